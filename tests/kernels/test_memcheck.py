"""One small call of every kernel on a GPU, with odd sizes at the end of their allocations: what compute-sanitizer is to watch.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \\
        python -m pytest -m gpu -n 0 tests/kernels/test_memcheck.py

Without the cache every tensor is an allocation of its own, so a read or write past its end is seen. The outputs are compared with the
twins' on the CPU, so the file is also a quick check of all kernels.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import minipaged.kernels.linear as linear_room
from minipaged.kernels import attention, cache, elementwise, sampling
from minipaged.kernels.attention import paged_decode, paged_prefill
from minipaged.kernels.cache import copy_blocks, rope_write_kv, write_kv
from minipaged.kernels.elementwise import embed_tokens, rms_norm, silu_mul
from minipaged.kernels.linear import (
    PackedMatrix,
    dequantize,
    gated_linear,
    linear,
    pack,
    packed_gated_linear,
    packed_linear,
)
from minipaged.kernels.sampling import draw_tokens, truncation_threshold
from tests.kernels.paged_cases import assert_close, make_case

DTYPES = [torch.float32, torch.bfloat16]
EPS = 1e-5
Prepare = Callable[[torch.dtype], tuple[Callable[..., object], list[Tensor]]]
PREPARED: dict[str, Prepare] = {}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def prepared(prepare: Prepare) -> Prepare:
    """Register a call: its function takes the tensors, and returns its outputs or changes the tensors."""
    PREPARED[prepare.__name__] = prepare
    return prepare


def decode(
    dtype: torch.dtype, contexts: list[int], kv_heads: int, group: int, window: int | None = None
) -> tuple[Callable[..., object], list[Tensor]]:
    case = make_case(
        contexts, [1] * len(contexts), kv_heads=kv_heads, group=group, head_dim=64, block_size=16, dtype=dtype,
        window=window, unused_entry=0,
    )  # fmt: skip
    *tensors, scale = case.decode()
    return lambda *given: paged_decode(*given, scale, window=window), list(tensors)


@prepared
def decode_of_single_heads(dtype: torch.dtype) -> tuple[Callable[..., object], list[Tensor]]:
    return decode(dtype, [1, 0, 17, 65, 31], 3, 1)


@prepared
def decode_of_groups(dtype: torch.dtype) -> tuple[Callable[..., object], list[Tensor]]:
    return decode(dtype, [1, 0, 17, 65, 31], 2, 4)


@prepared
def decode_in_chunks(dtype: torch.dtype) -> tuple[Callable[..., object], list[Tensor]]:
    return decode(dtype, [3001], 1, 4)


@prepared
def decode_in_a_window(dtype: torch.dtype) -> tuple[Callable[..., object], list[Tensor]]:
    return decode(dtype, [300, 41], 2, 2, window=40)


@prepared
def prefill(dtype: torch.dtype) -> tuple[Callable[..., object], list[Tensor]]:
    case = make_case(
        [1, 65, 70, 33], [1, 65, 7, 33], kv_heads=2, group=3, head_dim=80, block_size=16, dtype=dtype, unused_entry=0
    )
    query, keys, values, tables, lengths, starts, longest, scale = case.prefill()
    return lambda *given: paged_prefill(*given, longest, scale), [query, keys, values, tables, lengths, starts]


@prepared
def prefill_of_like_rows(dtype: torch.dtype) -> tuple[Callable[..., object], list[Tensor]]:
    """Few tiles are empty: in sixteen bits it is the Hopper kernel's on a Hopper GPU."""
    case = make_case(
        [65, 70, 133], [65, 64, 69], kv_heads=2, group=4, head_dim=64, block_size=16, dtype=dtype, unused_entry=0
    )
    query, keys, values, tables, lengths, starts, longest, scale = case.prefill()
    return lambda *given: paged_prefill(*given, longest, scale), [query, keys, values, tables, lengths, starts]


@prepared
def cache_write(dtype: torch.dtype) -> tuple[Callable[..., object], list[Tensor]]:
    key, value, caches = normal(0, 5, 3, 80), normal(1, 5, 3, 80), normal(2, 2, 3, 4, 3, 80)
    slots = torch.tensor([11, -1, 0, 7, 3])
    return write_kv, [key.to(dtype), value.to(dtype), *caches.to(dtype).unbind(0), slots]


