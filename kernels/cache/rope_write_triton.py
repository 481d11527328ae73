"""rope_write_kv on the GPU: one program per (token, some heads); the first of a token's programs take its queries, the rest its keys."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803, N806

import torch
import triton
import triton.language as tl

from minipaged.kernels.cache.quantize import LARGEST_CODE, Scales
from minipaged.kernels.cache.quantize_triton import codes_of, largest_finite, scale_arguments, scale_of
from minipaged.kernels.dependent_launch import dependent_launch, wait_for_previous
from minipaged.kernels.launch_table import check_layout, next_power_of_two

PROGRAM_PAIRS = 512  # pairs of dimensions that a program rotates, at least one head's


@triton.jit
def _rotate(first, second, cos, sin):
    """The rotated pair, in float32."""
    first = first.to(tl.float32)
    second = second.to(tl.float32)
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _normed(first, second, norm_ptr, pair, eps, HALF: tl.constexpr):
    """Both halves of some heads over their root mean square, times the weight; rounded as rms_norm rounds."""
    wide_first = first.to(tl.float32)
    wide_second = second.to(tl.float32)
    squares = tl.sum(wide_first * wide_first + wide_second * wide_second, 1)
    inverse = tl.rsqrt(squares / (2 * HALF) + eps)[:, None]
    first_weight = tl.load(norm_ptr + pair, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
    second_weight = tl.load(norm_ptr + HALF + pair, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
    first_normed = (wide_first * inverse).to(first.dtype).to(tl.float32) * first_weight
    second_normed = (wide_second * inverse).to(first.dtype).to(tl.float32) * second_weight
    return first_normed.to(first.dtype), second_normed.to(first.dtype)


@triton.jit
def _quantized(first, second, dtype: tl.constexpr, LARGEST: tl.constexpr):
    """(codes of the first halves of some heads, of the second halves, scale of each head)."""
    first = first.to(tl.float32)
    second = second.to(tl.float32)
    scale = scale_of(tl.maximum(largest_finite(first), largest_finite(second)), LARGEST)
    return codes_of(first, scale, dtype, LARGEST), codes_of(second, scale, dtype, LARGEST), scale


@triton.jit
def _rope_write_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    positions_ptr,
    cos_sin_ptr,
    key_cache_ptr,
    value_cache_ptr,
    slot_mapping_ptr,
    query_norm_ptr,
    key_norm_ptr,
    key_scale_ptr,
    value_scale_ptr,
    eps,
    stride_query,
    stride_query_head,
    stride_key,
    stride_key_head,
    stride_value,
    stride_value_head,
    stride_angle,
    stride_block,
    stride_slot,
    stride_head,
    stride_scale_block,
    stride_scale_head,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HEADS_TILE: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    NORM: tl.constexpr,
    LARGEST: tl.constexpr,  # code of a quantized cache; None without scales
    DEPENDENT: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    query_tiles: tl.constexpr = (HEADS + HEADS_TILE - 1) // HEADS_TILE
    pair = tl.arange(0, HALF_BLOCK)
    wait_for_previous(DEPENDENT)
    angle_ptr = cos_sin_ptr + tl.load(positions_ptr + token) * stride_angle + pair
    cos = tl.load(angle_ptr, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(angle_ptr + HALF, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
    if tile < query_tiles:
        head = tile * HEADS_TILE + tl.arange(0, HEADS_TILE)
        mask = (head < HEADS)[:, None] & (pair < HALF)[None, :]
        pointers = query_ptr + token * stride_query + head[:, None] * stride_query_head + pair[None, :]
        first = tl.load(pointers, mask=mask, other=0.0)
        second = tl.load(pointers + HALF, mask=mask, other=0.0)
        if NORM:
            first, second = _normed(first, second, query_norm_ptr, pair, eps, HALF)
        first, second = _rotate(first, second, cos, sin)
        tl.store(pointers, first.to(query_ptr.dtype.element_ty), mask=mask)
        tl.store(pointers + HALF, second.to(query_ptr.dtype.element_ty), mask=mask)
    else:
        slot = tl.load(slot_mapping_ptr + token).to(tl.int64)
        head = (tile - query_tiles) * HEADS_TILE + tl.arange(0, HEADS_TILE)
        written_heads = tl.where(slot >= 0, KV_HEADS, 0)
        mask = (head < written_heads)[:, None] & (pair < HALF)[None, :]
        key_pointers = key_ptr + token * stride_key + head[:, None] * stride_key_head + pair[None, :]
        value_pointers = value_ptr + token * stride_value + head[:, None] * stride_value_head + pair[None, :]
        destination = slot // PAGE * stride_block + slot % PAGE * stride_slot
        destination = destination + head[:, None] * stride_head + pair[None, :]
        first = tl.load(key_pointers, mask=mask, other=0.0)
        second = tl.load(key_pointers + HALF, mask=mask, other=0.0)
        if NORM:
            first, second = _normed(first, second, key_norm_ptr, pair, eps, HALF)
        first, second = _rotate(first, second, cos, sin)
        first_key = first.to(key_ptr.dtype.element_ty)
        second_key = second.to(key_ptr.dtype.element_ty)
        first_value = tl.load(value_pointers, mask=mask, other=0.0)
        second_value = tl.load(value_pointers + HALF, mask=mask, other=0.0)
        if LARGEST is not None:
            scale_at = slot // PAGE * stride_scale_block + head * stride_scale_head + slot % PAGE
            CODE: tl.constexpr = key_cache_ptr.dtype.element_ty
            first_key, second_key, key_scale = _quantized(first_key, second_key, CODE, LARGEST)
            first_value, second_value, value_scale = _quantized(first_value, second_value, CODE, LARGEST)
            tl.store(key_scale_ptr + scale_at, key_scale, mask=head < written_heads)
            tl.store(value_scale_ptr + scale_at, value_scale, mask=head < written_heads)
        tl.store(key_cache_ptr + destination, first_key, mask=mask)
        tl.store(key_cache_ptr + destination + HALF, second_key, mask=mask)
        tl.store(value_cache_ptr + destination, first_value, mask=mask)
        tl.store(value_cache_ptr + destination + HALF, second_value, mask=mask)


def rope_write_kv_triton(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    scales: Scales | None = None,
    query_norm: torch.Tensor | None = None,
    key_norm: torch.Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """See rope_write_kv."""
    num_tokens, heads, head_dim = query.shape
    kv_heads = key.shape[1]
    block_size = key_cache.shape[1]
    check_layout(block_size, head_dim)
    if num_tokens == 0:
        return
    half = head_dim // 2
    half_block = next_power_of_two(half)
    heads_tile = min(next_power_of_two(heads), max(1, PROGRAM_PAIRS // half_block))
    grid = (num_tokens, triton.cdiv(heads, heads_tile) + triton.cdiv(kv_heads, heads_tile))
    key_scale, value_scale, *scale_strides = scale_arguments(scales, query)
    _rope_write_kernel[grid](
        query,
        key,
        value,
        positions,
        cos_sin,
        key_cache,
        value_cache,
        slot_mapping,
        query_norm if query_norm is not None else query,
        key_norm if key_norm is not None else query,
        key_scale,
        value_scale,
        eps,
        query.stride(0),
        query.stride(1),
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        cos_sin.stride(0),
        key_cache.stride(0),
        key_cache.stride(1),
        key_cache.stride(2),
        *scale_strides,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HALF=half,
        HEADS_TILE=heads_tile,
        HALF_BLOCK=half_block,
        PAGE=block_size,
        NORM=query_norm is not None,
        LARGEST=None if scales is None else LARGEST_CODE[key_cache.dtype],
        num_warps=4,
        **dependent_launch(query.device),
    )
