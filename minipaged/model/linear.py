"""Linear layers, each with a weight format of its own: how its weight lies in memory, and how it is multiplied.

Nobody else touches a weight. A format is a module with the three methods of Format; its tensors are its parameters, so that the model
counts, moves and draws them like any other. There are two: the plain matrix, and the layout of oneDNN on a CPU.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from minipaged.kernels.elementwise.norm import rms_norm_torch
from minipaged.kernels.linear import gated_linear, linear

ONEDNN_ROWS = 8  # the batch that oneDNN's layout is chosen for; measured equally good from 1 to 1,000 rows


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich, 2019). Mostly it rides on a matrix product."""

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.weight = empty_parameter(size, dtype=dtype, device=device)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """A tensor of x's shape, [..., size]."""
        return rms_norm_torch(x, self.weight, self.eps)


class Format(Protocol):
    """A weight W [out_features, in_features]. `bias` is [out_features]; `norm` is applied to x first."""

    def multiply(self, x: Tensor, bias: Tensor | None, norm: RMSNorm | None, residual: Tensor | None) -> Tensor:
        """norm(x) W^T + bias, [T, out_features]; added to `residual` in place if that is given."""
        ...

    def multiply_gated(self, x: Tensor, bias: Tensor | None, norm: RMSNorm | None) -> Tensor:
        """silu(gate) * up, the halves of norm(x) W^T + bias: [T, out_features / 2]."""
        ...

    def rows(self, first: int, count: int) -> Tensor:
        """The view [count, in_features] that a checkpoint's matrix is copied into. RuntimeError where the format cannot be written so."""
        ...


class Dense(nn.Module):
    """The matrix as it is, [out_features, in_features], in the model's dtype."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def multiply(self, x: Tensor, bias: Tensor | None, norm: RMSNorm | None, residual: Tensor | None) -> Tensor:
        if norm is None:
            return linear(x, self.weight, bias, residual=residual)
        return linear(x, self.weight, bias, norm=norm.weight, eps=norm.eps, residual=residual)

    def multiply_gated(self, x: Tensor, bias: Tensor | None, norm: RMSNorm | None) -> Tensor:
        if norm is None:
            return gated_linear(x, self.weight, bias)
        return gated_linear(x, self.weight, bias, norm=norm.weight, eps=norm.eps)

    def rows(self, first: int, count: int) -> Tensor:
        return self.weight[first : first + count]


class OneDNN(nn.Module):
    """A float32 matrix as oneDNN's kernels read it on a CPU: 2-4 times faster than the plain layout."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ONEDNN_ROWS)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def multiply(self, x: Tensor, bias: Tensor | None, norm: RMSNorm | None, residual: Tensor | None) -> Tensor:
        normed = x if norm is None else rms_norm_torch(x, norm.weight, norm.eps)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(normed, self.weight, bias, "none", [], "")
        return product if residual is None else residual.add_(product)

    def multiply_gated(self, x: Tensor, bias: Tensor | None, norm: RMSNorm | None) -> Tensor:
        gate, up = self.multiply(x, bias, norm, None).chunk(2, dim=-1)
        return functional.silu(gate).mul_(up)

    def rows(self, first: int, count: int) -> Tensor:
        raise RuntimeError("a packed weight cannot be written: fill the model before Llama.pack()")


class Linear(nn.Module):
    """y = x W^T + b, with the norm before it and the sum or gate behind it in a layer. W is [out_features, in_features]."""

    format: Format

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.format = Dense(empty_parameter(out_features, in_features, dtype=dtype, device=device))
        self.bias = empty_parameter(out_features, dtype=dtype, device=device) if bias else None

    def forward(self, x: Tensor, *, norm: RMSNorm | None = None, residual: Tensor | None = None) -> Tensor:
        """norm(x) W^T + b, [T, out_features], for x [T, in_features]; added to `residual` in place, and that returned, if given."""
        return self.format.multiply(x, self.bias, norm, residual)

    def gated(self, x: Tensor, *, norm: RMSNorm | None = None) -> Tensor:
        """silu(gate) * up, [T, out_features / 2]: the gate's rows of W stand first (GLU variants, Shazeer, 2020)."""
        return self.format.multiply_gated(x, self.bias, norm)

    def slots(self, pieces: dict[str, int]) -> dict[str, Tensor]:
        """Where checkpoints' matrices of so many rows each, which W holds one below the other, are to be copied: name -> view."""
        slots, first = {}, 0
        for name, count in pieces.items():
            slots[f"{name}.weight"] = self.format.rows(first, count)
            if self.bias is not None:
                slots[f"{name}.bias"] = self.bias[first : first + count]
            first += count
        return slots

    def pack(self) -> None:
        """Change a plain float32 matrix on a CPU into oneDNN's layout. Nothing can be copied into it afterwards."""
        self.format = OneDNN(self.format.rows(0, self.out_features))


def empty_parameter(*shape: int, dtype: torch.dtype, device: torch.device | str) -> nn.Parameter:
    """A parameter of the network: to be filled, never trained."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)
