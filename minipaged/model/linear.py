"""Linear layers, each with a weight format of its own: how its weight lies in memory, and how it is multiplied.

Nobody else touches a weight. A format is a module with the three methods of Format; its tensors are its parameters, so that the model
counts and moves them like any other. There are four: the plain matrix, packed codes, the layout of oneDNN on a CPU, and torch's own
layout of four-bit codes there.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from minipaged.kernels.elementwise.norm import rms_norm_torch
from minipaged.kernels.linear import (
    PackedMatrix,
    gated_linear,
    linear,
    packed_gated_linear,
    packed_linear,
)
from minipaged.kernels.linear.packed_matrix import codes_of

RANDOM_GROUP = 128
UNIFORM_STD = (255 / 12) ** 0.5  # of the numbers 0 to 15
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

    def rows(self, first: int, count: int) -> Tensor | None:
        """The view [count, in_features] that a checkpoint's matrix is copied into; None where the format came filled.

        RuntimeError where the format cannot be written any more."""
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


class Packed(nn.Module):
    """Codes of four or eight bits with a scale for each group of them (kernels/linear/packed_matrix.py), as they came from a checkpoint."""

    def __init__(self, matrix: PackedMatrix) -> None:
        super().__init__()
        self.words = nn.Parameter(matrix.words, requires_grad=False)
        self.scales = nn.Parameter(matrix.scales, requires_grad=False)
        self.inputs, self.group, self.has_zero_points = matrix[2:]

    @property
    def matrix(self) -> PackedMatrix:
        """The parameters as the kernels take them."""
        return PackedMatrix(self.words, self.scales, self.inputs, self.group, self.has_zero_points)

    def multiply(self, x: Tensor, bias: Tensor | None, norm: RMSNorm | None, residual: Tensor | None) -> Tensor:
        if norm is None:
            return packed_linear(x, self.matrix, bias, residual=residual)
        return packed_linear(x, self.matrix, bias, norm=norm.weight, eps=norm.eps, residual=residual)

    def multiply_gated(self, x: Tensor, bias: Tensor | None, norm: RMSNorm | None) -> Tensor:
        if norm is None:
            return packed_gated_linear(x, self.matrix, bias)
        return packed_gated_linear(x, self.matrix, bias, norm=norm.weight, eps=norm.eps)

    def rows(self, first: int, count: int) -> None:
        return None

    @staticmethod
    def random(outputs: int, inputs: int, std: float, device: torch.device | str, generator: torch.Generator) -> Packed:
        """Four-bit codes drawn on `device`, in groups of 128 as AWQ has them (or all inputs, if they are no multiple of it)."""
        group = RANDOM_GROUP if inputs % RANDOM_GROUP == 0 else inputs
        shape = (outputs, -(-inputs // 128), 1, 32) if group == RANDOM_GROUP else (outputs, -(-inputs // 64), 1, 16)
        words = torch.empty(shape, dtype=torch.int16, device=device).random_(-(2**15), 2**15, generator=generator)
        scales = torch.empty(outputs, -(-shape[1] * shape[3] * 4 // group), 2, dtype=torch.float16, device=device)
        scales[..., 0], scales[..., 1] = std / UNIFORM_STD, 8.0
        return Packed(PackedMatrix(words, scales, inputs, group, True))


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

    def rows(self, first: int, count: int) -> Tensor | None:
        raise RuntimeError("a packed weight cannot be written: fill the model before Llama.pack()")


class Int4OnCPU(nn.Module):
    """Four-bit codes as torch's own kernel for a CPU reads them: twice as fast as bfloat16 for one row, alike for 64, many times slower
    than float32 in float32. Scales and offsets are rounded to bfloat16."""

    def __init__(self, matrix: PackedMatrix) -> None:
        super().__init__()
        self.group = matrix.group
        codes = codes_of(matrix).to(torch.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        self.codes = nn.Parameter(packed, requires_grad=False)
        scale, offset = matrix.scales[:, : matrix.inputs // matrix.group].float().unbind(-1)
        offset = -scale * offset if matrix.has_zero_points else offset
        pairs = torch.stack((scale, offset + 8 * scale), dim=-1)  # torch's codes stand for s * (q - 8) + b
        self.scales = nn.Parameter(pairs.transpose(0, 1).contiguous().to(torch.bfloat16), requires_grad=False)

    def multiply(self, x: Tensor, bias: Tensor | None, norm: RMSNorm | None, residual: Tensor | None) -> Tensor:
        normed = x if norm is None else rms_norm_torch(x, norm.weight, norm.eps)
        product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(normed, self.codes, self.group, self.scales)
        product = product if bias is None else product.add_(bias)
        return product if residual is None else residual.add_(product)

    def multiply_gated(self, x: Tensor, bias: Tensor | None, norm: RMSNorm | None) -> Tensor:
        gate, up = self.multiply(x, bias, norm, None).chunk(2, dim=-1)
        return functional.silu(gate).mul_(up)

    def rows(self, first: int, count: int) -> Tensor | None:
        raise RuntimeError("a packed weight cannot be written: fill the model before Llama.pack()")


def int4_on_cpu(outputs: int, group: int) -> bool:
    """Whether torch's four-bit kernel for a CPU takes a matrix."""
    return outputs % 16 == 0 and group in (32, 64, 128, 256) and hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu")


class Linear(nn.Module):
    """y = x W^T + b, with the norm before it and the sum or gate behind it in a layer. W is [out_features, in_features]."""

    format: Format

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str,
        weight_device: torch.device | str | None = None,
    ) -> None:
        """The weight is made on `weight_device`, if that is given: "meta" where a loader will bring another format."""
        super().__init__()
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        self.format = Dense(empty_parameter(out_features, in_features, dtype=dtype, device=weight_device or device))
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
            if (rows := self.format.rows(first, count)) is not None:
                slots[f"{name}.weight"] = rows
            if self.bias is not None:
                slots[f"{name}.bias"] = self.bias[first : first + count]
            first += count
        return slots

    def dense_on(self, device: torch.device | str) -> Dense:
        """An empty plain matrix of this weight's shape and dtype."""
        assert isinstance(self.format, Dense)
        return Dense(nn.Parameter(torch.empty_like(self.format.weight, device=device), requires_grad=False))

    def pack(self) -> None:
        """On a CPU: change a plain float32 matrix into oneDNN's layout, and four-bit codes that multiply bfloat16 into torch's own.

        Nothing can be copied into it afterwards.
        """
        if isinstance(self.format, Dense):
            if self.format.weight.dtype == torch.float32:
                self.format = OneDNN(self.format.weight)
        elif isinstance(self.format, Packed) and self.dtype == torch.bfloat16:
            matrix = self.format.matrix
            if matrix.words.shape[2] == 1 and int4_on_cpu(matrix.outputs, matrix.group):
                self.format = Int4OnCPU(matrix)


def empty_parameter(*shape: int, dtype: torch.dtype, device: torch.device | str) -> nn.Parameter:
    """A parameter of the network: to be filled, never trained."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)
