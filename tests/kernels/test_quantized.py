"""A quantized cache: what is written is off by no more than rounding, and attention over it is attention over what its codes stand for."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minipaged.kernels.attention import paged_decode, paged_prefill
from minipaged.kernels.attention.decode import paged_decode_torch
from minipaged.kernels.attention.prefill import is_worth_writing_out, paged_prefill_torch
from minipaged.kernels.cache import copy_blocks, rope_write_kv, write_kv
from minipaged.kernels.cache.dequantize import dequantize_pages_torch
from minipaged.kernels.cache.quantize import LARGEST_CODE, Scales, dequantize, quantize
from minipaged.kernels.launch_table import DecodeLaunch, PrefillLaunch
from tests.kernels.paged_cases import FEW_HEADS, PagedCase, assert_close, examples, make_case, paged_cases
from tests.kernels.test_decode_shared import shared_case
from tests.kernels.test_triton_interpreted import (
    BLOCK_SIZES,
    DECODE_CASES,
    DECODE_LAUNCHES,
    PREFILL_CASES,
    SHORT_CHUNKS,
    prefill_launches,
)

pytestmark = pytest.mark.usefixtures("unset_choice")

CODES = st.sampled_from(list(LARGEST_CODE))
interpreted = pytest.mark.usefixtures("interpreted")
ANY_BLOCK_SIZE = st.integers(1, 40) | st.sampled_from([100, 256])
TWIN_DTYPES = (torch.float32, torch.float32, torch.float16, torch.bfloat16)


def quantized(case: PagedCase, dtype: torch.dtype) -> tuple[PagedCase, Scales, PagedCase]:
    """The case with codes and their scales, both of them poisoned where nobody owns a slot; and with what the codes stand for."""
    caches, scales, plain = [], [], []
    for cache in (case.key_cache, case.value_cache):
        unused = cache.isnan().all(-1)
        codes, scale = quantize(cache, dtype)
        stands_for = dequantize(codes, scale).to(case.query.dtype)
        assert stands_for.isnan().all(-1).equal(unused)
        junk = torch.full_like(codes.view(torch.int8), 0x7F)  # NaN of float8, the largest of int8
        caches.append(torch.where(unused[..., None], junk, codes.view(torch.int8)).view(dtype))
        scales.append(scale.transpose(1, 2).contiguous())  # NaN where nobody owns the slot
        plain.append(stands_for)
    with_codes = replace(case, key_cache=caches[0], value_cache=caches[1])
    return with_codes, (scales[0], scales[1]), replace(case, key_cache=plain[0], value_cache=plain[1])


def test_zeros_tiny_and_large_heads_come_back() -> None:
    for dtype, largest in LARGEST_CODE.items():
        x = torch.stack(
            [
                torch.zeros(8),
                torch.full((8,), 1e-45),
                torch.full((8,), 3e-43),
                torch.full((8,), 3e38),
                torch.arange(8.0),
            ]
        )
        codes, scale = quantize(x, dtype)
        assert codes.float().abs().max() <= largest
        found = dequantize(codes, scale)
        assert found.isfinite().all()
        assert not found[0].any()
        torch.testing.assert_close(found[3:], x[3:], rtol=0.07, atol=0.03)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_read_as_nan(bad: float) -> None:
    for dtype in LARGEST_CODE:
        x = torch.ones(2, 8)
        x[0, 3] = bad
        codes, scale = quantize(x, dtype)
        assert dequantize(codes, scale)[0].isnan().all()
        assert torch.equal(dequantize(codes, scale)[1], x[1])


@examples(100)
@given(st.lists(st.floats(-(2.0**126), 2.0**126, width=32), min_size=1, max_size=40), CODES)
def test_L60_a_round_trip_is_off_by_half_a_step_at_most(numbers: list[float], dtype: torch.dtype) -> None:
    x = torch.tensor([numbers], dtype=torch.float32)
    codes, scale = quantize(x, dtype)
    off = (dequantize(codes, scale).double() - x.double()).abs()
    absmax = float(x.abs().max())
    if absmax < 1e-36:  # scales below float32's normal numbers are coarse themselves
        return
    # half a code of int8; of float8 a sixteenth of the number, or half of its smallest step
    allowed = (
        0.5 * scale.double()[:, None]
        if dtype == torch.int8
        else torch.maximum(x.double().abs() / 16, scale[:, None] * 2.0**-10)
    )
    assert (off <= allowed * (1 + 1e-5)).all()


@examples(60)
@given(paged_cases(prefill=False, block_sizes=ANY_BLOCK_SIZE, dtypes=TWIN_DTYPES, longest=300, most_rows=8), CODES)
def test_L60_decode_twin_over_codes_equals_decode_over_what_they_stand_for(case: PagedCase, dtype: torch.dtype) -> None:
    codes, scales, plain = quantized(case, dtype)
    found = paged_decode(*codes.decode(), scales=scales, window=case.window)
    assert torch.equal(found, paged_decode(*plain.decode(), window=case.window))


@examples(60)
@given(paged_cases(prefill=True, block_sizes=ANY_BLOCK_SIZE, dtypes=TWIN_DTYPES, longest=300, most_rows=5), CODES)
def test_L60_prefill_twin_over_codes_equals_prefill_over_what_they_stand_for(
    case: PagedCase, dtype: torch.dtype
) -> None:
    codes, scales, plain = quantized(case, dtype)
    found = paged_prefill(*codes.prefill(), scales=scales, window=case.window)
    assert torch.equal(found, paged_prefill(*plain.prefill(), window=case.window))


@interpreted
@examples(50)
@given(DECODE_CASES, DECODE_LAUNCHES, CODES)
def test_L60_decode_over_codes_equals_decode_over_what_they_stand_for(
    case: PagedCase, launch: DecodeLaunch | None, dtype: torch.dtype
) -> None:
    from minipaged.kernels.attention.decode_triton import paged_decode_triton

    codes, scales, plain = quantized(case, dtype)
    out = paged_decode_triton(*codes.decode(), scales=scales, window=case.window, launch=launch)
    assert_close(out, paged_decode_triton(*plain.decode(), window=case.window, launch=launch))
    assert_close(out, paged_decode_torch(*codes.decode(), scales=scales, window=case.window))


@interpreted
@pytest.mark.parametrize("overlapped", [False, True])
@examples(40)
@given(data=st.data(), case=PREFILL_CASES, dtype=CODES)
def test_L60_prefill_over_codes_equals_prefill_over_what_they_stand_for(
    overlapped: bool, data: st.DataObject, case: PagedCase, dtype: torch.dtype
) -> None:
    from minipaged.kernels.attention.prefill_triton import paged_prefill_triton

    launch = data.draw(prefill_launches(overlapped))
    codes, scales, plain = quantized(case, dtype)
    out = paged_prefill_triton(*codes.prefill(), scales=scales, window=case.window, launch=launch)
    assert_close(out, paged_prefill_triton(*plain.prefill(), window=case.window, launch=launch))
    assert_close(out, paged_prefill_torch(*codes.prefill(), scales=scales, window=case.window))


@interpreted
@pytest.mark.parametrize("dtype", LARGEST_CODE)
@pytest.mark.parametrize("overlapped", [False, True])
@pytest.mark.parametrize("window", [None, 41])
def test_L60_prefill_over_tiles_of_every_kind(window: int | None, overlapped: bool, dtype: torch.dtype) -> None:
    """Tiles at the window's edge, tiles without masks, tiles at the diagonal."""
    from minipaged.kernels.attention.prefill_triton import paged_prefill_triton

    launch = PrefillLaunch(64, 16, 1, 1, overlapped=overlapped, section_bytes=0)
    case = make_case([110, 33], [48, 33], kv_heads=2, group=4, head_dim=32, block_size=8, window=window)
    codes, scales, plain = quantized(case, dtype)
    out = paged_prefill_triton(*codes.prefill(), scales=scales, window=window, launch=launch)
    assert_close(out, paged_prefill_torch(*plain.prefill(), window=window))


