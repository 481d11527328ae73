"""Causal attention of prompt chunks over their paged prefix and themselves.

The kernels are in prefill_triton.py and, where it is faster on a Hopper GPU, in prefill_hopper.py.
Source: FlashAttention-2 (Dao, 2023) for the kernel's loop; chunked prefill: Sarathi-Serve (Agrawal et al., 2024).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from minipaged.kernels.attention.decode import gather_pages, paged_decode_torch
from minipaged.kernels.attention.sinks import Sinks, both_queries, check_sinks, turned
from minipaged.kernels.cache.dequantize import dequantize_pages
from minipaged.kernels.cache.quantize import Scales
from minipaged.kernels.checks import check_attention, check_integers
from minipaged.kernels.dispatch import gluon_runs, use_triton

# Queries that the twin attends at a time: enough to keep the processor busy, few enough that causality saves work.
QUERY_TILE = 256
# Chunks of so many queries have the codes that they read written out as numbers first, in so many bytes at most.
LONG_CHUNK = 256
WRITTEN_OUT_BYTES = 256 << 20


def paged_prefill(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    query_starts: Tensor,
    max_query_len: int,
    scale: float,
    *,
    scales: Scales | None = None,
    window: int | None = None,
    sinks: Sinks | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Row b's queries, query[query_starts[b] : query_starts[b + 1]], each over the tokens up to itself.

    query: [T, heads, head_dim]; query head h reads KV head h // (heads // kv_heads). query_starts: int32 [B + 1], cumulative.
    Query i of row b stands at position context_lens[b] - (its row's queries) + i; the chunk's own keys and values are in the cache
    already. max_query_len: at least the longest row's number of queries. context_lens: int32 [B], the chunk included. Queries past
    query_starts[B] are padding and their output is undefined. The rest is as in paged_decode.
    About 4 * heads * head_dim operations per (query, key) pair; reads the queries and, per tile of queries, the keys and values up to
    it. Raises ValueError on a scale that is not above 0, and on
    shapes, dtypes or devices that do not fit.
    """
    num_rows = query_starts.shape[0] - 1 if query_starts.dim() == 1 else 0
    check_integers("query_starts", query_starts, torch.int32, None, query.device)
    if num_rows < 0:
        raise ValueError("query_starts is empty; it must hold rows + 1 cumulative counts, at least the leading 0")
    check_attention(query, key_cache, value_cache, block_tables, context_lens, num_rows, scale, window, out, scales)
    if sinks is not None:
        check_sinks(sinks, query, window)
    if max_query_len < 0:
        raise ValueError(f"max_query_len is {max_query_len}; it must be at least 0")
    if not use_triton(query):
        paged = (query, key_cache, value_cache, block_tables, context_lens, query_starts, max_query_len, scale)
        return paged_prefill_torch(*paged, scales=scales, window=window, sinks=sinks, out=out)
    if scales is not None and is_worth_writing_out(query, key_cache, block_tables, max_query_len):
        key_cache, value_cache, block_tables = dequantize_pages(
            key_cache, value_cache, scales, block_tables, context_lens, query.dtype
        )
        scales = None
    paged = (query, key_cache, value_cache, block_tables, context_lens, query_starts, max_query_len, scale)
    # prefill_hopper brings tiles to shared memory as they are and multiplies them from there, so it takes no codes.
    if scales is None and gluon_runs():
        from minipaged.kernels.launch_table import hopper_prefill_launch

        launch = hopper_prefill_launch(query, key_cache, value_cache, block_tables, max_query_len, window)
        if launch is not None:
            from minipaged.kernels.attention.prefill_hopper import paged_prefill_hopper

            return paged_prefill_hopper(*paged, out=out, launch=launch)
    from minipaged.kernels.attention.prefill_triton import paged_prefill_triton

    return paged_prefill_triton(*paged, scales=scales, window=window, sinks=sinks, out=out)


