"""Frame cost, terminal encoding included: 160 x 50, from the mutation to the bytes of the frame.

A frame is made by one thread, so its processor time is what it takes on a machine that does nothing else; that is what is judged, and
the wall clock stands beside it.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace

import numpy as np
import pytest
from screens import drive, replay
from test_map import big_snapshot
from textual.pilot import Pilot

from minipaged.trace.snapshot import Snapshot
from minipaged.tui.app import ScreenApp
from minipaged.tui.map.blockmap import BlockMap
from minipaged.tui.map.layout import Zoom


def frame_times(num_blocks: int, changes: int, zoom: Zoom, *, frames: int = 40) -> list[tuple[float, float]]:
    """Seconds of processor and of wall time of each frame after `changes` blocks changed somewhere in the pool."""
    app = replay()
    snapshot = big_snapshot(num_blocks)
    rng = np.random.default_rng(1)

    async def script(pilot: Pilot[int]) -> list[tuple[float, float]]:
        app.session.playback.pause()
        block_map = app.query_one(BlockMap)
        app.view = replace(app.view, snapshot=snapshot)
        app.screen.maximize(block_map)
        await pilot.pause()
        block_map.show(app.view, None)
        block_map.set_zoom(zoom)
        await pilot.pause()
        encode(app, block_map)
        times = []
        for _ in range(frames):
            ids = np.unique(rng.integers(0, num_blocks, changes)).astype(np.int32) if changes < num_blocks else None
            mutate(snapshot, ids, rng)
            started, wall = time.thread_time(), time.perf_counter()
            block_map.show(replace(app.view), ids)
            encode(app, block_map)
            times.append((time.thread_time() - started, time.perf_counter() - wall))
        return times

    return drive(app, (160, 50), script)


def mutate(snapshot: Snapshot, ids: np.ndarray | None, rng: np.random.Generator) -> None:  # type: ignore[type-arg]
    where = slice(None) if ids is None else ids
    count = len(snapshot.device) if ids is None else len(ids)
    snapshot.device.refs[where] = rng.choice([0, 1, 1, 2], count)


def encode(app: ScreenApp, block_map: BlockMap) -> int:
    """The frame as the terminal gets it: the dirty regions composed and turned into escape sequences. Returns its length."""
    compositor = app.screen._compositor
    compositor.update_widgets({block_map})
    update = compositor.render_update(screen_stack=app._background_screens)
    return 0 if update is None else len(update.render_segments(app.console))  # type: ignore[union-attr]


CASES = [
    pytest.param(100_000, changes, zoom, limit, id=f"100k-{word}-{zoom.name.lower()}")
    for changes, word, limit in ((64, "64", 0.005), (100_000, "all", 0.020))
    for zoom in Zoom
]


@pytest.mark.slow
@pytest.mark.parametrize(("num_blocks", "changes", "zoom", "limit"), CASES)
def test_a_frame_is_cheap(num_blocks: int, changes: int, zoom: Zoom, limit: float) -> None:
    times = [cpu for cpu, _ in frame_times(num_blocks, changes, zoom)]
    assert statistics.median(times) <= limit, [f"{1000 * t:.1f} ms" for t in times]


if __name__ == "__main__":
    for case in CASES:
        num_blocks, changes, zoom, limit = case.values
        cpu, wall = zip(*frame_times(num_blocks, changes, zoom), strict=True)  # type: ignore[arg-type]
        print(
            f"{case.id}: median {1000 * statistics.median(cpu):.1f} ms of processor time (limit {1000 * limit:.0f}),"  # type: ignore[operator]
            f" wall clock {1000 * statistics.median(wall):.1f} ms, least {1000 * min(wall):.1f}"
        )
