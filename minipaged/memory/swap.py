"""The host's blocks: those of swapped sequences, and content that the device had no room for. And moving whole groups of sequences there
and back: each block once, with the sharing among them kept.

The caller has seen that there is room. The pairs of a swap, once returned, are executed even if the sequence leaves in the same step: the
blocks they read stay out of reach until the next step begins.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from minipaged.memory.blocks import BlockPool, PrefixIndex
from minipaged.memory.tables import NO_HOST_BLOCK, SequenceBlocks
from minipaged.memory.types import NULL_BLOCK

Emit = Callable[..., None]
Pairs = list[tuple[int, int]]


class HostPool:
    """Blocks 0 .. num_blocks - 1 of the host, where swapped sequences wait, and content whose device block was handed out (a cache).

    No null block. What is cached makes room for swapped sequences, the least recently used first.

    A block that this step reads or writes is not handed out again before the next one: the step's swaps run as one batch, in which
    no block may be written twice or be both source and destination.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.refs: dict[int, int] = {}  # block -> table entries that name it
        self.index = PrefixIndex()  # what the cached blocks hold
        self._cached: dict[int, None] = {}  # blocks with a key and no entries, the least recently used first
        self._fresh = 0
        self._free: list[int] = []
        self._touched: set[int] = set()  # in this step
        self._held_back: list[int] = []  # free, and touched in this step

    @property
    def num_available(self) -> int:
        """Blocks that can be handed out now."""
        busy = sum(block in self._cached for block in self._touched) if self._cached else 0
        return len(self._free) + self.num_blocks - self._fresh + len(self._cached) - busy

    @property
    def num_cached(self) -> int:
        """Blocks whose content can be found."""
        return len(self._cached)

    @property
    def num_free(self) -> int:
        """Blocks that no host table names."""
        return self.num_blocks - len(self.refs)

    def take(self) -> int:
        """Hand out a block with count 0; the caller shares it for each entry. IndexError if none is available."""
        block = self._take()
        self.refs[block] = 0
        return block

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        elif self._fresh < self.num_blocks:
            block = self._fresh
            self._fresh += 1
        else:
            # This step may still write or read the content of those that it touched.
            oldest = next((block for block in self._cached if block not in self._touched), None)
            if oldest is None:
                raise IndexError("the host pool is full")
            block = oldest
            del self._cached[block]
            self.index.erase(block)
        self._touched.add(block)
        return block

    def touch(self, block: int) -> None:
        """This step reads the block."""
        self._touched.add(block)
        if block in self._cached:
            self._cached[block] = self._cached.pop(block)

    def keep(self, key: bytes) -> int | None:
        """A block for content that is to come to the host and can be found there from now on. None: it is there, or there is no room."""
        block = self.index.find(key)
        if block is not None:
            self._cached[block] = self._cached.pop(block)
            return None
        if not self.num_available:
            return None
        block = self._take()
        self.index.publish(key, block)
        self._cached[block] = None
        return block

    def forget(self) -> None:
        """Nothing that is cached can be found any more."""
        for block in self._cached:
            self.index.erase(block)
            (self._held_back if block in self._touched else self._free).append(block)
        self._cached.clear()

    def share(self, block: int) -> None:
        """One more table entry names the block."""
        self.refs[block] += 1

    def drop(self, block: int) -> None:
        """One table entry less."""
        self.refs[block] -= 1
        if not self.refs[block]:
            del self.refs[block]
            (self._held_back if block in self._touched else self._free).append(block)

    def begin_step(self) -> None:
        """The swaps of the step before are done."""
        if self._touched:
            self._touched.clear()
            self._free.extend(self._held_back)
            self._held_back.clear()


def blocks_to_move(group: list[SequenceBlocks], block_size: int) -> dict[int, None]:
    """The distinct device blocks of a group, as they stand once it has left the step being planned."""
    blocks: dict[int, None] = {}
    for sequence in group:
        table, end, pending = sequence.table, sequence.before_plan(), sequence.pending
        if pending is not None:
            table = [*table[: pending.entry], pending.source]
        if end is not None:
            table = table[: -(-end // block_size)]
        blocks.update(dict.fromkeys(block for block in table if block != NULL_BLOCK))
    return blocks


def move_out(group: list[SequenceBlocks], blocks: Iterable[int], pool: BlockPool, host: HostPool, emit: Emit) -> Pairs:
    """Put the group's tables, which hold `blocks`, on the host. (device, host) pairs; a block that others hold is copied out and stays."""
    home = {block: host.take() for block in blocks}
    left: list[tuple[int, int]] = []  # (index, block) of every entry that goes
    for sequence in group:
        sequence.host = []
        for index, block in enumerate(sequence.table):
            if block == NULL_BLOCK:
                sequence.host.append(NO_HOST_BLOCK)
                continue
            host.share(home[block])
            sequence.host.append(home[block])
            left.append((index, block))
            emit("swap_out", sequence.seq_id, block, home[block], index)
        sequence.table = []
    for block in home:
        pool.guard(block)
    for _, block in sorted(left, key=lambda entry: -entry[0]):  # the deepest is the first to be evicted
        pool.drop(block)
    return list(home.items())


def next_step_blocks(group: list[SequenceBlocks], block_size: int) -> int:
    """Device blocks that one more token for each sequence will take, copies of shared tails included."""
    grown = 0
    writers: Counter[int] = Counter()
    entries = Counter(block for sequence in group for block in sequence.host or ())
    for sequence in group:
        table = sequence.host or []
        if sequence.reserved >= len(table) * block_size:
            grown += 1
        else:
            writers[table[-1]] += 1
    # The last sharer writes in place.
    copies = sum(count - (count == entries[block]) for block, count in writers.items())
    return grown + copies


def move_in(
    group: list[SequenceBlocks], pool: BlockPool, host: HostPool, take: Callable[[int], int], emit: Emit
) -> Pairs:
    """Bring the group's tables back. (host, device) pairs; `take` hands out a block for a sequence, with count 1."""
    home: dict[int, int] = {}
    for sequence in group:
        table = sequence.host or []
        for index, block in enumerate(table):
            if block == NO_HOST_BLOCK:
                sequence.table.append(NULL_BLOCK)
                continue
            if block in home:
                pool.share(home[block])
            else:
                home[block] = take(sequence.seq_id)
                host.touch(block)
            sequence.table.append(home[block])
            host.drop(block)
            emit("swap_in", sequence.seq_id, home[block], block, index)
        sequence.host = None
    return list(home.items())
