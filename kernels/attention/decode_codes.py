"""The step of paged_decode's loop over a quantized cache, for sixteen-bit queries in groups: codes are read in pairs.

A dot takes its operands in sixteen bits. Converting single bytes to them costs more instructions than the whole step otherwise has, and
single bytes of values cannot be transposed on the way from shared memory. So a tile is loaded as words of two codes, dimensions 2i and
2i + 1, and takes every path that sixteen-bit numbers take; its low and its high bytes become two operands of half the width, by bit
operations on two words at once: one dot with the even dimensions of the queries, one with the odd ones. Bytes moved: those of the codes,
and 8 a token for both scales.

float16 holds every code exactly, bfloat16 the int8 ones as well, but has no such short way. Queries are divided by a power of two for it
(queries_for_codes), weights times the values' scale are what they are for values of any usual size: a value above 65504 overflows here.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803

import triton
import triton.language as tl

from minipaged.kernels.attention.triton_tiles import load_scales, load_tile, tile_blocks


@triton.jit
def _low(word, FLOAT8: tl.constexpr, ASSEMBLY: tl.constexpr):
    """The codes in the low bytes of int16 words, as float16; of float8, 1/256 of what they stand for."""
    if ASSEMBLY:
        if FLOAT8:
            return tl.inline_asm_elementwise(
                "{ .reg .b32 a, b; shl.b32 a, $1, 7; and.b32 a, a, 0x3f803f80; shl.b32 b, $1, 8; and.b32 b, b, 0x80008000; "
                "or.b32 $0, a, b; }",
                "=r,r",
                [word],
                tl.float16,
                True,
                2,
            )
        else:
            return tl.inline_asm_elementwise(
                "{ .reg .b32 a, b; and.b32 a, $1, 0x00ff00ff; xor.b32 a, a, 0x64806480; mov.b32 b, 0x64806480; "
                "sub.f16x2 $0, a, b; }",
                "=r,r",
                [word],
                tl.float16,
                True,
                2,
            )
    elif FLOAT8:
        bits = ((word << 7) & 0x3F80) | ((word << 8) & -0x8000)
        return bits.to(tl.int16).to(tl.float16, bitcast=True)
    else:  # 1024 has its last bit at 1: the byte, its sign turned round, is 128 more than the code
        bits = (word & 0xFF) ^ 0x6480
        return bits.to(tl.int16).to(tl.float16, bitcast=True) - 1152.0


@triton.jit
def _high(word, FLOAT8: tl.constexpr, ASSEMBLY: tl.constexpr):
    """As _low, of the high bytes."""
    if ASSEMBLY:
        if FLOAT8:
            return tl.inline_asm_elementwise(
                "{ .reg .b32 a, b; shr.u32 a, $1, 1; and.b32 a, a, 0x3f803f80; and.b32 b, $1, 0x80008000; or.b32 $0, a, b; }",
                "=r,r",
                [word],
                tl.float16,
                True,
                2,
            )
        else:
            return tl.inline_asm_elementwise(
                "{ .reg .b32 a, b; shr.u32 a, $1, 8; and.b32 a, a, 0x00ff00ff; xor.b32 a, a, 0x64806480; mov.b32 b, 0x64806480; "
                "sub.f16x2 $0, a, b; }",
                "=r,r",
                [word],
                tl.float16,
                True,
                2,
            )
    elif FLOAT8:
        bits = ((word >> 1) & 0x3F80) | (word & -0x8000)
        return bits.to(tl.int16).to(tl.float16, bitcast=True)
    else:
        bits = ((word >> 8) & 0xFF) ^ 0x6480
        return bits.to(tl.int16).to(tl.float16, bitcast=True) - 1152.0


@triton.jit
def queries_for_codes(head_ptr, in_group, HALF_DIM: tl.constexpr, HALF_BLOCK: tl.constexpr, FLOAT8: tl.constexpr):
    """(even dimensions, odd dimensions, factor of their scores) of a group's queries: float16 [rows, HEAD_BLOCK / 2] twice, float32 [rows].

    Each row is divided by the power of two below its largest number, so that float16 holds it as exactly as bfloat16 did.
    """
    pair = tl.arange(0, HALF_BLOCK)
    pointers = head_ptr[:, None] + 2 * pair[None, :]
    in_head = in_group[:, None] & (pair < HALF_DIM)[None, :]
    even = tl.load(pointers, mask=in_head, other=0.0).to(tl.float32)
    odd = tl.load(pointers + 1, mask=in_head, other=0.0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(even), 1), tl.max(tl.abs(odd), 1))
    power = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    power = tl.where((power > 0) & (power < float("inf")), power, 1.0)
    even = (even / power[:, None]).to(tl.float16)
    odd = (odd / power[:, None]).to(tl.float16)
    if FLOAT8:
        power = power * 256.0
    return even, odd, power


@triton.jit
def attend_codes(
    queries,  # (even dimensions, odd dimensions, factor of their scores), of queries_for_codes
    state,  # (accumulated even dimensions, odd ones, top, total), as in attend_tile
    cache,  # as in attend_tile; keys, values and their strides in words
    start,
    limit,
    scale,
    HALF_DIM: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
    FLOAT8: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """The state after one more step of the online softmax. Of int8, 128 times what values give is accumulated."""
    even, odd, factor = queries
    accumulated_even, accumulated_odd, top, total = state
    key_ptr, value_ptr, table_ptr, stride_block, stride_slot, key_scale_ptr, value_scale_ptr, stride_scale_block = cache
    position = start + tl.arange(0, TILE)
    block = tile_blocks(table_ptr, position, limit, PAGE, MASKED)
    slot = position % PAGE
    offset = block * stride_block + slot * stride_slot
    key = load_tile(key_ptr, offset, position, limit, HALF_DIM, HALF_BLOCK, MASKED, tl.int16)
    value = load_tile(value_ptr, offset, position, limit, HALF_DIM, HALF_BLOCK, MASKED, tl.int16)
    scale_offset = block * stride_scale_block + slot
    key_scale = load_scales(key_scale_ptr, scale_offset, position, limit, MASKED)
    value_scale = load_scales(value_scale_ptr, scale_offset, position, limit, MASKED)
    score = tl.dot(even, tl.trans(_low(key, FLOAT8, ASSEMBLY)))
    score = tl.dot(odd, tl.trans(_high(key, FLOAT8, ASSEMBLY)), score)
    score = score * (factor * scale)[:, None] * key_scale[None, :]
    if MASKED:
        score = tl.where((position < limit)[None, :], score, float("-inf"))
    new_top = tl.maximum(top, tl.max(score, 1))
    weight = tl.exp2(score - new_top[:, None])
    decay = tl.exp2(top - new_top)
    total = total * decay + tl.sum(weight, 1)
    # The largest value of a token, about: far from float16's ends, which a scale alone would not be.
    weight = (weight * (value_scale * (256.0 if FLOAT8 else 128.0))[None, :]).to(tl.float16)
    accumulated_even = tl.dot(weight, _low(value, FLOAT8, ASSEMBLY), accumulated_even * decay[:, None])
    accumulated_odd = tl.dot(weight, _high(value, FLOAT8, ASSEMBLY), accumulated_odd * decay[:, None])
    return accumulated_even, accumulated_odd, new_top, total