@prepared
def block_copy(dtype: torch.dtype) -> tuple[Callable[..., object], list[Tensor]]:
    pairs = torch.tensor([[0, 4], [1, 3]])
    one, other = normal(0, 5, 3, 2, 33).to(dtype), normal(1, 5, 7).to(dtype)
    return lambda a, b: copy_blocks([a, b], pairs), [one, other]


def rope(dtype: torch.dtype, **norms: Tensor) -> tuple[Callable[..., object], list[Tensor]]:
    merged, caches = normal(0, 5, 7, 64).to(dtype), normal(1, 2, 2, 4, 2, 64).to(dtype)
    angle = torch.arange(9)[:, None] * 10000.0 ** (-torch.arange(0, 64, 2) / 64)
    cos_sin = torch.cat([angle.cos(), angle.sin()], 1)
    places = [torch.tensor([8, 0, 3, 8, 1]), cos_sin, *caches.unbind(0), torch.tensor([7, -1, 0, 5, 2])]
    # contiguous parts of their own, so that a read past a part's end is one past an allocation's end
    parts = [part.contiguous() for part in merged.split([3, 2, 2], 1)]
    names = list(norms)

    def call(*given: Tensor) -> None:
        rope_write_kv(*given[:8], **dict(zip(names, given[8:], strict=True)), **({"eps": EPS} if names else {}))

    return call, [*parts, *places, *norms.values()]


@prepared
def rope_write(dtype: torch.dtype) -> tuple[Callable[..., object], list[Tensor]]:
    return rope(dtype)


@prepared
def normed_rope_write(dtype: torch.dtype) -> tuple[Callable[..., object], list[Tensor]]:
    return rope(dtype, query_norm=normal(3, 64).to(dtype), key_norm=normal(4, 64).to(dtype))


@prepared
def norm(dtype: torch.dtype) -> tuple[Callable[..., object], list[Tensor]]:
    return lambda x, weight: rms_norm(x, weight, EPS), [normal(0, 5, 577).to(dtype), normal(1, 577).to(dtype)]


@prepared
def gate(dtype: torch.dtype) -> tuple[Callable[..., object], list[Tensor]]:
    return silu_mul, [normal(0, 5, 2 * 531).to(dtype)]


@prepared
def embedding(dtype: torch.dtype) -> tuple[Callable[..., object], list[Tensor]]:
    ids, batch_indices = torch.tensor([0, -1, 12, -1], dtype=torch.int32), torch.tensor([0, 4, 1, 2], dtype=torch.int32)
    return embed_tokens, [normal(0, 13, 577).to(dtype), ids, torch.tensor([1, 2, 3, 4, 12]), batch_indices]


@prepared
def draw(dtype: torch.dtype) -> tuple[Callable[..., object], list[Tensor]]:
    temperature, uniform = (
        torch.tensor([0.7, 0.0, 1.3], dtype=torch.float64),
        torch.tensor([0.2, 0.5, 0.99], dtype=torch.float64),
    )
    return draw_tokens, [3 * normal(0, 3, 5003).to(dtype), temperature, uniform]


@prepared
def most_likely(dtype: torch.dtype) -> tuple[Callable[..., object], list[Tensor]]:
    return draw_tokens, [normal(0, 3, 5003).to(dtype)]


@prepared
def truncation(dtype: torch.dtype) -> tuple[Callable[..., object], list[Tensor]]:
    columns = [[0.7, 0.0, 1.3], [50, 3, 0], [0.9, 0.5, 0.8], [0.0, 0.0, 0.01]]  # temperature, top-k, top-p, min-p
    asked = torch.tensor(columns, dtype=torch.float64).unbind(0)
    # What stays is compared: the least logit itself may be any number between two logits.
    return lambda logits, *columns: logits >= truncation_threshold(logits, *columns)[:, None], [
        3 * normal(0, 3, 5003).to(dtype),
        *asked,
    ]


@prepared
def truncated_draw(dtype: torch.dtype) -> tuple[Callable[..., object], list[Tensor]]:
    call, (logits, temperature, uniform) = draw(dtype)
    return call, [logits, temperature, uniform, torch.tensor([2.0, 1.0, float("-inf")])]


