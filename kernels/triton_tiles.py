"""What the Triton attention kernels share: finding and loading a tile of keys or values through a block table.

One tile spans many pages: each position looks up its own page, so any block size from 1 up has the same inner loop.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803, SIM108

import torch
import triton
import triton.language as tl

from kernels.dispatch import triton_interpreted


def must_upcast(tensor: torch.Tensor) -> bool:
    """Whether a kernel has to compute in float32 throughout: numpy, under the interpreter, has no bfloat16."""
    return tensor.dtype == torch.bfloat16 and triton_interpreted()


@triton.jit
def tile_offsets(
    table_ptr,  # this row's (and KV head's) block table
    position,  # [TILE] KV positions
    limit,  # positions from here on are not read
    stride_block,
    stride_slot,
    PAGE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Where in the cache each position's token begins, in elements: int64 [TILE]."""
    if MASKED:
        block = tl.load(table_ptr + position // PAGE, mask=position < limit, other=0)
    else:
        block = tl.load(table_ptr + position // PAGE)
    return block.to(tl.int64) * stride_block + (position % PAGE) * stride_slot


@triton.jit
def load_tile(
    ptr,
    offset,  # [TILE] element offset of each token
    position,
    limit,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """[TILE, HEAD_BLOCK] of keys or values; zeros past HEAD_DIM and, if MASKED, from `limit` on (whatever the cache holds there)."""
    dim = tl.arange(0, HEAD_BLOCK)
    pointers = ptr + offset[:, None] + dim[None, :]
    if MASKED:
        tile = tl.load(pointers, mask=(position < limit)[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
    elif HEAD_DIM < HEAD_BLOCK:
        tile = tl.load(pointers, mask=(dim < HEAD_DIM)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile
