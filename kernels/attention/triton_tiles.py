"""What the Triton attention kernels share: finding and loading a tile of keys or values through a block table.

One tile spans many pages: each position looks up its own page, so any block size from 1 up has the same inner loop.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803, SIM108

import torch
import triton
import triton.language as tl

from minipaged.kernels.dispatch import triton_interpreted


def must_upcast(tensor: torch.Tensor) -> bool:
    """Whether a kernel has to compute in float32 throughout: numpy, under the interpreter, has no bfloat16."""
    return tensor.dtype == torch.bfloat16 and triton_interpreted()


@triton.jit
def tile_blocks(
    table_ptr,  # this row's (and KV head's) block table
    position,  # [TILE] KV positions
    limit,  # positions from here on are not read
    PAGE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The block of each position: int64 [TILE]."""
    if MASKED:
        block = tl.load(table_ptr + position // PAGE, mask=position < limit, other=0)
    else:
        block = tl.load(table_ptr + position // PAGE)
    return block.to(tl.int64)


@triton.jit
def load_scales(ptr, offset, position, limit, MASKED: tl.constexpr):
    """The scales at these offsets, float32 [TILE]; if MASKED, zeros from `limit` on."""
    if MASKED:
        return tl.load(ptr + offset, mask=position < limit, other=0.0)
    else:
        return tl.load(ptr + offset)


@triton.jit
def load_tile(
    ptr,
    offset,  # [TILE] element offset of each token
    position,
    limit,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    dtype: tl.constexpr,
):
    """[TILE, HEAD_BLOCK] of keys or values, or their codes, as `dtype`; zeros past HEAD_DIM and, if MASKED, from `limit` on (whatever
    the cache holds there)."""
    dim = tl.arange(0, HEAD_BLOCK)
    pointers = ptr + offset[:, None] + dim[None, :]
    if MASKED:
        tile = tl.load(pointers, mask=(position < limit)[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
    elif HEAD_DIM < HEAD_BLOCK:
        tile = tl.load(pointers, mask=(dim < HEAD_DIM)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile.to(dtype)


@triton.jit
def clamped_pages(table_ptr, start, last, PAGE: tl.constexpr, TILE: tl.constexpr, CLAMP: tl.constexpr):
    """Page ids of the positions from `start`, int32 [TILE]. With CLAMP, those past position `last` take its page: none past it is read."""
    page = (start + tl.arange(0, TILE)) // PAGE
    if CLAMP:
        page = tl.minimum(page, last // PAGE)
    return tl.load(table_ptr + page)


@triton.jit
def clamped_offsets(
    pages,  # of clamped_pages
    start,
    last,
    stride_block,
    stride_slot,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    CLAMP: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Where each position's token begins, in elements: [TILE]; int64 if WIDE (a cache of 2**31 elements or more), else int32.

    `start` is a multiple of TILE. With CLAMP, positions past `last` are `last`.
    """
    if CLAMP:
        slot = tl.minimum(start + tl.arange(0, TILE), last) % PAGE
    elif TILE % PAGE == 0:
        slot = tl.arange(0, TILE) % PAGE
    else:
        slot = (start + tl.arange(0, TILE)) % PAGE
    if WIDE:
        return pages.to(tl.int64) * stride_block + slot * stride_slot
    else:
        return pages * stride_block + slot * stride_slot


@triton.jit
def load_tokens(ptr, offset, HEAD_DIM: tl.constexpr, HEAD_BLOCK: tl.constexpr, dtype: tl.constexpr):
    """[TILE, HEAD_BLOCK] of keys or values (or their codes) as `dtype`, at offsets that may all be read; zeros past HEAD_DIM."""
    dim = tl.arange(0, HEAD_BLOCK)
    pointers = ptr + (offset[:, None] + dim[None, :])  # summed before the pointer: in 32 bits where the offsets are
    if HEAD_DIM < HEAD_BLOCK:
        tile = tl.load(pointers, mask=(dim < HEAD_DIM)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile.to(dtype)
