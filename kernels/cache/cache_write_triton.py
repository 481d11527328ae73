"""write_kv on the GPU: one program per (token, some of its KV heads). Moves each element once in and once out."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803

import torch
import triton
import triton.language as tl

from minipaged.kernels.cache.quantize import LARGEST_CODE, Scales
from minipaged.kernels.cache.quantize_triton import codes_of, largest_finite, scale_arguments, scale_of
from minipaged.kernels.launch_table import check_layout, next_power_of_two

PROGRAM_ELEMENTS = 1024  # of keys, and as many of values


@triton.jit
def _write_kernel(
    key_ptr,
    value_ptr,
    key_cache_ptr,
    value_cache_ptr,
    slot_mapping_ptr,
    key_scale_ptr,
    value_scale_ptr,
    stride_key,
    stride_key_head,
    stride_value,
    stride_value_head,
    stride_block,
    stride_slot,
    stride_head,
    stride_scale_block,
    stride_scale_head,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEADS_TILE: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    LARGEST: tl.constexpr,  # code of a quantized cache; None without scales
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + token).to(tl.int64)
    if slot < 0:
        return
    head = tl.program_id(1) * HEADS_TILE + tl.arange(0, HEADS_TILE)[:, None]
    dim = tl.arange(0, HEAD_BLOCK)[None, :]
    mask = (head < KV_HEADS) & (dim < HEAD_DIM)
    destination = slot // PAGE * stride_block + slot % PAGE * stride_slot + head * stride_head + dim
    key = tl.load(key_ptr + token * stride_key + head * stride_key_head + dim, mask=mask, other=0.0)
    value = tl.load(value_ptr + token * stride_value + head * stride_value_head + dim, mask=mask, other=0.0)
    if LARGEST is not None:
        key = key.to(tl.float32)
        value = value.to(tl.float32)
        key_scale = scale_of(largest_finite(key), LARGEST)
        value_scale = scale_of(largest_finite(value), LARGEST)
        key = codes_of(key, key_scale, key_cache_ptr.dtype.element_ty, LARGEST)
        value = codes_of(value, value_scale, value_cache_ptr.dtype.element_ty, LARGEST)
        scale_head = tl.program_id(1) * HEADS_TILE + tl.arange(0, HEADS_TILE)
        scale_at = slot // PAGE * stride_scale_block + scale_head * stride_scale_head + slot % PAGE
        tl.store(key_scale_ptr + scale_at, key_scale, mask=scale_head < KV_HEADS)
        tl.store(value_scale_ptr + scale_at, value_scale, mask=scale_head < KV_HEADS)
    tl.store(key_cache_ptr + destination, key, mask=mask)
    tl.store(value_cache_ptr + destination, value, mask=mask)


def write_kv_triton(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    scales: Scales | None = None,
) -> None:
    """See write_kv."""
    num_tokens, kv_heads, head_dim = key.shape
    block_size = key_cache.shape[1]
    check_layout(block_size, head_dim)
    if num_tokens == 0:
        return
    dims = next_power_of_two(head_dim)
    heads_tile = min(next_power_of_two(kv_heads), max(1, PROGRAM_ELEMENTS // dims))
    key_scale, value_scale, *scale_strides = scale_arguments(scales, key)
    _write_kernel[(num_tokens, triton.cdiv(kv_heads, heads_tile))](
        key,
        value,
        key_cache,
        value_cache,
        slot_mapping,
        key_scale,
        value_scale,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        key_cache.stride(0),
        key_cache.stride(1),
        key_cache.stride(2),
        *scale_strides,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        HEADS_TILE=heads_tile,
        HEAD_BLOCK=dims,
        PAGE=block_size,
        LARGEST=None if scales is None else LARGEST_CODE[key_cache.dtype],
        num_warps=4,
    )
