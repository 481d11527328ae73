"""What the spec believes: sequences as lists of tokens, who holds which block, which content can be found, when each block became free.

Fed only with what the public contract says (arguments, results, tables, counts, events).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from minipaged.memory.types import BlockEvent, PoolUsage
from tests.laws.dense import kv_of

Key = tuple[str | None, tuple[int, ...]]  # salt and all tokens up to the block's end
NEVER_ENDS = 10**9


class BrokenLawError(AssertionError):
    """A law does not hold. `law` is its id."""

    def __init__(self, law: str, message: str) -> None:
        super().__init__(f"{law}: {message}")
        self.law = law


@dataclass
class Line:
    """A sequence. [0, computed) given to mark_computed, [computed, written) in the slots as well, [written, reserved) only reserved.

    While a step is planned more may be marked than is written: [promised, computed) is what this step is to write.
    """

    seq_id: int
    salt: str | None
    tokens: list[int]
    reserved: int
    computed: int
    written: int
    parent: int = -1
    swapped: bool = False
    before_release: int | None = None  # tokens that were computed when an entry was first released; None: none was
    copied_at: int | None = None  # a copy of this step that can be given up: what was reserved before it
    copy: tuple[int, int] | None = None
    promised: int | None = None  # where its promises of the open plan begin; None: it made none
    kv: list[int] = field(default_factory=list)

    @property
    def released(self) -> bool:
        """Whether any entry was given up."""
        return self.before_release is not None

    @property
    def counted(self) -> int:
        """Tokens that are written, or will be when the step that is planned has run."""
        return max(self.written, self.computed)

    def values(self) -> list[int]:
        """The KV of every known token."""
        if len(self.kv) != len(self.tokens):
            self.kv = kv_of(self.tokens)
        return self.kv

    def cut(self, num_tokens: int) -> None:
        """Tokens from num_tokens on are rejected, or only the places reserved for them are given back."""
        if num_tokens < self.counted:
            del self.tokens[num_tokens:]
            self.kv = []
        if self.promised is not None and num_tokens <= self.promised:
            self.promised = None
        self.written = min(self.written, num_tokens)
        self.computed = min(self.computed, num_tokens)
        self.reserved = num_tokens
        if self.before_release is not None:
            self.before_release = min(self.before_release, num_tokens)


class View(NamedTuple):
    """All that can be seen of a manager without changing it."""

    tables: dict[int, tuple[int, ...]]
    host_tables: dict[int, tuple[int, ...]]
    counts: tuple[int, ...]  # ref_count of every block
    usage: PoolUsage


def look(manager: Any, seq_ids: Iterable[int], num_blocks: int) -> View:
    """See everything."""
    ids = list(seq_ids)
    return View(
        {i: manager.table(i) for i in ids},
        {i: manager.host_table(i) for i in ids},
        tuple(map(manager.ref_count, range(num_blocks))),
        manager.usage(),
    )


class FreedAt(NamedTuple):
    """When a block lost its last holder: some time in [low, high], in call `call`, as entry `index` of a table.

    call: negative where its step still read the block, which ties it only with others of that kind.
    """

    low: int
    high: int
    call: int
    index: int

    def before(self, other: FreedAt) -> bool:
        """Whether this one must be evicted first: it was used earlier, or lies deeper among those freed together."""
        return self.high < other.low or (self.call == other.call and self.index > other.index)


class FoundContent:
    """Which blocks hold which content, by the publish and evict events. Of equal ones the first published is found."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.blocks_of: dict[Key, list[int]] = {}
        self.key_of: dict[int, Key] = {}

    def hits(self, tokens: list[int], salt: str | None, most: int) -> list[int]:
        """Blocks of the longest leading run that can be found."""
        blocks = []
        for n in range(self.block_size, most * self.block_size + 1, self.block_size):
            found = self.blocks_of.get((salt, tuple(tokens[:n])))
            if not found:
                break
            blocks.append(found[0])
        return blocks

    def publish(self, key: Key, block: int) -> None:
        """From now on the key finds the block, once the others that it finds are gone."""
        self.blocks_of.setdefault(key, []).append(block)
        self.key_of[block] = key

    def evict(self, block: int) -> None:
        """No longer."""
        self.blocks_of[self.key_of.pop(block)].remove(block)


class FoldedTables:
    """Tables rebuilt from the events alone, by the meanings that minipaged.memory.types.BlockEvent gives."""

    def __init__(self) -> None:
        self.tables: dict[int, list[int]] = {}
        self.hosts: dict[int, list[int]] = {}

    def apply(self, event: BlockEvent) -> None:
        """One event."""
        kind, seq, block, other, index = event.kind, event.seq_id, event.block, event.other, event.index
        table = self.tables.setdefault(seq, []) if seq >= 0 else []
        if kind in ("alloc", "cache_hit") or (kind == "fork" and block >= 0):
            self._put(table, index, block, 0)
        elif kind == "fork":
            self.tables[seq] = list(self.tables.get(other, []))
        elif kind == "copy":
            table[index] = other
        elif kind == "free" and event.tier == "host":
            del self.hosts[seq][index:]
        elif kind == "free":
            del table[index:]
        elif kind == "release":
            table[index] = 0
        elif kind == "swap_out":
            table[index] = 0
            self._put(self.hosts.setdefault(seq, []), index, other, -1)
        elif kind == "swap_in":
            self.hosts[seq][index] = -1
            self._put(table, index, block, 0)

    def differ(self, tables: dict[int, tuple[int, ...]]) -> str:
        """How a table by the events differs from the real one; "" if none does. Null entries at the end have no event."""
        for seq, table in tables.items():
            folded, real = self.tables.get(seq, []), list(table)
            while folded and not folded[-1]:
                folded.pop()
            while real and not real[-1]:
                real.pop()
            if folded != real:
                return f"by the events sequence {seq} has {folded}, its table is {real}"
        return ""

    @staticmethod
    def _put(table: list[int], index: int, block: int, null: int) -> None:
        table.extend([null] * (index + 1 - len(table)))
        table[index] = block
