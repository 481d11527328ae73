"""Sequences as the block manager sees them: a table, the tokens so far, and who owns which range of them. Knows no pool."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import NamedTuple

from minipaged.config import check_int
from minipaged.errors import InputError
from minipaged.memory.prefix_index import TOKEN_TYPE

HIGHEST_SEQUENCE = 2**63 - 1
NO_HOST_BLOCK = -1  # a null entry in a host table


class PendingCopy(NamedTuple):
    """A copy that this step was told to make and that can still be given up: the table's last entry was `source` when only
    `room` tokens were promised."""

    entry: int
    source: int
    room: int


class SequenceBlocks:
    """Ranges of tokens, half open: [0, cached) found, [cached, computed) written by this sequence, [computed, room) promised."""

    __slots__ = ("computed", "host", "keys", "pending", "publishes", "room", "root", "seq_id", "table", "tokens")

    def __init__(self, seq_id: int, root: bytes) -> None:
        self.seq_id = seq_id
        self.table: list[int] = []
        self.host: list[int] | None = None  # the table on the host while swapped out
        self.tokens = array(TOKEN_TYPE)  # [computed], kept only where blocks are published
        self.keys: list[bytes] = []  # of the leading full blocks
        self.root = root  # the parent key of a first block
        self.computed = 0
        self.room = 0
        self.pending: PendingCopy | None = None
        self.publishes = True  # False for good once an entry was released: what is computed then may differ

    def child(self, seq_id: int) -> SequenceBlocks:
        """A twin under another number, with lists of its own."""
        twin = SequenceBlocks(seq_id, self.root)
        twin.table = self.table.copy()
        twin.tokens = self.tokens[:]
        twin.keys = self.keys.copy()
        twin.computed, twin.room, twin.publishes = self.computed, self.room, self.publishes
        return twin

    def cut(self, num_tokens: int, block_size: int) -> None:
        """Forget computed tokens from `num_tokens` on."""
        if num_tokens < self.computed:
            self.computed = num_tokens
            del self.tokens[num_tokens:]
            del self.keys[num_tokens // block_size :]

    def table_without_copy(self) -> list[int]:
        """The table as it stands if the pending copy is given up."""
        if self.pending is None:
            return self.table
        return [*self.table[: self.pending.entry], self.pending.source]


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
        """Whether any sequence holds a block of the device."""
        return any(any(sequence.table) for sequence in self._sequences.values())
