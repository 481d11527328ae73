"""Block tables: the state of each sequence, every change of a table with its event, and what the step being planned can take back.

The editor decides nothing: its callers check first that there are enough blocks.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

from minipaged.config import check_int
from minipaged.errors import InputError
from minipaged.memory.blocks import BlockPool, PrefixIndex, next_key
from minipaged.memory.types import NULL_BLOCK, TOKEN_TYPE, BlockEvent

HIGHEST_SEQUENCE = 2**63 - 1
NO_HOST_BLOCK = -1  # a null entry in a host table


# ---- sequences


class PendingCopy(NamedTuple):
    """A copy of the step being planned that can still be given up: the table's last entry was `source` when only `reserved` tokens
    had a place."""

    entry: int
    source: int
    reserved: int


class SequenceBlocks:
    """Ranges of tokens, half open: [0, cached) found, [cached, computed) computed by this sequence, [computed, reserved) to come."""

    __slots__ = (
        *("computed", "host", "keys", "pending", "promised_from", "publishes", "reserved"),
        *("root", "seq_id", "table", "tokens"),
    )

    def __init__(self, seq_id: int, root: bytes) -> None:
        self.seq_id = seq_id
        self.table: list[int] = []
        self.host: list[int] | None = None  # the table on the host while swapped out
        self.tokens = array(TOKEN_TYPE)  # [computed], kept only where blocks are published
        self.keys: list[bytes] = []  # of the leading full blocks
        self.root = root  # the parent key of a first block
        self.computed = 0
        self.reserved = 0
        self.pending: PendingCopy | None = None
        # The step being planned is to write [promised_from, computed); None: nothing.
        self.promised_from: int | None = None
        # False for good once an entry was released, where what is computed then is kept to itself (Retention.publishes).
        self.publishes = True

    def check_fork(self) -> None:
        """InputError while it has reserved tokens that are not computed, or computed ones that the step being planned is to write."""
        if self.reserved != self.computed:
            raise InputError(
                f"sequence {self.seq_id} has room for {self.reserved - self.computed} tokens that are not computed: "
                "truncate it first"
            )
        if self.promised_from is not None:
            raise InputError(
                f"sequence {self.seq_id} has tokens that the step being planned is to write: fork it after end_step"
            )

    def child(self, seq_id: int) -> SequenceBlocks:
        """A twin under another number, with lists of its own."""
        twin = SequenceBlocks(seq_id, self.root)
        twin.table = self.table.copy()
        twin.tokens = self.tokens[:]
        twin.keys = self.keys.copy()
        twin.computed, twin.reserved, twin.publishes = self.computed, self.reserved, self.publishes
        return twin

    def cut(self, num_tokens: int, block_size: int) -> None:
        """Forget computed tokens from `num_tokens` on."""
        self.reserved = num_tokens
        if num_tokens < self.computed:
            self.computed = num_tokens
            del self.tokens[num_tokens:]
            del self.keys[num_tokens // block_size :]
        if self.promised_from is not None and num_tokens <= self.promised_from:
            self.promised_from = None

    def before_plan(self) -> int | None:
        """Where to cut it if it leaves the step being planned: before its copy and its promises. None if it has neither."""
        ends = [self.pending.reserved] if self.pending is not None else []
        ends += [self.promised_from] if self.promised_from is not None else []
        return min(ends, default=None)


class SequenceDirectory:
    """The sequences by number, and the errors of naming one that is not there or cannot be used so."""

    def __init__(self) -> None:
        self._sequences: dict[int, SequenceBlocks] = {}

    def add(self, sequence: SequenceBlocks) -> None:
        """Enter a sequence under its number, which `check_new` has passed."""
        self._sequences[sequence.seq_id] = sequence

    def remove(self, seq_id: int) -> None:
        """The sequence is gone."""
        del self._sequences[seq_id]

    def check_new(self, seq_id: int) -> None:
        """InputError unless the number is a good one and not in use."""
        check_int("seq_id", seq_id, 0, HIGHEST_SEQUENCE)
        if seq_id in self._sequences:
            raise InputError(f"sequence {seq_id} is in use: free it first, or take another number")

    def find(self, seq_id: int) -> SequenceBlocks:
        """KeyError if there is no such sequence; InputError if this cannot be one's number."""
        sequence = self._sequences.get(seq_id) if type(seq_id) is int else None
        if sequence is None:
            check_int("seq_id", seq_id, 0, HIGHEST_SEQUENCE)
            raise KeyError(f"sequence {seq_id} is unknown, or was freed")
        return sequence

    def on_device(self, seq_id: int) -> SequenceBlocks:
        """As `find`; InputError for a sequence that is swapped out."""
        sequence = self._sequences.get(seq_id) if type(seq_id) is int else None
        if sequence is None or sequence.host is not None:
            self.find(seq_id)
            raise InputError(f"sequence {seq_id} is swapped out: swap it in first")
        return sequence

    def group(self, seq_ids: Iterable[int], *, swapped: bool) -> list[SequenceBlocks]:
        """Several sequences, each once, all of them swapped out or none."""
        try:
            ids = list(seq_ids)
        except TypeError:
            raise InputError(f"seq_ids must be a sequence of whole numbers, not {seq_ids!r}") from None
        group = [self.find(seq_id) if swapped else self.on_device(seq_id) for seq_id in ids]
        for sequence in group:
            if swapped and sequence.host is None:
                raise InputError(f"sequence {sequence.seq_id} is on the device already")
        if len(set(ids)) < len(ids):
            raise InputError(f"a sequence stands twice in {ids}")
        return group

    def hold_device_blocks(self) -> bool:
        """Whether any sequence holds a block of the device. Any thread may ask: it looks at a copy of the directory."""
        return any(any(sequence.table) for sequence in tuple(self._sequences.values()))


