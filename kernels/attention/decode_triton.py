"""paged_decode on the GPU: one program per (chunk of a row, KV head), then a reduction over the rows that were cut.

The heads of a KV group are the rows of one dot, so each key and value is read once per group; with one head per group the dot is a
multiply-and-sum. The loop over whole tiles has no masks; only a chunk's last tile does.

How rows are cut, and joined again, is in decode_chunks.py. A row of one chunk writes its output itself; the reduction passes it by.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803, SIM102, SIM108

import math

import torch
import triton
import triton.language as tl

from minipaged.kernels.attention.decode_chunks import MOST_CHUNKS, chunks_of_rows, reduce_kernel
from minipaged.kernels.attention.sinks import Sinks
from minipaged.kernels.attention.sinks_triton import sink_arguments, turned_query
from minipaged.kernels.attention.triton_tiles import load_tile, must_upcast, tile_offsets
from minipaged.kernels.dependent_launch import PLAIN_LAUNCH, dependent_launch, wait_for_previous
from minipaged.kernels.launch_table import (
    DecodeLaunch,
    check_layout,
    decode_launch,
    head_block,
    multiprocessors,
    next_power_of_two,
)


@triton.jit
def _attend_tile(
    query,
    state,  # (accumulated output, top: largest score so far, total: sum of the weights), all float32
    cache,  # (keys, values, block table, stride of a block, of a slot)
    start,
    limit,
    scale,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The state after one more step of the online softmax, in base 2: `scale` holds log2(e) already."""
    accumulated, top, total = state
    key_ptr, value_ptr, table_ptr, stride_block, stride_slot = cache
    position = start + tl.arange(0, TILE)
    offset = tile_offsets(table_ptr, position, limit, stride_block, stride_slot, PAGE, MASKED)
    key = load_tile(key_ptr, offset, position, limit, HEAD_DIM, HEAD_BLOCK, MASKED, UPCAST)
    value = load_tile(value_ptr, offset, position, limit, HEAD_DIM, HEAD_BLOCK, MASKED, UPCAST)
    if GROUP == 1:  # query [HEAD_BLOCK], top and total scalars
        score = tl.sum(query[None, :] * key.to(tl.float32), 1) * scale
        if MASKED:
            score = tl.where(position < limit, score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 0))
        weight = tl.exp2(score - new_top)
        decay = tl.exp2(top - new_top)
        total = total * decay + tl.sum(weight, 0)
        accumulated = accumulated * decay + tl.sum(weight[:, None] * value.to(tl.float32), 0)
    else:  # query [group rows, HEAD_BLOCK], top and total [group rows]
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        if MASKED:
            score = tl.where((position < limit)[None, :], score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp2(score - new_top[:, None])
        decay = tl.exp2(top - new_top)
        total = total * decay + tl.sum(weight, 1)
        accumulated = tl.dot(weight.to(value.dtype), value, accumulated * decay[:, None], input_precision="ieee")
    return (accumulated, new_top, total)


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
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    LOOP_STAGES: tl.constexpr,
    UPCAST: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    wait_for_previous(DEPENDENT)
    kv_head = tl.program_id(0)
    index = tl.program_id(1)
    if SPLIT:
        counts, ends = chunks_of_rows(context_lens_ptr, num_rows, window, target, HAS_WINDOW, ROWS, TILE, MIN_CHUNK)
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
    if GROUP == 1:
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
    cache = (key_ptr, value_ptr, table_ptr, stride_block, stride_slot)
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
            state = _attend_tile(
                second, state, cache, start, sinks_end, scale, HEAD_DIM, HEAD_BLOCK, GROUP, PAGE, TILE, True, UPCAST
            )
    whole_end = low + tl.maximum(high - low, 0) // TILE * TILE
    for start in tl.range(low, whole_end, TILE, num_stages=LOOP_STAGES):
        state = _attend_tile(
            query, state, cache, start, high, scale, HEAD_DIM, HEAD_BLOCK, GROUP, PAGE, TILE, False, UPCAST
        )
    if whole_end < high:
        state = _attend_tile(
            query, state, cache, whole_end, high, scale, HEAD_DIM, HEAD_BLOCK, GROUP, PAGE, TILE, True, UPCAST
        )
    accumulated, top, total = state

    total = tl.where(total == 0.0, 1.0, total)  # an empty row's output is 0, its top stays -inf
    inverse = 1.0 / total
    if GROUP == 1:
        result = (accumulated * inverse)[None, :]
    else:
        result = accumulated * inverse[:, None]
    if count == 1:
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


def paged_decode_triton(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    *,
    window: int | None = None,
    sinks: Sinks | None = None,
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
    chunks = num_rows + target if split else num_rows
    if split:
        partial = torch.empty((chunks, heads, head_dim), dtype=torch.float32, device=query.device)
        partial_lse = torch.empty((chunks, heads), dtype=torch.float32, device=query.device)
        cuts = torch.empty((num_rows, 2), dtype=torch.int32, device=query.device)
    else:
        partial = partial_lse = cuts = out  # not touched
    per_head = block_tables.dim() == 3
    rows = next_power_of_two(num_rows)
    dependent = dependent_launch(query.device)
    most_programs = num_rows * kv_heads * -(-longest // launch.min_chunk)
    alone = split and fills_one_wave(num_rows * kv_heads, most_programs, programs)
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
        num_rows,
        scale * math.log2(math.e),
        window or 0,
        target,
        out.stride(0),
        out.stride(1),
        query.stride(0),
        query.stride(1),
        key_cache.stride(0),
        key_cache.stride(1),
        key_cache.stride(2),
        block_tables.stride(0),
        block_tables.stride(1) if per_head else 0,
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
        SPLIT=split,
        ROWS=rows,
        MIN_CHUNK=launch.min_chunk,
        LOOP_STAGES=launch.loop_stages,
        UPCAST=must_upcast(query),
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
            out.stride(0),
            out.stride(1),
            HEADS=heads,
            HEAD_DIM=head_dim,
            HEAD_BLOCK=head_block(head_dim),
            PARTS=16,
            num_warps=4,
            **dependent,
        )
    return out
