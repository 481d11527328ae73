"""paged_prefill on the GPU: one program per (tile of a row's queries, head, row), FlashAttention-2's loop over pages.

The row's queries are found on the device from query_starts; programs past a row's end stop at once. Tiles of keys that every query of
the tile sees are computed without masks; only the diagonal (and a window's left edge) has them. A row's last tiles, the longest,
start first.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803, SIM108

import math

import torch
import triton
import triton.language as tl

from kernels.launch_table import PrefillLaunch, check_layout, head_block, prefill_launch
from kernels.triton_tiles import load_tile, must_upcast, tile_offsets


@triton.jit
def _attend_tile(
    query,
    accumulated,
    top,
    total,
    key_ptr,
    value_ptr,
    table_ptr,
    start,
    query_position,
    length,
    scale,
    window,
    stride_block,
    stride_slot,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    KV_TILE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One step of the online softmax, in base 2: `scale` holds log2(e) already. top, total and accumulated are float32."""
    position = start + tl.arange(0, KV_TILE)
    offset = tile_offsets(table_ptr, position, length, stride_block, stride_slot, PAGE, MASKED)
    key = load_tile(key_ptr, offset, position, length, HEAD_DIM, HEAD_BLOCK, MASKED, UPCAST)
    score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
    if MASKED:
        seen = (position[None, :] <= query_position[:, None]) & (position < length)[None, :]
        if HAS_WINDOW:
            seen = seen & (position[None, :] > query_position[:, None] - window)
        score = tl.where(seen, score, float("-inf"))
    new_top = tl.maximum(top, tl.max(score, 1))
    if MASKED:  # a query that has seen nothing yet: -inf - -inf would be NaN
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    else:
        shift = new_top
    weight = tl.exp2(score - shift[:, None])
    decay = tl.exp2(top - shift)
    total = total * decay + tl.sum(weight, 1)
    value = load_tile(value_ptr, offset, position, length, HEAD_DIM, HEAD_BLOCK, MASKED, UPCAST)
    accumulated = tl.dot(weight.to(value.dtype), value, accumulated * decay[:, None], input_precision="ieee")
    return accumulated, new_top, total


