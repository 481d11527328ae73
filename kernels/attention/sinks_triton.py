"""The second query of attention sinks on the GPU: turned in registers, as the first one was loaded."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803

import torch
import triton
import triton.language as tl

from minipaged.kernels.attention.sinks import Sinks


@triton.jit
def turned_query(
    query,  # [rows, HEAD_BLOCK]
    pointers,  # where the queries' heads begin, [rows, 1]
    turn_ptrs,  # where their tokens' angles begin, [rows, 1]: cosines, then sines
    dim,  # [1, HEAD_BLOCK]
    mask,
    HEAD_DIM: tl.constexpr,
):
    """float32 [rows, HEAD_BLOCK]: the queries, each pair (x[i], x[i + HEAD_DIM / 2]) rotated by its token's angle."""
    half: tl.constexpr = HEAD_DIM // 2
    partner = tl.load(pointers + tl.where(dim < half, dim + half, dim - half), mask=mask, other=0.0).to(tl.float32)
    angle = tl.where(dim < half, dim, dim - half)
    cos = tl.load(turn_ptrs + angle, mask=mask, other=1.0)
    sin = tl.load(turn_ptrs + half + angle, mask=mask, other=0.0)
    return query.to(tl.float32) * cos + partner * tl.where(dim < half, -sin, sin)


def sink_arguments(sinks: Sinks | None, query: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """(angles, their stride, sinks) for a kernel; where there are none, what is not touched."""
    return (query, 0, 0) if sinks is None else (sinks.turn, sinks.turn.stride(0), sinks.count)