@interpreted
@pytest.mark.parametrize("dtype", LARGEST_CODE)
@pytest.mark.parametrize("lengths", [[200], [0, 1, 200, 16, 17, 15], [64, 64, 64]])
def test_L60_split_decode_over_codes(lengths: list[int], dtype: torch.dtype) -> None:
    from minipaged.kernels.attention.decode_triton import paged_decode_triton

    case = make_case(lengths, [1] * len(lengths), kv_heads=2, group=3, head_dim=32, block_size=8)
    codes, scales, plain = quantized(case, dtype)
    assert_close(
        paged_decode_triton(*codes.decode(), scales=scales, launch=SHORT_CHUNKS), paged_decode_torch(*plain.decode())
    )


@interpreted
@pytest.mark.parametrize("dtype", LARGEST_CODE)
@pytest.mark.parametrize("group", [1, 4])
def test_bfloat16_over_codes_is_computed_in_float32_under_the_interpreter(
    group: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINIPAGED_KERNELS", "triton")
    case = make_case([70, 9], [70, 3], kv_heads=1, group=group, head_dim=32, block_size=16, dtype=torch.bfloat16)
    codes, scales, _ = quantized(case, dtype)
    decode = (codes.query[:2], *codes.decode()[1:])
    assert_close(paged_decode(*decode, scales=scales), paged_decode_torch(*decode, scales=scales))
    assert_close(paged_prefill(*codes.prefill(), scales=scales), paged_prefill_torch(*codes.prefill(), scales=scales))


@interpreted
@pytest.mark.parametrize("launch", [None, SHORT_CHUNKS], ids=["table", "short"])
@pytest.mark.parametrize(("query", "code"), itertools.product([torch.float32, torch.float16], LARGEST_CODE), ids=str)
def test_L60_common_pages_of_codes_are_read_once(
    query: torch.dtype, code: torch.dtype, launch: DecodeLaunch | None
) -> None:
    from minipaged.kernels.attention.decode_triton import paged_decode_triton

    case, shared = shared_case([(3, 4), (2, 1)], 1, kv_heads=2, group=2, head_dim=32, block_size=8, dtype=query)
    codes, scales, plain = quantized(case, code)
    out = paged_decode_triton(*codes.decode(), scales=scales, shared=shared, launch=launch)
    assert_close(out, paged_decode_torch(*plain.decode()))


@interpreted
@examples(20)
@given(PREFILL_CASES, CODES)
def test_L64_dequantized_pages_equal_twin(case: PagedCase, dtype: torch.dtype) -> None:
    from minipaged.kernels.cache.dequantize_triton import dequantize_pages_triton

    if case.block_tables.dim() == 3:
        case = replace(case, block_tables=case.block_tables[:, 0].contiguous())
    codes, scales, _ = quantized(case, dtype)
    paged = (codes.key_cache, codes.value_cache, scales, codes.block_tables, codes.context_lens, case.query.dtype)
    found, expected = dequantize_pages_triton(*paged), dequantize_pages_torch(*paged)
    block_size = codes.key_cache.shape[1]
    for row, length in enumerate(case.context_lens.tolist()):
        pages = expected[2][row, : -(-length // block_size)].long()
        assert torch.equal(found[2][row, : len(pages)].long(), pages)
        for one, other in zip(found[:2], expected[:2], strict=True):
            torch.testing.assert_close(one[pages], other[pages], rtol=0, atol=0, equal_nan=True)


@interpreted
@pytest.mark.parametrize("dtype", LARGEST_CODE)
@pytest.mark.parametrize("worth", [False, True])
def test_L60_long_chunks_over_codes_written_out(
    worth: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINIPAGED_KERNELS", "triton")
    monkeypatch.setattr("minipaged.kernels.attention.prefill.LONG_CHUNK", 32 if worth else 1000)
    case = make_case([70, 33], [40, 33], kv_heads=2, group=2, head_dim=32, block_size=8, dtype=torch.float16)
    codes, scales, plain = quantized(case, dtype)
    assert is_worth_writing_out(codes.query, codes.key_cache, codes.block_tables, codes.max_query_len) is worth
    out = paged_prefill(*codes.prefill(), scales=scales)
    assert_close(out, paged_prefill_torch(*plain.prefill()))
    if worth:
        assert torch.equal(out, paged_prefill(*plain.prefill()))


def empty_like_cache(
    new: Tensor, dtype: torch.dtype, block_size: int, num_blocks: int
) -> tuple[Tensor, Tensor, Scales]:
    """Empty caches of `dtype` and their scales, for heads like `new`: [tokens, kv_heads, head_dim]."""
    _, kv_heads, head_dim = new.shape
    key, value = torch.zeros(2, num_blocks, block_size, kv_heads, head_dim, device=new.device).to(dtype)
    key_scale, value_scale = torch.full((2, num_blocks, kv_heads, block_size), math.nan, device=new.device)
    return key, value, (key_scale, value_scale)


def assert_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """The same numbers; a zero may be -0 in one of them."""
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=0, atol=0, equal_nan=True)


@examples(40)
@given(st.data(), st.integers(1, 20), st.integers(1, 6), st.sampled_from(TWIN_DTYPES), CODES)
def test_write_kv_puts_codes_and_scales_into_their_slots_and_no_others(
    data: st.DataObject, block_size: int, num_blocks: int, dtype: torch.dtype, code_dtype: torch.dtype
) -> None:
    slots = data.draw(st.lists(st.integers(0, block_size * num_blocks - 1), unique=True))
    mapping = torch.tensor([s for slot in slots for s in (slot, -1)], dtype=torch.int64)
    key, value = torch.randn(2, len(mapping), 3, 32).to(dtype)
    key_cache, value_cache, scales = empty_like_cache(key, code_dtype, block_size, num_blocks)
    write_kv(key, value, key_cache, value_cache, mapping, scales=scales)
    for new, cache, scale in zip((key, value), (key_cache, value_cache), scales, strict=True):
        rows, row_scales = cache.reshape(-1, 3, 32), scale.transpose(1, 2).reshape(-1, 3)
        codes, expected = quantize(new[::2], code_dtype)
        assert_same((rows[mapping[::2]], row_scales[mapping[::2]]), (codes, expected))
        assert int(row_scales.isnan().all(-1).sum()) == block_size * num_blocks - len(slots)


@interpreted
@examples(20)
@given(
    st.data(),
    BLOCK_SIZES,
    st.integers(1, 4),
    st.integers(1, 9),
    st.sampled_from([32, 80, 256]),
    st.sampled_from([torch.float32, torch.float16]),
    CODES,
)
def test_L64_write_kv_of_codes_equals_twin(
    data: st.DataObject,
    block_size: int,
    num_blocks: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    code_dtype: torch.dtype,
) -> None:
    from minipaged.kernels.cache.cache_write import write_kv_torch
    from minipaged.kernels.cache.cache_write_triton import write_kv_triton

    slots = data.draw(st.lists(st.integers(0, block_size * num_blocks - 1), unique=True, max_size=10))
    mapping = torch.tensor([s for slot in slots for s in (slot, -1)], dtype=torch.int64)
    key, value = torch.randn(len(mapping), 2 * kv_heads, head_dim, dtype=dtype).split(kv_heads, 1)
    if len(mapping) > 2:
        key[0, 0], value[2, 0, 1] = 0, data.draw(st.sampled_from([math.nan, math.inf, -math.inf, 6e4, 1e-7]))
    found, expected = (empty_like_cache(key, code_dtype, block_size, num_blocks) for _ in range(2))
    write_kv_triton(key, value, *found[:2], mapping, found[2])
    write_kv_torch(key, value, *expected[:2], mapping, expected[2])
    assert_same((*found[:2], *found[2]), (*expected[:2], *expected[2]))


@interpreted
@examples(15)
@given(st.integers(0, 99), BLOCK_SIZES, FEW_HEADS, st.sampled_from([32, 80, 128]), st.booleans(), CODES)
def test_L64_rope_write_of_codes_equals_twin(
    seed: int, block_size: int, heads: tuple[int, int], head_dim: int, norms: bool, code_dtype: torch.dtype
) -> None:
    from minipaged.kernels.cache.rope_write import rope_write_kv_torch
    from minipaged.kernels.cache.rope_write_triton import rope_write_kv_triton

    torch.manual_seed(seed)
    kv_heads, group = heads
    tokens, num_blocks = 5, -(-5 // block_size) + 1
    query, key, value = torch.randn(tokens, (group + 2) * kv_heads, head_dim).split(
        [group * kv_heads, kv_heads, kv_heads], 1
    )
    slots = torch.randperm(block_size * num_blocks)[:tokens]
    slots[seed % tokens] = -1
    positions = torch.randint(0, 30, (tokens,))
    angles = torch.rand(30, head_dim // 2) * 6
    norm = {"query_norm": torch.rand(head_dim), "key_norm": torch.rand(head_dim), "eps": 1e-5} if norms else {}
    found, expected = (empty_like_cache(key, code_dtype, block_size, num_blocks) for _ in range(2))
    queries = [query.clone(), query.clone()]
    table = torch.cat([angles.cos(), angles.sin()], -1)
    for run, into, rotated in zip((rope_write_kv_triton, rope_write_kv_torch), (found, expected), queries, strict=True):
        run(rotated, key, value, positions, table, *into[:2], slots, scales=into[2], **norm)
    assert_close(*queries)
    torch.testing.assert_close(found[2], expected[2], rtol=1e-5, atol=0, equal_nan=True)
    # Sines may differ in their last bit, and then a code that lay between two may be its neighbour.
    for one, other, scale in zip(found[:2], expected[:2], expected[2], strict=True):
        off = (one.float() - other.float()).abs()
        assert (off <= (1 if code_dtype == torch.int8 else other.float().abs() / 7 + 2**-9)).all()
        assert (off > 0).float().mean() < 0.01
        assert int(scale.isfinite().sum()) == (tokens - 1) * kv_heads


def test_copy_blocks_takes_codes_and_scales() -> None:
    codes, scales = torch.randn(5, 4, 2, 32).to(torch.float8_e4m3fn), torch.rand(5, 2, 4)
    before = codes.clone(), scales.clone()
    copy_blocks([codes, scales], torch.tensor([[1, 3]]))
    assert_same((codes[3], scales[3]), (before[0][1], before[1][1]))


def test_a_cache_of_codes_needs_its_scales_and_no_other_takes_any() -> None:
    case = make_case([7], [7], kv_heads=1, group=2, head_dim=32, block_size=4)
    codes, scales, plain = quantized(case, torch.int8)
    new, slot = case.query[:1, :1], torch.zeros(1, dtype=torch.int64)
    for arguments, given_scales, word in (
        (codes, None, "scales go with"),
        (plain, scales, "scales go with"),
        (codes, (scales[0], scales[1].double()), "value scales are torch.float64"),
        (codes, (scales[0].transpose(1, 2), scales[1]), "key scales are"),
        (codes, (scales[0], scales[1][:, :, :1].expand_as(scales[1])), "strides"),
    ):
        with pytest.raises(ValueError, match=word):
            paged_prefill(*arguments.prefill(), scales=given_scales)
        with pytest.raises(ValueError, match=word):
            paged_decode(arguments.query[:1], *arguments.decode()[1:], scales=given_scales)
        with pytest.raises(ValueError, match=word):
            write_kv(new, new, arguments.key_cache, arguments.value_cache, slot, scales=given_scales)
        caches = (arguments.key_cache, arguments.value_cache)
        with pytest.raises(ValueError, match=word):
            rope_write_kv(case.query[:1], new, new, slot, torch.ones(1, 32), *caches, slot, scales=given_scales)
    with pytest.raises(ValueError, match=r"but value is torch\.float16"):
        write_kv(new, new.half(), codes.key_cache, codes.value_cache, slot, scales=scales)
    with pytest.raises(ValueError, match=r"out is torch\.float16"):
        paged_prefill(*codes.prefill(), scales=scales, out=case.query.half())
