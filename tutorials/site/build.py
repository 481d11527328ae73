"""Build the site: lessons, laws, READMEs, API and runs that play. `python tutorials/site/build.py OUT` (extra `docs`: Zensical).

Everything is made from what the repository has elsewhere: lessons from their cells, the API from docstrings, runs from the gallery's
traces. OUT then holds a site that can be read from the disk or from any server, without a network. Its search needs a server: Zensical
has a setting for search from the disk, which fetches a script from elsewhere.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]

import film  # noqa: E402

from minipaged.api import LLM  # noqa: E402
from minipaged.config import SamplingParams  # noqa: E402
from minipaged.errors import InputError, ModelError, RequestError, TraceError  # noqa: E402
from minipaged.laws import LAWS  # noqa: E402
from minipaged.learn.catalog import lessons  # noqa: E402
from minipaged.learn.notebooks import cells_of, write_notebooks  # noqa: E402
from minipaged.page.page import run_page  # noqa: E402
from minipaged.page.recording import Recording  # noqa: E402
from minipaged.scheduling.request import CompletionOutput, RequestOutput  # noqa: E402
from minipaged.trace.sources import FileSource  # noqa: E402
from minipaged.tui.gallery import SCENARIOS, scenario_path  # noqa: E402

FILMED = "cow"
READMES = {  # file -> page and title
    "README.md": ("index.md", "minipaged"),
    "minipaged/README.md": ("inside/request.md", "The path of a request"),
    "kernels/README.md": ("inside/kernels.md", "Kernels"),
    "minipaged/execution/README.md": ("inside/execution.md", "Several GPUs"),
    "minipaged/baselines/README.md": ("inside/baselines.md", "Other systems"),
    "minipaged/serving/README.md": ("inside/serving.md", "The server"),
    "minipaged/lab/README.md": ("inside/lab.md", "The lab"),
    "minipaged/lab/results/README.md": ("inside/results.md", "What was measured"),
    "tutorials/README.md": ("lessons/index.md", "The lessons"),
    "tutorials/glossary.md": ("lessons/glossary.md", "Glossary"),
}
API = (
    LLM,
    SamplingParams,
    RequestOutput,
    CompletionOutput,
    Recording,
    InputError,
    ModelError,
    RequestError,
    TraceError,
)
COPIED = (".svg", ".png", ".json")
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
LIST = re.compile(r"\s*(?:[-*]|\d+\.) ")


class Docs:
    """A folder of Markdown pages."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pages = {name: page for name, (page, _) in READMES.items()}
        self.pages |= {f"tutorials/{one.path.name}": f"lessons/{one.path.stem}.md" for one in lessons()}

    def write(self, page: str, text: str) -> None:
        """One page."""
        path = self.folder / page
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def prose(self, text: str, source: str, page: str) -> str:
        """Markdown of the repository for a page of the site: its links lead to pages, files go along, others are mere words."""
        parts = re.split(r"(^```.*?^```$)", text, flags=re.MULTILINE | re.DOTALL)
        parts[::2] = [_spaced(LINK.sub(self._leading(source, page), part)) for part in parts[::2]]
        return "".join(parts)

    def _leading(self, source: str, page: str) -> Callable[[re.Match[str]], str]:
        def lead(found: re.Match[str]) -> str:
            picture, words, target = found.groups()
            if re.match(r"\w+:|#", target):
                return found[0]
            name, _, part = target.partition("#")
            path = os.path.normpath(os.path.join(os.path.dirname(source), name))
            to = self.pages.get(path)
            if to is None and path.endswith(COPIED) and (ROOT / path).is_file():
                to = f"files/{path}"
                (self.folder / to).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / path, self.folder / to)
            if to is None:
                return words
            way = os.path.relpath(to, os.path.dirname(page) or ".")
            return f"{picture}[{words}]({way}{'#' + part if part else ''})"

        return lead


