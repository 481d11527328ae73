"""Helpers: an app over a trace, driven by keys, read as text."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

from scripted import sharing_scene
from textual.pilot import Pilot

from minipaged.trace.events import StepDelta
from minipaged.trace.sources import ListSource, Source
from minipaged.tui.app import ScreenApp
from minipaged.tui.session import Session

SIZES = ((80, 24), (120, 40), (200, 60))
T = TypeVar("T")


def replay(
    deltas: Iterable[StepDelta] | None = None, *, at: int = 0, ascii: bool = False, source: Source | None = None
) -> ScreenApp:
    """An app over a recorded list."""
    session = Session(source or ListSource(sharing_scene().deltas if deltas is None else deltas))
    session.playback.seek(at)
    return ScreenApp(session, ascii=ascii)


def drive(app: ScreenApp, size: tuple[int, int], script: Callable[[Pilot[int]], Awaitable[T]]) -> T:
    """Run the app headless and a script against it."""

    async def run() -> T:
        async with app.run_test(size=size) as pilot:
            app.frame()
            await pilot.pause()
            return await script(pilot)

    return asyncio.run(run())


def text(app: ScreenApp) -> str:
    """What stands on the screen."""
    return "\n".join(strip.text for strip in app.screen._compositor.render_strips())


async def until(pilot: Pilot[int], condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait for a condition, not for a time."""
    deadline = asyncio.get_running_loop().time() + seconds
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, text(pilot.app)  # type: ignore[arg-type]
        await pilot.pause(0.01)
