"""A short film of the terminal screen: an asciinema v2 file of its own frames, and a page that plays it without a network.

`python tutorials/site/film.py TRACE OUT` writes OUT.cast and OUT.html. Nothing is timed: a film is the same each time it is made.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import sys
import zlib
from html import escape
from pathlib import Path

from rich.console import Console

from minipaged.page.page import part
from minipaged.trace.sources import FileSource, Source
from minipaged.tui.app import ScreenApp
from minipaged.tui.session import Session

SIZE = (100, 30)
STEP_SECONDS, EVENT_SECONDS = 0.25, 2.0  # a step stays so long; one in which something but writing happened, longer
MOST_STEPS = 120


def cast(source: Source, *, size: tuple[int, int] = SIZE, title: str = "minipaged") -> str:
    """The screen at each step of a trace, as asciinema v2: a header line, then [seconds, "o", what is written to the terminal]."""
    lines = [json.dumps({"version": 2, "width": size[0], "height": size[1], "title": title})]
    for seconds, written in asyncio.run(_frames(source, size)):
        lines.append(json.dumps([seconds, "o", written], ensure_ascii=False))
    return "\n".join(lines) + "\n"


async def _frames(source: Source, size: tuple[int, int]) -> list[tuple[float, str]]:
    """When, and what is written then: rows that differ from before."""
    session = Session(source)
    session.playback.pause()
    app = ScreenApp(session)
    console = Console(color_system="truecolor", force_terminal=True, width=size[0])
    found: list[tuple[float, str]] = []
    before: list[str] = []
    now = 0.0
    async with app.run_test(size=size) as pilot:
        for position in range(min(len(source), MOST_STEPS) + 1):
            session.go(position)
            app.paint()
            await pilot.pause()
            rows = [strip.render(console) for strip in app.screen._compositor.render_strips()]
            changed = [at for at, row in enumerate(rows) if not before or before[at] != row]
            start = "" if before else "\x1b[?25l\x1b[2J"
            found.append((round(now, 2), start + "".join(f"\x1b[{at + 1};1H\x1b[0m{rows[at]}" for at in changed)))
            before = rows
            now += EVENT_SECONDS if position and source.marks[position - 1] else STEP_SECONDS
    found.append((round(now, 2), ""))
    return found


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'sha256-{script_hash}'; style-src 'sha256-{style_hash}'">
<title>{title}</title><style>{style}</style></head><body>
<div id="film" role="img" aria-label="A film of the terminal screen"></div>
<p><button id="play">play</button> <input id="seek" type="range" min="0" value="0" aria-label="moment of the film"></p>
<script type="text/plain" id="cast">{data}</script><script>{script}</script></body></html>
"""


def film_page(text: str, title: str) -> str:
    """A page that plays an asciinema v2 file as `cast` writes it."""
    style, script = part("film.css"), part("film.js")
    data = base64.b64encode(zlib.compress(text.encode(), 9)).decode()
    hashes = {f"{name}_hash": _hash(of) for name, of in (("style", style), ("script", script))}
    return PAGE.format(title=escape(title), style=style, script=script, data=data, **hashes)


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def main() -> None:
    """The command line."""
    if len(sys.argv) != 3:
        sys.exit("usage: python tutorials/site/film.py TRACE OUT")
    trace, out = map(Path, sys.argv[1:])
    text = cast(FileSource(trace), title=trace.stem)
    for path, written in ((out.with_suffix(".cast"), text), (out.with_suffix(".html"), film_page(text, trace.stem))):
        path.write_text(written, encoding="utf-8")
        print(f"{path}: {len(written.encode()) / 1000:,.0f} kB")


if __name__ == "__main__":
    main()
