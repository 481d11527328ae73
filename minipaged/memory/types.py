"""What goes in and out of the managers, the block manager's and other systems': plain values, and the checks of arguments.

Bad arguments raise InputError (a ValueError) naming the value, before anything changes.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from enum import Enum
from typing import NamedTuple

from minipaged.config import check_int
from minipaged.errors import InputError

NULL_BLOCK = 0
HIGHEST_TOKEN = 2**32 - 1
TOKEN_TYPE = "I"  # of arrays of token ids: unsigned, 4 bytes
_TEXT, _LISTS = (str, bytes), (list, tuple)


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
    host_free: int  # includes host_cached
    host_cached: int = 0


class BlockEvent(NamedTuple):
    """One thing that happened to a block, such that tables and reference counts can be rebuilt from the events alone.

    `index` is the entry of the sequence's table, `other` is -1 where it has no meaning, `group` is 0 (layer groups, later).

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
    | spill     | cause     | device one  | host block  | evicted content goes on in the host's cache; index -1                |
    | host_hit  | holder    | device one  | host block  | entry index, just allocated, gets its content from the host's cache  |
    | pin/unpin | -1        | block       | -1          | count + 1 or - 1, held by no table; index -1                         |

    A sequence that is freed or swapped emits one event for each entry that is not null, last entry first when freed; null entries leave
    without one. Tier is that of `block`. Several blocks may be published with equal content; each is evicted by itself.
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


def token_array(token_ids: Iterable[int]) -> array[int]:
    """Token ids as unsigned 32-bit numbers."""
    if isinstance(token_ids, _TEXT):
        raise InputError(f"token_ids must be whole numbers from 0 to {HIGHEST_TOKEN}, not text: {token_ids[:20]!r}")
    try:
        ids = token_ids if isinstance(token_ids, _LISTS) else list(token_ids)
        tokens = array(TOKEN_TYPE, ids)
    except (TypeError, OverflowError, ValueError):
        raise InputError(_complaint(token_ids)) from None
    if bool in set(map(type, ids)):
        raise InputError(_complaint(ids))
    return tokens


def _complaint(token_ids: Iterable[int]) -> str:
    allowed = f"token_ids must be whole numbers from 0 to {HIGHEST_TOKEN}"
    try:
        for token in token_ids:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token <= HIGHEST_TOKEN:
                return f"{allowed}, not {token!r}"
    except TypeError:
        return f"{allowed} in a sequence, not {token_ids!r}"
    return allowed


def check_salt(salt: str | None) -> None:
    """A salt is text, or None for the common cache."""
    if salt is not None and not isinstance(salt, str):
        raise InputError(f"salt must be text or None, not {salt!r}")


def id_list(name: str, values: Iterable[int], high: int | None = None) -> list[int]:
    """Whole numbers from 0 to `high`, in the order given."""
    try:
        ids = list(values)
    except TypeError:
        raise InputError(f"{name} must be a sequence of whole numbers, not {values!r}") from None
    for value in ids:
        check_int(name, value, 0, high)
    return ids
