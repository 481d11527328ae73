"""silu_mul on the GPU: one program per (token, a stretch of the inner dimension).

`inner` is specialised: only where it is known to be a multiple of 16 can the halves be read in whole vectors.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803

import torch
import triton
import triton.language as tl

from minipaged.kernels.dependent_launch import dependent_launch, wait_for_previous
from minipaged.kernels.launch_table import next_power_of_two


@triton.jit
def _silu_mul_kernel(out_ptr, gate_up_ptr, inner, stride_in, stride_out, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < inner
    wait_for_previous(DEPENDENT)
    gate = tl.load(gate_up_ptr + token * stride_in + column, mask=mask, other=0.0)
    up = tl.load(gate_up_ptr + token * stride_in + inner + column, mask=mask, other=0.0)
    wide = gate.to(tl.float32)
    activated = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)
    tl.store(
        out_ptr + token * stride_out + column, (activated.to(tl.float32) * up.to(tl.float32)).to(gate.dtype), mask=mask
    )


def silu_mul_triton(gate_up: torch.Tensor) -> torch.Tensor:
    """See silu_mul."""
    num_tokens, inner = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((num_tokens, inner), dtype=gate_up.dtype, device=gate_up.device)
    if out.numel() == 0:
        return out
    block = min(1024, next_power_of_two(inner))
    _silu_mul_kernel[(num_tokens, triton.cdiv(inner, block))](
        out, gate_up, inner, gate_up.stride(0), out.stride(0), BLOCK=block, num_warps=4, **dependent_launch(out.device)
    )
    return out
