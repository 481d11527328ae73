"""The only place where block tables change: blocks taken, shared, copied, cut off and published, each change told as an event.

Decides nothing: whoever calls has seen that there is room. Knows the pool, the index and the pending copies of this step.
"""

from __future__ import annotations

from array import array

from minipaged.memory.block_pool import BlockPool
from minipaged.memory.pending_copies import PendingCopies
from minipaged.memory.prefix_index import PrefixIndex, next_key
from minipaged.memory.sequence_blocks import SequenceBlocks
from minipaged.memory.types import NULL_BLOCK, BlockEvent


class TableEditor:
    """Edits tables of blocks of `block_size` tokens over one pool of `num_blocks`."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.index = PrefixIndex()
        self.pool = BlockPool(num_blocks, self.index)
        self.copies = PendingCopies(self.pool)
        self._events: list[tuple[str, int, int, int, int, str, int]] = []

    def take_events(self) -> tuple[BlockEvent, ...]:
        """What happened since the last call."""
        events, self._events = self._events, []
        return tuple(map(BlockEvent._make, events))

    def tell(self, kind: str, seq_id: int, block: int, other: int, index: int, tier: str = "device") -> None:
        """Note an event; types.BlockEvent says what each field means."""
        self._events.append((kind, seq_id, block, other, index, tier, 0))

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold this many tokens."""
        return -(-num_tokens // self.block_size)

    def match(self, tokens: array[int], salt: str | None, wanted: int) -> tuple[list[int], list[bytes]]:
        """Found blocks (and keys) inside the first `wanted` tokens, with one token of all left to compute."""
        size = self.block_size
        return self.index.match(tokens, size, salt, max(0, min(len(tokens) - 1, wanted) // size))

    def count_available(self, blocks: list[int]) -> int:
        """How many of these could be handed out: they are lost to others once they are shared."""
        return sum(map(self.pool.is_available, blocks))

    def take(self, seq_id: int) -> int:
        """A block of count 1 whose old content can no longer be found."""
        block = self.pool.take()
        if self.index.erase(block):
            self.tell("evict", seq_id, block, -1, -1)
        return block

    def grow(self, sequence: SequenceBlocks, count: int) -> tuple[int, ...]:
        """Append `count` new blocks to the table; the caller has seen that they are there."""
        seq_id, table = sequence.seq_id, sequence.table
        start = len(table)
        for index in range(start, start + count):
            block = self.take(seq_id)
            table.append(block)
            self.tell("alloc", seq_id, block, -1, index)
        return tuple(table[start:])

    def copy_tail(self, sequence: SequenceBlocks) -> tuple[int, int]:
        """Replace the tail block by a copy. Returns (source, destination)."""
        tail, destination = sequence.table[-1], self.take(sequence.seq_id)
        source = self.copies.add(sequence, destination, self.block_size)
        self.tell("copy", sequence.seq_id, tail, destination, len(sequence.table) - 1)
        return source, destination

    def cut(self, sequence: SequenceBlocks, num_tokens: int) -> None:
        """Keep num_tokens tokens, at most the room. Entries beyond them go, the last first; a copy after which nothing is
        left to write is given up, and its source stands in the table again."""
        seq_id, table, keep = sequence.seq_id, sequence.table, self.blocks_for(num_tokens)
        pending = sequence.pending if sequence.pending is not None and num_tokens <= sequence.pending.room else None
        source = pending.source if pending is not None and pending.entry < keep else NULL_BLOCK
        if pending is not None:
            self.copies.end(sequence)
        while len(table) > (keep - 1 if source != NULL_BLOCK else keep):
            block = table.pop()
            if block != NULL_BLOCK:
                self.tell("free", seq_id, block, -1, len(table))
                self.pool.drop(block)
        if source != NULL_BLOCK:
            self.tell("fork", seq_id, source, -1, len(table))
            self.pool.share(source)
            table.append(source)
        if pending is not None:
            self.pool.unguard(pending.source)
        sequence.cut(num_tokens, self.block_size)
        sequence.room = num_tokens

    def publish_full(self, sequence: SequenceBlocks) -> None:
        """Key the blocks that have become full, and let them be found."""
        size, tokens, keys = self.block_size, sequence.tokens, sequence.keys
        key = keys[-1] if keys else sequence.root
        for index in range(len(keys), sequence.computed // size):
            key = next_key(key, tokens[index * size : (index + 1) * size].tobytes())
            keys.append(key)
            self.publish(sequence, index)

    def publish(self, sequence: SequenceBlocks, index: int) -> None:
        """Let the block of a keyed entry be found, unless another already holds its content."""
        block = sequence.table[index]
        if block != NULL_BLOCK and self.index.publish(sequence.keys[index], block):
            self.tell("publish", sequence.seq_id, block, -1, index)
