"""paged_decode on the GPU: one program per (chunk of a row, KV head), then a reduction over the rows that were cut.

The heads of a KV group are the rows of one dot, so each key and value is read once per group; with one head per group the dot is a
multiply-and-sum. The loop over whole tiles has no masks; only a chunk's last tile does.

Where a cache holds codes, and queries have sixteen bits and stand in groups, the tiles are decode_codes.py's, of far fewer instructions.

How rows are cut, and joined again, is in decode_chunks.py. A row of one chunk writes its output itself; the reduction passes it by.
Where rows begin with the same pages, decode_shared_triton.py attends to those first, for many rows at once; here a row starts behind them.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803, SIM102, SIM108

import math

import torch
import triton
import triton.language as tl

from minipaged.kernels.attention.decode_chunks import MOST_CHUNKS, chunks_of_rows, reduce_kernel
from minipaged.kernels.attention.decode_codes import attend_codes, queries_for_codes
from minipaged.kernels.attention.decode_shared import TILE_ROWS, SharedPrefixes
from minipaged.kernels.attention.decode_shared_triton import shared_kernel
from minipaged.kernels.attention.decode_tile import attend_tile
from minipaged.kernels.attention.sinks import Sinks
from minipaged.kernels.attention.sinks_triton import sink_arguments, turned_query
from minipaged.kernels.attention.triton_tiles import must_upcast
from minipaged.kernels.cache.quantize import Scales
from minipaged.kernels.cache.quantize_triton import scale_arguments
from minipaged.kernels.dependent_launch import PLAIN_LAUNCH, dependent_launch, wait_for_previous
from minipaged.kernels.dispatch import triton_interpreted
from minipaged.kernels.launch_table import (
    DecodeLaunch,
    check_layout,
    decode_launch,
    head_block,
    multiprocessors,
    next_power_of_two,
)


@triton.jit(do_not_specialize=["num_rows", "window", "target", "stride_table", "stride_table_head", "sinks"])
def _decode_kernel(
    out_ptr,
    partial_ptr,  # float32 [chunks, heads, HEAD_DIM]: outputs of chunks whose row has several
    partial_lse_ptr,  # float32 [chunks, heads]: base-2 logarithm of each chunk's softmax denominator
    cuts_ptr,  # int32 [rows, 2], written for the reduction: chunks of each row, and the first of them
    query_ptr,
    key_ptr,
    value_ptr,
    block_tables_ptr,
    context_lens_ptr,
    shared_tokens_ptr,  # int32 [rows]: leading tokens of each that shared_kernel attends to
    key_scale_ptr,
    value_scale_ptr,
    num_rows,
    scale,
    window,
    target,
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
    turn_ptr,  # float32 [rows, HEAD_DIM]: the angles of the second query, for the sinks
    stride_turn,
    sinks,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    LOOP_STAGES: tl.constexpr,
    UPCAST: tl.constexpr,
    QUANTIZED: tl.constexpr,
    PAIRS: tl.constexpr,  # codes are read as words of two; keys, values and their strides are in words
    FLOAT8: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    wait_for_previous(DEPENDENT)
    kv_head = tl.program_id(0)
    index = tl.program_id(1)
    if SPLIT:
        counts, ends = chunks_of_rows(
            context_lens_ptr, shared_tokens_ptr, num_rows, window, target, HAS_WINDOW, HAS_SHARED, ROWS, TILE, MIN_CHUNK
        )
        mine = (ends - counts <= index) & (index < ends)  # one row, or none
        row = num_rows - tl.sum(tl.where(mine, num_rows - tl.arange(0, ROWS), 0), 0)
        count = tl.sum(tl.where(mine, counts, 0), 0)
        part = index - tl.sum(tl.where(mine, ends - counts, 0), 0)
    else:
        row = index
        count = 1
        part = 0
    if row >= num_rows:
        return
    if SPLIT:
        if (kv_head == 0) & (part == 0):
            tl.store(cuts_ptr + 2 * row, count)
            tl.store(cuts_ptr + 2 * row + 1, index)

    length = tl.load(context_lens_ptr + row)
    low = 0
    if HAS_WINDOW:
        low = tl.maximum(length - window, 0)
    sinks_end = 0
    if HAS_SINKS:  # those before the window; they come with the row's first chunk, and do not count when rows are cut
        sinks_end = tl.where(part == 0, tl.minimum(sinks, low), 0)
    if HAS_SHARED:
        shared = tl.load(shared_tokens_ptr + row)
        low = shared
    else:
        shared = 0
    high = length
    if SPLIT:
        chunk = ((length - low + count - 1) // count + TILE - 1) // TILE * TILE
        low = low + part * chunk
        high = tl.minimum(low + chunk, length)

    dim = tl.arange(0, HEAD_BLOCK)
    group_row = tl.arange(0, GROUP_ROWS)
    head = kv_head * GROUP + group_row
    in_head = (group_row < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
    row_query_ptr = query_ptr + row.to(tl.int64) * stride_query
    if PAIRS:
        head_ptr = row_query_ptr + head * stride_query_head
        queries = queries_for_codes(head_ptr, group_row < GROUP, HEAD_DIM // 2, HEAD_BLOCK // 2, FLOAT8)
        accumulated_even = tl.zeros([GROUP_ROWS, HEAD_BLOCK // 2], tl.float32)
        accumulated_odd = tl.zeros([GROUP_ROWS, HEAD_BLOCK // 2], tl.float32)
        top = tl.full([GROUP_ROWS], float("-inf"), tl.float32)
        total = tl.zeros([GROUP_ROWS], tl.float32)
    elif GROUP == 1:
        query = tl.load(row_query_ptr + kv_head * stride_query_head + dim, mask=dim < HEAD_DIM, other=0.0).to(
            tl.float32
        )
        accumulated = tl.zeros([HEAD_BLOCK], tl.float32)
        top = tl.full([], float("-inf"), tl.float32)
        total = tl.full([], 0.0, tl.float32)
    else:
        query = tl.load(row_query_ptr + head[:, None] * stride_query_head + dim[None, :], mask=in_head, other=0.0)
        if UPCAST:
            query = query.to(tl.float32)
        accumulated = tl.zeros([GROUP_ROWS, HEAD_BLOCK], tl.float32)
        top = tl.full([GROUP_ROWS], float("-inf"), tl.float32)
        total = tl.zeros([GROUP_ROWS], tl.float32)

    table_ptr = block_tables_ptr + row.to(tl.int64) * stride_table + kv_head * stride_table_head
    key_ptr += kv_head * stride_head
    value_ptr += kv_head * stride_head
    key_scale_ptr += kv_head * stride_scale_head
    value_scale_ptr += kv_head * stride_scale_head
    cache = (
        key_ptr, value_ptr, table_ptr, stride_block, stride_slot, key_scale_ptr, value_scale_ptr, stride_scale_block
    )  # fmt: skip
    whole_end = low + tl.maximum(high - low, 0) // TILE * TILE
    if PAIRS:
        halves = (accumulated_even, accumulated_odd, top, total)
        for start in tl.range(low, whole_end, TILE, num_stages=LOOP_STAGES):
            halves = attend_codes(
                queries, halves, cache, start, high, scale,
                HEAD_DIM // 2, HEAD_BLOCK // 2, PAGE, TILE, False, FLOAT8, ASSEMBLY,
            )  # fmt: skip
        if whole_end < high:
            halves = attend_codes(
                queries, halves, cache, whole_end, high, scale,
                HEAD_DIM // 2, HEAD_BLOCK // 2, PAGE, TILE, True, FLOAT8, ASSEMBLY,
            )  # fmt: skip
        accumulated_even, accumulated_odd, top, total = halves
        accumulated = tl.interleave(accumulated_even, accumulated_odd)
        if not FLOAT8:
            accumulated = accumulated * 0.0078125  # 1 / 128, which attend_codes multiplied by
    else:
        state = (accumulated, top, total)
        if HAS_SINKS:
            second = turned_query(
                query if GROUP > 1 else query[None, :],
                row_query_ptr + head[:, None] * stride_query_head,
                turn_ptr + row.to(tl.int64) * stride_turn + 0 * head[:, None],
                dim[None, :],
                in_head,
                HEAD_DIM,
            )
            if GROUP == 1:
                second = tl.reshape(second, [HEAD_BLOCK])
            second = second.to(query.dtype)
            for start in tl.range(0, sinks_end, TILE):
                state = attend_tile(
                    second, state, cache, start, sinks_end, scale,
                    HEAD_DIM, HEAD_BLOCK, GROUP, PAGE, TILE, True, QUANTIZED,
                )  # fmt: skip
        for start in tl.range(low, whole_end, TILE, num_stages=LOOP_STAGES):
            state = attend_tile(
                query, state, cache, start, high, scale, HEAD_DIM, HEAD_BLOCK, GROUP, PAGE, TILE, False, QUANTIZED
            )
        if whole_end < high:
            state = attend_tile(
                query, state, cache, whole_end, high, scale, HEAD_DIM, HEAD_BLOCK, GROUP, PAGE, TILE, True, QUANTIZED
            )
        accumulated, top, total = state

    total = tl.where(total == 0.0, 1.0, total)  # an empty row's output is 0, its top stays -inf
    inverse = 1.0 / total
    if GROUP == 1:
        result = (accumulated * inverse)[None, :]
    else:
        result = accumulated * inverse[:, None]
    if (count == 1) & (shared == 0):
        out_row_ptr = out_ptr + row.to(tl.int64) * stride_out
        pointers = out_row_ptr + head[:, None] * stride_out_head + dim[None, :]
        tl.store(pointers, result.to(out_ptr.dtype.element_ty), mask=in_head)
    else:
        first = index.to(tl.int64) * (KV_HEADS * GROUP)
        tl.store(partial_ptr + (first + head)[:, None] * HEAD_DIM + dim[None, :], result, mask=in_head)
        lse = top + tl.log2(total) + tl.zeros([GROUP_ROWS], tl.float32)
        tl.store(partial_lse_ptr + first + head, lse, mask=group_row < GROUP)


def fills_one_wave(rows_and_heads: int, most_programs: int, slots: int) -> bool:
    """Whether the programs may be few long rows' equal parts that fill every slot of the GPU once.

    Such a grid must not come onto the GPU while another kernel is still there: whom that one's programs displace starts a second wave,
    as long as the first. A dependent launch saves 1 microsecond of 11 (1 row of 2048) and costs 9 of 33 (1 of 16384), 3 of 53 (8 of 1024).
    """
    return 2 * rows_and_heads <= slots < most_programs


def pairs_up(*caches: torch.Tensor) -> bool:
    """Whether caches of one-byte codes can be read as words of two."""
    return all(
        cache.shape[3] % 2 == 0 and cache.data_ptr() % 2 == 0 and all(stride % 2 == 0 for stride in cache.stride()[:3])
        for cache in caches
    )


def paged_decode_triton(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    *,
    scales: Scales | None = None,
    window: int | None = None,
    sinks: Sinks | None = None,
    shared: SharedPrefixes | None = None,
    out: torch.Tensor | None = None,
    launch: DecodeLaunch | None = None,
) -> torch.Tensor:
    """See paged_decode. `launch` overrides the launch table, for measuring and for tests."""
    num_rows, heads, head_dim = query.shape
    _, block_size, kv_heads, _ = key_cache.shape
    check_layout(block_size, head_dim)
    out = torch.empty_like(query, memory_format=torch.contiguous_format) if out is None else out
    if num_rows == 0:
        return out
    launch = launch or decode_launch(head_dim, query.element_size(), query.device)
    group = heads // kv_heads
    programs = launch.programs_per_multiprocessor * multiprocessors(query.device)
    target = max(1, programs // kv_heads)
    longest = block_tables.shape[-1] * block_size if window is None else window
    split = longest > launch.min_chunk and num_rows * kv_heads < launch.enough_waves * programs
    split = split and num_rows + target < MOST_CHUNKS  # so many rows fill any GPU anyway
    split = split or shared is not None  # the parts are joined either way
    chunks = num_rows + target if split else num_rows
    if split:
        partial = torch.empty((chunks, heads, head_dim), dtype=torch.float32, device=query.device)
        partial_lse = torch.empty((chunks, heads), dtype=torch.float32, device=query.device)
        cuts = torch.empty((num_rows, 2), dtype=torch.int32, device=query.device)
    else:
        partial = partial_lse = cuts = out  # not touched
    per_head = block_tables.dim() == 3
    table_strides = (block_tables.stride(0), block_tables.stride(1) if per_head else 0)
    key_scale, value_scale, *scale_strides = scale_arguments(scales, query)
    rows = next_power_of_two(num_rows)
    dependent = dependent_launch(query.device)
    most_programs = num_rows * kv_heads * -(-longest // launch.min_chunk)
    if shared is not None:
        parts = launch.shared_parts(len(shared.rows) * kv_heads, programs)
        shared_partial = torch.empty((num_rows, parts, heads, head_dim), dtype=torch.float32, device=query.device)
        shared_lse = torch.empty((num_rows, parts, heads), dtype=torch.float32, device=query.device)
        group_block = next_power_of_two(group)
        shared_kernel[(parts, kv_heads, len(shared.rows))](
            shared_partial,
            shared_lse,
            query,
            key_cache,
            value_cache,
            block_tables,
            shared.rows,
            shared.tile_tokens,
            key_scale,
            value_scale,
            scale * math.log2(math.e),
            query.stride(0),
            query.stride(1),
            *key_cache.stride()[:3],
            *table_strides,
            *scale_strides,
            KV_HEADS=kv_heads,
            GROUP=group,
            GROUP_BLOCK=group_block,
            HEAD_DIM=head_dim,
            HEAD_BLOCK=head_block(head_dim),
            PAGE=block_size,
            TILE=launch.tile,
            TILE_ROWS=TILE_ROWS,
            PARTS=parts,
            UPCAST=must_upcast(query),
            QUANTIZED=scales is not None,
            num_warps=8 if group_block > 4 else 4,
            num_stages=launch.num_stages,
            **dependent,
        )
        shared_tokens = shared.row_tokens
    else:
        parts, shared_partial, shared_lse, shared_tokens = 1, partial, partial_lse, context_lens  # not read
    alone = split and shared is None and fills_one_wave(num_rows * kv_heads, most_programs, programs)
    float8 = key_cache.dtype == torch.float8_e4m3fn
    pairs = scales is not None and group > 1 and query.element_size() == 2 and pairs_up(key_cache, value_cache)
    pairs = pairs and sinks is None  # the second query is not taken apart in two
    if pairs:
        key_cache, value_cache = key_cache.view(torch.int16), value_cache.view(torch.int16)
    _decode_kernel[(kv_heads, chunks)](
        out,
        partial,
        partial_lse,
        cuts,
        query,
        key_cache,
        value_cache,
        block_tables,
        context_lens,
        shared_tokens,
        key_scale,
        value_scale,
        num_rows,
        scale * math.log2(math.e),
        window or 0,
        target,
        out.stride(0),
        out.stride(1),
        query.stride(0),
        query.stride(1),
        *key_cache.stride()[:3],
        *table_strides,
        *scale_strides,
        *sink_arguments(sinks, query),
        KV_HEADS=kv_heads,
        GROUP=group,
        GROUP_ROWS=1 if group == 1 else max(16, next_power_of_two(group)),
        HEAD_DIM=head_dim,
        HEAD_BLOCK=head_block(head_dim),
        PAGE=block_size,
        TILE=launch.tile,
        HAS_WINDOW=window is not None,
        HAS_SINKS=sinks is not None,
        HAS_SHARED=shared is not None,
        SPLIT=split,
        ROWS=rows,
        MIN_CHUNK=launch.min_chunk,
        LOOP_STAGES=launch.loop_stages,
        UPCAST=must_upcast(query),
        QUANTIZED=scales is not None,
        PAIRS=pairs,
        FLOAT8=float8,
        ASSEMBLY=not triton_interpreted(),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        **(PLAIN_LAUNCH if alone else dependent),
    )
    if split:
        reduce_kernel[(heads, num_rows)](
            out,
            partial,
            partial_lse,
            cuts,
            shared_partial,
            shared_lse,
            shared_tokens,
            out.stride(0),
            out.stride(1),
            HEADS=heads,
            HEAD_DIM=head_dim,
            HEAD_BLOCK=head_block(head_dim),
            PARTS=16,
            HAS_SHARED=shared is not None,
            SHARED_TILE=launch.tile,
            SHARED_PARTS=parts,
            num_warps=4,
            **dependent,
        )
    return out
