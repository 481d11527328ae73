"""A checkpoint's quantized matrix in one form, whatever file it comes from, on its way into a packed weight.

Codes lie one a byte, so that rows can be moved and cut and matrices laid one below the other; `packed` then gives them the layout of the
kernels. The files' own layouts are in gguf_blocks.py and hf_quantized.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minipaged.kernels.linear import PackedMatrix, pack
from minipaged.kernels.linear.packed_matrix import SMALLEST_GROUP


class QuantizedMatrix(NamedTuple):
    """[outputs, inputs] of codes below 2**bits; those of a group stand for s * (q - z), or s * q + b.

    codes: uint8 [outputs, inputs]. scales: [outputs, groups, 2], s and z with has_zero_points, else s and b; float16 where the file's
    numbers are, else float32.
    """

    codes: Tensor
    scales: Tensor
    bits: int
    has_zero_points: bool

    @property
    def group(self) -> int:
        """Neighbouring inputs that share a scale."""
        return self.codes.shape[1] // self.scales.shape[1]

    def rows(self, index: Tensor | slice) -> QuantizedMatrix:
        """Some of the outputs, in any order."""
        return self._replace(codes=self.codes[index], scales=self.scales[index])

    def columns(self, first: int, count: int) -> QuantizedMatrix:
        """Neighbouring inputs. ValueError unless they begin and end where groups do."""
        if first % self.group or count % self.group:
            raise ValueError(f"inputs {first} to {first + count} do not begin and end with groups of {self.group}")
        groups = slice(first // self.group, (first + count) // self.group)
        return self._replace(codes=self.codes[:, first : first + count], scales=self.scales[:, groups])

    def packed(self, device: torch.device | str) -> PackedMatrix:
        """In the layout of the kernels, on `device`."""
        matrix = pack(self.codes, self.scales, self.bits, has_zero_points=self.has_zero_points)
        return matrix._replace(words=matrix.words.to(device), scales=matrix.scales.to(device))


def can_pack(inputs: int, group: int) -> bool:
    """Whether the kernels take a matrix of so many inputs in groups of that size."""
    return group % SMALLEST_GROUP == 0 and inputs % group == 0


def stack(pieces: Sequence[QuantizedMatrix]) -> QuantizedMatrix:
    """The matrices one below the other. Where they differ, each takes the finest groups and the widest codes of all: the same values."""
    group = math.gcd(*(piece.group for piece in pieces))
    zero_points = all(piece.has_zero_points for piece in pieces)
    wide = any(piece.scales.dtype == torch.float32 for piece in pieces)
    wide = wide or (not zero_points and any(piece.has_zero_points for piece in pieces))
    scales = []
    for piece in pieces:
        own = piece.scales.float() if wide else piece.scales
        if piece.has_zero_points and not zero_points:
            own = torch.stack((own[..., 0], -own[..., 0] * own[..., 1]), dim=-1)
        scales.append(own.repeat_interleave(piece.group // group, dim=1))
    codes = torch.cat([piece.codes for piece in pieces])
    return QuantizedMatrix(codes, torch.cat(scales), max(piece.bits for piece in pieces), zero_points)
