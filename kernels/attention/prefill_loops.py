"""The loops of the prefill kernel over tiles of keys: in turn (scores, softmax, values), or with the values' product a tile late.

Both keep the online softmax in base 2 and float32. Arguments go in tuples: `state` is (accumulated output, top: each row's largest score
so far, unscaled, total: the sum of its weights), `cache` (keys, values, block table, stride of a block, of a slot, scales of keys, of
values, stride of a block of scales), `sight` (each row's query position, window, the row's last position). QUANTIZED: keys and values are
codes; the key's scale multiplies the scores, the value's the weights. Without MASKED every position of the tiles is seen by every query
of the tile.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803, N806

import triton
import triton.language as tl

from minipaged.kernels.attention.triton_tiles import clamped_offsets, clamped_pages, load_tokens


@triton.jit
def _hide(score, start, sight, HAS_WINDOW: tl.constexpr):
    """-inf where a row's query doesn't see the position: later ones, and those before its window."""
    query_position, window = sight[0], sight[1]
    position = start + tl.arange(0, score.shape[1])
    seen = position[None, :] <= query_position[:, None]
    if HAS_WINDOW:
        seen = seen & (position[None, :] > query_position[:, None] - window)
    return tl.where(seen, score, float("-inf"))


@triton.jit
def _softmax(score, top, total, scale, start, sight, HAS_WINDOW: tl.constexpr, MASKED: tl.constexpr):
    """The tile's weights, the factor by which earlier ones shrink, and the new top and total."""
    if MASKED:
        score = _hide(score, start, sight, HAS_WINDOW)
    new_top = tl.maximum(top, tl.max(score, 1))
    shift = new_top * scale
    if MASKED:  # a query that has seen nothing yet: -inf - -inf would be NaN
        shift = tl.where(new_top == float("-inf"), 0.0, shift)
    weight = tl.exp2(score * scale - shift[:, None])
    decay = tl.exp2(top * scale - shift)
    return weight, decay, new_top, total * decay + tl.sum(weight, 1)


@triton.jit
def attend_in_turn(
    query,
    state,
    cache,
    sight,
    scale,
    begin,
    end,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
    QUANTIZED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The state (accumulated, top, total) after the tiles from begin to end."""
    accumulated, top, total = state
    key_ptr, value_ptr, table_ptr, stride_block, stride_slot, key_scale_ptr, value_scale_ptr, stride_scale_block = cache
    last = sight[2]
    HEAD_BLOCK: tl.constexpr = query.shape[1]
    for start in tl.range(begin, end, TILE):
        pages = clamped_pages(table_ptr, start, last, PAGE, TILE, MASKED)
        offset = clamped_offsets(pages, start, last, stride_block, stride_slot, PAGE, TILE, MASKED, WIDE)
        key = load_tokens(key_ptr, offset, HEAD_DIM, HEAD_BLOCK, query.dtype)
        value = load_tokens(value_ptr, offset, HEAD_DIM, HEAD_BLOCK, query.dtype)
        score = tl.dot(query, tl.trans(key), input_precision="ieee")
        if QUANTIZED:
            scale_offset = clamped_offsets(pages, start, last, stride_scale_block, 1, PAGE, TILE, MASKED, WIDE)
            score = score * tl.load(key_scale_ptr + scale_offset)[None, :]
        weight, decay, top, total = _softmax(score, top, total, scale, start, sight, HAS_WINDOW, MASKED)
        if QUANTIZED:
            weight = weight * tl.load(value_scale_ptr + scale_offset)[None, :]
        accumulated = tl.dot(weight.to(value.dtype), value, accumulated * decay[:, None], input_precision="ieee")
    return (accumulated, top, total)


@triton.jit
def attend_overlapped(
    query,
    state,
    late,
    cache,
    sight,
    scale,
    begin,
    end,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
    QUANTIZED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """As attend_in_turn, but the values' product of the tile before (weight, decay, offset) runs beside this tile's softmax.

    `late`: (weight, decay, offset of the tile before begin, whose product is due; pages of the tile at begin). The returned pair of state
    and late is the same for the tile at end.
    """
    accumulated, top, total = state
    weight, decay, offset, pages = late
    key_ptr, value_ptr, table_ptr, stride_block, stride_slot, key_scale_ptr, value_scale_ptr, stride_scale_block = cache
    last = sight[2]
    HEAD_BLOCK: tl.constexpr = query.shape[1]
    for start in tl.range(begin, end, TILE):
        next_offset = clamped_offsets(pages, start, last, stride_block, stride_slot, PAGE, TILE, MASKED, WIDE)
        key = load_tokens(key_ptr, next_offset, HEAD_DIM, HEAD_BLOCK, query.dtype)
        value = load_tokens(value_ptr, offset, HEAD_DIM, HEAD_BLOCK, query.dtype)
        if QUANTIZED:
            scale_offset = clamped_offsets(pages, start, last, stride_scale_block, 1, PAGE, TILE, MASKED, WIDE)
        pages = clamped_pages(table_ptr, start + TILE, last, PAGE, TILE, True)
        score = tl.dot(query, tl.trans(key), input_precision="ieee")
        if QUANTIZED:
            score = score * tl.load(key_scale_ptr + scale_offset)[None, :]
        accumulated = tl.dot(weight.to(value.dtype), value, accumulated * decay[:, None], input_precision="ieee")
        weight, decay, top, total = _softmax(score, top, total, scale, start, sight, HAS_WINDOW, MASKED)
        if QUANTIZED:  # the total is of the weights alone; what is due is their product with the values
            weight = weight * tl.load(value_scale_ptr + scale_offset)[None, :]
        offset = next_offset
    return (accumulated, top, total), (weight, decay, offset, pages)


@triton.jit
def last_product(state, late, cache, HEAD_DIM: tl.constexpr, dtype: tl.constexpr):
    """The state with the product that attend_overlapped left due."""
    accumulated, top, total = state
    weight, decay, offset, _ = late
    HEAD_BLOCK: tl.constexpr = accumulated.shape[1]
    value = load_tokens(cache[1], offset, HEAD_DIM, HEAD_BLOCK, dtype)
    accumulated = tl.dot(weight.to(value.dtype), value, accumulated * decay[:, None], input_precision="ieee")
    return (accumulated, top, total)
