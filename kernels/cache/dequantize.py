"""Pages of codes written out as numbers, for attention that reads each of them many times.

The Triton kernel is in dequantize_triton.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minipaged.kernels.cache.quantize import Scales, dequantize
from minipaged.kernels.dispatch import use_triton


def dequantize_pages(
    key_cache: Tensor,
    value_cache: Tensor,
    scales: Scales,
    block_tables: Tensor,
    context_lens: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Caches of `dtype` with each row's pages one after the other, and their block tables.

    The caches, scales, block_tables (int32 [rows, width]) and context_lens are as in paged_prefill, and checked by it. Returns keys and
    values, [rows * width, block_size, kv_heads, head_dim], of which the pages within a row's length are written, and tables [rows, width].
    Reads 2 * N * kv_heads * (head_dim + 4) bytes for N tokens of context, and writes 2 * N * kv_heads * head_dim elements.
    """
    if use_triton(key_cache):
        from minipaged.kernels.cache.dequantize_triton import dequantize_pages_triton as run
    else:
        run = dequantize_pages_torch
    return run(key_cache, value_cache, scales, block_tables, context_lens, dtype)


def dequantize_pages_torch(
    key_cache: Tensor,
    value_cache: Tensor,
    scales: Scales,
    block_tables: Tensor,
    context_lens: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The twin of dequantize_pages_triton."""
    page = torch.arange(block_tables.numel(), dtype=torch.int32, device=key_cache.device).view_as(block_tables)
    within = (page - page[:, :1]) * key_cache.shape[1] < context_lens[:, None]
    blocks = torch.where(within, block_tables, 0).flatten()
    key, value = (
        dequantize(cache.index_select(0, blocks), scale.index_select(0, blocks).transpose(1, 2), dtype)
        for cache, scale in zip((key_cache, value_cache), scales, strict=True)
    )
    return key, value, page
