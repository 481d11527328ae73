"""packed_linear for few rows, and the way back to a dense matrix.

A code becomes a float without a conversion: the bits of 128 (bfloat16) or 1024 (float16) or-ed with a code of four bits are that number
plus the code, for the code fills the last bits of the mantissa. Tensor cores multiply these sums with x, two codes a machine word all the
way; a group's scale, and what the 128 and the zero point add, are applied to the products, which are far fewer than the codes.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803, N806

import torch
import triton
import triton.language as tl

from minipaged.kernels.attention.triton_tiles import must_upcast
from minipaged.kernels.dependent_launch import dependent_launch, wait_for_previous
from minipaged.kernels.dispatch import triton_interpreted
from minipaged.kernels.launch_table import PackedLaunch, next_power_of_two, packed_rows_launch, packed_tile_launch
from minipaged.kernels.linear.packed_matrix import PackedMatrix


def _or_magic(quarter: int, magic: int) -> str:
    """Machine code: two words' codes number `quarter`, each or-ed into the mantissa of `magic`."""
    if quarter == 0:
        return f"lop3.b32 $0, $1, 0x000f000f, {magic}, 0xea;"
    return "{ .reg .b32 t; shr.b32 t, $1, " + f"{4 * quarter}; lop3.b32 $0, t, 0x000f000f, {magic}, 0xea; }}"


_BF16_0, _BF16_1, _BF16_2, _BF16_3 = (tl.constexpr(_or_magic(quarter, 0x43004300)) for quarter in range(4))
_FP16_0, _FP16_1, _FP16_2, _FP16_3 = (tl.constexpr(_or_magic(quarter, 0x64006400)) for quarter in range(4))