@triton.jit(do_not_specialize=["window", "stride_table", "stride_table_head"])
def _prefill_kernel(
    out_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    block_tables_ptr,
    context_lens_ptr,
    query_starts_ptr,
    scale,
    window,
    stride_out,
    stride_out_head,
    stride_query,
    stride_query_head,
    stride_block,
    stride_slot,
    stride_head,
    stride_table,
    stride_table_head,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    KV_TILE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    UPCAST: tl.constexpr,
):
    head = tl.program_id(1)
    row = tl.program_id(2)
    first_query = tl.load(query_starts_ptr + row)
    num_queries = tl.load(query_starts_ptr + row + 1) - first_query
    tile = (num_queries + QUERY_TILE - 1) // QUERY_TILE - 1 - tl.program_id(0)
    if tile < 0:
        return
    length = tl.load(context_lens_ptr + row)
    kv_head = head // GROUP

    query_index = tile * QUERY_TILE + tl.arange(0, QUERY_TILE)
    query_position = length - num_queries + query_index
    dim = tl.arange(0, HEAD_BLOCK)
    token = (first_query + query_index).to(tl.int64)
    in_row = (query_index < num_queries)[:, None] & (dim < HEAD_DIM)[None, :]
    query = tl.load(
        query_ptr + token[:, None] * stride_query + head * stride_query_head + dim[None, :], mask=in_row, other=0.0
    )
    if UPCAST:
        query = query.to(tl.float32)
    accumulated = tl.zeros([QUERY_TILE, HEAD_BLOCK], tl.float32)
    top = tl.full([QUERY_TILE], float("-inf"), tl.float32)
    total = tl.zeros([QUERY_TILE], tl.float32)

    # Positions: [low, body) masked by the window, [body, diagonal) seen by every query of the tile, [diagonal, high) masked.
    first = length - num_queries + tile * QUERY_TILE
    high = tl.minimum(first + QUERY_TILE, length)
    low = 0
    body = 0
    if HAS_WINDOW:
        low = tl.maximum(first - window + 1, 0) // KV_TILE * KV_TILE
        body = (tl.maximum(high - window, 0) + KV_TILE - 1) // KV_TILE * KV_TILE
    diagonal = tl.maximum((first + 1) // KV_TILE * KV_TILE, body)

    table_ptr = block_tables_ptr + row.to(tl.int64) * stride_table + kv_head * stride_table_head
    key_ptr += kv_head * stride_head
    value_ptr += kv_head * stride_head
    if HAS_WINDOW:
        for start in range(low, body, KV_TILE):
            accumulated, top, total = _attend_tile(
                query,
                accumulated,
                top,
                total,
                key_ptr,
                value_ptr,
                table_ptr,
                start,
                query_position,
                length,
                scale,
                window,
                stride_block,
                stride_slot,
                HEAD_DIM,
                HEAD_BLOCK,
                PAGE,
                KV_TILE,
                HAS_WINDOW,
                True,
                UPCAST,
            )
    for start in range(body, diagonal, KV_TILE):
        accumulated, top, total = _attend_tile(
            query,
            accumulated,
            top,
            total,
            key_ptr,
            value_ptr,
            table_ptr,
            start,
            query_position,
            length,
            scale,
            window,
            stride_block,
            stride_slot,
            HEAD_DIM,
            HEAD_BLOCK,
            PAGE,
            KV_TILE,
            HAS_WINDOW,
            False,
            UPCAST,
        )
    for start in range(diagonal, high, KV_TILE):
        accumulated, top, total = _attend_tile(
            query,
            accumulated,
            top,
            total,
            key_ptr,
            value_ptr,
            table_ptr,
            start,
            query_position,
            length,
            scale,
            window,
            stride_block,
            stride_slot,
            HEAD_DIM,
            HEAD_BLOCK,
            PAGE,
            KV_TILE,
            HAS_WINDOW,
            True,
            UPCAST,
        )

    result = accumulated / tl.where(total == 0.0, 1.0, total)[:, None]
    pointers = out_ptr + token[:, None] * stride_out + head * stride_out_head + dim[None, :]
    tl.store(pointers, result.to(out_ptr.dtype.element_ty), mask=in_row)


def paged_prefill_triton(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    query_starts: torch.Tensor,
    max_query_len: int,
    scale: float,
    *,
    window: int | None = None,
    out: torch.Tensor | None = None,
    launch: PrefillLaunch | None = None,
) -> torch.Tensor:
    """See kernels.paged_prefill. `launch` overrides the launch table, for measuring and for tests."""
    _, heads, head_dim = query.shape
    _, block_size, kv_heads, _ = key_cache.shape
    check_layout(block_size, head_dim)
    out = torch.empty_like(query, memory_format=torch.contiguous_format) if out is None else out
    num_rows = context_lens.shape[0]
    if num_rows == 0 or max_query_len == 0:
        return out
    launch = launch or prefill_launch(head_dim, query.element_size(), query.device)
    _prefill_kernel[(triton.cdiv(max_query_len, launch.query_tile), heads, num_rows)](
        out,
        query,
        key_cache,
        value_cache,
        block_tables,
        context_lens,
        query_starts,
        scale * math.log2(math.e),
        window or 0,
        out.stride(0),
        out.stride(1),
        query.stride(0),
        query.stride(1),
        key_cache.stride(0),
        key_cache.stride(1),
        key_cache.stride(2),
        block_tables.stride(0),
        block_tables.stride(1) if block_tables.dim() == 3 else 0,
        GROUP=heads // kv_heads,
        HEAD_DIM=head_dim,
        HEAD_BLOCK=head_block(head_dim),
        PAGE=block_size,
        QUERY_TILE=launch.query_tile,
        KV_TILE=launch.kv_tile,
        HAS_WINDOW=window is not None,
        UPCAST=must_upcast(query),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return out
