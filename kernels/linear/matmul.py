"""The matrix products of a layer with what stands around them: the norm before, the residual sum or the gate after.

The Triton kernels, for the few rows of a small decode step, are in matmul_triton.py; with more rows the product is torch's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from minipaged.kernels.checks import FLOAT_DTYPES, shape_of
from minipaged.kernels.dispatch import use_triton
from minipaged.kernels.elementwise.activation import silu_mul
from minipaged.kernels.elementwise.norm import rms_norm


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    """n(x) weight^T + bias, where n is the RMS norm of weight `norm` if that is given; added to `residual` in place if that is given.

    x: [T, inputs], its last dimension contiguous. weight: [outputs, inputs], contiguous. bias: [outputs]. norm: [inputs].
    residual: [T, outputs], changed and returned; else a new tensor [T, outputs]. Moves the weight once: inputs * outputs elements,
    which is all that counts while T is small. On a GPU the weight must have been written before the kernel launched last: its first tiles
    are read while that one may still run. Raises ValueError on shapes, dtypes or devices that do not fit.
    """
    _check(x, weight, bias, norm, 1)
    if residual is not None and (
        residual.shape != (x.shape[0], weight.shape[0]) or residual.dtype != x.dtype or residual.stride(-1) != 1
    ):
        raise ValueError(
            f"residual is {residual.dtype} {shape_of(residual)} with strides {residual.stride()}; it must be {x.dtype} "
            f"[{x.shape[0]}, {weight.shape[0]}] with its last dimension contiguous"
        )
    if use_triton(x):
        from minipaged.kernels.linear.matmul_triton import (
            few_rows_triton,
            one_row_triton,
            takes_few_rows,
            takes_one_row,
        )

        if takes_one_row(x):
            return one_row_triton(x, weight, bias, norm=norm, eps=eps, residual=residual)
        if takes_few_rows(x, weight, residual):
            return few_rows_triton(x if norm is None else rms_norm(x, norm, eps), weight, bias, residual=residual)
    return linear_torch(x, weight, bias, norm=norm, eps=eps, residual=residual)


def gated_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, norm: Tensor | None = None, eps: float = 0.0
) -> Tensor:
    """silu(gate) * up, where gate and up are the halves of n(x) weight^T + bias: [T, outputs / 2].

    weight: [outputs, inputs], the gate's rows first; the rest as in `linear`. Source: Shazeer, 2020 (GLU variants).
    """
    _check(x, weight, bias, norm, 2)
    if use_triton(x):
        from minipaged.kernels.linear.matmul_triton import one_row_triton, takes_one_row

        if takes_one_row(x):
            return one_row_triton(x, weight, bias, norm=norm, eps=eps, gated=True)
    return gated_linear_torch(x, weight, bias, norm=norm, eps=eps)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, norm: Tensor | None, parts: int) -> None:
    """The arguments of a product fit each other."""
    if x.dim() != 2 or weight.dim() != 2 or weight.shape[1] != x.shape[1] or weight.shape[0] % parts:
        raise ValueError(
            f"x has shape {shape_of(x)} and weight {shape_of(weight)}; they must be [tokens, inputs] and [outputs, inputs]"
            + (", outputs even" if parts == 2 else "")
        )
    if x.dtype not in FLOAT_DTYPES or x.stride(1) != 1 or not weight.is_contiguous():
        raise ValueError(
            f"x is {x.dtype} with strides {x.stride()}, weight has strides {weight.stride()}; x must be float32, float16 or bfloat16 "
            "with its last dimension contiguous, weight contiguous"
        )
    for name, tensor, size in (("bias", bias, weight.shape[0]), ("norm", norm, weight.shape[1])):
        if tensor is not None and (tensor.shape != (size,) or tensor.dtype != x.dtype):
            raise ValueError(f"{name} is {tensor.dtype} {shape_of(tensor)}; it must be {x.dtype} [{size}]")
    for name, tensor in (("weight", weight), ("bias", bias), ("norm", norm)):
        if tensor is not None and (tensor.dtype != x.dtype or tensor.device != x.device):
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}; it must be {x.dtype} on {x.device}, as x is"
            )


def linear_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    """The twin of the Triton kernels, and the way of many rows: the norm apart, the sum as the product's own beta.

    On a CPU the product is rounded before the sum, as transformers does it, so that outputs can be compared in sixteen bits too.
    """
    normed = x if norm is None else rms_norm(x, norm, eps)
    if x.is_meta:  # shapes alone: for these torch's function would import its compiler's parts first
        return x.new_empty(x.shape[0], weight.shape[0]) if residual is None else residual
    if residual is None:
        return F.linear(normed, weight, bias)
    if not x.is_cuda:
        return residual.add_(F.linear(normed, weight, bias))
    if bias is not None:
        residual.add_(bias)
    return torch.addmm(residual, normed, weight.t(), out=residual)


def gated_linear_torch(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, norm: Tensor | None = None, eps: float = 0.0
) -> Tensor:
    """The twin of the gated one-row kernel, and the way of more rows."""
    return silu_mul(linear_torch(x, weight, bias, norm=norm, eps=eps))
