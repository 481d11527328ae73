"""Records a lesson's own small block manager for the screen: after each operation it is given the tables and lengths, and writes a step.

Knows tables and lengths, whoever keeps them; knows nothing of how they came about. Everything that the screen shows is computed
from those two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from minipaged.learn.replays import RECORDINGS
from minipaged.learn.workspace import PROGRESS
from minipaged.trace.records import (
    FLAG_NULL,
    TIER_DEVICE,
    BlockPatch,
    Event,
    Queues,
    SequencePatch,
    Stats,
    StepDelta,
    TablePatch,
)
from minipaged.trace.stream import Header, StreamWriter

Tables = Mapping[str, Sequence[int]]


class Tape:
    """A trace of a pool of `num_blocks` blocks, the null block among them, of `block_size` tokens each."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self.deltas: list[StepDelta] = []
        self._names: list[str] = []  # a sequence's number is its place here
        self._tables: dict[str, tuple[int, ...]] = {}
        self._texts: dict[str, str] = {}
        self._recorded: dict[int, int] = {}  # tokens recorded of a sequence so far
        self._num_events = 0

    def note(self, tables: Tables, lengths: Mapping[str, int], texts: Mapping[str, str] | None = None) -> None:
        """How things stand after one operation. A sequence that is missing has ended."""
        new = {name: tuple(table) for name, table in tables.items()}
        fresh = [name for name in new if name not in self._tables]
        self._names += fresh
        events = self._events(new)
        patches = tuple(
            TablePatch(self._number(name), 0, 0, new.get(name, ()))
            for name in [*new, *(name for name in self._tables if name not in new)]
        )
        sequences = [self._sequence(name, "running", lengths[name], (texts or {}).get(name, "")) for name in new]
        sequences += [self._sequence(name, "finished", 0, "") for name in self._tables if name not in new]
        blocks = self._blocks(new, lengths)
        written = int(blocks.fill.sum())
        held = int((blocks.refs > 0).sum())
        stats = Stats(
            total_blocks=self.num_blocks,
            free_blocks=self.num_blocks - 1 - held,
            block_size=self.block_size,
            token_slots=written,
            tail_slots=held * self.block_size - written,
            shared_saved_blocks=int(blocks.refs.sum()) - held,
        )
        running = tuple(self._number(name) for name in new)
        step = len(self.deltas)
        queues = Queues(running=running)
        self.deltas.append(StepDelta(step, step * 1_000_000, events, blocks, patches, tuple(sequences), queues, stats))
        self._tables = new

    def save(self, lesson: str) -> Path | None:
        """Write the trace where `minipaged learn show` looks for it. None outside of a learner's folder: nothing is written there."""
        if not Path(PROGRESS).is_file():
            return None
        Path(RECORDINGS).mkdir(exist_ok=True)
        path = Path(RECORDINGS) / f"{lesson}.trace"
        self.write(path)
        return path

    def write(self, path: Path) -> None:
        """Write the trace to a file."""
        with path.open("wb") as file:
            writer = StreamWriter(file, Header(model="your own code", engine={"block_size": self.block_size}))
            for delta in self.deltas:
                writer.delta(delta)
            writer.finish()

    def _number(self, name: str) -> int:
        return len(self._names) - 1 - self._names[::-1].index(name)

    def _sequence(self, name: str, status: str, length: int, text: str) -> SequencePatch:
        number = self._number(name)
        old = self._texts.get(name, "")
        added = text.removeprefix(old).encode()
        self._texts[name] = text or old
        tokens = tuple(
            range(self._recorded.get(number, 0), length)
        )  # which tokens they are is unknown: their positions stand for them
        self._recorded[number] = max(self._recorded.get(number, 0), length)
        reason = "stop" if status == "finished" else ""
        return SequencePatch(number, number, -1, status, length, 0, 0, tokens, added, math.nan, reason)

    def _events(self, new: dict[str, tuple[int, ...]]) -> tuple[Event, ...]:
        """What must have happened since the last operation, entry by entry."""
        found: list[tuple[str, int, int, int]] = []
        for name in [*self._tables, *(name for name in new if name not in self._tables)]:
            old, now = self._tables.get(name, ()), new.get(name, ())
            number = self._number(name)
            for index in range(max(len(old), len(now))):
                gone, come = (table[index] if index < len(table) else -1 for table in (old, now))
                if gone >= 0 and gone != come:
                    found.append(("free", number, gone, index))
                if come >= 0 and gone != come:
                    found.append(("alloc", number, come, index))
        first = self._num_events
        self._num_events += len(found)
        return tuple(Event(first + i, kind, -1, seq, block, -1, at) for i, (kind, seq, block, at) in enumerate(found))

    def _blocks(self, tables: dict[str, tuple[int, ...]], lengths: Mapping[str, int]) -> BlockPatch:
        n = self.num_blocks
        owner, refs, fill = np.full(n, -1, np.int32), np.zeros(n, np.int32), np.zeros(n, np.int32)
        for name, table in tables.items():
            for index, block in enumerate(table):
                if 0 < block < n:
                    owner[block] = self._number(name) if owner[block] < 0 else owner[block]
                    refs[block] += 1
                    written = min(max(lengths[name] - index * self.block_size, 0), self.block_size)
                    fill[block] = max(int(fill[block]), written)
        flags = np.zeros(n, np.uint8)
        flags[0] = FLAG_NULL
        ids = np.arange(n, dtype=np.int32)
        return BlockPatch(ids, owner, refs, fill, flags, np.full(n, TIER_DEVICE, np.uint8), np.zeros(n, np.int32))
