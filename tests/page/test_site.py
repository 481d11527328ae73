"""The site: it is built by one command, all its links lead somewhere, and a browser fetches nothing from elsewhere."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from minipaged.errors import InputError
from minipaged.learn.catalog import lessons
from minipaged.trace.player import Player
from minipaged.trace.sources import FileSource
from minipaged.trace.words import sentence
from minipaged.tui.gallery import scenario_path
from minipaged.tui.view import View
from tests.page.browser import DESK, PHONE, Browser, find_browser

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "tutorials/site/build.py"
WRITTEN = re.compile(r"\x1b\[(\d+);1H(.*?)(?=\x1b\[\d+;1H|$)", re.DOTALL)  # a row's number, and the row


def builder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_builder", BUILD)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_links_lead_to_pages_and_other_files_are_words(tmp_path: Path) -> None:
    docs = builder().Docs(tmp_path)
    text = "See [the map](../README.md#use-it), [a law](../tests/laws/catalog.py), [out](https://example.org).\n- a\n  - b\n"
    found = docs.prose(text, "minipaged/README.md", "inside/request.md")
    assert "[the map](../index.md#use-it), a law, [out](https://example.org).\n\n- a\n    - b\n" in found
    picture = docs.prose("![x](tui/screenshot.svg)", "README.md", "index.md")
    assert picture == "![x](files/tui/screenshot.svg)"
    assert (tmp_path / "files/tui/screenshot.svg").is_file()
    code = "```\n[x](y.py)\n- a\n```"
    assert docs.prose(code, "README.md", "index.md") == code


def test_every_readme_and_class_has_its_place(tmp_path: Path) -> None:
    module = builder()
    docs = module.Docs(tmp_path)
    assert all((ROOT / name).is_file() for name in module.READMES)
    module.api_page(docs)
    api = (tmp_path / "api.md").read_text(encoding="utf-8")
    assert "## LLM\n" in api
    assert "    model: str = 'smollm2-135m',\n    *,\n" in api
    assert "### Recording.save\n" in api
    with pytest.raises(InputError, match="not an empty folder"):
        module.build(tmp_path)


def test_a_film_holds_what_the_screen_shows(browser: Browser, tmp_path: Path) -> None:
    film = builder().film
    text = film.cast(FileSource(scenario_path("cow")))
    assert len(text.encode()) < 300_000
    header, *frames = map(json.loads, text.splitlines())
    assert (header["version"], header["width"], header["height"]) == (2, 100, 30)
    times = [seconds for seconds, _, _ in frames]
    assert times == sorted(times)
    rows: dict[int, str] = {}
    for _, kind, written in frames[:4]:
        assert kind == "o"
        for row, line in WRITTEN.findall(written):
            rows[int(row)] = re.sub(r"\x1b\[[0-9;]*m", "", line)
    shown = "\n".join(rows[row] for row in range(1, 31))
    player = Player(FileSource(scenario_path("cow")))
    player.seek(3)
    assert sentence(View(player.snapshot, player.delta)) in shown
    path = tmp_path / "film.html"
    path.write_text(film.film_page(text, "<cow>"), encoding="utf-8")
    browser.open(path.as_uri(), ready="document.body?.dataset.ready")
    browser.run("{ const s = document.getElementById('seek'); s.value = 3; s.dispatchEvent(new Event('input')) }")
    drawn = browser.run("[...document.querySelectorAll('#film > div')].map(row => row.textContent).join('\\n')")
    assert drawn == shown
    assert browser.complaints == []


@pytest.mark.slow
def test_the_site_is_built_and_whole(tmp_path: Path) -> None:
    if shutil.which("zensical", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}") is None:
        pytest.skip("zensical is not installed: pip install -e '.[docs]'")
    out = tmp_path / "site"
    done = subprocess.run([sys.executable, str(BUILD), str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = sorted(out.rglob("*.html"))
    assert len(pages) > len(lessons()) + 20
    for page in pages:
        text = page.read_text(encoding="utf-8")
        fetched = re.findall(r"<(?:script|img|iframe|link)\b[^>]*?(?:src|href)=\"?(https?:[^\" >]*)", text)
        assert fetched == [], page
        for target in re.findall(r"<a\b[^>]*?href=\"?([^\" >]+)", text):
            name = target.partition("#")[0]
            if name and not re.match(r"\w+:|/|\.$", name):
                assert (page.parent / name).exists(), f"{page}: {target}"
    command = find_browser()
    if command is not None:
        look_at(Browser(command), out)


def look_at(browser: Browser, out: Path) -> None:
    """Both widths; no page is wider than its window."""
    try:
        for name in ("index", "lessons/03_blocks", "runs/cow", "laws", "api"):
            for size in (PHONE, DESK):
                browser.open((out / f"{name}.html").as_uri(), size)
                assert browser.run("document.documentElement.scrollWidth <= window.innerWidth"), (name, size)
                assert all(url.startswith(("file:", "data:", "about:")) for url in browser.requests)
    finally:
        browser.close()
