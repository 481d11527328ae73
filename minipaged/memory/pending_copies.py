"""Copies that this step was told to make and that can still be given up, until their writer has written or the next step begins.

Knows which block stood in the table before. A block is a copy's source only as it was before the step: a second copy of what a pending copy
will fill reads the original, so that no destination of a step is also a source.
"""

from __future__ import annotations

from minipaged.memory.block_pool import BlockPool
from minipaged.memory.sequence_blocks import PendingCopy, SequenceBlocks


class PendingCopies:
    """The copies of one step."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._writers: dict[int, SequenceBlocks] = {}
        self._origins: dict[int, int] = {}  # destination -> source
        self._kept_slots: dict[int, int] = {}  # source -> slots of it that its former holder may come back to

    def begin_step(self) -> None:
        """The step's copies are made, and stay."""
        if self._writers:
            for sequence in self._writers.values():
                sequence.pending = None
            self._writers.clear()
        self._origins.clear()
        self._kept_slots.clear()

    def must_copy(self, tail: int, slot: int) -> bool:
        """Whether a holder that goes on at `slot` of its tail block must write elsewhere.

        It must if somebody else holds the block, or may come back to it and needs that slot as it was.
        """
        return self._pool.refs[tail] > 1 or slot < self._kept_slots.get(tail, 0)

    def add(self, sequence: SequenceBlocks, destination: int, block_size: int) -> int:
        """Let `destination` replace the sequence's tail block. Returns the source, which stays out of reach for this step."""
        index = len(sequence.table) - 1
        tail = sequence.table[index]
        source = self._origins.pop(tail, tail)
        if sequence.pending is None:
            sequence.pending = PendingCopy(index, source, sequence.room)
            self._writers[sequence.seq_id] = sequence
            self._pool.guard(source)
            self._kept_slots[source] = max(self._kept_slots.get(source, 0), sequence.room - index * block_size)
        self._origins[destination] = source
        sequence.table[index] = destination
        self._pool.drop(tail)
        return source

    def end(self, sequence: SequenceBlocks) -> None:
        """The sequence's copy, if any, is no longer one that can be given up: it was made, or has just been given up."""
        if sequence.pending is not None:
            self._origins.pop(sequence.table[sequence.pending.entry], None)
            sequence.pending = None
            del self._writers[sequence.seq_id]
