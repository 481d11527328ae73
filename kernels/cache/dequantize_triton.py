"""dequantize_pages on the GPU: one program per (page of a row, row, some of the page's heads)."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803

import torch
import triton
import triton.language as tl

from minipaged.kernels.cache.quantize import Scales
from minipaged.kernels.launch_table import check_layout, next_power_of_two

PROGRAM_ELEMENTS = 4096  # of keys, and as many of values


@triton.jit
def _write_out(out_ptr, cache_ptr, scale_ptr, to, offset, scale_offset, line_mask, mask):
    scale = tl.load(scale_ptr + scale_offset, mask=line_mask, other=0.0)
    code = tl.load(cache_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + to, (code * scale[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["width", "stride_table"])
def _dequantize_kernel(
    key_out_ptr,
    value_out_ptr,
    table_out_ptr,
    key_ptr,
    value_ptr,
    key_scale_ptr,
    value_scale_ptr,
    block_tables_ptr,
    context_lens_ptr,
    width,
    stride_block,
    stride_slot,
    stride_head,
    stride_table,
    stride_scale_block,
    stride_scale_head,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    LINES: tl.constexpr,  # heads of tokens: token after token, each with all its KV heads
):
    page = tl.program_id(0)
    row = tl.program_id(1)
    if page * PAGE >= tl.load(context_lens_ptr + row):
        return
    block = tl.load(block_tables_ptr + row * stride_table + page).to(tl.int64)
    written = row * width + page
    if tl.program_id(2) == 0:
        tl.store(table_out_ptr + written, written)
    line = tl.program_id(2) * LINES + tl.arange(0, LINES)
    slot = line // KV_HEADS
    head = line % KV_HEADS
    dim = tl.arange(0, HEAD_BLOCK)
    line_mask = line < PAGE * KV_HEADS
    mask = line_mask[:, None] & (dim < HEAD_DIM)[None, :]
    offset = (block * stride_block + slot * stride_slot + head * stride_head)[:, None] + dim[None, :]
    scale_offset = block * stride_scale_block + head * stride_scale_head + slot
    to = (written.to(tl.int64) * (PAGE * KV_HEADS) + line)[:, None] * HEAD_DIM + dim[None, :]
    _write_out(key_out_ptr, key_ptr, key_scale_ptr, to, offset, scale_offset, line_mask, mask)
    _write_out(value_out_ptr, value_ptr, value_scale_ptr, to, offset, scale_offset, line_mask, mask)


def dequantize_pages_triton(
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    scales: Scales,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See dequantize_pages."""
    rows, width = block_tables.shape
    _, block_size, kv_heads, head_dim = key_cache.shape
    check_layout(block_size, head_dim)
    shape = (rows * width, block_size, kv_heads, head_dim)
    key, value = (torch.empty(shape, dtype=dtype, device=key_cache.device) for _ in range(2))
    tables = torch.empty((rows, width), dtype=torch.int32, device=key_cache.device)
    dims = next_power_of_two(head_dim)
    lines = min(next_power_of_two(block_size * kv_heads), max(1, PROGRAM_ELEMENTS // dims))
    _dequantize_kernel[(width, rows, triton.cdiv(block_size * kv_heads, lines))](
        key,
        value,
        tables,
        key_cache,
        value_cache,
        *scales,
        block_tables,
        context_lens,
        width,
        *key_cache.stride()[:3],
        block_tables.stride(0),
        scales[0].stride(0),
        scales[0].stride(1),
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        HEAD_BLOCK=dims,
        PAGE=block_size,
        LINES=lines,
        num_warps=4,
    )
    return key, value, tables
