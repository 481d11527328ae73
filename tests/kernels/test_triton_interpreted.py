"""The Triton kernels against their twins, in Triton's interpreter (float32 and float16; it has no bfloat16 arithmetic)."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minipaged.kernels.attention import paged_decode, paged_prefill
from minipaged.kernels.attention.decode import paged_decode_torch
from minipaged.kernels.attention.prefill import paged_prefill_torch
from minipaged.kernels.cache import copy_blocks, write_kv
from minipaged.kernels.launch_table import DecodeLaunch, PrefillLaunch
from tests.kernels.paged_cases import FEW_HEADS, PagedCase, assert_close, examples, make_case, paged_cases

pytestmark = pytest.mark.usefixtures("interpreted", "unset_choice")

BLOCK_SIZES = st.sampled_from([1, 2, 4, 8, 16, 32, 64, 256])
# The interpreter takes about 10 ms for a program and 5 for a tile, so few programs: few rows and heads, several tiles in each.
SMALL = {
    "block_sizes": BLOCK_SIZES, "dtypes": (torch.float32, torch.float16), "longest": 100, "fewest_rows": 1, "heads": FEW_HEADS
}  # fmt: skip
DECODE_CASES = paged_cases(prefill=False, most_rows=3, **SMALL)
PREFILL_CASES = paged_cases(prefill=True, most_rows=2, **SMALL)
# Small tiles and chunks, so that short rows are split and cross many tiles.
SHORT_CHUNKS = DecodeLaunch(16, 1, 1, min_chunk=16, programs_per_multiprocessor=6, enough_waves=1000)
DECODE_LAUNCHES = st.sampled_from([None, SHORT_CHUNKS])


def prefill_launches(overlapped: bool) -> st.SearchStrategy[PrefillLaunch]:
    """Either loop, with tiles small enough for a row to have several of each kind."""
    return st.builds(
        PrefillLaunch,
        query_tile=st.sampled_from([32, 64, 128]),
        kv_tile=st.sampled_from([16, 32, 64]),
        num_warps=st.just(1),
        num_stages=st.just(1),
        pack=st.sampled_from([1, 4]),
        overlapped=st.just(overlapped),
        section_bytes=st.sampled_from([0, 1 << 14, 1 << 24]),
    )


@examples(50)
@given(DECODE_CASES, DECODE_LAUNCHES)
def test_L64_decode_equals_twin(case: PagedCase, launch: DecodeLaunch | None) -> None:
    from minipaged.kernels.attention.decode_triton import paged_decode_triton

    out = paged_decode_triton(*case.decode(), window=case.window, launch=launch)
    assert_close(out, paged_decode_torch(*case.decode(), window=case.window))


@pytest.mark.parametrize("overlapped", [False, True])
@examples(40)
@given(data=st.data(), case=PREFILL_CASES)
def test_L64_prefill_equals_twin(overlapped: bool, data: st.DataObject, case: PagedCase) -> None:
    from minipaged.kernels.attention.prefill_triton import paged_prefill_triton

    launch = data.draw(prefill_launches(overlapped))
    out = paged_prefill_triton(*case.prefill(), window=case.window, launch=launch)
    assert_close(out, paged_prefill_torch(*case.prefill(), window=case.window))


@pytest.mark.parametrize("overlapped", [False, True])
@pytest.mark.parametrize("pack", [1, 4])
@pytest.mark.parametrize("window", [None, 41])
def test_L64_prefill_over_tiles_of_every_kind(window: int | None, pack: int, overlapped: bool) -> None:
    """Tiles at the window's edge, tiles without masks, tiles at the diagonal. One query stands a position before a tile's last."""
    from minipaged.kernels.attention.prefill_triton import paged_prefill_triton

    launch = PrefillLaunch(64, 16, 1, 1, pack=pack, overlapped=overlapped, section_bytes=0)
    case = make_case([110, 33], [48, 33], kv_heads=1, group=4, head_dim=32, block_size=8, window=window)
    out = paged_prefill_triton(*case.prefill(), window=window, launch=launch)
    assert_close(out, paged_prefill_torch(*case.prefill(), window=window))


@examples(10)
@given(PREFILL_CASES)
def test_L64_prefill_as_the_launch_table_says_equals_twin(case: PagedCase) -> None:
    from minipaged.kernels.attention.prefill_triton import paged_prefill_triton

    out = paged_prefill_triton(*case.prefill(), window=case.window)
    assert_close(out, paged_prefill_torch(*case.prefill(), window=case.window))


@pytest.mark.parametrize("programs", [1, 3, 20])
@pytest.mark.parametrize("lengths", [[200], [0, 1, 200, 16, 17, 15], [64, 64, 64]])
def test_L64_split_decode_equals_twin(programs: int, lengths: list[int]) -> None:
    from minipaged.kernels.attention.decode_triton import paged_decode_triton

    launch = replace(SHORT_CHUNKS, programs_per_multiprocessor=programs)
    case = make_case(lengths, [1] * len(lengths), kv_heads=1, group=3, head_dim=32, block_size=8)
    assert_close(paged_decode_triton(*case.decode(), launch=launch), paged_decode_torch(*case.decode()))


@examples(50)
@given(st.lists(st.integers(0, 900), min_size=1, max_size=33), st.integers(1, 60))
def test_decode_cuts_rows_evenly_and_starts_the_longest_chunks_first(lengths: list[int], target: int) -> None:
    """Every chunk number is one row's, there are no more than the grid has programs, and their lengths' classes never rise."""
    from tests.kernels.chunk_order import chunks_kernel

    counts, ends = torch.full((2, len(lengths)), -1, dtype=torch.int32)
    rows = 1 << (len(lengths) - 1).bit_length()
    chunks_kernel[(1,)](counts, ends, torch.tensor(lengths, dtype=torch.int32), len(lengths), target, rows, 16, 32)
    chunk = max(32, -(-sum(lengths) // (16 * target)) * 16)
    started = 0
    longest_class = 3
    for end, count, length in sorted(zip(ends.tolist(), counts.tolist(), lengths, strict=True)):
        assert end - count == started
        started = end
        assert 2 * length < 3 * chunk * count, "no chunk is longer than one and a half"
        length_class = min(length // count * 8 // (3 * chunk), 3)  # below 3/8, 6/8, 9/8 of a chunk, longer
        assert length_class <= longest_class
        longest_class = length_class
    assert started <= target + len(lengths)


def test_a_plain_launch_is_for_few_long_rows_that_fill_the_gpu_once() -> None:
    from minipaged.kernels.attention.decode_triton import fills_one_wave

    slots = 4 * 132
    assert fills_one_wave(rows_and_heads=8, most_programs=8 * 128, slots=slots)  # 1 row of 16384, 8 KV heads
    assert not fills_one_wave(rows_and_heads=8, most_programs=8 * 16, slots=slots)  # 1 of 2048: not all slots
    assert not fills_one_wave(rows_and_heads=64 * 8, most_programs=64 * 8 * 32, slots=slots)  # 64 rows: several waves


@examples(12)
@given(DECODE_CASES, DECODE_LAUNCHES, st.integers(0, 9))
def test_L63_decode_sees_neither_physical_ids_nor_unused_slots(
    case: PagedCase, launch: DecodeLaunch | None, seed: int
) -> None:
    from minipaged.kernels.attention.decode_triton import paged_decode_triton

    out = paged_decode_triton(*case.decode(), window=case.window, launch=launch)
    for other in (case.permuted(seed), case.filled(1e30 if case.query.dtype == torch.float32 else 6e4)):
        assert torch.equal(out, paged_decode_triton(*other.decode(), window=case.window, launch=launch))


@examples(12)
@given(PREFILL_CASES, st.one_of(prefill_launches(False), prefill_launches(True)), st.integers(0, 9))
def test_L63_prefill_sees_neither_physical_ids_nor_unused_slots(
    case: PagedCase, launch: PrefillLaunch, seed: int
) -> None:
    from minipaged.kernels.attention.prefill_triton import paged_prefill_triton

    out = paged_prefill_triton(*case.prefill(), window=case.window, launch=launch)
    for other in (case.permuted(seed), case.filled(1e30 if case.query.dtype == torch.float32 else 6e4)):
        assert torch.equal(out, paged_prefill_triton(*other.prefill(), window=case.window, launch=launch))


@examples(20)
@given(st.data(), BLOCK_SIZES, st.integers(1, 4), st.integers(1, 9), st.sampled_from([32, 80, 256]), st.booleans())
def test_L64_write_kv_equals_twin(
    data: st.DataObject, block_size: int, num_blocks: int, kv_heads: int, head_dim: int, interleaved: bool
) -> None:
    from minipaged.kernels.cache.cache_write import write_kv_torch
    from minipaged.kernels.cache.cache_write_triton import write_kv_triton

    slots = data.draw(st.lists(st.integers(0, block_size * num_blocks - 1), unique=True, max_size=10))
    mapping = torch.tensor([s for slot in slots for s in (slot, -1)], dtype=torch.int64)
    shape = (num_blocks, 2, block_size, kv_heads, head_dim)
    written, expected = (torch.full(shape, math.nan, dtype=torch.float16) for _ in range(2))
    if not interleaved:
        written, expected = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (written, expected))
    key, value = torch.randn(len(mapping), 2 * kv_heads, head_dim, dtype=torch.float16).split(kv_heads, 1)
    write_kv_triton(key, value, written[:, 0], written[:, 1], mapping)
    write_kv_torch(key, value, expected[:, 0], expected[:, 1], mapping)
    assert torch.equal(written.view(torch.int16), expected.view(torch.int16))


@examples(20)
@given(st.permutations(range(1, 9)), st.integers(0, 4))
def test_L64_copy_blocks_equals_twin(order: list[int], copies: int) -> None:
    from minipaged.kernels.cache.block_copy import copy_blocks_torch
    from minipaged.kernels.cache.block_copy_triton import copy_blocks_triton

    pairs = torch.tensor([*zip(order, order[4:], strict=False)], dtype=torch.int64).view(-1, 2)[:copies]
    pairs = torch.cat([pairs, torch.zeros(2, 2, dtype=torch.int64)])  # padding: the null block onto itself
    copied = [
        torch.randn(9, 4, 2, 80),
        torch.randn(9, 4, 2, 80),
        torch.randint(0, 99, (9, 5), dtype=torch.int8),
        torch.randn(9, 2, 7)[:, 1],
        torch.randn(9, 3).to(torch.bfloat16),
    ]
    expected = [cache.clone() for cache in copied]
    copy_blocks_triton(copied, pairs)
    copy_blocks_torch(expected, pairs)
    for one, other in zip(copied, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("group", [1, 4])
def test_bfloat16_is_computed_in_float32_under_the_interpreter(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIPAGED_KERNELS", "triton")
    case = make_case([70, 9], [70, 3], kv_heads=1, group=group, head_dim=32, block_size=16, dtype=torch.bfloat16)
    decode = (case.query[:2], *case.decode()[1:])
    assert_close(paged_decode(*decode), paged_decode_torch(*decode))
    assert_close(paged_prefill(*case.prefill()), paged_prefill_torch(*case.prefill()))


def test_nothing_to_do_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIPAGED_KERNELS", "triton")
    case = make_case([], [], kv_heads=1, group=2, head_dim=32, block_size=4)
    assert paged_decode(*case.decode()).shape == (0, 2, 32)
    assert paged_prefill(*case.prefill()).shape == (0, 2, 32)
    none = torch.empty(0, 1, 32)
    write_kv(none, none, case.key_cache, case.value_cache, torch.empty(0, dtype=torch.int64))
    copy_blocks([case.key_cache], torch.empty(0, 2, dtype=torch.int64))


def test_block_sizes_that_are_no_powers_of_two_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIPAGED_KERNELS", "triton")
    case = make_case([7], [7], kv_heads=1, group=1, head_dim=32, block_size=3)
    new = torch.zeros(1, 1, 32)
    with pytest.raises(ValueError, match="block_size is 3"):
        paged_prefill(*case.prefill())
    with pytest.raises(ValueError, match="block_size is 3"):
        paged_decode(case.query[:1], *case.decode()[1:])
    with pytest.raises(ValueError, match="block_size is 3"):
        write_kv(new, new, case.key_cache, case.value_cache, torch.zeros(1, dtype=torch.int64))
