"""The products with packed weights, with the norm before and the sum or gate after, as those of matmul.py with dense ones.

The Triton kernel, for few rows of x, is in packed_triton.py. For many rows the matrix is dequantized and the product is torch's; that
is also the twin.
"""

from __future__ import annotations

from torch import Tensor

from minipaged.kernels.checks import FLOAT_DTYPES, shape_of
from minipaged.kernels.dispatch import gluon_runs, use_triton
from minipaged.kernels.elementwise.activation import silu_mul
from minipaged.kernels.elementwise.norm import rms_norm
from minipaged.kernels.launch_table import FEW_PACKED_ROWS, MOST_TILE_ROWS
from minipaged.kernels.linear.matmul import gated_linear_torch, linear_torch
from minipaged.kernels.linear.packed_matrix import PackedMatrix, dequantize


def packed_linear(
    x: Tensor,
    weight: PackedMatrix,
    bias: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    """`linear` with a packed weight: n(x) W^T + bias, [T, outputs]; added to `residual` in place, and that returned, if given.

    x: [T, inputs], its last dimension contiguous. bias: [outputs]. norm: [inputs]. residual: [T, outputs]. Moves weight.num_bytes while T
    is small. Raises ValueError on shapes, dtypes or devices that do not fit.
    """
    _check(x, weight, 1)
    if use_triton(x) and x.element_size() == 2:
        if x.shape[0] == 1 and gluon_runs():
            from minipaged.kernels.linear.packed_one_row import packed_one_row

            return packed_one_row(x, weight, bias, norm=norm, eps=eps, residual=residual)
        if x.shape[0] <= MOST_TILE_ROWS:
            from minipaged.kernels.linear.packed_triton import packed_rows_triton, packed_tile_triton

            normed = x if norm is None else rms_norm(x, norm, eps)
            multiply = packed_rows_triton if x.shape[0] <= FEW_PACKED_ROWS else packed_tile_triton
            return multiply(normed, weight, bias, residual=residual)
    return packed_linear_torch(x, weight, bias, norm=norm, eps=eps, residual=residual)


def packed_gated_linear(
    x: Tensor, weight: PackedMatrix, bias: Tensor | None = None, *, norm: Tensor | None = None, eps: float = 0.0
) -> Tensor:
    """`gated_linear` with a packed weight: silu(gate) * up, the halves of n(x) W^T + bias, [T, outputs / 2]."""
    _check(x, weight, 2)
    if use_triton(x) and x.element_size() == 2:
        if x.shape[0] == 1 and gluon_runs():
            from minipaged.kernels.linear.packed_one_row import packed_one_row

            return packed_one_row(x, weight, bias, norm=norm, eps=eps, gated=True)
        if x.shape[0] <= FEW_PACKED_ROWS:
            from minipaged.kernels.linear.packed_triton import packed_rows_triton

            return packed_rows_triton(x if norm is None else rms_norm(x, norm, eps), weight, bias, gated=True)
        if x.shape[0] <= MOST_TILE_ROWS:
            return silu_mul(packed_linear(x, weight, bias, norm=norm, eps=eps))
    return packed_gated_linear_torch(x, weight, bias, norm=norm, eps=eps)


def _check(x: Tensor, weight: PackedMatrix, parts: int) -> None:
    """x fits the weight."""
    if x.dim() != 2 or x.shape[1] != weight.inputs or weight.outputs % parts:
        raise ValueError(
            f"x has shape {shape_of(x)} and the weight [{weight.outputs}, {weight.inputs}]; they must be [tokens, inputs] and "
            "[outputs, inputs]" + (", outputs even" if parts == 2 else "")
        )
    if x.dtype not in FLOAT_DTYPES or x.stride(1) != 1 or weight.words.device != x.device:
        raise ValueError(
            f"x is {x.dtype} on {x.device} with strides {x.stride()}, the weight is on {weight.words.device}; x must be float32, float16 "
            "or bfloat16 where the weight is, its last dimension contiguous"
        )


def packed_linear_torch(
    x: Tensor,
    weight: PackedMatrix,
    bias: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    """The twin of the Triton kernel, and the way of many rows: dequantize, then multiply."""
    return linear_torch(x, _dense(weight, x), bias, norm=norm, eps=eps, residual=residual)


def packed_gated_linear_torch(
    x: Tensor, weight: PackedMatrix, bias: Tensor | None = None, *, norm: Tensor | None = None, eps: float = 0.0
) -> Tensor:
    """The twin of the gated kernel, and the way of many rows."""
    return gated_linear_torch(x, _dense(weight, x), bias, norm=norm, eps=eps)


def _dense(weight: PackedMatrix, x: Tensor) -> Tensor:
    """W in x's dtype; by the Triton kernel where that runs."""
    if use_triton(x):
        from minipaged.kernels.linear.packed_triton import dequantize_triton

        return dequantize_triton(weight, x.dtype)
    return dequantize(weight, x.dtype)
