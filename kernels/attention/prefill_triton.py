"""paged_prefill on the GPU: FlashAttention-2's loop over pages, one program per (tile of a row's queries, heads of a group, row).

A tile's rows are queries times PACK heads of one KV group, so that few queries still fill a dot. Two forms of the loop (prefill_loops.py):
in turn, with two programs a multiprocessor hiding each other's softmax, and overlapped, where the product with the values runs a tile
late, beside the next softmax. Tiles of keys that every query of the tile sees have no masks; only the diagonal (and a window's left edge)
have them. Loads have none at all: positions past the row's end read its last token again, and the masks hide it.

Order: `section` pairs of (row, heads) run together, each its longest tiles first, so that the grid ends on short tiles, while the keys and
values of a section stay in the L2 cache (FlashAttention-3's order for causal attention).
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803, N806

import math

import torch
import triton
import triton.language as tl

from minipaged.kernels.attention.prefill_loops import attend_in_turn, attend_overlapped, last_product
from minipaged.kernels.attention.sinks import Sinks
from minipaged.kernels.attention.sinks_triton import sink_arguments, turned_query
from minipaged.kernels.attention.triton_tiles import clamped_offsets, clamped_pages, must_upcast
from minipaged.kernels.cache.quantize import Scales
from minipaged.kernels.cache.quantize_triton import scale_arguments
from minipaged.kernels.dependent_launch import dependent_launch, wait_for_previous
from minipaged.kernels.launch_table import PrefillLaunch, check_layout, head_block, packed_heads, prefill_launch


@triton.jit(do_not_specialize=["num_rows", "window", "tiles", "section", "stride_table", "stride_table_head", "sinks"])
def _prefill_kernel(
    out_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    block_tables_ptr,
    context_lens_ptr,
    query_starts_ptr,
    key_scale_ptr,
    value_scale_ptr,
    num_rows,
    scale,  # above 0; with log2(e) in it, for the softmax is in base 2
    window,
    tiles,  # of the longest row
    section,  # pairs of (row, heads) that run together
    stride_out,
    stride_out_head,
    stride_query,
    stride_query_head,
    stride_block,
    stride_slot,
    stride_head,
    stride_table,
    stride_table_head,
    stride_scale_block,
    stride_scale_head,
    turn_ptr,  # float32 [tokens, HEAD_DIM]: the angles of the second query, for the sinks
    stride_turn,
    sinks,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PACK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    KV_TILE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    OVERLAPPED: tl.constexpr,
    UPCAST: tl.constexpr,
    QUANTIZED: tl.constexpr,
    WIDE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    QUERIES: tl.constexpr = QUERY_TILE // PACK
    wait_for_previous(DEPENDENT)
    in_section = tl.program_id(0) % (section * tiles)
    pair = tl.program_id(0) // (section * tiles) * section + in_section % section
    row = pair // (HEADS // PACK)
    if row >= num_rows:  # the last section is not full
        return
    first_query = tl.load(query_starts_ptr + row)
    num_queries = tl.load(query_starts_ptr + row + 1) - first_query
    tile = (num_queries + QUERIES - 1) // QUERIES - 1 - in_section // section
    if tile < 0:
        return
    length = tl.load(context_lens_ptr + row)
    first_head = pair % (HEADS // PACK) * PACK
    kv_head = first_head // GROUP

    tile_row = tl.arange(0, QUERY_TILE)
    query_index = tile * QUERIES + tile_row // PACK
    query_position = length - num_queries + query_index
    head = first_head + tile_row % PACK
    dim = tl.arange(0, HEAD_BLOCK)
    token = (first_query + query_index).to(tl.int64)
    in_row = (query_index < num_queries)[:, None] & (dim < HEAD_DIM)[None, :]
    query = tl.load(
        query_ptr + (token * stride_query + head * stride_query_head)[:, None] + dim[None, :], mask=in_row, other=0.0
    )
    if UPCAST:
        query = query.to(tl.float32)

    # Positions: [low, body) masked by the window, [body, diagonal) seen by every query of the tile, [diagonal, high) masked.
    first = length - num_queries + tile * QUERIES
    high = tl.minimum(first + QUERIES, length)
    low = 0
    body = 0
    if HAS_WINDOW:
        low = tl.maximum(first - window + 1, 0) // KV_TILE * KV_TILE
        body = (tl.maximum(high - window, 0) + KV_TILE - 1) // KV_TILE * KV_TILE
    diagonal = tl.maximum((first + 1) // KV_TILE * KV_TILE, body)

    table_ptr = block_tables_ptr + row.to(tl.int64) * stride_table + kv_head * stride_table_head
    key_ptr += kv_head.to(tl.int64) * stride_head
    value_ptr += kv_head.to(tl.int64) * stride_head
    key_scale_ptr += kv_head.to(tl.int64) * stride_scale_head
    value_scale_ptr += kv_head.to(tl.int64) * stride_scale_head
    cache = (
        key_ptr, value_ptr, table_ptr, stride_block, stride_slot, key_scale_ptr, value_scale_ptr, stride_scale_block
    )  # fmt: skip
    sight = (query_position, window, length - 1)
    accumulated = tl.zeros([QUERY_TILE, HEAD_BLOCK], tl.float32)
    top = tl.full([QUERY_TILE], float("-inf"), tl.float32)
    total = tl.zeros([QUERY_TILE], tl.float32)
    state = (accumulated, top, total)
    if HAS_SINKS:
        # Those that lie before a query's window: positions up to this one. The others are seen with the window.
        last_sink = tl.minimum(query_position - window, sinks - 1)
        second = turned_query(
            query,
            query_ptr + (token * stride_query + head * stride_query_head)[:, None],
            turn_ptr + (token * stride_turn)[:, None],
            dim[None, :],
            in_row,
            HEAD_DIM,
        ).to(query.dtype)
        state = attend_in_turn(
            second, state, cache, (last_sink, 0, length - 1), scale, 0, tl.minimum(high - window, sinks),
            HEAD_DIM, PAGE, KV_TILE, False, True, QUANTIZED, WIDE,
        )  # fmt: skip
    edges = (low, body, diagonal, high)
    FIRST_PART: tl.constexpr = 0 if HAS_WINDOW else 1
    if OVERLAPPED:
        pages = clamped_pages(table_ptr, low, length - 1, PAGE, KV_TILE, True)
        offset = clamped_offsets(pages, low, length - 1, stride_block, stride_slot, PAGE, KV_TILE, True, WIDE)
        weight = tl.zeros([QUERY_TILE, KV_TILE], tl.float32)  # there is no tile before the first: it weighs nothing
        decay = tl.full([QUERY_TILE], 1.0, tl.float32)
        late = (weight, decay, offset, pages)
        for part in tl.static_range(FIRST_PART, 3):  # three loops, of which the middle one has no masks
            state, late = attend_overlapped(
                query, state, late, cache, sight, scale, edges[part], edges[part + 1],
                HEAD_DIM, PAGE, KV_TILE, HAS_WINDOW, part != 1, QUANTIZED, WIDE,
            )  # fmt: skip
        state = last_product(state, late, cache, HEAD_DIM, query.dtype)
    else:
        for part in tl.static_range(FIRST_PART, 3):
            state = attend_in_turn(
                query, state, cache, sight, scale, edges[part], edges[part + 1],
                HEAD_DIM, PAGE, KV_TILE, HAS_WINDOW, part != 1, QUANTIZED, WIDE,
            )  # fmt: skip
    accumulated, top, total = state

    # The output's addresses are computed from what is read again, so that they hold no registers during the loop.
    first_query = tl.load(query_starts_ptr + row, volatile=True)
    num_queries = tl.load(query_starts_ptr + row + 1, volatile=True) - first_query
    query_index = tile * QUERIES + tile_row // PACK
    token = (first_query + query_index).to(tl.int64)
    in_row = (query_index < num_queries)[:, None] & (dim < HEAD_DIM)[None, :]
    result = accumulated / tl.where(total == 0.0, 1.0, total)[:, None]
    pointers = out_ptr + (token * stride_out + head * stride_out_head)[:, None] + dim[None, :]
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
    scales: Scales | None = None,
    window: int | None = None,
    sinks: Sinks | None = None,
    out: torch.Tensor | None = None,
    launch: PrefillLaunch | None = None,
) -> torch.Tensor:
    """See paged_prefill. `launch` overrides the launch table, for measuring and for tests."""
    _, heads, head_dim = query.shape
    num_blocks, block_size, kv_heads, _ = key_cache.shape
    check_layout(block_size, head_dim)
    out = torch.empty_like(query, memory_format=torch.contiguous_format) if out is None else out
    num_rows = context_lens.shape[0]
    if num_rows == 0 or max_query_len == 0:
        return out
    group = heads // kv_heads
    longest = block_tables.shape[-1] * block_size
    if launch is None:
        launch = prefill_launch(
            head_dim,
            query.element_size(),
            query.device,
            rows=num_rows,
            heads=heads,
            group=group,
            max_query_len=max_query_len,
            longest=longest,
        )
    pack = packed_heads(launch, group)
    tiles = triton.cdiv(max_query_len, launch.query_tile // pack)
    pairs = num_rows * heads // pack
    kv_heads_together = max(1, launch.section_bytes // (2 * longest * head_dim * key_cache.element_size()))
    section = min(pairs, kv_heads_together * (group // pack))
    key_scale, value_scale, *scale_strides = scale_arguments(scales, query)
    _prefill_kernel[(triton.cdiv(pairs, section) * section * tiles,)](
        out,
        query,
        key_cache,
        value_cache,
        block_tables,
        context_lens,
        query_starts,
        key_scale,
        value_scale,
        num_rows,
        scale * math.log2(math.e),
        window or 0,
        tiles,
        section,
        out.stride(0),
        out.stride(1),
        query.stride(0),
        query.stride(1),
        key_cache.stride(0),
        key_cache.stride(1),
        key_cache.stride(2),
        block_tables.stride(0),
        block_tables.stride(1) if block_tables.dim() == 3 else 0,
        *scale_strides,
        *sink_arguments(sinks, query),
        HEADS=heads,
        GROUP=group,
        PACK=pack,
        HEAD_DIM=head_dim,
        HEAD_BLOCK=head_block(head_dim),
        PAGE=block_size,
        QUERY_TILE=launch.query_tile,
        KV_TILE=launch.kv_tile,
        HAS_WINDOW=window is not None,
        HAS_SINKS=sinks is not None,
        OVERLAPPED=launch.overlapped,
        UPCAST=must_upcast(query),
        QUANTIZED=scales is not None,
        WIDE=(num_blocks - 1) * key_cache.stride(0) + block_size * key_cache.stride(1) >= 2**31,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        **dependent_launch(query.device),
    )
    return out
