"""Random paged caches for the kernels' tests, and attention written out densely as their oracle."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class PagedCase:
    """A cache whose every slot that no row owns is NaN, and what to ask of it."""

    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    block_tables: Tensor
    context_lens: Tensor
    query_starts: Tensor
    max_query_len: int
    scale: float
    window: int | None

    def decode_arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float]:
        return (
            self.query,
            self.key_cache,
            self.value_cache,
            self.block_tables,
            self.context_lens,
            self.scale,
        )

    def prefill_arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int, float]:
        return (
            self.query,
            self.key_cache,
            self.value_cache,
            self.block_tables,
            self.context_lens,
            self.query_starts,
            self.max_query_len,
            self.scale,
        )


def make_case(
    context_lens: list[int],
    query_lens: list[int],
    *,
    kv_heads: int,
    group: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype = torch.float32,
    window: int | None = None,
    table_per_head: bool = False,
    device: str = "cpu",
    seed: int = 0,
) -> PagedCase:
    """Rows of these lengths over shuffled pages. Table entries past a row's length name a block that does not exist.

    For decode, query_lens is all ones.
    """
    generator = torch.Generator().manual_seed(seed)
    pages = [-(-n // block_size) for n in context_lens]
    copies = kv_heads if table_per_head else 1
    total = sum(pages) * copies
    ids = (torch.randperm(total, generator=generator) + 1).tolist()  # block 0 is the null block
    shape = (total + 1, block_size, kv_heads, head_dim)
    key_cache, value_cache = torch.full(shape, math.nan), torch.full(shape, math.nan)
    width = max([*pages, 1])
    tables = torch.full((len(pages), copies, width), 2**30, dtype=torch.int32)
    for row, (length, num_pages) in enumerate(zip(context_lens, pages, strict=True)):
        for copy in range(copies):
            heads = slice(copy, copy + 1) if table_per_head else slice(None)
            for index in range(num_pages):
                block = ids.pop()
                tables[row, copy, index] = block
                used = min(block_size, length - index * block_size)
                for cache in (key_cache, value_cache):
                    part = cache[block, :used, heads]
                    part.copy_(torch.randn(part.shape, generator=generator))
    query = torch.randn(sum(query_lens), kv_heads * group, head_dim, generator=generator)
    return PagedCase(
        query=query.to(device, dtype),
        key_cache=key_cache.to(device, dtype),
        value_cache=value_cache.to(device, dtype),
        block_tables=(tables if table_per_head else tables[:, 0].contiguous()).to(device),
        context_lens=torch.tensor(context_lens, dtype=torch.int32, device=device),
        query_starts=torch.tensor([0, *query_lens], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device),
        max_query_len=max([*query_lens, 0]),
        scale=1 / math.sqrt(head_dim),
        window=window,
    )


def dense_attention(case: PagedCase) -> Tensor:
    """What paged_prefill must give, by one loop over rows, heads and queries in float64; decode is its one-query case."""
    out = torch.zeros(case.query.shape, dtype=torch.float64, device=case.query.device)
    block_size, kv_heads = case.key_cache.shape[1:3]
    group = case.query.shape[1] // kv_heads
    starts = case.query_starts.tolist()
    for row, length in enumerate(case.context_lens.tolist()):
        num_queries = starts[row + 1] - starts[row]
        if length == 0 or num_queries == 0:
            continue
        position = torch.arange(length, device=case.query.device)
        query_position = position[length - num_queries :, None]
        seen = position <= query_position
        if case.window is not None:
            seen &= position > query_position - case.window
        for kv_head in range(kv_heads):
            table = case.block_tables[row] if case.block_tables.dim() == 2 else case.block_tables[row, kv_head]
            block, offset = table[position // block_size].long(), position % block_size
            key = case.key_cache[block, offset, kv_head].double()
            value = case.value_cache[block, offset, kv_head].double()
            for head in range(kv_head * group, (kv_head + 1) * group):
                query = case.query[starts[row] : starts[row + 1], head].double()
                scores = (query @ key.T * case.scale).masked_fill(~seen, -math.inf)
                out[starts[row] : starts[row + 1], head] = scores.softmax(-1) @ value
    return out
