"""The compiled kernels over a quantized cache, on a CUDA GPU: against dense attention over what the codes stand for, and their twins."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from minipaged.kernels.attention import paged_decode, paged_prefill
from minipaged.kernels.cache import copy_blocks, rope_write_kv, write_kv
from minipaged.kernels.cache.cache_write import write_kv_torch
from minipaged.kernels.cache.quantize import LARGEST_CODE, Scales, dequantize
from minipaged.kernels.cache.rope_write import rope_write_kv_torch
from minipaged.lab.measure.timing import capture
from tests.kernels.paged_cases import PagedCase, assert_close, dense_attention
from tests.kernels.test_decode_shared import shared_case
from tests.kernels.test_gpu import DTYPES, SHAPES, gpu_case, names
from tests.kernels.test_quantized import empty_like_cache, quantized

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.usefixtures("unset_choice"),
]


def exact(codes: PagedCase, scales: Scales) -> PagedCase:
    """What the codes stand for, in float32."""
    key, value = (
        dequantize(cache, scale.transpose(1, 2))
        for cache, scale in zip((codes.key_cache, codes.value_cache), scales, strict=True)
    )
    return replace(codes, key_cache=key, value_cache=value)


@pytest.mark.parametrize("codes", LARGEST_CODE, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=names)
def test_L60_attention_over_codes_on_the_gpu(
    shape: tuple[int, int, int, int, int | None, bool], dtype: torch.dtype, codes: torch.dtype
) -> None:
    for prefill, run in ((False, paged_decode), (True, paged_prefill)):
        case = gpu_case(shape, dtype, prefill=prefill)
        coded, scales, _ = quantized(case, codes)
        arguments = coded.prefill() if prefill else coded.decode()
        out = run(*arguments, scales=scales, window=case.window)  # type: ignore[operator]
        assert_close(out, dense_attention(exact(coded, scales)))


@pytest.mark.parametrize("codes", LARGEST_CODE, ids=str)
def test_L60_large_and_small_numbers_on_the_gpu(codes: torch.dtype) -> None:
    """Queries beyond float16, and values far from one."""
    case = gpu_case((128, 2, 4, 16, None, False), torch.bfloat16, prefill=False)
    for of_queries, of_keys, of_values in ((1e6, 1e-6, 1.0), (1e-6, 1e6, 1.0), (1.0, 1.0, 1e-2), (1.0, 1.0, 1e3)):
        scaled = replace(
            case,
            query=case.query * of_queries,
            key_cache=case.key_cache * of_keys,
            value_cache=case.value_cache * of_values,
        )
        coded, scales, _ = quantized(scaled, codes)
        out = paged_decode(*coded.decode(), scales=scales)
        assert_close(out / of_values, dense_attention(exact(coded, scales)) / of_values)


@pytest.mark.parametrize("codes", LARGEST_CODE, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_L64_writes_of_codes_on_the_gpu(head_dim: int, dtype: torch.dtype, codes: torch.dtype) -> None:
    torch.manual_seed(0)
    tokens, heads, kv_heads = 37, 8, 2
    query, key, value = torch.randn(tokens, heads + 2 * kv_heads, head_dim, device="cuda", dtype=dtype).split(
        [heads, kv_heads, kv_heads], 1
    )
    key[3], value[5, 1] = 0, float("nan")
    slots = torch.randperm(64, device="cuda")[:tokens]
    slots[7] = -1
    found, expected = (empty_like_cache(key, codes, 16, 4) for _ in range(2))
    write_kv(key, value, *found[:2], slots, scales=found[2])
    write_kv_torch(key, value, *expected[:2], slots, expected[2])
    for one, other in zip((*found[:2], *found[2]), (*expected[:2], *expected[2]), strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=0, atol=0, equal_nan=True)
    positions = torch.arange(tokens, device="cuda")
    angles = torch.rand(tokens, head_dim // 2, device="cuda") * 6
    table = torch.cat([angles.cos(), angles.sin()], -1)
    queries = [query.clone(), query.clone()]
    rope_write_kv(queries[0], key, value, positions, table, *found[:2], slots, scales=found[2])
    rope_write_kv_torch(queries[1], key, value, positions, table, *expected[:2], slots, scales=expected[2])
    assert_close(*queries)
    for cache, other, scale, its in zip(found[:2], expected[:2], found[2], expected[2], strict=True):
        torch.testing.assert_close(scale, its, rtol=1e-2, atol=0, equal_nan=True)
        off = (cache.float() - other.float()).abs()  # a rotated key may be rounded to its neighbour first
        assert (off > (1 if codes == torch.int8 else 0)).float().mean() < 0.05
    before = [tensor.clone() for tensor in (*found[:2], *found[2])]
    copy_blocks([*found[:2], *found[2]], torch.tensor([[1, 3], [0, 0]]))
    for tensor, was in zip((*found[:2], *found[2]), before, strict=True):
        torch.testing.assert_close(tensor[3].float(), was[1].float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("codes", LARGEST_CODE, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kv_heads", "group", "head_dim"), [(2, 4, 128), (4, 1, 64), (2, 3, 96), (1, 7, 256)])
def test_L60_common_pages_of_codes_on_the_gpu(
    kv_heads: int, group: int, head_dim: int, dtype: torch.dtype, codes: torch.dtype
) -> None:
    heads = {"kv_heads": kv_heads, "group": group, "head_dim": head_dim}
    case, shared = shared_case([(40, 90), (5, 33)], 3, block_size=16, dtype=dtype, device="cuda", **heads)  # type: ignore[arg-type]
    coded, scales, _ = quantized(case, codes)
    out = paged_decode(*coded.decode(), scales=scales, shared=shared)
    assert_close(out, dense_attention(exact(coded, scales)))


@pytest.mark.parametrize("codes", LARGEST_CODE, ids=str)
def test_decode_over_codes_in_a_graph(codes: torch.dtype) -> None:
    case = gpu_case((128, 2, 4, 16, None, False), torch.bfloat16, prefill=False)
    coded, scales, _ = quantized(case, codes)
    out = torch.zeros_like(case.query)
    graph = capture(lambda: paged_decode(*coded.decode(), scales=scales, out=out))
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, paged_decode(*coded.decode(), scales=scales))
