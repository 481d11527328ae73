"""AWQ's and GPTQ's packed matrices: qweight, qzeros and scales (and GPTQ's g_idx) -> codes and scales, and back.

A word of 32 bits holds eight codes. AWQ: words lie along the outputs, [inputs, outputs / 8], and code i of a word is of output
8 j + (0, 2, 4, 6, 1, 3, 5, 7)[i]. GPTQ: along the inputs, [inputs / 8, outputs], in order. Zero points: [groups, outputs / 8], in the
order of AWQ's codes, or in order; scales: float16 [groups, outputs]. A value is s * (q - z).

GPTQ's first version stores z - 1, the second z, and files are known to name the wrong one. Where all zero points are the same middle code,
8, what is stored tells them apart; elsewhere the config is believed.
Sources: AutoAWQ (awq/modules/linear/gemm.py), GPTQModel (nn_modules/qlinear), vLLM's issue 38966.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from minipaged.errors import ModelError
from minipaged.model.loading.quantization_config import Quantization
from minipaged.model.loading.quantized import QuantizedMatrix

PARTS = ("qweight", "qzeros", "scales", "g_idx")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
MIDDLE = 8
SHIFTS = torch.arange(0, 32, 4, dtype=torch.int32)


def quantized_stem(name: str) -> str | None:
    """`model.layers.0.mlp.down_proj` of any of its parts; None of other tensors."""
    stem, _, part = name.rpartition(".")
    return stem if part in PARTS else None


def shape_of(
    name: str, parts: Mapping[str, tuple[int, ...]], quantization: Quantization, path: Path
) -> tuple[int, int]:
    """[outputs, inputs] of a matrix from the shapes of its parts. ModelError where they do not belong together."""
    missing = [part for part in PARTS[:3] if part not in parts and not (part == "qzeros" and quantization.symmetric)]
    if missing:
        raise ModelError(f"{path}: tensor {name}.{missing[0]} is missing; the other parts of {name} are there")
    words, scales = parts["qweight"], parts["scales"]
    awq = quantization.method == "awq"
    if len(words) == 2 and len(scales) == 2:
        inputs, outputs = (words[0], 8 * words[1]) if awq else (8 * words[0], words[1])
        groups = inputs // (quantization.group or max(inputs, 1))
        expected = {"scales": (groups, outputs), "qzeros": (groups, outputs // 8), "g_idx": (inputs,)}
        if groups * (quantization.group or inputs) == inputs and all(
            shape == expected.get(part, shape) for part, shape in parts.items()
        ):
            return outputs, inputs
    raise ModelError(
        f"{path}: {name} has the shapes "
        + ", ".join(f"{part} {list(shape)}" for part, shape in parts.items())
        + f"; for {quantization.method} in groups of {quantization.group or 'all inputs'} they do not belong together"
    )


class ZeroPoints:
    """How this checkpoint stores them, as found in the first matrix that tells; the others must agree."""

    def __init__(self, quantization: Quantization, path: Path) -> None:
        self.quantization, self.path = quantization, path
        self.less_one: bool | None = None

    def read(self, name: str, stored: Tensor) -> Tensor:
        """The zero points of a matrix from the codes that are stored for them."""
        quantization = self.quantization
        same = stored.numel() > 0 and bool((stored == stored.flatten()[0]).all())
        value = int(stored.flatten()[0]) if same else None
        first_version = quantization.method == "gptq"
        if quantization.symmetric and value not in ((MIDDLE - 1, MIDDLE) if first_version else (MIDDLE,)):
            raise ModelError(
                f"{self.path}: {name}.qzeros are not all {MIDDLE}, though quantization_config says that the codes are symmetric"
            )
        if not first_version:
            return stored
        less_one = quantization.zeros_less_one
        if value in (MIDDLE - 1, MIDDLE):
            less_one = value == MIDDLE - 1
            if self.less_one is not None and self.less_one != less_one:
                raise ModelError(f"{self.path}: {name}.qzeros are stored in another way than those of earlier matrices")
            self.less_one = less_one
        elif self.less_one is not None:
            less_one = self.less_one
        return (stored + 1) & 15 if less_one else stored


def unpack_words(words: Tensor, method: str) -> Tensor:
    """Eight codes of each int32 along the last dimension, uint8, in order."""
    codes = ((words[..., None] >> SHIFTS) & 15).to(torch.uint8)
    if method == "awq":
        codes = codes[..., torch.tensor(AWQ_ORDER).argsort()]
    return codes.flatten(-2)


def pack_words(codes: Tensor, method: str) -> Tensor:
    """int32 of eight codes each along the last dimension: the way back of unpack_words."""
    eights = codes.reshape(*codes.shape[:-1], -1, 8).to(torch.int64)
    if method == "awq":
        eights = eights[..., torch.tensor(AWQ_ORDER)]
    words = (eights << SHIFTS.long()).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def read_matrix(
    name: str, parts: Mapping[str, Tensor], zero_points: ZeroPoints
) -> tuple[QuantizedMatrix, Tensor | None]:
    """The matrix, and the group of each input where groups are not neighbours (desc_act), else None."""
    quantization = zero_points.quantization
    method = quantization.method
    words = parts["qweight"]
    codes = unpack_words(words, method).t() if method == "awq" else unpack_words(words.t(), method)
    scale = parts["scales"].t()
    scale = scale if scale.dtype == torch.float16 else scale.float()
    if "qzeros" in parts:
        zeros = zero_points.read(name, unpack_words(parts["qzeros"], method)).t()
    else:
        zeros = torch.full(scale.shape, MIDDLE, dtype=torch.uint8)
    matrix = QuantizedMatrix(codes.contiguous(), torch.stack((scale, zeros.to(scale.dtype)), -1), 4, True)
    order = parts.get("g_idx")
    if order is None or torch.equal(order.long(), torch.arange(len(order)) // matrix.group):
        return matrix, None
    if int(order.min()) < 0 or int(order.max()) >= matrix.scales.shape[1]:
        raise ModelError(f"{zero_points.path}: {name}.g_idx names groups that are not there")
    return matrix, order.long()


def values_of(matrix: QuantizedMatrix, order: Tensor | None) -> Tensor:
    """[outputs, inputs] in float32. order: the group of each input; None if groups are neighbours."""
    groups = torch.arange(matrix.codes.shape[1]) // matrix.group if order is None else order
    scale, zero = matrix.scales.float()[:, groups].unbind(-1)
    return (matrix.codes.float() - zero) * scale
