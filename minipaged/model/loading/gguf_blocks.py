"""GGUF's quantized blocks -> codes and scales, with no value changed: the file's float32 values come back bit for bit.

The layouts are those of ggml (ggml-common.h); a row of a matrix is whole blocks. d and dmin are float16, a "low" half of packed bytes
stands for earlier inputs than the "high" half.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from minipaged.model.loading.quantized import QuantizedMatrix


@dataclass(frozen=True, slots=True)
class Blocks:
    """One type: values and bytes a block, and how rows of it, uint8 [outputs, blocks, bytes], become a matrix.

    group: values that share a scale. bits: what a value takes as it stays packed, scales included.
    """

    values: int
    num_bytes: int
    group: int
    bits: float
    read: Callable[[Tensor], QuantizedMatrix]


def _half(raw: Tensor, first: int) -> Tensor:
    """The float16 at that byte of each block."""
    return raw[..., first : first + 2].contiguous().view(torch.float16).squeeze(-1)


def _matrix(codes: Tensor, scale: Tensor, offset: Tensor, bits: int, *, zero_points: bool) -> QuantizedMatrix:
    """codes [outputs, blocks, values of a block], scale and offset [outputs, blocks(, groups of a block)]."""
    outputs = codes.shape[0]
    scales = torch.stack((scale.expand_as(offset), offset.to(scale.dtype)), dim=-1)
    return QuantizedMatrix(codes.reshape(outputs, -1), scales.reshape(outputs, -1, 2), bits, zero_points)


def _constant(scale: Tensor, zero_point: float) -> Tensor:
    return torch.full_like(scale, zero_point)


def _cut(packed: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """The last dimension as several."""
    return packed.reshape(*packed.shape[:-1], *sizes)


def _nibbles(packed: Tensor) -> Tensor:
    """The low halves of the last dimension, then the high halves."""
    return torch.cat((packed & 15, packed >> 4), dim=-1)


def _bit(packed: Tensor, count: int) -> Tensor:
    """Bits 0 to 31 of four bytes, as a fifth bit of the codes: [..., 32]."""
    bits = (packed[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.reshape(*packed.shape[:-1], count) << 4


def _q4_0(raw: Tensor) -> QuantizedMatrix:
    """d, 16 bytes: d * (q - 8)."""
    d = _half(raw, 0)
    return _matrix(_nibbles(raw[..., 2:]), d, _constant(d, 8), 4, zero_points=True)


def _q4_1(raw: Tensor) -> QuantizedMatrix:
    """d, m, 16 bytes: d * q + m."""
    return _matrix(_nibbles(raw[..., 4:]), _half(raw, 0), _half(raw, 2), 4, zero_points=False)


def _q5_0(raw: Tensor) -> QuantizedMatrix:
    """d, 4 bytes of fifth bits, 16 bytes: d * (q - 16)."""
    d = _half(raw, 0)
    return _matrix(_nibbles(raw[..., 6:]) | _bit(raw[..., 2:6], 32), d, _constant(d, 16), 8, zero_points=True)


def _q5_1(raw: Tensor) -> QuantizedMatrix:
    """d, m, 4 bytes of fifth bits, 16 bytes: d * q + m."""
    codes = _nibbles(raw[..., 8:]) | _bit(raw[..., 4:8], 32)
    return _matrix(codes, _half(raw, 0), _half(raw, 2), 8, zero_points=False)


def _q8_0(raw: Tensor) -> QuantizedMatrix:
    """d, 32 signed bytes: d * q. Here q + 128 and a zero point."""
    d = _half(raw, 0)
    return _matrix(raw[..., 2:] ^ 128, d, _constant(d, 128), 8, zero_points=True)


def _k_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Eight 6-bit scales and eight 6-bit minimums from 12 bytes: four each in low bits, the other four's pieces around them."""
    first, second, third = torch.split(packed, 4, dim=-1)
    scale = torch.cat((first & 63, third & 15 | (first >> 2) & 48), dim=-1)
    minimum = torch.cat((second & 63, third >> 4 | (second >> 2) & 48), dim=-1)
    return scale.float(), minimum.float()


def _q4_k(raw: Tensor) -> QuantizedMatrix:
    """d, dmin, 12 bytes of scales, 128 bytes: d * scale * q - dmin * minimum, in groups of 32."""
    scale, minimum = _k_scales(raw[..., 4:16])
    codes = _nibbles(_cut(raw[..., 16:], (4, 32))).flatten(-2)
    return _k_matrix(raw, codes, scale, minimum, 4)


def _q5_k(raw: Tensor) -> QuantizedMatrix:
    """d, dmin, 12 bytes of scales, 32 bytes of fifth bits, 128 bytes: as Q4_K; bit i of the fifth bits' bytes is of group i."""
    scale, minimum = _k_scales(raw[..., 4:16])
    fifth = (raw[..., 16:48, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    codes = _nibbles(_cut(raw[..., 48:], (4, 32))).flatten(-2) | fifth.transpose(-1, -2).flatten(-2) << 4
    return _k_matrix(raw, codes, scale, minimum, 8)


def _k_matrix(raw: Tensor, codes: Tensor, scale: Tensor, minimum: Tensor, bits: int) -> QuantizedMatrix:
    d, dmin = _half(raw, 0).float()[..., None], _half(raw, 2).float()[..., None]
    return _matrix(codes, d * scale, -(dmin * minimum), bits, zero_points=False)


def _q6_k(raw: Tensor) -> QuantizedMatrix:
    """128 bytes of low halves, 64 of high pairs of bits, 16 signed scales, d: d * scale * (q - 32), in groups of 16."""
    low = _nibbles(_cut(raw[..., :128], (2, 64)))  # of each half block of 128 inputs: 64 low, 64 high
    pairs = _cut(raw[..., 128:192], (2, 1, 32)) >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
    codes = low.flatten(-2) | (pairs & 3).flatten(-3) << 4
    scale = _half(raw, 208).float()[..., None] * raw[..., 192:208].contiguous().view(torch.int8).float()
    return _matrix(codes, scale, _constant(scale, 32), 8, zero_points=True)


# By ggml's number of the type.
PACKABLE: dict[int, Blocks] = {
    2: Blocks(32, 18, 32, 5, _q4_0),
    3: Blocks(32, 20, 32, 5, _q4_1),
    6: Blocks(32, 22, 32, 9, _q5_0),
    7: Blocks(32, 24, 32, 9, _q5_1),
    8: Blocks(32, 34, 32, 9, _q8_0),
    12: Blocks(256, 144, 32, 6, _q4_k),
    13: Blocks(256, 176, 32, 10, _q5_k),
    14: Blocks(256, 210, 16, 12, _q6_k),
}
