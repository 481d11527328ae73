"""keep_heaviest on the GPU, for rows of one query that may let go of one token each: as a captured step needs it, without the host.

One kernel writes the raw scores of each query head, reading the keys once more; a program of the other for each row and KV head makes
probabilities of them, adds these to what the tokens have been given so far, finds the token that goes, and puts the newest into its slot.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803

import torch
import triton
import triton.language as tl

from minipaged.kernels.attention.triton_tiles import load_scales, load_tile, tile_blocks
from minipaged.kernels.cache.quantize import Scales, movable
from minipaged.kernels.cache.quantize_triton import scale_arguments
from minipaged.kernels.launch_table import check_layout, head_block, next_power_of_two

TILE = 64  # tokens whose keys a program of the first kernel reads
MARK_TILE = 128  # tokens of a turn of the second one's loops


@triton.jit(do_not_specialize=["width", "stride_table"])
def _raw_scores_kernel(
    raw_ptr,  # float32 [rows, heads, width]
    query_ptr,
    key_ptr,
    key_scale_ptr,
    block_tables_ptr,
    context_lens_ptr,
    scale,
    width,
    stride_query,
    stride_query_head,
    stride_block,
    stride_slot,
    stride_head,
    stride_table,
    stride_scale_block,
    stride_scale_head,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    QUANTIZED: tl.constexpr,
):
    kv_head = tl.program_id(0)
    start = tl.program_id(1) * TILE
    row = tl.program_id(2).to(tl.int64)
    length = tl.load(context_lens_ptr + row)
    if start >= length:
        return
    position = start + tl.arange(0, TILE)
    block = tile_blocks(block_tables_ptr + row * stride_table, position, length, PAGE, True)
    offset = block * stride_block + position % PAGE * stride_slot
    key = load_tile(key_ptr + kv_head * stride_head, offset, position, length, HEAD_DIM, HEAD_BLOCK, True, tl.float32)
    factor = tl.zeros([TILE], tl.float32) + scale
    if QUANTIZED:
        place = block * stride_scale_block + position % PAGE
        factor = factor * load_scales(key_scale_ptr + kv_head * stride_scale_head, place, position, length, True)
    dim = tl.arange(0, HEAD_BLOCK)
    for member in tl.static_range(GROUP):
        head = kv_head * GROUP + member
        pointers = query_ptr + row * stride_query + head * stride_query_head + dim
        query = tl.load(pointers, mask=dim < HEAD_DIM, other=0.0).to(tl.float32)
        raw = tl.sum(query[None, :] * key, 1) * factor
        tl.store(raw_ptr + (row * (KV_HEADS * GROUP) + head) * width + position, raw, mask=position < length)


@triton.jit(do_not_specialize=["width", "stride_table", "most", "recent"])
def _keep_kernel(
    scores_ptr,
    positions_ptr,
    raw_ptr,
    key_ptr,
    value_ptr,
    key_scale_ptr,
    value_scale_ptr,
    block_tables_ptr,
    context_lens_ptr,
    query_positions_ptr,
    width,
    most,
    recent,
    stride_block,
    stride_slot,
    stride_head,
    stride_table,
    stride_scale_block,
    stride_scale_head,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    QUANTIZED: tl.constexpr,
):
    kv_head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    length = tl.load(context_lens_ptr + row)
    if length == 0:
        return
    newest = tl.load(query_positions_ptr + row)
    table_ptr = block_tables_ptr + row * stride_table
    member = tl.arange(0, GROUP_BLOCK)[:, None]
    raw_ptr += (row * KV_HEADS + kv_head) * GROUP * width
    lane = tl.arange(0, TILE)

    # 1) The softmax of each query head over all that it sees.
    top = tl.full([GROUP_BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_BLOCK], tl.float32)
    for start in tl.range(0, length, TILE):
        at = start + lane
        inside = (member < GROUP) & (at < length)[None, :]
        raw = tl.load(raw_ptr + member * width + at[None, :], mask=inside, other=float("-inf"))
        raw = tl.where(member < GROUP, raw, 0.0)  # heads that do not exist have some sum, so that nothing is NaN
        new_top = tl.maximum(top, tl.max(raw, 1))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(raw - new_top[:, None]), 1)
        top = new_top

    # 2) What each token was given, and in each lane the one that would go.
    lowest = tl.full([TILE], float("inf"), tl.float32)
    oldest = tl.full([TILE], 2147483647, tl.int32)
    where_oldest = tl.zeros([TILE], tl.int32)
    score_of_newest = tl.zeros([TILE], tl.float32)
    for start in tl.range(0, length, TILE):
        at = start + lane
        valid = at < length
        inside = (member < GROUP) & valid[None, :]
        raw = tl.load(raw_ptr + member * width + at[None, :], mask=inside, other=float("-inf"))
        given = tl.sum(tl.exp(raw - top[:, None]) / total[:, None], 0)
        block = tile_blocks(table_ptr, at, length, PAGE, True)
        mark = (block * KV_HEADS + kv_head) * PAGE + at % PAGE
        is_new = at == length - 1
        before = tl.load(scores_ptr + mark, mask=valid & (at < length - 1), other=0.0)
        score = before + given
        tl.store(scores_ptr + mark, score, mask=valid)
        position = tl.load(positions_ptr + mark, mask=valid & (at < length - 1), other=0)
        position = tl.where(is_new, newest, position)
        tl.store(positions_ptr + mark, position, mask=is_new)
        score_of_newest += tl.where(is_new, score, 0.0)
        may_go = valid & (position <= newest - (recent - 1))
        goes_first = may_go & ((score < lowest) | ((score == lowest) & (position < oldest)))
        lowest = tl.where(goes_first, score, lowest)
        oldest = tl.where(goes_first, position, oldest)
        where_oldest = tl.where(goes_first, at, where_oldest)

    # 3) The newest token takes the slot of the one that goes.
    if length > most:
        least = tl.min(lowest, 0)
        age = tl.min(tl.where(lowest == least, oldest, 2147483647), 0)
        victim = tl.max(tl.where((lowest == least) & (oldest == age), where_oldest, 0), 0)
        last = length - 1
        if victim != last:
            source = tl.load(table_ptr + last // PAGE).to(tl.int64)
            target = tl.load(table_ptr + victim // PAGE).to(tl.int64)
            dim = tl.arange(0, HEAD_BLOCK)
            come = source * stride_block + last % PAGE * stride_slot + kv_head * stride_head + dim
            go = target * stride_block + victim % PAGE * stride_slot + kv_head * stride_head + dim
            in_head = dim < HEAD_DIM
            tl.store(key_ptr + go, tl.load(key_ptr + come, mask=in_head), mask=in_head)
            tl.store(value_ptr + go, tl.load(value_ptr + come, mask=in_head), mask=in_head)
            if QUANTIZED:
                come_scale = source * stride_scale_block + kv_head * stride_scale_head + last % PAGE
                go_scale = target * stride_scale_block + kv_head * stride_scale_head + victim % PAGE
                tl.store(key_scale_ptr + go_scale, tl.load(key_scale_ptr + come_scale))
                tl.store(value_scale_ptr + go_scale, tl.load(value_scale_ptr + come_scale))
            go_mark = (target * KV_HEADS + kv_head) * PAGE + victim % PAGE
            tl.debug_barrier()  # another thread has just written what the victim was given
            tl.store(scores_ptr + go_mark, tl.sum(score_of_newest, 0))
            tl.store(positions_ptr + go_mark, newest)


def keep_heaviest_triton(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    marks: tuple[torch.Tensor, torch.Tensor],  # heavy_hitters.Marks
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    positions: torch.Tensor,
    budget: tuple[int, int],  # heavy_hitters.Budget
    softmax_scale: float,
    *,
    scales: Scales | None = None,
) -> None:
    """See keep_heaviest: rows of one query, all of which may let go of a token, and none of which sees more than the budget."""
    num_rows, heads, head_dim = query.shape
    _, block_size, kv_heads, _ = key_cache.shape
    check_layout(block_size, head_dim)
    if num_rows == 0:
        return
    if key_cache.stride() != value_cache.stride() or key_cache.stride(3) != 1:
        raise ValueError("keys and values must have the same strides, and heads whose elements lie side by side")
    group = heads // kv_heads
    heavy, recent = budget
    width = min(block_tables.shape[1] * block_size, heavy + recent)
    raw = torch.empty((num_rows, heads, width), dtype=torch.float32, device=query.device)
    key_scale, value_scale, *scale_strides = scale_arguments(scales, query)
    shape = {
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "HEAD_BLOCK": head_block(head_dim),
        "PAGE": block_size,
        "QUANTIZED": scales is not None,
    }
    _raw_scores_kernel[(kv_heads, -(-width // TILE), num_rows)](
        raw,
        query,
        key_cache,
        key_scale,
        block_tables,
        context_lens,
        softmax_scale,
        width,
        query.stride(0),
        query.stride(1),
        *key_cache.stride()[:3],
        block_tables.stride(0),
        *scale_strides,
        **shape,
        TILE=TILE,
        num_warps=4,
    )
    _keep_kernel[(kv_heads, num_rows)](
        *marks,
        raw,
        movable(key_cache),
        movable(value_cache),
        key_scale,
        value_scale,
        block_tables,
        context_lens,
        positions,
        width,
        heavy + recent - 1,
        recent,
        *key_cache.stride()[:3],
        block_tables.stride(0),
        *scale_strides,
        **shape,
        GROUP_BLOCK=next_power_of_two(group),
        TILE=MARK_TILE,
        num_warps=4,
    )