@triton.jit
def _unpack(words, QUARTER: tl.constexpr, DTYPE: tl.constexpr, PLAIN: tl.constexpr):
    """Codes number QUARTER of int16 words as floats, plus the magic number unless PLAIN (the interpreter has no machine code)."""
    if PLAIN:
        return ((words >> (4 * QUARTER)) & 15).to(DTYPE)
    elif tl.bfloat16 == DTYPE:
        if QUARTER == 0:
            return tl.inline_asm_elementwise(_BF16_0, "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2)
        elif QUARTER == 1:
            return tl.inline_asm_elementwise(_BF16_1, "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2)
        elif QUARTER == 2:
            return tl.inline_asm_elementwise(_BF16_2, "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2)
        else:
            return tl.inline_asm_elementwise(_BF16_3, "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2)
    else:
        if QUARTER == 0:
            return tl.inline_asm_elementwise(_FP16_0, "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)
        elif QUARTER == 1:
            return tl.inline_asm_elementwise(_FP16_1, "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)
        elif QUARTER == 2:
            return tl.inline_asm_elementwise(_FP16_2, "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)
        else:
            return tl.inline_asm_elementwise(_FP16_3, "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def _load_scales(scales_ptr, at):
    """Of groups: the scale, and the zero point or offset beside it. One load: scales_ptr is to integers of both."""
    pair = tl.load(scales_ptr + at)
    if scales_ptr.dtype.element_ty == tl.int32:
        scale = pair.to(tl.int16).to(tl.float16, bitcast=True)
        offset = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True)
        return scale.to(tl.float32), offset.to(tl.float32)
    else:
        return pair.to(tl.int32).to(tl.float32, bitcast=True), (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _packed_rows_kernel(
    out_ptr,
    x_ptr,
    words_ptr,
    scales_ptr,
    bias_ptr,
    residual_ptr,
    num_rows,
    n_size,  # outputs; with GATED the gate's, the weight has twice as many rows
    k_size,
    blocks,
    groups,
    stride_x,
    stride_out,
    GROUP: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ZERO_POINTS: tl.constexpr,
    PLANES: tl.constexpr,
    WIDTH: tl.constexpr,
    SPAN: tl.constexpr,  # quarters of a block that share a scale
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLIT: tl.constexpr,  # neighbouring blocks at once, each summed by itself
    WHOLE: tl.constexpr,
    STAGES: tl.constexpr,
    PLAIN: tl.constexpr,
    UPCAST: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """out[m, n] = sum over k of x[m, k] W[n, k]. Outputs are the rows of the dot, so that the weight goes to it through registers."""
    wait_for_previous(DEPENDENT)
    DTYPE: tl.constexpr = tl.float32 if UPCAST else x_ptr.dtype.element_ty
    MAGIC: tl.constexpr = 0 if PLAIN else (128 if tl.bfloat16 == DTYPE else 1024)
    SUM_MAGIC: tl.constexpr = MAGIC * (1 if PLANES == 1 else 17)
    HALVES: tl.constexpr = 2 if GATED else 1
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    line = tl.minimum(column, n_size - 1).to(tl.int64)  # rows past the last are computed and not stored
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    x_row = row.to(tl.int64) * stride_x
    part = tl.arange(0, SPLIT)
    j = tl.arange(0, WIDTH)
    ones = tl.full([SPLIT, COLUMNS, WIDTH], 1.0, DTYPE)
    sums = tl.zeros([SPLIT, COLUMNS, ROWS], tl.float32)
    up_sums = tl.zeros([SPLIT, COLUMNS, ROWS], tl.float32)
    for start in tl.range(0, blocks, SPLIT, num_stages=STAGES):
        block = start + part
        inside = block < blocks
        if not WHOLE:
            block = tl.minimum(block, blocks - 1)
        for half in tl.static_range(HALVES):
            matrix_row = line + half * n_size
            at = (matrix_row[None, :, None] * blocks + block[:, None, None]) * (PLANES * WIDTH) + j[None, None, :]
            low = tl.load(words_ptr + at, eviction_policy="evict_first")
            if PLANES == 2:
                high = tl.load(words_ptr + at + WIDTH, eviction_policy="evict_first")
            for first in tl.static_range(0, 4, SPAN):
                products = tl.zeros([SPLIT, COLUMNS, ROWS], tl.float32)
                x_sums = tl.zeros([SPLIT, COLUMNS, ROWS], tl.float32)
                high_products = tl.zeros([SPLIT, COLUMNS, ROWS], tl.float32)
                for quarter in tl.static_range(first, first + SPAN):
                    k = block[:, None] * (4 * WIDTH) + quarter * WIDTH + j[None, :]
                    mask = (row < num_rows)[None, None, :]
                    if not WHOLE:
                        mask = mask & (inside[:, None] & (k < k_size))[:, :, None]
                    x = tl.load(x_ptr + (x_row[None, None, :] + k[:, :, None]), mask=mask, other=0.0).to(DTYPE)
                    codes = _unpack(low, quarter, DTYPE, PLAIN)
                    products = tl.dot(codes, x, products, input_precision="ieee")
                    x_sums = tl.dot(ones, x, x_sums, input_precision="ieee")
                    if PLANES == 2:
                        codes = _unpack(high, quarter, DTYPE, PLAIN)
                        high_products = tl.dot(codes, x, high_products, input_precision="ieee")
                if PLANES == 2:
                    products += 16.0 * high_products
                of_group = (block * (4 * WIDTH) + first * WIDTH) // GROUP
                scale, offset = _load_scales(scales_ptr, matrix_row[None, :] * groups + of_group[:, None])
                # (code + magic) x was summed, of both planes if there are two
                offset = -scale * (offset + SUM_MAGIC) if ZERO_POINTS else offset - scale * SUM_MAGIC
                products = products * scale[:, :, None] + x_sums * offset[:, :, None]
                if half == 0:
                    sums += products
                else:
                    up_sums += products
    result = tl.sum(sums, 0)
    up_result = result
    if GATED:
        up_result = tl.sum(up_sums, 0)
    inside_n = column < n_size
    mask = inside_n[:, None] & (row < num_rows)[None, :]
    if HAS_BIAS:
        result += tl.load(bias_ptr + column, mask=inside_n, other=0.0).to(tl.float32)[:, None]
        if GATED:
            up_result += tl.load(bias_ptr + n_size + column, mask=inside_n, other=0.0).to(tl.float32)[:, None]
    if GATED:
        result = result / (1.0 + tl.exp(-result)) * up_result
    at = row.to(tl.int64)[None, :] * stride_out + column[:, None]
    if HAS_RESIDUAL:
        result += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, result.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _packed_tile_kernel(
    out_ptr,
    x_ptr,
    words_ptr,
    scales_ptr,
    bias_ptr,
    residual_ptr,
    num_rows,
    n_size,
    k_size,
    blocks,
    groups,
    stride_x,
    stride_out,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ZERO_POINTS: tl.constexpr,
    PLANES: tl.constexpr,
    WIDTH: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WHOLE: tl.constexpr,
    STAGES: tl.constexpr,
    PLAIN: tl.constexpr,
    UPCAST: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """The same for more rows: one tile of outputs after the other blocks, by the tensor cores of a whole warp group. Zero points are
    taken off the codes, exactly; only offsets need the sums of x."""
    wait_for_previous(DEPENDENT)
    DTYPE: tl.constexpr = tl.float32 if UPCAST else x_ptr.dtype.element_ty
    MAGIC: tl.constexpr = 0 if PLAIN else (128 if tl.bfloat16 == DTYPE else 1024)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    line = tl.minimum(column, n_size - 1).to(tl.int64)  # rows past the last are computed and not stored
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    x_row = tl.minimum(row, num_rows - 1).to(tl.int64) * stride_x
    j = tl.arange(0, WIDTH)
    ones = tl.full([COLUMNS, WIDTH], 1.0, DTYPE)
    sums = tl.zeros([COLUMNS, ROWS], tl.float32)
    for block in tl.range(0, blocks, num_stages=STAGES):
        at = line[:, None] * (blocks * PLANES * WIDTH) + (block * (PLANES * WIDTH) + j)[None, :]
        low = tl.load(words_ptr + at, eviction_policy="evict_first")
        if PLANES == 2:
            high = tl.load(words_ptr + at + WIDTH, eviction_policy="evict_first")
        for first in tl.static_range(0, 4, SPAN):
            of_group = (block * (4 * WIDTH) + first * WIDTH) // GROUP
            scale, offset = _load_scales(scales_ptr, line * groups + of_group)
            if ZERO_POINTS:
                zero = (offset + MAGIC).to(DTYPE) if PLANES == 1 else (offset % 16 + MAGIC).to(DTYPE)
                high_zero = ((offset - offset % 16) / 16 + MAGIC).to(DTYPE)
            products = tl.zeros([COLUMNS, ROWS], tl.float32)
            high_products = tl.zeros([COLUMNS, ROWS], tl.float32)
            x_sums = tl.zeros([COLUMNS, ROWS], tl.float32)
            for quarter in tl.static_range(first, first + SPAN):
                k = block * (4 * WIDTH) + quarter * WIDTH + j
                if WHOLE:
                    x = tl.load(x_ptr + (x_row[None, :] + k[:, None])).to(DTYPE)
                else:
                    x = tl.load(x_ptr + (x_row[None, :] + k[:, None]), mask=(k < k_size)[:, None], other=0.0).to(DTYPE)
                codes = _unpack(low, quarter, DTYPE, PLAIN)
                if ZERO_POINTS:
                    codes = codes - zero[:, None]
                else:
                    x_sums = tl.dot(ones, x, x_sums, input_precision="ieee")
                products = tl.dot(codes, x, products, input_precision="ieee")
                if PLANES == 2:
                    codes = _unpack(high, quarter, DTYPE, PLAIN)
                    if ZERO_POINTS:
                        codes = codes - high_zero[:, None]
                    high_products = tl.dot(codes, x, high_products, input_precision="ieee")
            if PLANES == 2:
                products += 16.0 * high_products
            sums += products * scale[:, None]
            if not ZERO_POINTS:
                sums += x_sums * (offset - scale * (MAGIC * (1 if PLANES == 1 else 17)))[:, None]
    inside_n = column < n_size
    mask = inside_n[:, None] & (row < num_rows)[None, :]
    if HAS_BIAS:
        sums += tl.load(bias_ptr + column, mask=inside_n, other=0.0).to(tl.float32)[:, None]
    at = row.to(tl.int64)[None, :] * stride_out + column[:, None]
    if HAS_RESIDUAL:
        sums += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, sums.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _dequantize_kernel(
    out_ptr,
    words_ptr,
    scales_ptr,
    k_size,
    blocks,
    groups,
    GROUP: tl.constexpr,
    ZERO_POINTS: tl.constexpr,
    PLANES: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """A few blocks of one row of W."""
    line = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    j = tl.arange(0, WIDTH)
    at = (line * blocks + block[:, None]) * (PLANES * WIDTH) + j[None, :]
    mask = (block < blocks)[:, None]
    wait_for_previous(DEPENDENT)
    low = tl.load(words_ptr + at, mask=mask, other=0)
    high = low
    if PLANES == 2:
        high = tl.load(words_ptr + at + WIDTH, mask=mask, other=0)
    for quarter in tl.static_range(4):
        codes = (low >> (4 * quarter)) & 15
        if PLANES == 2:
            codes = codes | (((high >> (4 * quarter)) & 15) << 4)
        first = block * (4 * WIDTH) + quarter * WIDTH
        of_group = line * groups + tl.minimum(first // GROUP, groups - 1)
        scale, offset = _load_scales(scales_ptr, of_group)
        values = codes.to(tl.float32)
        shifted = values - offset[:, None]
        values = shifted * scale[:, None] if ZERO_POINTS else values * scale[:, None] + offset[:, None]
        k = first[:, None] + j[None, :]
        tl.store(out_ptr + line * k_size + k, values.to(out_ptr.dtype.element_ty), mask=mask & (k < k_size))


def pairs_of(weight: PackedMatrix) -> torch.Tensor:
    """The scales with each pair as one integer."""
    return weight.scales.view(torch.int32 if weight.scales.element_size() == 2 else torch.int64)


def span_of(weight: PackedMatrix) -> int:
    """Quarters of a block that share a scale."""
    return next(span for span in (4, 2, 1) if weight.group % (span * weight.words.shape[3]) == 0)


def packed_rows_triton(
    x: torch.Tensor,
    weight: PackedMatrix,
    bias: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
    gated: bool = False,
    launch: PackedLaunch | None = None,
) -> torch.Tensor:
    """See packed_linear and packed_gated_linear; any number of rows, but it pays for few. `launch` overrides the launch table."""
    num_rows = x.shape[0]
    _, blocks, planes, width = weight.words.shape
    n_size = weight.outputs // (2 if gated else 1)
    out = x.new_empty(num_rows, n_size) if residual is None else residual
    if out.numel() == 0:
        return out
    launch = launch or packed_rows_launch(num_rows)
    _packed_rows_kernel[(triton.cdiv(n_size, launch.columns), triton.cdiv(num_rows, launch.rows))](
        out,
        x,
        weight.words,
        pairs_of(weight),
        bias if bias is not None else x,
        out,
        num_rows,
        n_size,
        weight.inputs,
        blocks,
        weight.scales.shape[1],
        x.stride(0),
        out.stride(0),
        GROUP=weight.group,
        GATED=gated,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        ZERO_POINTS=weight.has_zero_points,
        PLANES=planes,
        WIDTH=width,
        SPAN=span_of(weight),
        ROWS=launch.rows,
        COLUMNS=launch.columns,
        SPLIT=launch.split,
        WHOLE=blocks % launch.split == 0 and weight.inputs % (4 * width) == 0,
        STAGES=launch.num_stages,
        PLAIN=triton_interpreted(),
        UPCAST=must_upcast(x),
        num_warps=launch.num_warps,
        **dependent_launch(x.device),
    )
    return out


def packed_tile_triton(
    x: torch.Tensor,
    weight: PackedMatrix,
    bias: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
    launch: PackedLaunch | None = None,
) -> torch.Tensor:
    """See packed_linear; for more rows than packed_rows_triton is for. `launch` overrides the launch table; its split is unused."""
    num_rows = x.shape[0]
    _, blocks, planes, width = weight.words.shape
    out = x.new_empty(num_rows, weight.outputs) if residual is None else residual
    launch = launch or packed_tile_launch(num_rows, weight.outputs, weight.inputs)
    _packed_tile_kernel[(triton.cdiv(weight.outputs, launch.columns), triton.cdiv(num_rows, launch.rows))](
        out,
        x,
        weight.words,
        pairs_of(weight),
        bias if bias is not None else x,
        out,
        num_rows,
        weight.outputs,
        weight.inputs,
        blocks,
        weight.scales.shape[1],
        x.stride(0),
        out.stride(0),
        GROUP=weight.group,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        ZERO_POINTS=weight.has_zero_points,
        PLANES=planes,
        WIDTH=width,
        SPAN=span_of(weight),
        ROWS=launch.rows,
        COLUMNS=launch.columns,
        WHOLE=weight.inputs == blocks * 4 * width,
        STAGES=launch.num_stages,
        PLAIN=triton_interpreted(),
        UPCAST=must_upcast(x),
        num_warps=launch.num_warps,
        **dependent_launch(x.device),
    )
    return out


def dequantize_triton(weight: PackedMatrix, dtype: torch.dtype) -> torch.Tensor:
    """See minipaged.kernels.linear.packed_matrix.dequantize. Moves the packed bytes and those of the result."""
    outputs, blocks, planes, width = weight.words.shape
    out = torch.empty(outputs, weight.inputs, dtype=dtype, device=weight.words.device)
    blocks_a_program = min(32, next_power_of_two(blocks))
    _dequantize_kernel[(outputs, triton.cdiv(blocks, blocks_a_program))](
        out,
        weight.words,
        pairs_of(weight),
        weight.inputs,
        blocks,
        weight.scales.shape[1],
        GROUP=weight.group,
        ZERO_POINTS=weight.has_zero_points,
        PLANES=planes,
        WIDTH=width,
        BLOCKS=blocks_a_program,
        num_warps=4,
        **dependent_launch(out.device),
    )
    return out
