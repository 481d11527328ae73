"""packed_linear and packed_gated_linear for one row, in Triton's lower language Gluon: nothing leaves the registers before the last sum.

A program has a few rows of the weight, and each of its threads four neighbouring words of each of them at a time: 16 bytes, 32 codes that
share a block. Words and scales wait for nobody, so the first are on their way while the kernel before this one still runs. A code becomes
a float by half a shift and one operation on bits: in the mantissa of 1 it is 1 + q / 128, or 1 + q / 2048, so the products need no
conversion; what the 1 and the zero point add is taken off once a group. Gluon, since Triton chooses layouts for
itself, and would carry x and the scales through shared memory to reach the words' one.

Bytes: the packed weight once, weight.num_bytes. Operations: two and a half a code (half a shift, bits, multiply-add), and what x costs.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803, N806

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from minipaged.kernels.dependent_launch import dependent_launch
from minipaged.kernels.launch_table import PackedOneRowLaunch, packed_one_row_launch
from minipaged.kernels.linear.packed_matrix import PackedMatrix
from minipaged.kernels.linear.packed_triton import pairs_of, span_of

WORDS = 4  # of 32 bits, that a thread loads of a row at once


def _code(shift: str, mask: int) -> str:
    """Machine code: bits of a word, moved under the mask, or-ed into the mantissa of 1."""
    return "{ .reg .b32 t; " + f"{shift} lop3.b32 $0, t, {mask}, 0x3f800000, 0xea; }}"


# Code n of a word's eight is moved to bit 12 or bit 16 of the mantissa, whichever takes the fewer shifts: 1 + q / 2048 or 1 + q / 128.
_SHIFTS = (
    ("shl.b32 t, $1, 12;", 12), ("shl.b32 t, $1, 8;", 12), ("shl.b32 t, $1, 8;", 16), ("mov.b32 t, $1;", 12),
    ("mov.b32 t, $1;", 16), ("shr.b32 t, $1, 8;", 12), ("shr.b32 t, $1, 8;", 16), ("shr.b32 t, $1, 12;", 16),
)  # fmt: skip
_CODES = gl.constexpr(tuple(_code(shift, 15 << bit) for shift, bit in _SHIFTS))
_BITS = gl.constexpr(tuple(bit for _, bit in _SHIFTS))


@gluon.jit
def _one_and_code(words, NUMBER: gl.constexpr):
    """1 + q / 2048 or 1 + q / 128 for code NUMBER of eight of each word, float32."""
    bits = gl.inline_asm_elementwise(_CODES[NUMBER], "=r,r", [words], dtype=gl.int32, is_pure=True, pack=1)
    return bits.to(gl.float32, bitcast=True)


@gluon.jit
def _pair(both, BF16: gl.constexpr):
    """The two sixteen-bit numbers of each int32, as float32."""
    if BF16:
        return (both << 16).to(gl.float32, bitcast=True), (both & -65536).to(gl.float32, bitcast=True)
    else:
        low = both.to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
        return low, (both >> 16).to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)


@gluon.jit
def _scale_pair(pair):
    """A group's scale, and its zero point or offset, float32."""
    if pair.dtype == gl.int32:
        return _pair(pair, False)
    else:
        return pair.to(gl.int32).to(gl.float32, bitcast=True), (pair >> 32).to(gl.int32).to(gl.float32, bitcast=True)


@gluon.jit
def _add(words, x, sums_12, sums_16, NUMBER: gl.constexpr):
    """Add code NUMBER's products with x to the sums of those at its bit."""
    if _BITS[NUMBER] == 12:
        sums_12 += _one_and_code(words, NUMBER) * gl.expand_dims(x, 0)
    else:
        sums_16 += _one_and_code(words, NUMBER) * gl.expand_dims(x, 0)
    return sums_12, sums_16


@gluon.jit
def wait_for_previous(DEPENDENT: gl.constexpr):
    """As in dependent_launch.py, which is not in Gluon."""
    if DEPENDENT:
        gl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; griddepcontrol.wait; // dummy $0",
            "=r", [], dtype=gl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@gluon.jit
