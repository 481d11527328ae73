"""The words that the block manager speaks: plain values, no behaviour."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

NULL_BLOCK = 0


class Allocation(NamedTuple):
    """What one allocate or append did to a table."""

    cached_tokens: int  # leading tokens whose KV is already there
    new_blocks: tuple[int, ...]  # physical ids, in table order; copy destinations are not among them
    copies: tuple[tuple[int, int], ...]  # (source, destination), to copy before this step's writes


class Admission(Enum):
    """Whether a request may start: now, when others have left, or at no time."""

    OK = "ok"
    LATER = "later"
    NEVER = "never"


class PoolUsage(NamedTuple):
    """Blocks by state. `free` includes `cached`; free + referenced + null = total."""

    total: int
    null: int
    free: int
    cached: int
    referenced: int
    pinned: int
    host_total: int
    host_free: int


class BlockEvent(NamedTuple):
    """One thing that happened to a block.

    kind: alloc, free, fork, copy, cache_hit, publish, evict, swap_out, swap_in, release.
    `other` is the second block of a copy or swap, or the parent sequence of a fork; -1 where there is none.
    """

    kind: str
    seq_id: int
    block: int
    other: int
    index: int  # type: ignore[assignment]  # the contract's name, though tuples have a method of it
    tier: str  # device or host
    group: int