def _spaced(text: str) -> str:
    """A blank line before each list and table, and nested lists by four places: what Python-Markdown asks for, and GitHub does not."""
    lines: list[str] = []
    for line in text.split("\n"):
        before = lines[-1] if lines else ""
        starts = next((p for p in (LIST, re.compile(r"\|")) if p.match(line)), None)
        if starts is not None and before.strip() and not starts.match(before) and not before.startswith("  "):
            lines.append("")
        if nested := re.match(r" {2,3}(?=[-*] |\d+\. )", line):
            line = "    " + line[nested.end() :]
        lines.append(line)
    return "\n".join(lines)


def lesson_pages(docs: Docs) -> Iterator[tuple[str, str]]:
    """A page for each lesson: its cells."""
    for one in lessons():
        source, page = f"tutorials/{one.path.name}", f"lessons/{one.path.stem}.md"
        text = [
            docs.prose(cell.text, source, page) if cell.kind == "markdown" else f"```python\n{cell.text}\n```"
            for cell in cells_of(one.path.read_text(encoding="utf-8"))
        ]
        end = f"---\n\n[As a notebook](../notebooks/{one.path.stem}.ipynb) · checked by `minipaged learn watch {one.number}`"
        docs.write(page, "\n\n".join([*text, end]) + "\n")
        yield f"{one.number}. {one.title}", page


def run_pages(docs: Docs) -> Iterator[tuple[str, str]]:
    """A page for each recorded scene, and the run itself in a frame."""
    for name, about in SCENARIOS.items():
        source = FileSource(scenario_path(name))
        docs.write(f"runs/play/{name}.html", run_page(source))
        source.close()
        about = about.removesuffix(" (press c)")
        text = (
            f"# {name}\n\n{about[0].upper()}{about[1:]}. A run of the real engine, recorded step by step:"
            f" `minipaged tui --scenario {name}` shows it in a terminal. [In a window of its own](play/{name}.html)\n\n"
            f'<iframe class="run" title="the run {name}" src="play/{name}.html" loading="lazy"></iframe>\n'
        )
        docs.write(f"runs/{name}.md", text)
        yield name, f"runs/{name}.md"


def film_page(docs: Docs) -> str:
    """A film of the terminal screen, to play here or with asciinema."""
    text = film.cast(FileSource(scenario_path(FILMED)))
    docs.write("runs/play/film.cast", text)
    docs.write("runs/play/film.html", film.film_page(text, "The terminal screen"))
    docs.write(
        "runs/film.md",
        "# The terminal screen\n\nWhat a terminal shows of the run [cow](cow.md), step by step."
        " [In a window of its own](play/film.html) · [for asciinema](play/film.cast)\n\n"
        '<iframe class="film" title="a film of the terminal screen" src="play/film.html" loading="lazy"></iframe>\n',
    )
    return "runs/film.md"


def law_page(docs: Docs) -> str:
    """The laws, by group."""
    lines = [
        "# The laws of a paged engine",
        "",
        "Each is one sentence, and has tests that name it: `pytest -k L07` runs law 7.",
        "",
    ]
    group = ""
    for law in LAWS:
        if law.group != group:
            group = law.group
            lines += ["", f"## {group[0].upper()}{group[1:]}", "", "| law | what must hold |", "|---|---|"]
        lines.append(f"| {law.id} | {law.sentence} |")
    docs.write("laws.md", "\n".join(lines) + "\n")
    return "laws.md"


def api_page(docs: Docs) -> str:
    """The public classes: signatures and docstrings."""
    lines = ["# API", "", "`from minipaged import LLM, SamplingParams`: what may be asked, and what comes back.", ""]
    for thing in API:
        lines += [f"## {thing.__name__}", "", *_described(thing, thing.__name__)]
        if issubclass(thing, Exception):
            continue
        for name, member in vars(thing).items():
            if name.startswith("_"):
                continue
            if isinstance(member, property):
                lines += [f"### {thing.__name__}.{name}", "", _text(member)]
            elif callable(member) or isinstance(member, classmethod):
                lines += [f"### {thing.__name__}.{name}", "", *_described(getattr(thing, name), name)]
    docs.write("api.md", "\n".join(lines) + "\n")
    return "api.md"


