"""Long traces open and seek at once. `python test_long_traces.py STEPS` measures any length."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from minipaged.trace.player import Player
from minipaged.trace.records import BlockPatch, Event, Queues, Stats, StepDelta
from minipaged.trace.sources import FileSource
from minipaged.trace.stream import Header, StreamWriter

NUM_BLOCKS, CHANGES = 10_000, 32
RUNNING = tuple(range(16))


def write_long(path: Path, steps: int) -> None:
    """A trace of 10,000 blocks in which 32 change a step."""
    rng = np.random.default_rng(0)
    stats = Stats(total_blocks=NUM_BLOCKS, free_blocks=5000, block_size=16, num_tokens=16, num_drawn=16)
    zeros = np.zeros(CHANGES, np.int32)
    with path.open("wb") as out:
        writer = StreamWriter(out, Header("long"))
        for step in range(steps):
            ids = rng.integers(1, NUM_BLOCKS, CHANGES).astype(np.int32)
            owner, refs, fill = rng.integers(0, 16, (3, CHANGES)).astype(np.int32)
            patch = BlockPatch(ids, owner, refs, fill, zeros.astype(np.uint8), zeros.astype(np.uint8), zeros)
            events = (Event(step, "alloc", -1, step % 16, int(ids[0]), -1, 0),)
            writer.delta(StepDelta(step, step, events, patch, (), (), Queues(RUNNING), stats))
        writer.finish()


def measure(path: Path, steps: int) -> tuple[float, list[float]]:
    """Seconds to open, and to seek to some places."""
    started = time.perf_counter()
    source = FileSource(path)
    opened = time.perf_counter() - started
    player = Player(source)
    seeks = []
    for position in np.random.default_rng(1).integers(0, steps, 60).tolist():
        started = time.perf_counter()
        player.seek(position)
        seeks.append(time.perf_counter() - started)
        assert player.position == position
    return opened, seeks


@pytest.mark.slow
def test_a_long_trace_opens_and_seeks_at_once(tmp_path: Path) -> None:
    write_long(tmp_path / "long.mpt", 100_000)
    opened, seeks = measure(tmp_path / "long.mpt", 100_000)
    assert opened < 1.0
    assert statistics.median(seeks) < 0.020


if __name__ == "__main__":
    steps = int(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "long.mpt"
        write_long(path, steps)
        opened, seeks = measure(path, steps)
        print(f"{steps} steps, {path.stat().st_size / 1e6:.0f} MB: opens in {1000 * opened:.0f} ms")
        print(f"seeks: median {1000 * statistics.median(seeks):.1f} ms, most {1000 * max(seeks):.1f} ms")
