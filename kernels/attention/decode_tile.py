"""One turn of decode attention's loop: a tile of keys and values, found through a block table, against the queries that read it."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803

import triton
import triton.language as tl

from minipaged.kernels.attention.triton_tiles import load_scales, load_tile, tile_blocks


@triton.jit
def attend_tile(
    query,
    state,  # (accumulated output, top: largest score so far, total: sum of the weights), all float32
    cache,  # (keys, values, block table, stride of a block, of a slot, scales of keys, of values, stride of a block of scales)
    start,
    limit,
    scale,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
    QUANTIZED: tl.constexpr,
):
    """The state after one more step of the online softmax, in base 2: `scale` holds log2(e) already.

    Keys and values become the query's dtype. QUANTIZED: they are codes, which it holds exactly; the key's scale multiplies the scores and
    the value's the weights.
    """
    accumulated, top, total = state
    key_ptr, value_ptr, table_ptr, stride_block, stride_slot, key_scale_ptr, value_scale_ptr, stride_scale_block = cache
    position = start + tl.arange(0, TILE)
    block = tile_blocks(table_ptr, position, limit, PAGE, MASKED)
    slot = position % PAGE
    offset = block * stride_block + slot * stride_slot
    key = load_tile(key_ptr, offset, position, limit, HEAD_DIM, HEAD_BLOCK, MASKED, query.dtype)
    value = load_tile(value_ptr, offset, position, limit, HEAD_DIM, HEAD_BLOCK, MASKED, query.dtype)
    if QUANTIZED:
        scale_offset = block * stride_scale_block + slot
        scale = scale * load_scales(key_scale_ptr, scale_offset, position, limit, MASKED)
        value_scale = load_scales(value_scale_ptr, scale_offset, position, limit, MASKED)
    if GROUP == 1:  # query [HEAD_BLOCK], top and total scalars
        score = tl.sum(query[None, :] * key.to(tl.float32), 1) * scale
        if MASKED:
            score = tl.where(position < limit, score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 0))
        weight = tl.exp2(score - new_top)
        decay = tl.exp2(top - new_top)
        total = total * decay + tl.sum(weight, 0)
        if QUANTIZED:
            weight = weight * value_scale
        accumulated = accumulated * decay + tl.sum(weight[:, None] * value.to(tl.float32), 0)
    else:  # query [group rows, HEAD_BLOCK], top and total [group rows]
        if QUANTIZED:
            scale = scale[None, :]
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        if MASKED:
            score = tl.where((position < limit)[None, :], score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp2(score - new_top[:, None])
        decay = tl.exp2(top - new_top)
        total = total * decay + tl.sum(weight, 1)
        if QUANTIZED:
            weight = weight * value_scale[None, :]
        accumulated = tl.dot(weight.to(value.dtype), value, accumulated * decay[:, None], input_precision="ieee")
    return (accumulated, new_top, total)
