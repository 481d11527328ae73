"""Weights of four or eight bits: how they lie in memory, and the way there and back.

A code q stands for s * (q - z) or s * q + b, where a group of neighbouring codes in a row shares s and z or b.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from minipaged.kernels.checks import shape_of

SMALLEST_GROUP = 16  # codes: what one step of a tensor core takes


class PackedMatrix(NamedTuple):
    """A matrix W [outputs, inputs] of four- or eight-bit codes.

    words: int16 [outputs, blocks, planes, width]. A block is 4 * width inputs of a row; bits 4 i to 4 i + 3 of its word j are of input
    i * width + j, so that each quarter of a block meets neighbouring inputs. Eight-bit codes have two planes, the low halves and the
    high ones; four-bit codes have one. Inputs past the last one are padding.
    scales: float16 or float32 [outputs, groups, 2], side by side since they are read together: s and z, or s and b.
    """

    words: Tensor
    scales: Tensor
    inputs: int
    group: int  # neighbouring inputs that share a scale
    has_zero_points: bool  # a group's second number is z, not b

    @property
    def outputs(self) -> int:
        """Rows of W."""
        return self.words.shape[0]

    @property
    def num_bytes(self) -> int:
        """What the matrix takes in memory, and what a product reads of it."""
        return sum(part.numel() * part.element_size() for part in (self.words, self.scales))


def pack(codes: Tensor, scales: Tensor, bits: int, *, has_zero_points: bool) -> PackedMatrix:
    """The matrix with these codes, uint8 [outputs, inputs], below 2**bits; scales are [outputs, groups, 2], as PackedMatrix has them.

    Raises ValueError on a group that is no multiple of 16, or shapes that do not fit.
    """
    outputs, inputs = codes.shape
    group = inputs // scales.shape[1]
    if bits not in (4, 8) or group % SMALLEST_GROUP or scales.shape != (outputs, inputs // max(group, 1), 2):
        raise ValueError(
            f"codes of {bits} bits {shape_of(codes)} with scales {shape_of(scales)}; codes must have 4 or 8 bits, groups a multiple of "
            f"{SMALLEST_GROUP} of them"
        )
    width = 32 if inputs % 128 == 0 and group % 32 == 0 else 16
    padding = -inputs % (4 * width)
    quarters = functional.pad(codes, (0, padding)).view(outputs, -1, 4, width)
    planes = [quarters] if bits == 4 else [quarters & 15, quarters >> 4]
    words = torch.stack([_words(plane) for plane in planes], dim=2)
    more_groups = -(-(inputs + padding) // group) - scales.shape[1]
    scales = functional.pad(scales, (0, 0, 0, more_groups)).contiguous()
    return PackedMatrix(words, scales, inputs, group, has_zero_points)


def _words(nibbles: Tensor) -> Tensor:
    """int16 [outputs, blocks, width] of uint8 [outputs, blocks, 4, width]: two bytes each, the lower one first."""
    low = nibbles[:, :, 0] | nibbles[:, :, 1] << 4
    high = nibbles[:, :, 2] | nibbles[:, :, 3] << 4
    return torch.stack((low, high), dim=-1).view(torch.int16).squeeze(-1)


def codes_of(matrix: PackedMatrix) -> Tensor:
    """The codes, uint8 [outputs, inputs]: what was given to `pack`."""
    outputs, blocks, planes, width = matrix.words.shape
    pairs = matrix.words.view(torch.uint8).view(outputs, blocks, planes, width, 2).movedim(-1, 3)
    nibbles = torch.stack((pairs & 15, pairs >> 4), dim=4)  # [outputs, blocks, planes, 2, 2, width]
    codes = nibbles[:, :, 0] if planes == 1 else nibbles[:, :, 0] | nibbles[:, :, 1] << 4
    return codes.reshape(outputs, -1)[:, : matrix.inputs].contiguous()


def dequantize(matrix: PackedMatrix, dtype: torch.dtype) -> Tensor:
    """W, [outputs, inputs], computed in float32 and rounded once."""
    groups = matrix.inputs // matrix.group
    codes = codes_of(matrix).view(matrix.outputs, groups, matrix.group).float()
    scale, offset = matrix.scales[:, :groups, :, None].float().unbind(2)
    values = codes.sub_(offset).mul_(scale) if matrix.has_zero_points else codes.mul_(scale).add_(offset)
    return values.view(matrix.outputs, matrix.inputs).to(dtype)