def is_worth_writing_out(query: Tensor, cache: Tensor, block_tables: Tensor, max_query_len: int) -> bool:
    """Whether a cache of codes is to be written out before long chunks read it.

    Each tile of queries reads, and would convert, all keys and values up to it. From a few tiles on it is less work to convert them once,
    for the kernels that want numbers. Not where that takes much memory, as in a captured step with room for many long tables.
    """
    entries = block_tables.shape[0] * block_tables.shape[-1]
    out_bytes = 2 * entries * cache[0].numel() * query.element_size()
    return (
        query.element_size() == 2
        and block_tables.dim() == 2
        and max_query_len >= LONG_CHUNK
        and out_bytes <= WRITTEN_OUT_BYTES
    )


def paged_prefill_torch(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    query_starts: Tensor,
    max_query_len: int,
    scale: float,
    *,
    scales: Scales | None = None,
    window: int | None = None,
    sinks: Sinks | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The twin of paged_prefill_triton: each row's pages gathered once, then dense attention by tiles of queries.

    Rows of one query go to the decode twin together.
    """
    out = torch.empty_like(query, memory_format=torch.contiguous_format) if out is None else out
    _, block_size, kv_heads, _ = key_cache.shape
    group = query.shape[1] // kv_heads
    device = query.device
    starts: list[int] = query_starts.tolist()
    lengths: list[int] = context_lens.tolist()
    single = [row for row in range(len(lengths)) if starts[row + 1] - starts[row] == 1]
    if single:  # decodes among the chunks: many rows at once
        rows = torch.tensor(single, device=device)
        tokens = query_starts.index_select(0, rows)
        out[tokens] = paged_decode_torch(
            query.index_select(0, tokens),
            key_cache,
            value_cache,
            block_tables.index_select(0, rows),
            context_lens.index_select(0, rows),
            scale,
            scales=scales,
            window=window,
            sinks=None if sinks is None else sinks._replace(turn=sinks.turn.index_select(0, tokens)),
        )
    for row, length in enumerate(lengths):
        start, num_queries = starts[row], starts[row + 1] - starts[row]
        if num_queries < 2:
            continue
        offset = length - num_queries  # position of the row's first query
        first_page = max(0, offset - window + 1) // block_size if window and sinks is None else 0
        page = torch.arange(first_page, -(-length // block_size), device=device)[None]
        k, v = gather_pages(
            *(key_cache, value_cache, block_tables[row : row + 1], page, torch.ones_like(page, dtype=torch.bool)),
            scales=scales,
            dtype=query.dtype,
        )
        # [kv_heads, group, tokens, head_dim]; expand repeats no memory
        k, v = (x[0].transpose(0, 1)[:, None].expand(-1, group, -1, -1) for x in (k, v))
        for tile in range(0, num_queries, QUERY_TILE):
            tile_end = min(tile + QUERY_TILE, num_queries)
            low, high = offset + tile, offset + tile_end  # positions of the tile's queries
            seen_from = max(0, low - window + 1) if window and sinks is None else 0
            causal_only = seen_from == low == 0 and (window is None or window >= high)
            mask = None
            if not causal_only:
                positions, queries = (
                    torch.arange(seen_from, high, device=device),
                    torch.arange(low, high, device=device),
                )
                mask = positions <= queries[:, None]
                if window:
                    in_window = positions > queries[:, None] - window
                    mask &= in_window if sinks is None else in_window | (positions < sinks.count)
            base = first_page * block_size
            of_tile, seen_keys = slice(start + tile, start + tile_end), slice(seen_from - base, high - base)
            q, k_seen, v_seen = _by_head(query[of_tile], kv_heads), k[:, :, seen_keys], v[:, :, seen_keys]
            if sinks is not None and not causal_only:
                second = _by_head(turned(query[of_tile], sinks.turn[of_tile]), kv_heads)
                q, k_seen = both_queries(q, k_seen, second, torch.arange(high, device=device) < sinks.count)
            attended = F.scaled_dot_product_attention(
                q, k_seen, v_seen, attn_mask=mask, is_causal=causal_only, scale=scale
            )
            out[of_tile] = attended.permute(2, 0, 1, 3).flatten(1, 2)
    return out


def _by_head(query: Tensor, kv_heads: int) -> Tensor:
    """[tokens, heads, head_dim] -> [kv_heads, group, tokens, head_dim]."""
    tokens, heads, head_dim = query.shape
    return query.view(tokens, kv_heads, heads // kv_heads, head_dim).permute(1, 2, 0, 3)
