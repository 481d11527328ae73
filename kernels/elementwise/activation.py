"""SwiGLU's gate: silu(gate) * up over a merged gate-up projection.

The Triton kernel is in activation_triton.py. Source: Shazeer, 2020 (GLU variants).
"""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from minipaged.kernels.checks import FLOAT_DTYPES, shape_of
from minipaged.kernels.dispatch import use_triton


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate_up[:, :inner]) * gate_up[:, inner:], for gate_up [T, 2 * inner]; returns [T, inner].

    silu is rounded to the dtype before the product, as in transformers. Moves 2 * inner elements in and inner out per token. Raises
    ValueError on a shape or dtype that does not fit.
    """
    if gate_up.dim() != 2 or gate_up.shape[1] % 2:
        raise ValueError(f"gate_up has shape {shape_of(gate_up)}; it must be [tokens, 2 * inner]")
    if gate_up.dtype not in FLOAT_DTYPES or gate_up.stride(1) != 1:
        raise ValueError(
            f"gate_up is {gate_up.dtype} with strides {gate_up.stride()}; it must be float32, float16 or bfloat16 with its "
            "last dimension contiguous"
        )
    if use_triton(gate_up):
        from minipaged.kernels.elementwise.activation_triton import silu_mul_triton

        return silu_mul_triton(gate_up)
    return silu_mul_torch(gate_up)


def silu_mul_torch(gate_up: Tensor) -> Tensor:
    """The twin of silu_mul_triton."""
    gate, up = gate_up.chunk(2, dim=1)
    return F.silu(gate).mul_(up)
