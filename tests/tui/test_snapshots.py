"""A few pictures: the sizes, and colour, no colour, ascii and light, on a pool of 512 blocks. `pytest --snapshot-update` draws them anew.

The clock does not run (a paused recording), nothing blinks, and the pool is scripted.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from screens import replay
from scripted import Scene
from textual.pilot import Pilot

from minipaged.trace.events import StepDelta
from minipaged.tui.app import ScreenApp

Compare = Callable[..., bool]


def traffic() -> list[StepDelta]:
    """Twelve sequences on 512 blocks: prefixes shared by forks, copies, some done, one swapped out."""
    scene = Scene(num_blocks=512, num_host=16)
    for number in range(10):
        seq = scene.add("A library that never closed, in a town by the sea, had a reader " * (1 + number % 3))
        scene.admit(seq)
        scene.step()
        if number % 3 == 0:
            child = scene.fork(seq)
            scene.write(child, "who came every night")
        scene.write(seq, "who was a cat" * (number + 1))
        scene.step()
    scene.finish(2, cache=True)
    scene.finish(5, cache=True)
    scene.step()
    small = scene.add("a short one")
    scene.admit(small)
    scene.step()
    scene.swap_out(small)
    scene.write(scene.fork(1), "x")
    scene.step()
    return scene.deltas


def shown(*, ascii: bool = False, light: bool = False) -> ScreenApp:
    app = replay(traffic(), at=len(traffic()), ascii=ascii)
    return ScreenApp(app.session, ascii=ascii, light=light)


async def settle(pilot: Pilot[int]) -> None:
    """Paint once; the timer's frames find nothing new after that."""
    pilot.app.frame()  # type: ignore[attr-defined]
    await pilot.pause()


@pytest.mark.parametrize("size", [(80, 24), (120, 40), (200, 60)], ids=["80x24", "120x40", "200x60"])
def test_sizes(snap_compare: Compare, size: tuple[int, int]) -> None:
    assert snap_compare(shown(), terminal_size=size, run_before=settle)


def test_ascii(snap_compare: Compare) -> None:
    assert snap_compare(shown(ascii=True), terminal_size=(80, 24), run_before=settle)


def test_light(snap_compare: Compare) -> None:
    assert snap_compare(shown(light=True), terminal_size=(80, 24), run_before=settle)


def test_no_color(snap_compare: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert snap_compare(shown(), terminal_size=(80, 24), run_before=settle)
