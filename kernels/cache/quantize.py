"""Keys and values in eight bits: int8 or float8 e4m3 codes, and one float32 scale for each token and KV head.

Such a scale depends on its token alone. It never changes once it is written, so chunks, preemption, prefix hits and forks give the same
codes; a scale shared by a block would have to be rewritten as tokens arrive. Scales are tensors of their own, [num_blocks, kv_heads,
block_size]: those of a block and head lie side by side, so that attention reads them with whole cache lines; between the codes they
would break the alignment of these. The Triton kernels' half is quantize_triton.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# The largest code of each dtype that a quantized cache may have.
LARGEST_CODE: dict[torch.dtype, float] = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}

Scales = tuple[Tensor, Tensor]  # of keys and of values: float32 [num_blocks, kv_heads, block_size] each


def movable(tensor: Tensor) -> Tensor:
    """The same memory in a dtype that torch copies by index; it does not offer that for float8 on a CPU."""
    return tensor.view(torch.int8) if tensor.dtype == torch.float8_e4m3fn else tensor


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes and scales of heads, [..., head_dim] -> (dtype [..., head_dim], float32 [...]); code * scale is about x.

    scale = max |x| / largest code; codes are rounded to the nearest, ties to even, so an int8 code is off by half a scale at most.
    A head of zeros has scale 0 and codes 0. One that holds NaN or an infinity has scale NaN and codes 0: whoever reads it gets NaN,
    as without quantization.
    """
    largest = LARGEST_CODE[dtype]
    x = x.float()
    absmax = x.abs().amax(-1)
    # Divided by a tensor: by a Python number, torch multiplies with its reciprocal on a GPU, and the last bit may differ.
    scale = torch.where(absmax < math.inf, absmax / torch.full_like(absmax, largest), math.nan)
    codes = x / torch.where(scale > 0, scale, 1.0)[..., None]
    # The quotient of numbers too small for full precision may leave the range, and a float8 conversion would not saturate.
    codes = torch.where(scale[..., None] >= 0, codes, 0.0).clamp(-largest, largest)
    return (codes.round() if dtype == torch.int8 else codes).to(dtype), scale


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """code * scale, computed in float32 and rounded to `dtype` once. codes: [..., head_dim]; scale: [...]."""
    return (codes.float() * scale[..., None]).to(dtype)
