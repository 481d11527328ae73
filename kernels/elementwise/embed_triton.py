"""embed_tokens on the GPU: one program per (token, a stretch of the row)."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803

import torch
import triton
import triton.language as tl

from minipaged.kernels.dependent_launch import dependent_launch, wait_for_previous
from minipaged.kernels.launch_table import next_power_of_two


@triton.jit
def _embed_kernel(
    out_ptr, table_ptr, token_ids_ptr, newest_ptr, batch_indices_ptr, size, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr
):
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wait_for_previous(DEPENDENT)
    token = tl.load(token_ids_ptr + row).to(tl.int64)
    if token < 0:
        token = tl.maximum(tl.load(newest_ptr + tl.load(batch_indices_ptr + row)), 0)
    values = tl.load(table_ptr + token * size + column, mask=column < size)
    tl.store(out_ptr + row.to(tl.int64) * size + column, values, mask=column < size)


def embed_tokens_triton(
    table: torch.Tensor, token_ids: torch.Tensor, newest: torch.Tensor, batch_indices: torch.Tensor
) -> torch.Tensor:
    """See embed_tokens."""
    num_tokens, size = len(token_ids), table.shape[1]
    out = table.new_empty(num_tokens, size)
    if out.numel() == 0:
        return out
    block = min(1024, next_power_of_two(size))
    _embed_kernel[(num_tokens, triton.cdiv(size, block))](
        out, table, token_ids, newest, batch_indices, size, BLOCK=block, num_warps=4, **dependent_launch(table.device)
    )
    return out