# ---- what the step being planned can take back


class PendingCopies:
    """The copies of one step, which can be given up until its plan is final (or, for a caller that never says so, until their writer
    has written).

    A block is a copy's source only as it was before the step: a second copy of what a pending copy will fill reads the original, so that
    no destination of a step is also a source.
    """

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._writers: dict[int, SequenceBlocks] = {}
        self._origins: dict[int, int] = {}  # destination -> source
        # source -> slots of it that its former holder may come back to; empty where no copy was made since the last `settle`
        self.kept_slots: dict[int, int] = {}

    def settle(self) -> None:
        """All copies returned so far are made, and stay."""
        for sequence in self._writers.values():
            sequence.pending = None
        self._writers.clear()
        self._origins.clear()
        self.kept_slots.clear()

    def must_copy(self, tail: int, slot: int) -> bool:
        """Whether a holder that goes on at `slot` of its tail block must write elsewhere.

        It must if somebody else holds the block, or may come back to it and needs that slot as it was.
        """
        return self._pool.refs[tail] > 1 or slot < self.kept_slots.get(tail, 0)

    def add(self, sequence: SequenceBlocks, destination: int, block_size: int) -> int:
        """Let `destination` replace the sequence's tail block. Returns the source, which stays out of reach for this step."""
        index = len(sequence.table) - 1
        tail = sequence.table[index]
        source = self._origins.pop(tail, tail)
        if sequence.pending is None:
            sequence.pending = PendingCopy(index, source, sequence.reserved)
            self._writers[sequence.seq_id] = sequence
            self._pool.guard(source)
            self.kept_slots[source] = max(self.kept_slots.get(source, 0), sequence.reserved - index * block_size)
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


class Promises:
    """Tokens that the step being planned is to write. Their full blocks can be found already, and a writer that leaves the step
    withdraws them."""

    def __init__(self) -> None:
        self.writer_of: dict[int, int] = {}  # found block -> the sequence that is to write it
        self.writers: list[SequenceBlocks] = []

    def add(self, sequence: SequenceBlocks) -> None:
        """What the sequence computes from here on is written by the step being planned; it has promised nothing yet."""
        sequence.promised_from = sequence.computed
        self.writers.append(sequence)

    def settle(self) -> None:
        """The plan is final: all of them are kept."""
        for sequence in self.writers:
            sequence.promised_from = None
        self.writers.clear()
        self.writer_of.clear()


# ---- edits

_as_event = partial(tuple.__new__, BlockEvent)  # BlockEvent._make, without a call of Python's for each event