def _load_step(
    words_ptr,
    scales_ptr,
    line,  # rows of the weight, int64
    thread,
    STEP: gl.constexpr,
    blocks,
    groups,
    PLANES: gl.constexpr,
    WIDTH: gl.constexpr,
    GROUP: gl.constexpr,
    WHOLE_STEPS: gl.constexpr,
    words_layout: gl.constexpr,
):
    """Of each row and thread: the block, its four words of the low and of the high plane, and the scales of the block's first group."""
    HALF: gl.constexpr = WIDTH // 2
    first = STEP * (4 * thread.shape[0]) + thread * 4
    if STEP >= WHOLE_STEPS:
        first = gl.minimum(first, blocks * HALF - 4)  # what lies past the end meets zeros of x
    block = first // HALF
    at = block * (PLANES * HALF) + first % HALF
    place = gl.expand_dims(line * (blocks * (PLANES * HALF)), 1) + gl.expand_dims(at, 0)
    word = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(0, words_layout)))
    places = gl.expand_dims(place, 2) + gl.expand_dims(gl.expand_dims(word, 0), 0)
    low = gl.load(words_ptr + places, eviction_policy="evict_first")
    high = low
    if PLANES == 2:
        high = gl.load(words_ptr + places + HALF, eviction_policy="evict_first")
    group = gl.expand_dims((block * (4 * WIDTH)) // GROUP, 0)
    return block, low, high, gl.load(scales_ptr + gl.expand_dims(line * groups, 1) + group)


@gluon.jit
def _packed_one_row_kernel(
    out_ptr,
    x_ptr,  # x and norm as int32: pairs of their numbers; words as int32
    words_ptr,
    scales_ptr,
    bias_ptr,
    norm_ptr,
    residual_ptr,
    eps,
    n_size,  # outputs; with GATED the gate's, the weight has twice as many rows
    k_size,
    blocks,
    groups,
    GATED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_NORM: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    ZERO_POINTS: gl.constexpr,
    PLANES: gl.constexpr,
    WIDTH: gl.constexpr,
    SPAN: gl.constexpr,  # quarters of a block that share a scale
    GROUP: gl.constexpr,
    BF16: gl.constexpr,
    ROWS: gl.constexpr,
    STEPS: gl.constexpr,
    WHOLE_STEPS: gl.constexpr,  # those that neither words nor x end in
    DEPENDENT: gl.constexpr,
    num_warps: gl.constexpr,
):
    HALF: gl.constexpr = WIDTH // 2  # words of a block and plane
    THREADS: gl.constexpr = 32 * num_warps
    PLANES_SUM: gl.constexpr = 1.0 if PLANES == 1 else 17.0
    words_layout: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 32, 1], [1, num_warps, 1], [2, 1, 0])
    sums_layout: gl.constexpr = gl.SliceLayout(2, words_layout)  # [ROWS, THREADS]
    x_layout: gl.constexpr = gl.SliceLayout(0, words_layout)  # [THREADS, 4]
    thread_layout: gl.constexpr = gl.SliceLayout(0, sums_layout)
    row = gl.program_id(0) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, sums_layout))
    line = gl.minimum(row, n_size - 1).to(gl.int64)
    thread = gl.arange(0, THREADS, thread_layout)
    thread_x = gl.arange(0, THREADS, gl.SliceLayout(1, x_layout))
    word = gl.arange(0, 4, gl.SliceLayout(0, x_layout))

    block, low, high, scale_pair = _load_step(
        words_ptr, scales_ptr, line, thread, 0, blocks, groups, PLANES, WIDTH, GROUP, WHOLE_STEPS, words_layout
    )
    up_low, up_high, up_scale_pair = low, high, scale_pair
    if GATED:
        block, up_low, up_high, up_scale_pair = _load_step(
            words_ptr,
            scales_ptr,
            line + n_size,
            thread,
            0,
            blocks,
            groups,
            PLANES,
            WIDTH,
            GROUP,
            WHOLE_STEPS,
            words_layout,
        )
    wait_for_previous(DEPENDENT)
    sums = gl.zeros([ROWS, THREADS], gl.float32, sums_layout)
    up_sums = gl.zeros([ROWS, THREADS], gl.float32, sums_layout)
    squares = gl.zeros([THREADS, 4], gl.float32, x_layout)
    for step in gl.static_range(STEPS):
        if step > 0:
            block, low, high, scale_pair = _load_step(
                words_ptr,
                scales_ptr,
                line,
                thread,
                step,
                blocks,
                groups,
                PLANES,
                WIDTH,
                GROUP,
                WHOLE_STEPS,
                words_layout,
            )
            if GATED:
                block, up_low, up_high, up_scale_pair = _load_step(
                    words_ptr, scales_ptr, line + n_size, thread, step, blocks, groups, PLANES, WIDTH, GROUP, WHOLE_STEPS,
                    words_layout,
                )  # fmt: skip
        first_x = step * (4 * THREADS) + thread_x * 4
        pair_of_x = (first_x // HALF) * (2 * WIDTH) + first_x % HALF
        at_x = gl.expand_dims(pair_of_x, 1) + gl.expand_dims(word, 0)
        for half in gl.static_range(2 if GATED else 1):
            if half == 1:
                low, high, scale_pair = up_low, up_high, up_scale_pair
            for begin in gl.static_range(0, 4, SPAN):
                if begin > 0:
                    of_row = gl.expand_dims((line + half * n_size) * groups, 1)
                    group = gl.expand_dims((block * (4 * WIDTH) + begin * WIDTH) // GROUP, 0)
                    scale_pair = gl.load(scales_ptr + of_row + group)
                sums_12 = gl.zeros([ROWS, THREADS, 4], gl.float32, words_layout)
                sums_16 = gl.zeros([ROWS, THREADS, 4], gl.float32, words_layout)
                high_12 = gl.zeros([ROWS, THREADS, 4], gl.float32, words_layout)
                high_16 = gl.zeros([ROWS, THREADS, 4], gl.float32, words_layout)
                x_sums = gl.zeros([THREADS, 4], gl.float32, x_layout)
                ones = gl.zeros([THREADS, 4], gl.float32, x_layout)  # what the 1 of each code adds
                for quarter in gl.static_range(begin, begin + SPAN):
                    pair = at_x + quarter * HALF
                    if step >= WHOLE_STEPS:
                        low_x, high_x = _pair(gl.load(x_ptr + pair, mask=pair < k_size // 2, other=0), BF16)
                    else:
                        low_x, high_x = _pair(gl.load(x_ptr + pair), BF16)
                    if HAS_NORM:
                        if half == 0:
                            squares += low_x * low_x + high_x * high_x
                        if step >= WHOLE_STEPS:
                            low_norm, high_norm = _pair(
                                gl.load(norm_ptr + pair, mask=pair < k_size // 2, other=0), BF16
                            )
                        else:
                            low_norm, high_norm = _pair(gl.load(norm_ptr + pair), BF16)
                        low_x = low_x * low_norm
                        high_x = high_x * high_norm
                    x_sums += low_x + high_x
                    ones += low_x * (PLANES_SUM * 2.0 ** (23 - _BITS[quarter]))
                    ones += high_x * (PLANES_SUM * 2.0 ** (23 - _BITS[quarter + 4]))
                    sums_12, sums_16 = _add(low, low_x, sums_12, sums_16, quarter)
                    sums_12, sums_16 = _add(low, high_x, sums_12, sums_16, quarter + 4)
                    if PLANES == 2:
                        high_12, high_16 = _add(high, low_x, high_12, high_16, quarter)
                        high_12, high_16 = _add(high, high_x, high_12, high_16, quarter + 4)
                if PLANES == 2:
                    sums_12 += 16.0 * high_12
                    sums_16 += 16.0 * high_16
                products = gl.sum(sums_12 * 2048.0 + sums_16 * 128.0, 2)
                x_sum = gl.expand_dims(gl.convert_layout(gl.sum(x_sums, 1), thread_layout), 0)
                products -= gl.expand_dims(gl.convert_layout(gl.sum(ones, 1), thread_layout), 0)
                scale, offset = _scale_pair(scale_pair)
                part = scale * (products - offset * x_sum) if ZERO_POINTS else scale * products + offset * x_sum
                if half == 0:
                    sums += part
                else:
                    up_sums += part
    result = gl.sum(sums, 1)
    up_result = result
    if GATED:
        up_result = gl.sum(up_sums, 1)
    if HAS_NORM:
        quotient = gl.rsqrt(gl.sum(gl.sum(squares, 1), 0) / k_size + eps)
        result = result * quotient
        up_result = up_result * quotient
    mask = row < n_size
    if HAS_BIAS:
        result += gl.load(bias_ptr + row, mask=mask, other=0.0).to(gl.float32)
        if GATED:
            up_result += gl.load(bias_ptr + n_size + row, mask=mask, other=0.0).to(gl.float32)
    if GATED:
        result = result / (1.0 + gl.exp(-result)) * up_result
    if HAS_RESIDUAL:
        result += gl.load(residual_ptr + row, mask=mask, other=0.0).to(gl.float32)
    gl.store(out_ptr + row, result.to(out_ptr.dtype.element_ty), mask=mask)


def packed_one_row(
    x: torch.Tensor,
    weight: PackedMatrix,
    bias: torch.Tensor | None = None,
    *,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    residual: torch.Tensor | None = None,
    gated: bool = False,
    launch: PackedOneRowLaunch | None = None,
) -> torch.Tensor:
    """See packed_linear and packed_gated_linear; x is [1, inputs]. `launch` overrides the launch table."""
    _, blocks, planes, width = weight.words.shape
    n_size = weight.outputs // (2 if gated else 1)
    out = x.new_empty(1, n_size) if residual is None else residual
    launch = launch or packed_one_row_launch(n_size, weight.inputs, gated)
    words = blocks * width // 2
    step = WORDS * 32 * launch.num_warps
    _packed_one_row_kernel[(triton.cdiv(n_size, launch.rows),)](
        out,
        x.view(torch.int32),
        weight.words.view(torch.int32),
        pairs_of(weight),
        bias if bias is not None else x,
        norm.view(torch.int32) if norm is not None else x,
        out,
        eps,
        n_size,
        weight.inputs,
        blocks,
        weight.scales.shape[1],
        GATED=gated,
        HAS_BIAS=bias is not None,
        HAS_NORM=norm is not None,
        HAS_RESIDUAL=residual is not None,
        ZERO_POINTS=weight.has_zero_points,
        PLANES=planes,
        WIDTH=width,
        SPAN=span_of(weight),
        GROUP=weight.group,
        BF16=x.dtype == torch.bfloat16,
        ROWS=launch.rows,
        STEPS=triton.cdiv(words, step),
        WHOLE_STEPS=weight.inputs // (4 * width) * (width // 2) // step,
        num_warps=launch.num_warps,
        **dependent_launch(x.device),
    )
    return out
