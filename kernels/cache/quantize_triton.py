"""The quantization of quantize.py, inside the Triton kernels that write keys and values."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803

import triton
import triton.language as tl

from minipaged.kernels.cache.quantize import Scales


@triton.jit
def largest_finite(x):
    """max |x| of each row of x, float32 [rows, columns] -> [rows]; infinity where the row holds NaN or an infinity."""
    size = tl.abs(x)
    return tl.max(tl.where(size < float("inf"), size, float("inf")), 1)


@triton.jit
def scale_of(absmax, LARGEST: tl.constexpr):
    """The scale of rows whose largest absolute value this is, NaN if it is infinite."""
    return tl.where(absmax < float("inf"), tl.div_rn(absmax, LARGEST + tl.zeros_like(absmax)), float("nan"))


@triton.jit
def codes_of(x, scale, dtype: tl.constexpr, LARGEST: tl.constexpr):
    """The codes, of `dtype`, of x, float32 [rows, columns], with a scale a row.

    Both dtypes are rounded here, to the nearest, ties to even: Triton converts to integers by cutting, and its interpreter loses the
    carry when it rounds to float8. The conversion is then exact everywhere.
    """
    divisor = tl.where(scale > 0, scale, 1.0)[:, None] + tl.zeros_like(x)
    code = tl.where((scale >= 0)[:, None], tl.div_rn(x, divisor), 0.0)
    code = tl.minimum(tl.maximum(code, -LARGEST), LARGEST)
    if dtype == tl.int8:
        code = (code + 12582912.0) - 12582912.0  # 1.5 * 2**23: what is left of it is a whole number
    else:
        bits = code.to(tl.int32, bitcast=True)
        bits = (bits + (0x7FFFF + ((bits >> 20) & 1))) & -0x100000  # three bits of mantissa
        small = (code + 24576.0) - 24576.0  # 1.5 * 2**14: multiples of 2**-9, the step below 2**-6
        code = tl.where(tl.abs(code) < 0.015625, small, bits.to(tl.float32, bitcast=True))
    return code.to(dtype)


def scale_arguments(scales: Scales | None, unused: object) -> tuple[object, object, int, int]:
    """(scales of keys, of values, stride of a block, of a head) for a kernel; without scales `unused` stands for both."""
    if scales is None:
        return unused, unused, 0, 0
    return *scales, scales[0].stride(0), scales[0].stride(1)
