"""The computing warps of prefill_hopper: two warpgroups, each 64 rows of a tile of queries, which read what the third has loaded.

Step by step a warpgroup asks the tensor cores for the scores of one tile of keys and, right behind, for the product of the tile before with
its values; the softmax of the scores runs while that product is computed.
Source: FlashAttention-3 (Shah et al., 2024), sections 3.1 and 3.2; barriers as in the CUDA guide: a phase bit that flips at each round.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803, N806, RUF059

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from minipaged.kernels.attention.prefill_hopper_items import HALF, describe, work_item

warpgroup_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier  # renamed after Triton 3.6


@gluon.jit
def wait_until_full(barriers, number):
    """Until round `number` of a ring of buffers has been loaded. The tensor cores see it after a fence."""
    STAGES: gl.constexpr = barriers.shape[0]
    mbarrier.wait(barriers.index(number % STAGES), (number // STAGES) & 1)


@gluon.jit
def softmax(score, top, total, scale, start, query_position, MASKED: gl.constexpr):
    """(weights, decay of what came before, top, total) of an online softmax in base 2; a row that has seen no key yet has top -inf."""
    if MASKED:
        position = start + gl.arange(0, score.shape[1], layout=gl.SliceLayout(0, score.type.layout))
        score = gl.where(position[None, :] <= query_position[:, None], score, float("-inf"))
    new_top = gl.maximum(top, gl.max(score, 1))
    shift = new_top * scale
    if MASKED:
        shift = gl.where(new_top == float("-inf"), 0.0, shift)
    weight = gl.exp2(score * scale - shift[:, None])
    decay = gl.exp2(top * scale - shift)
    return weight, decay, new_top, total * decay + gl.sum(weight, 1)


@gluon.jit
def scores(query, keys, layout: gl.constexpr):
    """Asks for the products of the queries with a tile of keys: float32 [HALF, TILE]."""
    TILE: gl.constexpr = keys.shape[0]
    zero = gl.zeros([HALF, TILE], gl.float32, layout=layout)
    return warpgroup_mma(query, keys.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def attend_tile(query, weight, state, number, start, buffers, barriers, scale, query_position, MASKED: gl.constexpr):
    """(weights of tile `number`, state): its scores and softmax, and beside them the product of the tile before with its values."""
    accumulated, top, total = state
    queries, keys, values = buffers
    query_full, query_empty, key_full, key_empty, value_full, value_empty = barriers
    STAGES: gl.constexpr = keys.shape[0]
    mma: gl.constexpr = accumulated.type.layout
    score_layout: gl.constexpr = top.type.layout.parent
    wait_until_full(key_full, number)
    wait_until_full(value_full, number - 1)
    fence_async_shared()
    score = scores(query, keys.index(number % STAGES), score_layout)
    product = warpgroup_mma(weight, values.index((number - 1) % STAGES), accumulated, is_async=True)
    score = warpgroup_mma_wait(1, deps=[score])
    mbarrier.arrive(key_empty.index(number % STAGES), count=1)
    new_weight, decay, top, total = softmax(score, top, total, scale, start, query_position, MASKED)
    accumulated = warpgroup_mma_wait(0, deps=[product])
    mbarrier.arrive(value_empty.index((number - 1) % STAGES), count=1)
    accumulated = accumulated * gl.convert_layout(decay, gl.SliceLayout(1, mma))[:, None]
    return gl.convert_layout(new_weight.to(values.dtype), weight.type.layout), (accumulated, top, total)


@gluon.jit
def attend_item(
    part: gl.constexpr, described, slot, phase, count, buffers, barriers, out_ptr, strides, scale, PACK: gl.constexpr
):
    """HALF rows of a tile of queries over all their keys, from the diagonal down to position 0. count: tiles of keys before this item."""
    tiles, whole, first_query, num_queries, tile, length, first_head, row = described
    queries, keys, values = buffers
    query_full, query_empty, key_full, key_empty, value_full, value_empty = barriers
    STAGES: gl.constexpr = keys.shape[0]
    TILE: gl.constexpr = keys.shape[1]
    HEAD_DIM: gl.constexpr = keys.shape[2]
    QUERIES: gl.constexpr = 2 * HALF // PACK
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    rows: gl.constexpr = gl.SliceLayout(1, score_layout)
    query = queries.index(2 * slot + part)
    tile_row = part * HALF + gl.arange(0, HALF, layout=rows)
    query_position = length - num_queries + tile * QUERIES + tile_row // PACK
    top = gl.full([HALF], float("-inf"), gl.float32, layout=rows)
    total = gl.zeros([HALF], gl.float32, layout=rows)
    # the last tile of keys comes first: no product is due yet
    mbarrier.wait(query_full.index(slot), phase)
    wait_until_full(key_full, count)
    fence_async_shared()
    score = warpgroup_mma_wait(0, deps=[scores(query, keys.index(count % STAGES), score_layout)])
    mbarrier.arrive(key_empty.index(count % STAGES), count=1)
    weight, decay, top, total = softmax(score, top, total, scale, (tiles - 1) * TILE, query_position, True)
    weight = gl.convert_layout(weight.to(values.dtype), gl.DotOperandLayout(0, mma, 2))
    state = (gl.zeros([HALF, HEAD_DIM], gl.float32, layout=mma), top, total)
    masked_end = gl.maximum(tiles - whole, 1)
    for step in range(1, masked_end):
        start = (tiles - 1 - step) * TILE
        weight, state = attend_tile(
            query, weight, state, count + step, start, buffers, barriers, scale, query_position, True
        )
    for step in range(masked_end, tiles):
        weight, state = attend_tile(
            query, weight, state, count + step, 0, buffers, barriers, scale, query_position, False
        )
    accumulated, top, total = state
    last = count + tiles - 1
    wait_until_full(value_full, last)
    fence_async_shared()
    product = warpgroup_mma(weight, values.index(last % STAGES), accumulated, is_async=True)
    accumulated = warpgroup_mma_wait(0, deps=[product])
    mbarrier.arrive(value_empty.index(last % STAGES), count=1)
    divisor = gl.convert_layout(gl.where(total == 0.0, 1.0, total), gl.SliceLayout(1, mma))
    result = (accumulated / divisor[:, None]).to(values.dtype)
    store_rows(part, result, query, query_empty.index(slot), described, out_ptr, strides, PACK)


@gluon.jit
def store_rows(part: gl.constexpr, result, buffer, empty, described, out_ptr, strides, PACK: gl.constexpr):
    """Write the rows that are queries. They pass through the shared memory of their queries, so that a row is written at once."""
    tiles, whole, first_query, num_queries, tile, length, first_head, row = described
    HEAD_DIM: gl.constexpr = buffer.shape[1]
    QUERIES: gl.constexpr = 2 * HALF // PACK
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    warpgroup_barrier()  # all of the warpgroup have used the queries
    buffer.store(result)
    warpgroup_barrier()
    result = buffer.load(layout)
    warpgroup_barrier()
    mbarrier.arrive(empty, count=1)
    tile_row = part * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, layout))
    dim = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, layout))
    index = tile * QUERIES + tile_row // PACK
    token = (first_query + index).to(gl.int64)
    head = first_head + tile_row % PACK
    pointers = out_ptr + (token * strides[0] + head * strides[1])[:, None] + dim[None, :]
    gl.store(pointers, result, mask=(index < num_queries)[:, None])


@gluon.jit
def consume(
    part: gl.constexpr,
    work,
    turns,
    buffers,
    barriers,
    out_ptr,
    strides,
    scale,
    HEADS: gl.constexpr,
    PACK: gl.constexpr,
):
    """One of the two computing warpgroups: its half of every item."""
    SLOTS: gl.constexpr = buffers[0].shape[0] // 2
    TILE: gl.constexpr = buffers[1].shape[1]
    count = 0  # tiles of keys so far
    number = 0  # items so far
    for turn in range(0, turns):
        described = describe(work_item(turn), work, HEADS, PACK, TILE)
        if described[0] > 0:
            attend_item(
                part,
                described,
                number % SLOTS,
                (number // SLOTS) & 1,
                count,
                buffers,
                barriers,
                out_ptr,
                strides,
                scale,
                PACK,
            )
            number += 1
        count += described[0]
