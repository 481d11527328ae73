"""Attention of one new token per sequence over its paged context.

The Triton kernel is in decode_triton.py.
Source: PagedAttention (Kwon et al., 2023, section 4.3); grouped heads: GQA (Ainslie et al., 2023).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from minipaged.kernels.attention.decode_shared import SharedPrefixes
from minipaged.kernels.attention.sinks import Sinks, both_queries, check_sinks, turned
from minipaged.kernels.cache.quantize import Scales, dequantize
from minipaged.kernels.checks import check_attention
from minipaged.kernels.dispatch import use_triton

# The twin gathers the pages of a few rows at a time: about this many bytes of keys and values, so that they are still in the
# processor's cache when attention reads them.
GATHER_BYTES = 4 << 20


def paged_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    *,
    scales: Scales | None = None,
    window: int | None = None,
    sinks: Sinks | None = None,
    shared: SharedPrefixes | None = None,
    out: Tensor | None = None,
    check: bool = True,
) -> Tensor:
    """out[b, h] = softmax(scale * query[b, h] . K[b]) V[b] over the context_lens[b] tokens that block_tables[b] points to.

    query: [B, heads, head_dim]; query head h reads KV head h // (heads // kv_heads).
    key_cache, value_cache: [num_blocks, block_size, kv_heads, head_dim]. block_tables: int32 [B, width], or [B, kv_heads, width] for
    a table per KV head. context_lens: int32 [B], the new token included (it is in the cache already); a row of length 0 gives zeros.
    scales: of keys and of values, where the cache holds codes (as in write_kv); the query has a floating dtype then, of its own.
    window: only the last `window` tokens are seen; sinks: the first ones too, by a second query. shared: rows whose tables begin alike,
    so that the kernel reads those pages once for many; not together with a window. It changes no result, and the twin does without. out:
    written and returned, if given. Reads 2 * sum(context_lens) * kv_heads * head_dim elements, and a scale for each head_dim of them.
    Raises ValueError on a scale that is not above 0, and on shapes, dtypes or devices that do not fit, unless `check` is False: for a
    caller that has had such tensors checked, as those of the step's first layer.
    """
    if check:
        check_attention(
            query, key_cache, value_cache, block_tables, context_lens, query.shape[0], scale, window, out, scales
        )
        if sinks is not None:
            check_sinks(sinks, query, window)
        if shared is not None and window is not None:
            raise ValueError("rows that share their first tokens cannot have a window, which may leave these out")
    paged = (query, key_cache, value_cache, block_tables, context_lens, scale)
    if use_triton(query):
        from minipaged.kernels.attention.decode_triton import paged_decode_triton

        return paged_decode_triton(*paged, scales=scales, window=window, sinks=sinks, shared=shared, out=out)
    return paged_decode_torch(*paged, scales=scales, window=window, sinks=sinks, out=out)


def paged_decode_torch(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    *,
    scales: Scales | None = None,
    window: int | None = None,
    sinks: Sinks | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The twin of paged_decode_triton: rows of similar length together, their pages gathered, then one dense attention."""
    out = torch.empty_like(query, memory_format=torch.contiguous_format) if out is None else out
    _, block_size, kv_heads, head_dim = key_cache.shape
    group = query.shape[1] // kv_heads
    block_bytes = 2 * block_size * kv_heads * head_dim * key_cache.element_size()
    lengths: list[int] = context_lens.tolist()
    hidden = window if window and sinks is None else None  # whether pages before the window are not read at all
    first_pages = [max(0, n - hidden) // block_size if hidden else 0 for n in lengths]
    pages = [-(-n // block_size) - first for n, first in zip(lengths, first_pages, strict=True)]
    if not all(lengths):
        out[context_lens == 0] = 0
    for row_list, width in row_batches(pages, GATHER_BYTES // block_bytes):
        rows = torch.tensor(row_list, device=query.device)
        page = torch.arange(width, device=query.device) + torch.tensor(
            [[first_pages[row]] for row in row_list], device=query.device
        )
        position = (page[:, :, None] * block_size + torch.arange(block_size, device=query.device)).flatten(1)
        length = context_lens.index_select(0, rows)[:, None]
        seen = position < length
        if window:
            seen &= (position >= length - window) | (position < (sinks.count if sinks is not None else 0))
        k, v = gather_pages(
            *(key_cache, value_cache, block_tables.index_select(0, rows), page, page * block_size < length),
            scales=scales,
            dtype=query.dtype,
        )
        unseen = (~seen).flatten().nonzero().squeeze(1)
        mask = None
        if unseen.numel():
            # Slots that no token of the row owns may hold anything, NaN too; a weight of zero would not hide that.
            for gathered in (k, v):
                gathered.flatten(0, 1).index_fill_(0, unseen, 0)
            mask = seen[:, None, None, :]
        # [rows, kv_heads, tokens, head_dim]; the group's heads stand where queries of a prompt would
        q, k, v = query.index_select(0, rows).view(-1, kv_heads, group, head_dim), k.transpose(1, 2), v.transpose(1, 2)
        if sinks is not None:
            second = turned(query.index_select(0, rows), sinks.turn.index_select(0, rows)).view_as(q)
            q, k = both_queries(q, k, second, (position < sinks.count)[:, None])
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        out.index_copy_(0, rows, attended.flatten(1, 2))
    return out


def gather_pages(
    key_cache: Tensor,
    value_cache: Tensor,
    tables: Tensor,
    page: Tensor,
    present: Tensor,
    *,
    scales: Scales | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Keys and values of some table entries, as `dtype` [rows, tokens, kv_heads, head_dim] of their own.

    tables: int32 [rows, width] or [rows, kv_heads, width]. page: int64 [rows, pages], indices into the tables. present: bool, as
    page; where it is False the entry is not read and the tokens are those of block 0. scales: of a cache that holds codes, of which each
    becomes what it stands for; else `dtype` is the cache's.
    """
    num_rows, num_pages = page.shape
    block_size, kv_heads, head_dim = key_cache.shape[1:]
    page = torch.where(present, page, 0)
    shape = (num_rows, num_pages * block_size, kv_heads, head_dim)
    if tables.dim() == 2:
        blocks = torch.where(present, tables.gather(1, page), 0).flatten()
        k, v = (cache.index_select(0, blocks).view(shape) for cache in (key_cache, value_cache))
        if scales is None:
            return k, v
        # [rows * pages, kv_heads, block_size] -> [rows, tokens, kv_heads]
        k_scale, v_scale = (x.index_select(0, blocks).transpose(1, 2).reshape(shape[:3]) for x in scales)
        return dequantize(k, k_scale, dtype), dequantize(v, v_scale, dtype)
    page, present = (x[:, None].expand(-1, kv_heads, -1) for x in (page, present))
    blocks = torch.where(present, tables.gather(2, page), 0).transpose(1, 2)[..., None]
    slot = torch.arange(block_size, device=page.device)
    head = torch.arange(kv_heads, device=page.device)[:, None]
    # [rows, pages, kv_heads, block_size, head_dim] each
    k, v = (cache[blocks, slot, head] for cache in (key_cache, value_cache))
    if scales is not None:
        k, v = (dequantize(x, kept[blocks, head, slot], dtype) for x, kept in zip((k, v), scales, strict=True))
    return k.transpose(2, 3).flatten(1, 2).contiguous(), v.transpose(2, 3).flatten(1, 2).contiguous()


def row_batches(pages: list[int], budget: int) -> list[tuple[list[int], int]]:
    """Cut the rows into batches for one dense attention each: (rows, pages of the longest of them).

    A batch holds at most `budget` pages (or one row), and its shortest row at least half of its longest's, so padding stays below
    half. Rows without pages are left out.
    """
    batches: list[tuple[list[int], int]] = []
    batch: list[int] = []
    for row in sorted((r for r, n in enumerate(pages) if n), key=lambda r: pages[r], reverse=True):
        if batch and (2 * pages[row] < pages[batch[0]] or (len(batch) + 1) * pages[batch[0]] > budget):
            batches.append((batch, pages[batch[0]]))
            batch = []
        batch.append(row)
    if batch:
        batches.append((batch, pages[batch[0]]))
    return batches
