"""The torch twins against attention written out densely, and the laws of paging on them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minipaged.kernels.attention import paged_decode, paged_prefill
from minipaged.kernels.attention.decode import row_batches
from minipaged.kernels.cache import copy_blocks, write_kv
from tests.kernels.paged_cases import PagedCase, assert_close, dense_attention, examples, make_case, paged_cases

pytestmark = pytest.mark.usefixtures("unset_choice")

ANY_BLOCK_SIZE = st.integers(1, 40) | st.sampled_from([100, 256])
DTYPES = (torch.float32, torch.float32, torch.float16, torch.bfloat16)


@examples(60)
@given(paged_cases(prefill=False, block_sizes=ANY_BLOCK_SIZE, dtypes=DTYPES, longest=300, most_rows=8))
def test_decode_twin_equals_dense_attention(case: PagedCase) -> None:
    out = paged_decode(*case.decode(), window=case.window)
    assert_close(out, dense_attention(case))


@examples(60)
@given(paged_cases(prefill=True, block_sizes=ANY_BLOCK_SIZE, dtypes=DTYPES, longest=300, most_rows=5))
def test_prefill_twin_equals_dense_attention(case: PagedCase) -> None:
    out = paged_prefill(*case.prefill(), window=case.window)
    assert_close(out, dense_attention(case))


@pytest.mark.parametrize("window", [None, 300])
def test_prefill_twin_over_several_query_tiles(window: int | None) -> None:
    case = make_case([700, 613], [700, 600], kv_heads=2, group=3, head_dim=32, block_size=16, window=window)
    assert_close(paged_prefill(*case.prefill(), window=window), dense_attention(case))


def test_decode_twin_over_several_row_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minipaged.kernels.attention.decode.GATHER_BYTES", 64 << 10)
    lengths = [1, 500, 16, 0, 33, 120, 499, 17, 64, 3]
    case = make_case(lengths, [1] * len(lengths), kv_heads=2, group=2, head_dim=32, block_size=16)
    assert_close(paged_decode(*case.decode()), dense_attention(case))


@examples(100)
@given(st.lists(st.integers(0, 50)), st.integers(0, 200))
def test_row_batches_hold_every_row_once_and_waste_less_than_half(pages: list[int], budget: int) -> None:
    batches = list(row_batches(pages, budget))
    assert sorted(row for batch, _ in batches for row in batch) == [row for row, n in enumerate(pages) if n]
    for batch, width in batches:
        assert width == max(pages[row] for row in batch)
        assert len(batch) == 1 or (len(batch) * width <= budget and 2 * min(pages[row] for row in batch) >= width)


@examples(25)
@given(paged_cases(prefill=False, block_sizes=ANY_BLOCK_SIZE), st.integers(0, 9))
def test_L63_decode_twin_sees_neither_physical_ids_nor_unused_slots(case: PagedCase, seed: int) -> None:
    out = paged_decode(*case.decode(), window=case.window)
    assert torch.equal(out, paged_decode(*case.permuted(seed).decode(), window=case.window))
    assert torch.equal(out, paged_decode(*case.filled(1e30).decode(), window=case.window))


@examples(25)
@given(paged_cases(prefill=True, block_sizes=ANY_BLOCK_SIZE), st.integers(0, 9))
def test_L63_prefill_twin_sees_neither_physical_ids_nor_unused_slots(case: PagedCase, seed: int) -> None:
    out = paged_prefill(*case.prefill(), window=case.window)
    assert torch.equal(out, paged_prefill(*case.permuted(seed).prefill(), window=case.window))
    assert torch.equal(out, paged_prefill(*case.filled(1e30).prefill(), window=case.window))


@examples(30)
@given(
    st.data(), st.integers(1, 20), st.integers(1, 6), st.sampled_from([torch.float32, torch.bfloat16]), st.booleans()
)
def test_write_kv_fills_its_slots_and_no_others(
    data: st.DataObject, block_size: int, num_blocks: int, dtype: torch.dtype, interleaved: bool
) -> None:
    slots = data.draw(st.lists(st.integers(0, block_size * num_blocks - 1), unique=True))
    mapping = torch.tensor([s for slot in slots for s in (slot, -1)], dtype=torch.int64)
    if interleaved:  # keys and values of a block side by side: the caches are views with gaps
        key_cache, value_cache = torch.full((num_blocks, 2, block_size, 3, 32), math.nan, dtype=dtype).unbind(1)
    else:
        key_cache, value_cache = torch.full((2, num_blocks, block_size, 3, 32), math.nan, dtype=dtype)
    key, value = torch.randn(2, len(mapping), 3, 32).to(dtype)
    write_kv(key, value, key_cache, value_cache, mapping)
    for new, cache in ((key, key_cache), (value, value_cache)):
        rows = cache.reshape(-1, 3, 32)
        assert torch.equal(rows[mapping[::2]], new[::2])
        assert int(rows.isnan().all(-1).all(-1).sum()) == block_size * num_blocks - len(slots)


@examples(30)
@given(st.permutations(range(9)), st.integers(0, 4))
def test_copy_blocks_acts_on_every_tensor(order: list[int], copies: int) -> None:
    pairs = torch.tensor(list(zip(order, order[4:], strict=False)), dtype=torch.int64).view(-1, 2)[:copies]
    caches = [torch.randn(9, 4, 2, 32), torch.randint(0, 99, (9, 5), dtype=torch.int8), torch.randn(9, 2, 7)[:, 1]]
    before = [cache.clone() for cache in caches]
    copy_blocks(caches, pairs)
    where_from = torch.arange(9)
    where_from[pairs[:, 1]] = pairs[:, 0]
    for cache, old in zip(caches, before, strict=True):
        assert torch.equal(cache, old[where_from])


def test_queries_may_be_a_slice_of_a_wider_projection() -> None:
    case = make_case([9, 30], [4, 30], kv_heads=2, group=2, head_dim=32, block_size=8)
    merged = torch.randn(34, 4 * 32 + 2 * 2 * 32)
    merged[:, : 4 * 32] = case.query.flatten(1)
    query = merged[:, : 4 * 32].view(34, 4, 32)
    out = torch.empty_like(case.query)
    returned = paged_prefill(query, *case.prefill()[1:], out=out)
    assert returned is out
    assert_close(out, dense_attention(case))
    decoded = paged_decode(query[:2], *case.decode()[1:])
    assert torch.equal(decoded, paged_decode(case.query[:2], *case.decode()[1:]))