def product(dtype: torch.dtype, rows: int) -> tuple[Callable[..., object], list[Tensor]]:
    x, weight, weights, residual = normal(0, rows, 576), normal(1, 771, 576) / 24, normal(2, 576), normal(3, rows, 771)
    return (
        lambda x, w, n, r: linear(x, w, norm=n, eps=EPS, residual=r),
        [x.to(dtype), weight.to(dtype), weights.to(dtype), residual.to(dtype)],
    )


@prepared
def product_of_one_row(dtype: torch.dtype) -> tuple[Callable[..., object], list[Tensor]]:
    return product(dtype, 1)


@prepared
def product_of_few_rows(dtype: torch.dtype) -> tuple[Callable[..., object], list[Tensor]]:
    return product(dtype, 5)


@prepared
def gated_product_of_one_row(dtype: torch.dtype) -> tuple[Callable[..., object], list[Tensor]]:
    x, weight = normal(0, 1, 576).to(dtype), (normal(1, 2 * 387, 576) / 24).to(dtype)
    return lambda *given: gated_linear(*given[:2], norm=given[2], eps=EPS), [
        x,
        weight,
        normal(2, 576).to(dtype),
    ]


def packed(dtype: torch.dtype, rows: int, product: Callable[..., Tensor]) -> tuple[Callable[..., object], list[Tensor]]:
    codes = torch.randint(0, 16, (2 * 40, 160), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    scales = torch.stack((normal(4, 80, 5).abs() / 40 + 0.01, torch.full((80, 5), 8.0)), -1).half()
    words, scales, *rest = pack(codes, scales, 4, has_zero_points=True)
    return lambda x, words, scales: product(x, PackedMatrix(words, scales, *rest)), [
        normal(5, rows, 160).to(dtype),
        words,
        scales,
    ]


@prepared
def packed_product_of_one_row(dtype: torch.dtype) -> tuple[Callable[..., object], list[Tensor]]:
    return packed(dtype, 1, packed_linear)


@prepared
def packed_product_of_few_rows(dtype: torch.dtype) -> tuple[Callable[..., object], list[Tensor]]:
    return packed(dtype, 5, packed_linear)


@prepared
def packed_product_of_many_rows(dtype: torch.dtype) -> tuple[Callable[..., object], list[Tensor]]:
    return packed(dtype, 40, packed_linear)


@prepared
def packed_gated_product(dtype: torch.dtype) -> tuple[Callable[..., object], list[Tensor]]:
    return packed(dtype, 1, packed_gated_linear)


@prepared
def dequantized(dtype: torch.dtype) -> tuple[Callable[..., object], list[Tensor]]:
    return packed(dtype, 1, lambda x, matrix: dequantize(matrix, x.dtype))


def outputs(call: Callable[..., object], tensors: list[Tensor]) -> list[Tensor]:
    """What the call returned, and the tensors it was given, which it may have changed."""
    result = call(*tensors)
    returned = [] if result is None else list(result) if isinstance(result, tuple) else [result]
    return [x for x in (*returned, *tensors) if isinstance(x, Tensor)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.usefixtures("unset_choice")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PREPARED)
def test_within_its_allocations(name: str, dtype: torch.dtype) -> None:
    call, tensors = PREPARED[name](dtype)
    found = outputs(call, [x.cuda() for x in tensors])
    torch.cuda.synchronize()
    for one, other in zip(found, outputs(call, tensors), strict=True):
        if other.dtype in DTYPES:
            assert_close(one.cpu().nan_to_num(), other.nan_to_num().double())
        else:
            assert torch.equal(one.cpu(), other)


def test_every_kernel_is_here() -> None:
    """Each public function of the kernels is called by one of the above."""
    names = {
        name for prepare in (*PREPARED.values(), decode, rope, product, packed) for name in prepare.__code__.co_names
    }
    nested = {
        name
        for prepare in (*PREPARED.values(), decode, rope, product, packed)
        for constant in prepare.__code__.co_consts
        if hasattr(constant, "co_names")
        for name in constant.co_names
    }
    rooms = (attention, cache, elementwise, linear_room, sampling)
    assert {name for room in rooms for name in room.__all__} <= names | nested
