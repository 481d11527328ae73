"""Random paged caches for the kernels' tests, and attention written out densely as their oracle."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

# Absolute and relative tolerance of outputs that are averages of standard normal values.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def examples(count: int) -> settings:
    """`count` examples under the default profile, more in proportion under a longer one."""
    return settings(max_examples=max(count, settings.default.max_examples * count // 100), deadline=None)


@dataclass(frozen=True)
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

    def decode(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float]:
        """The positional arguments of paged_decode."""
        return (self.query, self.key_cache, self.value_cache, self.block_tables, self.context_lens, self.scale)

    def prefill(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int, float]:
        """The positional arguments of paged_prefill."""
        return (*self.decode()[:5], self.query_starts, self.max_query_len, self.scale)

    def permuted(self, seed: int) -> PagedCase:
        """The same rows, every physical block somewhere else. Table entries past a row's length stay as they are."""
        num_blocks = self.key_cache.shape[0]
        generator = torch.Generator().manual_seed(seed)
        moved = torch.randperm(num_blocks, generator=generator).to(self.key_cache.device)
        key_cache, value_cache = torch.empty_like(self.key_cache), torch.empty_like(self.value_cache)
        key_cache[moved], value_cache[moved] = self.key_cache, self.value_cache
        used = self.block_tables < num_blocks
        tables = torch.where(used, moved[torch.where(used, self.block_tables, 0).long()], self.block_tables)
        return replace(self, key_cache=key_cache, value_cache=value_cache, block_tables=tables.to(torch.int32))

    def filled(self, value: float) -> PagedCase:
        """The same, with `value` in the slots that nobody owns."""
        return replace(
            self,
            key_cache=self.key_cache.nan_to_num(nan=value),
            value_cache=self.value_cache.nan_to_num(nan=value),
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
    unused_entry: int = 2**30,
    seed: int = 0,
) -> PagedCase:
    """Rows of these lengths over shuffled pages; for decode, query_lens is all ones.

    Table entries past a row's length are `unused_entry`: by default a block that does not exist.
    """
    generator = torch.Generator().manual_seed(seed)
    pages = [-(-n // block_size) for n in context_lens]
    copies = kv_heads if table_per_head else 1
    total = sum(pages) * copies
    shape = (total + 1, block_size, kv_heads, head_dim)  # block 0 is the null block
    key_cache, value_cache = torch.full(shape, math.nan), torch.full(shape, math.nan)
    tables = torch.full((len(pages), copies, max([*pages, 1])), unused_entry, dtype=torch.int32)
    ids = iter((torch.randperm(total, generator=generator) + 1).split([n for n in pages for _ in range(copies)]))
    for row, length in enumerate(context_lens):
        position = torch.arange(length)
        for copy in range(copies):
            tables[row, copy, : pages[row]] = next(ids)
            block = tables[row, copy, position // block_size].long()
            heads = slice(copy, copy + 1) if table_per_head else slice(None)
            for cache in (key_cache, value_cache):
                part = cache[:, :, heads]
                part[block, position % block_size] = torch.randn(length, *part.shape[2:], generator=generator)
    query = torch.randn(sum(query_lens), kv_heads * group, head_dim, generator=generator)
    return PagedCase(
        query=query.to(device, dtype),
        key_cache=key_cache.to(device, dtype),
        value_cache=value_cache.to(device, dtype),
        block_tables=(tables if table_per_head else tables[:, 0].contiguous()).to(device),
        context_lens=torch.tensor(context_lens, dtype=torch.int32, device=device),
        query_starts=torch.tensor([0, *query_lens]).cumsum(0).to(device, torch.int32),
        max_query_len=max([*query_lens, 0]),
        scale=1 / math.sqrt(head_dim),
        window=window,
    )


ANY_HEADS = st.tuples(st.integers(1, 3), st.sampled_from([1, 1, 2, 3, 4, 7]))  # (KV heads, query heads of each)
FEW_HEADS = st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 2), (1, 3), (1, 4), (1, 7)])


@st.composite
def paged_cases(
    draw: st.DrawFn,
    *,
    prefill: bool,
    dtypes: tuple[torch.dtype, ...] = (torch.float32,),
    block_sizes: st.SearchStrategy[int],
    longest: int = 150,
    fewest_rows: int = 0,
    most_rows: int = 4,
    heads: st.SearchStrategy[tuple[int, int]] = ANY_HEADS,
) -> PagedCase:
    """Cases for decode, or for prefill with ragged chunks, of any head dimension, grouping, window and table form."""
    context_lens = draw(st.lists(st.integers(0, longest), min_size=fewest_rows, max_size=most_rows))
    query_lens = [draw(st.integers(0, n)) if prefill else 1 for n in context_lens]
    kv_heads, group = draw(heads)
    return make_case(
        context_lens,
        query_lens,
        kv_heads=kv_heads,
        group=group,
        head_dim=draw(st.sampled_from([32, 64, 80, 96, 128, 256])),
        block_size=draw(block_sizes),
        dtype=draw(st.sampled_from(dtypes)),
        window=draw(st.none() | st.integers(1, longest + 20)),
        table_per_head=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


def dense_attention(case: PagedCase) -> Tensor:
    """What paged_prefill must give, written out in float64 by row and KV head; decode is its one-query case."""
    out = torch.zeros(case.query.shape, dtype=torch.float64, device=case.query.device)
    block_size, kv_heads = case.key_cache.shape[1:3]
    group = case.query.shape[1] // kv_heads
    starts = case.query_starts.tolist()
    for row, length in enumerate(case.context_lens.tolist()):
        num_queries = starts[row + 1] - starts[row]
        if length == 0 or num_queries == 0:
            continue
        rows = slice(starts[row], starts[row + 1])
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
                scores = case.query[rows, head].double() @ key.T * case.scale
                out[rows, head] = scores.masked_fill(~seen, -math.inf).softmax(-1) @ value
    return out


def largest_error(actual: Tensor, expected: Tensor) -> float:
    """The largest absolute difference; NaN if there is one anywhere."""
    return float((actual.double() - expected.double()).abs().max()) if actual.numel() else 0.0


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Within the tolerance of `actual`'s dtype."""
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)