class TableEditor:
    """Edits tables of blocks of `block_size` tokens over one pool of `num_blocks`: the only place where tables change."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.index = PrefixIndex()
        self.pool = BlockPool(num_blocks, self.index)
        self.copies = PendingCopies(self.pool)
        self.promises = Promises()
        self.save: Callable[[bytes, int, int], None] | None = (
            None  # told (key, block, cause) of content that is about to be lost
        )
        self.published: list[tuple[bytes, int]] | None = None  # (key, block) of each, where somebody wants to know
        self._events: list[tuple[str, int, int, int, int, str, int]] = []

    def take_events(self) -> tuple[BlockEvent, ...]:
        """What happened since the last call."""
        events, self._events = self._events, []
        return tuple(map(_as_event, events))

    def emit(self, kind: str, seq_id: int, block: int, other: int, index: int, tier: str = "device") -> None:
        """Note an event; types.BlockEvent says what each field means."""
        self._events.append((kind, seq_id, block, other, index, tier, 0))

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold this many tokens."""
        return -(-num_tokens // self.block_size)

    def count_available(self, blocks: list[int]) -> int:
        """How many of these could be handed out: they are lost to others once they are shared. Null entries
        and blocks of the host are none."""
        return sum(block > 0 and self.pool.is_available(block) for block in blocks)

    def take(self, seq_id: int) -> int:
        """A block of count 1 whose old content can no longer be found."""
        block = self.pool.take()
        key = None if self.save is None else self.index.key_of(block)
        if self.index.erase(block):
            self.emit("evict", seq_id, block, -1, -1)
            if self.save is not None and key is not None and self.index.find(key) is None:
                self.save(key, block, seq_id)
        return block

    def grow(self, sequence: SequenceBlocks, count: int) -> tuple[int, ...]:
        """Append `count` new blocks to the table; the caller has seen that they are there."""
        seq_id, table = sequence.seq_id, sequence.table
        start = len(table)
        for index in range(start, start + count):
            block = self.take(seq_id)
            table.append(block)
            self.emit("alloc", seq_id, block, -1, index)
        return tuple(table[start:])

    def copy_tail(self, sequence: SequenceBlocks) -> tuple[int, int]:
        """Replace the tail block by a copy. Returns (source, destination)."""
        tail, destination = sequence.table[-1], self.take(sequence.seq_id)
        source = self.copies.add(sequence, destination, self.block_size)
        self.emit("copy", sequence.seq_id, tail, destination, len(sequence.table) - 1)
        return source, destination

    def cut(self, sequence: SequenceBlocks, num_tokens: int) -> None:
        """Keep num_tokens tokens, at most those reserved. Promises beyond them are withdrawn. Entries beyond them go, the last first;
        a copy after which nothing is left to write is given up, and its source stands in the table again."""
        seq_id, table, keep = sequence.seq_id, sequence.table, self.blocks_for(num_tokens)
        if sequence.promised_from is not None:
            for index in self.promised_entries(sequence, num_tokens):
                self.index.erase(table[index])
                del self.promises.writer_of[table[index]]
                self.emit("evict", seq_id, table[index], -1, index)
        pending = sequence.pending if sequence.pending is not None and num_tokens <= sequence.pending.reserved else None
        source = pending.source if pending is not None and pending.entry < keep else NULL_BLOCK
        if pending is not None:
            self.copies.end(sequence)
        while len(table) > (keep - 1 if source != NULL_BLOCK else keep):
            block = table.pop()
            if block != NULL_BLOCK:
                self.emit("free", seq_id, block, -1, len(table))
                self.pool.drop(block)
        if source != NULL_BLOCK:
            self.emit("fork", seq_id, source, -1, len(table))
            self.pool.share(source)
            table.append(source)
        if pending is not None:
            self.pool.unguard(pending.source)
        sequence.cut(num_tokens, self.block_size)

    def publish_full(self, sequence: SequenceBlocks) -> None:
        """Key the blocks that have become full, and let them be found."""
        size, tokens, keys, table = self.block_size, sequence.tokens, sequence.keys, sequence.table
        key = keys[-1] if keys else sequence.root
        promised = sequence.promised_from is not None
        for index in range(len(keys), sequence.computed // size):
            key = next_key(key, tokens[index * size : (index + 1) * size].tobytes())
            keys.append(key)
            if self.publish(sequence, index) and promised:
                self.promises.writer_of[table[index]] = sequence.seq_id

    def publish(self, sequence: SequenceBlocks, index: int) -> bool:
        """Let the block of a keyed entry be found; False if it can be already."""
        block = sequence.table[index]
        if block == NULL_BLOCK or not self.index.publish(sequence.keys[index], block):
            return False
        self.emit("publish", sequence.seq_id, block, -1, index)
        if self.published is not None:
            self.published.append((sequence.keys[index], block))
        return True

    def promised_entries(self, sequence: SequenceBlocks, num_tokens: int) -> list[int]:
        """Entries whose blocks can be found and are yet to be written by the sequence in this step, which it will not do if it keeps
        only num_tokens tokens."""
        if sequence.promised_from is None:
            return []
        entries = range(
            max(sequence.promised_from, num_tokens) // self.block_size, sequence.computed // self.block_size
        )
        return [i for i in entries if self.promises.writer_of.get(sequence.table[i]) == sequence.seq_id]

    def check_leaving(self, sequence: SequenceBlocks, num_tokens: int) -> None:
        """InputError if somebody else holds a block that the sequence would not write in this step if it kept only num_tokens tokens, or
        if it would be cut inside a block that it found and that another is to write (to go on there it would copy the block, and
        copies are made before the step writes)."""
        said = f"sequence {sequence.seq_id} cannot be cut at token {num_tokens} while this step is planned"
        for index in self.promised_entries(sequence, num_tokens):
            block = sequence.table[index]
            if self.pool.refs[block] > 1:
                raise InputError(f"{said}: it is to write block {block}, which somebody else holds")
        entry, slot = divmod(num_tokens, self.block_size)
        if slot and sequence.reserved >= (entry + 1) * self.block_size:
            writer = self.promises.writer_of.get(sequence.table[entry], sequence.seq_id)
            if writer != sequence.seq_id:
                raise InputError(f"{said}: it found block {sequence.table[entry]}, which sequence {writer} is to write")
