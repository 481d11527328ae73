"""RMS norm of rows, and of the heads in them.

The Triton kernels are in norm_triton.py.
Source: Zhang and Sennrich, 2019. Rounding is that of transformers' Llama: the mean and the quotient in float32, rounded to x's dtype
before the weight multiplies them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from minipaged.kernels.checks import FLOAT_DTYPES, shape_of
from minipaged.kernels.dispatch import use_triton


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    x: [T, size], or [T, heads, size] for a norm per head; its last dimension contiguous. weight: [size], of x's dtype. Returns a
    contiguous tensor of x's shape. Moves x in and out once. Raises ValueError on shapes, dtypes or devices that do not fit.
    """
    check_norm(x, weight, eps)
    if use_triton(x):
        from minipaged.kernels.elementwise.norm_triton import rms_norm_triton

        return rms_norm_triton(x, weight, eps)
    return rms_norm_torch(x, weight, eps)


def check_norm(x: Tensor, weight: Tensor, eps: float) -> None:
    """The arguments of a norm fit each other."""
    if x.dim() not in (2, 3) or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"x has shape {shape_of(x)} and weight {shape_of(weight)}; they must be [tokens, size] or [tokens, heads, size], and [size]"
        )
    if x.dtype not in FLOAT_DTYPES or weight.dtype != x.dtype or weight.device != x.device:
        raise ValueError(
            f"x is {x.dtype} on {x.device}, weight {weight.dtype} on {weight.device}; both must be one of float32, float16, "
            "bfloat16 on one device"
        )
    if x.stride(-1) != 1 or weight.stride(-1) != 1:
        raise ValueError(f"x has strides {x.stride()} and weight {weight.stride()}; last dimensions must be contiguous")
    if not eps >= 0:
        raise ValueError(f"eps is {eps}; it must be at least 0")


def rms_norm_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The twin of rms_norm_triton."""
    if x.dtype == torch.float32:
        return F.rms_norm(x, weight.shape, weight, eps)
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)
