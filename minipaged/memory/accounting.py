"""What the slots of a paged pool hold, each physical slot once: the split of the PagedAttention paper (section 3.1, Fig. 2).

For systems that reserve ahead, reservations.py keeps the same sums row by row. Here blocks are shared, so rows cannot be summed:
a slot is `token` if any holder has written it, else `reserved` if any holder will, else `internal`. Pure functions over block tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from minipaged.config import check_int
from minipaged.errors import InputError
from minipaged.memory.types import NULL_BLOCK, PoolBands


class TableUse(NamedTuple):
    """One sequence: its block table, tokens written, and tokens at its end (known in hindsight; until then its limit)."""

    table: Sequence[int]
    written: int
    needed: int


def paged_bands(uses: Iterable[TableUse], num_blocks: int, block_size: int, *, waiting: bool) -> PoolBands:
    """Slots of blocks 1 .. num_blocks - 1 by what they hold; they sum to the pool.

    Free blocks are `idle`, or `external` while a request waits for room (`waiting`). A paged pool has no padding.
    InputError for a table that names a block outside the pool or is too short for what is written.
    """
    check_int("num_blocks", num_blocks, 1)
    check_int("block_size", block_size, 1)
    written: dict[int, int] = {}
    wanted: dict[int, int] = {}
    for use in uses:
        check_int("written", use.written, 0, len(use.table) * block_size)
        check_int("needed", use.needed, use.written)
        for index, block in enumerate(use.table):
            if not 0 <= block < num_blocks:
                raise InputError(f"block {block} is not one of the pool's 0 to {num_blocks - 1}")
            if block != NULL_BLOCK:
                start = index * block_size
                written[block] = max(written.get(block, 0), min(block_size, max(0, use.written - start)))
                wanted[block] = max(wanted.get(block, 0), min(block_size, max(0, use.needed - start)))
    token, needed = sum(written.values()), sum(wanted.values())
    rest = (num_blocks - 1 - len(written)) * block_size
    return PoolBands(
        token=token,
        reserved=needed - token,
        internal=len(written) * block_size - needed,
        external=rest if waiting else 0,
        padding=0,
        idle=0 if waiting else rest,
    )
