"""Paged pools for the kernel benchmarks, and the same keys and values in the forms that other libraries want."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 16


@dataclass(frozen=True)
class Pool:
    """One layer's KV pool with shuffled pages, and the contexts that lie in it."""

    keys: Tensor  # [pages, BLOCK, kv_heads, head_dim]
    values: Tensor
    tables: Tensor  # int32 [sequences, most pages]; 0 past a context's end
    lengths: Tensor  # int32 [sequences]
    contexts: tuple[int, ...]  # lengths, on the host

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values that the contexts hold."""
        return 2 * sum(self.contexts) * self.keys.shape[2] * self.keys.shape[3] * self.keys.element_size()

    def dense(self) -> tuple[Tensor, Tensor]:
        """Keys and values gathered, each [sequences, kv_heads, context, head_dim]; all contexts must be of one length."""
        (length,) = set(self.contexts)
        index = self.tables.long()
        gathered = (cache[index].flatten(1, 2)[:, :length] for cache in (self.keys, self.values))
        keys, values = (x.transpose(1, 2).contiguous() for x in gathered)
        return keys, values

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """The tables as compressed rows, int32: where each row starts, page ids, tokens in each last page."""
        pages = [-(-n // BLOCK) for n in self.contexts]
        starts = torch.tensor([0, *itertools.accumulate(pages)], dtype=torch.int32, device=self.tables.device)
        index = torch.cat([table[:n] for table, n in zip(self.tables, pages, strict=True)])
        last = [n - BLOCK * (count - 1) for n, count in zip(self.contexts, pages, strict=True)]
        return starts, index, torch.tensor(last, dtype=torch.int32, device=self.tables.device)


def make_pool(contexts: tuple[int, ...], kv_heads: int, head_dim: int, device: str = "cuda") -> Pool:
    """A pool of random bfloat16 keys and values for these contexts."""
    widths = [-(-n // BLOCK) for n in contexts]
    total = sum(widths)
    keys = torch.randn(total, BLOCK, kv_heads, head_dim, device=device, dtype=torch.bfloat16)
    pages = torch.randperm(total, device=device).to(torch.int32)
    tables = torch.zeros(len(contexts), max(widths), dtype=torch.int32, device=device)
    ends = list(itertools.accumulate(widths))
    for row, (width, end) in enumerate(zip(widths, ends, strict=True)):
        tables[row, :width] = pages[end - width : end]
    lengths = torch.tensor(contexts, dtype=torch.int32, device=device)
    return Pool(keys, torch.randn_like(keys), tables, lengths, tuple(contexts))
