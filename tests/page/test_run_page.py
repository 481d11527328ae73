"""The page of a recorded run, in a real browser: what it says is what the fold says, by keyboard alone, at both widths."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from minipaged.page.page import run_page
from minipaged.trace.events import FLAG_CACHED, FLAG_COPIED, Queues, SequencePatch, StepDelta
from minipaged.trace.file import Header
from minipaged.trace.observed import progress_of
from minipaged.trace.player import Player
from minipaged.trace.snapshot import Snapshot
from minipaged.trace.sources import FileSource, ListSource
from minipaged.trace.words import letter, plural, sentence
from minipaged.tui.gallery import scenario_path
from minipaged.tui.panes.inspector import describe
from minipaged.tui.reading.history import History
from minipaged.tui.view import View
from tests.page.browser import DESK, PHONE, Browser

READY = "document.body?.dataset.ready"
TEXT = "document.getElementById('{}').textContent"


def written(folder: Path, name: str) -> str:
    path = folder / f"{name}.html"
    path.write_text(run_page(FileSource(scenario_path(name))), encoding="utf-8")
    return path.as_uri()


def map_in_words(snapshot: Snapshot) -> str:
    """What the page's map should say, from the fold."""
    pool, size = snapshot.device, snapshot.stats.block_size
    blocks = range(1, len(pool))
    held = [b for b in blocks if pool.refs[b]]
    shared = sum(pool.refs[b] > 1 for b in held)
    cached = sum(not pool.refs[b] and bool(pool.flags[b] & FLAG_CACHED) for b in blocks)
    found = [
        f"{plural(len(blocks), 'block')} of {plural(size, 'token')}: {len(held)} held"
        + (f", {shared} of them shared" if shared else "")
        + f", {cached} cached, {len(blocks) - len(held) - cached} free."
    ]
    copied = [str(b) for b in blocks if pool.flags[b] & FLAG_COPIED]
    if copied:
        found.append(f"Copied in this step: {', '.join(copied)}.")

    def name(seq: int) -> str:
        return letter(snapshot.sequences[seq].label)

    for seq, table in sorted(snapshot.tables.items()):
        words = [f"{b} (shared)" if pool.refs[b] > 1 else str(b) for b in table]
        fill = int(pool.fill[table[-1]])
        tail = f", the last {fill} of {size} full" if fill < size else ""
        found.append(f"{name(seq)} holds {', '.join(words)}{tail}.")
    for seq, table in sorted(snapshot.host_tables.items()):
        found.append(f"{name(seq)} is on the CPU: {plural(sum(b >= 0 for b in table), 'block')}.")
    return " ".join(found)


@pytest.mark.parametrize("name", ["cow", "swap", "beam"])
def test_the_page_says_what_the_fold_says(browser: Browser, tmp_path: Path, name: str) -> None:
    source = FileSource(scenario_path(name))
    browser.open(written(tmp_path, name), ready=READY)
    player, history = Player(source), History()
    for position in {*range(1, len(source), 7), 2, 3, len(source)}:
        browser.run(f"minipaged.go({position})")
        browser.press("Tab")
        player.seek(position)
        view = View(player.snapshot, player.delta, position=position)
        assert browser.run(TEXT.format("say")) == sentence(view)
        words = map_in_words(player.snapshot)
        assert browser.run("document.getElementById('map').getAttribute('aria-label')") == words
        rows = browser.run("[...document.querySelectorAll('#rows tr')].map(row => row.cells[0].textContent)")
        assert rows == [view.letter(s.sequence) for s in by_life(player.snapshot)]
    assert map_in_words(player.snapshot) in browser.accessible("image"), "a screen reader is told the same"
    player.seek(len(source))
    browser.press("G")
    alive = player.snapshot
    for block in range(1, len(alive.device), 3):
        view.block = block
        past = history.of(source, block, len(source))
        told = [[p.position, describe(view, p)] for p in past]
        named = [entry for entry in browser.run(f"minipaged.past({block})") if "?" not in entry[1]]
        assert [p for p, _ in named] == [p for p, _ in told], block
        assert all(words == said for (_, words), (_, said) in zip(told, named, strict=True) if "?" not in words)
    assert browser.complaints == []


def by_life(snapshot: Snapshot) -> list[Any]:
    return sorted(snapshot.sequences.values(), key=lambda s: (not s.alive, s.sequence))


def test_keys_alone_lead_everywhere(browser: Browser, tmp_path: Path) -> None:
    browser.open(written(tmp_path, "preempt"), PHONE, dark=True, ready=READY)
    browser.press("g", "}", "}")
    assert browser.run(TEXT.format("where")).startswith("step 1 ·")
    browser.press("{")
    assert browser.run(TEXT.format("where")).startswith("step 0 ·")
    browser.press("G", "[")
    assert browser.run(TEXT.format("where")) == "step 43 · 44 of 45"
    browser.press("ArrowRight", "ArrowRight", "ArrowRight")
    assert browser.run(TEXT.format("block")) == "Block 2"
    assert "reference count" in browser.run(TEXT.format("facts"))
    browser.press("ArrowDown")
    across = int(browser.run(TEXT.format("block")).split()[1]) - 2
    assert 4 <= across <= 10
    browser.press("w")
    assert int(browser.run("document.body.dataset.at")) < 44, "to the newest line of its past"
    browser.press("f", "?")
    assert browser.run("document.getElementById('help').open") is True
    browser.press("Escape")
    assert browser.run("document.getElementById('help').open") is False
    browser.press("g", ">", ">", " ")
    browser.until("document.body.dataset.at > 2")
    browser.press(" ")
    at = browser.run("document.body.dataset.at")
    assert browser.run("new Promise(done => setTimeout(() => done(document.body.dataset.at), 120))") == at
    assert browser.complaints == []


@pytest.mark.parametrize("size", [PHONE, DESK])
def test_a_page_fits_its_window_and_loads_nothing(browser: Browser, tmp_path: Path, size: tuple[int, int]) -> None:
    url = written(tmp_path, "orca")
    browser.open(url, size, ready=READY)
    assert browser.run("document.documentElement.scrollWidth") == size[0]
    assert browser.requests == [url]
    assert browser.complaints == []
    painted = "document.getElementById('map').getContext('2d').getImageData(0, 0, 400, 60).data"
    assert browser.run(f"new Set({painted}).size") > 20, "the map is drawn"
    refused = browser.run("fetch('https://example.org/').then(() => 'loaded', () => 'refused')")
    assert refused == "refused"
    assert any("Content Security Policy" in text for text in browser.complaints)


def test_what_a_trace_says_is_text(browser: Browser, tmp_path: Path) -> None:
    evil = "</script><img src=x onerror='document.title=1'>\u202e\x1b[31m"
    patch = SequencePatch(0, 0, -1, "running", 0, 1, math.nan, evil)
    delta = StepDelta(0, 0, (), (patch,), progress_of([(0, 0, 0, 1)], [5]), {5: evil.encode()}, Queues((0,)))
    header = Header(model=evil, engine={"policy": evil}, extra={"about": evil}, finding=evil)
    path = tmp_path / "evil.html"
    path.write_text(run_page(ListSource([delta], header=header)), encoding="utf-8")
    browser.open(path.as_uri(), ready=READY)
    assert browser.run("document.images.length") == 0
    assert browser.run("document.title").startswith("minipaged · </script><img")
    whole = browser.run("document.body.innerText")
    assert whole.count("onerror") >= 3
    assert "\u202e" not in whole
    assert "\x1b" not in whole
    assert browser.requests == [path.as_uri()]
    assert browser.complaints == []


def test_the_hues_are_the_terminals() -> None:
    from minipaged.page.page import part
    from minipaged.tui.palette import HUES_DARK, HUES_LIGHT

    for hues in (HUES_DARK, HUES_LIGHT):
        line = " ".join(f"--hue{n}: {hue.lower()};" for n, hue in enumerate(hues))
        assert line in part("look.css")


def test_the_data_of_a_page_are_plain_json() -> None:
    from minipaged.page.frames import document

    found = document(FileSource(scenario_path("swap")))
    assert json.loads(json.dumps(found)) == found
