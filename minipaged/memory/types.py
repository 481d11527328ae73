"""The words that the managers speak, the block manager's and other systems': plain values, no behaviour."""

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
    """One thing that happened to a block, told so that tables and reference counts can be rebuilt from the events alone.

    `index` is the entry of the sequence's table, `other` is -1 where nothing is said of it, `group` is 0 (layer groups, later).

    | kind      | seq_id    | block       | other       | what it means                                                        |
    |-----------|-----------|-------------|-------------|----------------------------------------------------------------------|
    | alloc     | holder    | new block   | -1          | table[index] = block, the new last entry; its count is 1             |
    | cache_hit | holder    | cached one  | -1          | the same for a block found by its content; its count grows by 1      |
    | fork      | child     | -1          | parent      | child's table = parent's, `index` entries; each count grows by 1     |
    | fork      | holder    | source      | -1          | table[index] = block again: a copy given up before it ran; count + 1 |
    | copy      | writer    | source      | destination | table[index] = other; source's count - 1, destination's is 1         |
    | free      | holder    | block       | -1          | table is cut at `index`; count - 1 (tier host: of the host table)    |
    | release   | holder    | block       | -1          | table[index] = 0, the null block; count - 1                          |
    | publish   | writer    | block       | -1          | the block can now be found by its content                            |
    | evict     | cause, -1 | block       | -1          | it can no longer; -1: the cache was reset                            |
    | swap_out  | holder    | device one  | host block  | entry index moved to the host table; device count - 1, host + 1      |
    | swap_in   | holder    | device one  | host block  | the reverse                                                          |
    | pin/unpin | -1        | block       | -1          | count + 1 or - 1, held by no table; index -1                         |

    A sequence that is freed or swapped tells one event for each entry that is not null, last entry first when freed; null entries leave
    without a word. Tier is that of `block`.
    """

    kind: str
    seq_id: int
    block: int
    other: int
    index: int  # type: ignore[assignment]  # the contract's name, though tuples have a method of it
    tier: str  # device or host
    group: int


class Run(NamedTuple):
    """Consecutive slots of another system's pool. kind: token reserved internal external padding idle."""

    start: int
    length: int
    kind: str
    sequence: int


class PoolBreakdown(NamedTuple):
    """Slots of a pool by what they hold; they sum to the pool."""

    token: int
    reserved: int
    internal: int
    external: int
    padding: int
    idle: int
