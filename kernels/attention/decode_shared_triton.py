"""The part of paged_decode over pages that several rows share: one program per (part of the common tokens, KV head, tile of rows).

The queries of up to 16 rows, with all heads of a KV group, are the rows of one dot, so each common key and value is read once a tile.
What a program finds goes where the outputs of a row's chunks go, and reduce_kernel joins both.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803

import triton
import triton.language as tl

from minipaged.kernels.attention.decode_chunks import shared_part
from minipaged.kernels.attention.decode_tile import attend_tile
from minipaged.kernels.dependent_launch import wait_for_previous


@triton.jit(do_not_specialize=["stride_table", "stride_table_head"])
def shared_kernel(
    partial_ptr,  # float32 [B, PARTS, heads, HEAD_DIM]: outputs over each part of the common tokens
    partial_lse_ptr,  # float32 [B, PARTS, heads]: base-2 logarithm of each part's softmax denominator
    query_ptr,
    key_ptr,
    value_ptr,
    block_tables_ptr,
    rows_ptr,  # of SharedPrefixes
    tile_tokens_ptr,
    key_scale_ptr,
    value_scale_ptr,
    scale,
    stride_query,
    stride_query_head,
    stride_block,
    stride_slot,
    stride_head,
    stride_table,
    stride_table_head,
    stride_scale_block,
    stride_scale_head,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,  # the power of two from GROUP up
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    UPCAST: tl.constexpr,
    QUANTIZED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    wait_for_previous(DEPENDENT)
    part = tl.program_id(0)
    kv_head = tl.program_id(1)
    tile = tl.program_id(2)
    low, high = shared_part(tl.load(tile_tokens_ptr + tile), part, TILE, PARTS)
    if low >= high:
        return
    index = tl.arange(0, TILE_ROWS * GROUP_BLOCK)
    row = tl.load(rows_ptr + tile * TILE_ROWS + index // GROUP_BLOCK)
    head = kv_head * GROUP + index % GROUP_BLOCK
    present = (row >= 0) & (index % GROUP_BLOCK < GROUP)
    dim = tl.arange(0, HEAD_BLOCK)
    in_head = present[:, None] & (dim < HEAD_DIM)[None, :]
    at = row.to(tl.int64) * stride_query + head * stride_query_head
    query = tl.load(query_ptr + at[:, None] + dim[None, :], mask=in_head, other=0.0)
    if UPCAST:
        query = query.to(tl.float32)
    accumulated = tl.zeros([TILE_ROWS * GROUP_BLOCK, HEAD_BLOCK], tl.float32)
    top = tl.full([TILE_ROWS * GROUP_BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([TILE_ROWS * GROUP_BLOCK], tl.float32)

    first = tl.load(rows_ptr + tile * TILE_ROWS)
    table_ptr = block_tables_ptr + first.to(tl.int64) * stride_table + kv_head * stride_table_head
    key_ptr += kv_head * stride_head
    value_ptr += kv_head * stride_head
    key_scale_ptr += kv_head * stride_scale_head
    value_scale_ptr += kv_head * stride_scale_head
    cache = (
        key_ptr, value_ptr, table_ptr, stride_block, stride_slot, key_scale_ptr, value_scale_ptr, stride_scale_block
    )  # fmt: skip
    state = (accumulated, top, total)
    whole_end = low + (high - low) // TILE * TILE
    for start in range(low, whole_end, TILE):
        state = attend_tile(
            query, state, cache, start, high, scale, HEAD_DIM, HEAD_BLOCK, 0, PAGE, TILE, False, QUANTIZED
        )
    if whole_end < high:
        state = attend_tile(
            query, state, cache, whole_end, high, scale, HEAD_DIM, HEAD_BLOCK, 0, PAGE, TILE, True, QUANTIZED
        )
    accumulated, top, total = state

    to = (row.to(tl.int64) * PARTS + part) * (KV_HEADS * GROUP) + head
    tl.store(partial_ptr + to[:, None] * HEAD_DIM + dim[None, :], accumulated / total[:, None], mask=in_head)
    tl.store(partial_lse_ptr + to, top + tl.log2(total), mask=present)