def _described(thing: Any, name: str) -> list[str]:
    """The signature, where calling it is of use, and the docstring."""
    if isinstance(thing, type) and issubclass(thing, Exception):
        return [_text(thing)]
    found = inspect.signature(thing)
    values, star = [], False
    for value in found.parameters.values():
        if value.name == "self":
            continue
        if value.kind == value.KEYWORD_ONLY and not star:
            values.append("*")
            star = True
        default = "" if value.default is value.empty else f" = {value.default!r}"
        values.append(f"{value.name}{_annotation(': ', value.annotation)}{default}")
    returns = "" if isinstance(thing, type) else _annotation(" -> ", found.return_annotation)
    signature = f"{name}({', '.join(values)}){returns}"
    if len(signature) > 90:
        inner = "".join(f"    {value},\n" for value in values)
        signature = f"{name}(\n{inner}){returns}"
    return ["```python", signature, "```", "", _text(thing)]


def _annotation(before: str, value: Any) -> str:
    if value is inspect.Parameter.empty:
        return ""
    return before + (value if isinstance(value, str) else inspect.formatannotation(value))


def _text(thing: Any) -> str:
    """A docstring as Markdown: a list that stands in a line, `a: what; b: what`, stays as it is written."""
    return _spaced((inspect.getdoc(thing) or "").replace("*", "\\*")) + "\n"


def build(out: Path) -> None:
    """Write the whole site to `out`, which must be empty or not there yet."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not an empty folder: name another one")
    command = shutil.which("zensical", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if command is None:
        raise InputError("zensical is not installed: pip install -e '.[docs]'")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        docs = Docs(folder / "docs")
        shutil.copytree(HERE, docs.folder, ignore=lambda *_: {"build.py", "film.py", "zensical.toml", "__pycache__"})
        for source, (page, _) in READMES.items():
            docs.write(page, docs.prose((ROOT / source).read_text(encoding="utf-8"), source, page))
        titles = dict(READMES.values())
        inside = [(title, page) for page, title in titles.items() if page.startswith("inside/")]
        nav = [
            {"minipaged": "index.md"},
            {
                "Lessons": [
                    "lessons/index.md",
                    *({t: p} for t, p in lesson_pages(docs)),
                    {"Glossary": "lessons/glossary.md"},
                ]
            },
            {"Runs that play": [{"The terminal screen": film_page(docs)}, *({t: p} for t, p in run_pages(docs))]},
            {"Laws": law_page(docs)},
            {"API": api_page(docs)},
            {"Inside": [{t: p} for t, p in inside]},
        ]
        write_notebooks(docs.folder / "notebooks")
        settings = (HERE / "zensical.toml").read_text(encoding="utf-8")
        (folder / "zensical.toml").write_text(
            settings.replace("nav = [] # build.py", f"nav = {_toml(nav)}"), encoding="utf-8"
        )
        done = subprocess.run([command, "build", "--clean"], cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode or not (folder / "site/index.html").is_file():
            raise InputError(f"zensical failed:\n{done.stdout}{done.stderr}")
        shutil.copytree(folder / "site", out, dirs_exist_ok=True)


def _toml(value: Any) -> str:
    """Lists, texts and mappings of one text each, as TOML writes them."""
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{json.dumps(k)} = {_toml(v)}' for k, v in value.items())} }}"
    return json.dumps(value)


def main() -> None:
    """The command line."""
    if len(sys.argv) != 2:
        sys.exit("usage: python tutorials/site/build.py OUT")
    try:
        build(Path(sys.argv[1]))
    except InputError as error:
        sys.exit(f"the site was not built: {error}")
    print(f"{sys.argv[1]}: open index.html in a browser")


if __name__ == "__main__":
    main()
