"""Pictures of a run: the map, the inspector, the comparison and the timeline at two sizes, each at a moment that shows something."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from textual.pilot import Pilot

from minipaged.trace.events import MARKS
from minipaged.trace.sources import Source
from minipaged.tui.app import ScreenApp
from minipaged.tui.session import Session

SIZES = ((120, 40), (200, 60))
FRAMES = 400  # that a comparison may take to catch up


def take_pictures(source: Source, limits: Mapping[int, int], folder: str | Path) -> list[str]:
    """SVGs of the source's trace in `folder`; returns their names. limits: most new tokens of each request, for the other systems."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    return asyncio.run(_take(source, limits, target))


async def _take(source: Source, limits: Mapping[int, int], target: Path) -> list[str]:
    taken: list[str] = []
    for size in SIZES:
        session = Session(source)
        session.playback.pause()
        session.limits(limits)
        session.tick(0.0)
        app = ScreenApp(session)
        async with app.run_test(size=size) as pilot:
            for name, picture in (
                ("blocks", _blocks),
                ("inspector", _inspector),
                ("timeline", _timeline),
                ("compare", _compare),
            ):
                await picture(app, pilot)
                await pilot.pause()
                path = target / f"{name}-{size[0]}x{size[1]}.svg"
                path.write_text(app.export_screenshot(title="minipaged"), encoding="utf-8")
                taken.append(path.name)
    return taken


def _busiest(source: Source) -> int:
    """The middle of the steps in which the pool was as good as full."""
    full = np.flatnonzero(source.occupied >= 0.97 * source.occupied.max(initial=0)) + 1
    return int(full[len(full) // 2]) if len(full) else 0


def _newest(source: Source, kind: str, before: int) -> int:
    """The last step up to `before` in which that happened; `before` if it never did."""
    found = np.flatnonzero(source.marks[:before] & np.uint16(MARKS[kind])) + 1
    return int(found[-1]) if len(found) else before


async def _blocks(app: ScreenApp, pilot: Pilot[int]) -> None:
    """The fullest moment, the whole pool in view."""
    app.session.go(_busiest(app.session.source))
    app.frame()
    await pilot.press("1", "0")


async def _inspector(app: ScreenApp, pilot: Pilot[int]) -> None:
    """A block that many share, its owners and its past."""
    refs = app.session.snapshot.device.refs
    app.pick(int(np.argmax(refs)))
    app.frame()
    await pilot.press("5")


async def _timeline(app: ScreenApp, pilot: Pilot[int]) -> None:
    """Somebody made way."""
    source = app.session.source
    app.session.go(_newest(source, "preempt", len(source)))
    app.frame()
    await pilot.press("4")


async def _compare(app: ScreenApp, pilot: Pilot[int]) -> None:
    """Other systems, at the fullest moment."""
    app.session.go(_busiest(app.session.source))
    await pilot.press("c")
    for _ in range(FRAMES):
        app.paint()
        if app.session.shadows():
            break
        await pilot.pause()
