"""RMS norm on the GPU: one program per row, the row held in registers between the mean and the quotient."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803

import torch
import triton
import triton.language as tl

from minipaged.kernels.dependent_launch import dependent_launch, wait_for_previous
from minipaged.kernels.launch_table import next_power_of_two


@triton.jit
def _normalised(wide, weight_ptr, column, mask, eps, SIZE: tl.constexpr, DTYPE: tl.constexpr):
    """wide / sqrt(mean(wide^2) + eps), rounded, times the weight; in float32."""
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, 0) / SIZE + eps)
    return (wide * inverse).to(DTYPE).to(tl.float32) * weight


@triton.jit
def _norm_kernel(
    out_ptr,
    x_ptr,
    weight_ptr,
    eps,
    stride_token,
    stride_head,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < SIZE
    wait_for_previous(DEPENDENT)
    x = tl.load(x_ptr + row // HEADS * stride_token + row % HEADS * stride_head + column, mask=mask, other=0.0)
    normed = _normalised(x.to(tl.float32), weight_ptr, column, mask, eps, SIZE, x.dtype)
    tl.store(out_ptr + row * SIZE + column, normed.to(x.dtype), mask=mask)


def _warps(block: int) -> int:
    return min(16, max(1, block // 512))


def rms_norm_triton(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See rms_norm."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    size = x.shape[-1]
    if out.numel() == 0:
        return out
    block = next_power_of_two(size)
    heads = x.shape[1] if x.dim() == 3 else 1
    _norm_kernel[(out.numel() // size,)](
        out,
        x,
        weight,
        eps,
        x.stride(0),
        x.stride(1) if x.dim() == 3 else 0,
        HEADS=heads,
        SIZE=size,
        BLOCK=block,
        num_warps=_warps(block),
        **dependent_launch(x.device),
    )
    return out
