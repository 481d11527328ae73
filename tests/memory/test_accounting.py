"""The bands of a paged pool: they sum to it, count shared slots once, and agree with the reserving systems' where nothing is shared."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipaged.errors import InputError
from minipaged.memory import BlockManager
from minipaged.memory.accounting import TableUse, paged_bands
from minipaged.memory.systems import reservations


@given(
    st.integers(1, 6),
    st.lists(st.tuples(st.integers(1, 20), st.integers(0, 20), st.integers(0, 3)), max_size=6),
    st.booleans(),
)
def test_bands_sum_to_the_pool_and_sharing_counts_once(
    size: int, rows: list[tuple[int, int, int]], waiting: bool
) -> None:
    """With children that share their parent's blocks, token slots are those of the distinct blocks."""
    manager = BlockManager(256, size, prefix_caching=False)
    manager.begin_step()
    uses, alone = [], []
    for seq, (prompt, more, children) in enumerate(rows):
        manager.allocate(10 * seq, [0] * prompt)
        manager.mark_computed(10 * seq, [0] * prompt)
        alone.append(TableUse(manager.table(10 * seq), prompt, prompt + more))
        for child in range(1, children + 1):
            manager.fork(10 * seq, 10 * seq + child)
            uses.append(TableUse(manager.table(10 * seq + child), prompt, prompt))
    bands = paged_bands(alone + uses, 256, size, waiting=waiting)
    assert sum(bands) == 255 * size
    assert bands == paged_bands(alone, 256, size, waiting=waiting)
    assert bands.token == sum(use.written for use in alone)
    assert (bands.idle if waiting else bands.external) == 0


@given(st.integers(1, 6), st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5))
def test_a_full_reservation_is_what_tgi_holds(size: int, rows: list[tuple[int, int]]) -> None:
    """Tables as long as prompt + limit are the reservation of TGI's paged mode, band by band."""
    account = reservations("tgi-paged", 100 * size, block_size=size)
    uses, next_block = [], 1
    for key, (prompt, output) in enumerate(rows):
        blocks = -(-(prompt + output + 5) // size)
        assert account.admit(key, prompt, output, output + 5)
        account.grow(key, prompt)
        uses.append(TableUse(range(next_block, next_block + blocks), prompt, prompt + output))
        next_block += blocks
    assert paged_bands(uses, 101, size, waiting=False) == account.bands(waiting=False)


@pytest.mark.parametrize(
    ("use", "word"),
    [
        (TableUse([1, 9], 1, 2), "block 9"),
        (TableUse([1], 5, 5), "written"),
        (TableUse([1], 2, 1), "needed"),
        (TableUse([1], -1, 1), "written"),
    ],
)
def test_impossible_tables_are_named(use: TableUse, word: str) -> None:
    """Tables that no pool could have."""
    with pytest.raises(InputError, match=word):
        paged_bands([use], 4, 4, waiting=False)
