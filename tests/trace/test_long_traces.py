"""Long traces open and seek at once. `python test_long_traces.py STEPS` measures any length."""

from __future__ import annotations

import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from minipaged.trace.events import Event, Queues, SequencePatch, Stats, StepDelta
from minipaged.trace.file import Header, StreamWriter
from minipaged.trace.observed import progress_of
from minipaged.trace.player import Player
from minipaged.trace.sources import FileSource

NUM_BLOCKS, CHANGES, MOST = 10_000, 32, 400  # MOST: entries of a table
RUNNING = tuple(range(16))


def write_long(path: Path, steps: int) -> None:
    """A trace of 10,000 blocks in which 32 change a step: 16 are taken and, once the tables are long, 16 given back; 16 sequences write."""
    rng = np.random.default_rng(0)
    stats = Stats(total_blocks=NUM_BLOCKS, free_blocks=5000, block_size=16, num_tokens=16, num_drawn=16)
    free = list(range(1, NUM_BLOCKS))
    tables: list[list[int]] = [[] for _ in RUNNING]
    patches = tuple(SequencePatch(seq, seq, -1, "running", 0, 0, math.nan, "") for seq in RUNNING)
    with path.open("wb") as out:
        writer = StreamWriter(out, Header("long"))
        number = 0
        for step in range(steps):
            events = []
            for seq in rng.integers(0, 16, CHANGES // 2).tolist():
                table = tables[seq]
                if len(table) == MOST:
                    events += [("free", seq, table[i], -1, i) for i in range(MOST - 1, MOST - 1 - CHANGES, -1)]
                    free += table[-CHANGES:]
                    del table[-CHANGES:]
                table.append(free.pop(int(rng.integers(0, len(free)))))
                events.append(("alloc", seq, table[-1], -1, len(table) - 1))
            rows = [(seq, min(step, 16 * len(tables[seq])), 1, 0) for seq in RUNNING]
            told = tuple(Event(number + i, kind, -1, *rest) for i, (kind, *rest) in enumerate(events))
            number += len(told)
            first = patches if step == 0 else ()
            writer.delta(StepDelta(step, step, told, first, progress_of(rows, ()), queues=Queues(RUNNING), stats=stats))
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
        assert not source.damage
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
