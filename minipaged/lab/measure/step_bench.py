"""Times one step of a real network over a real KV pool: the same step with other attention, other tables, other rows.

On a GPU a time is the median replay of a CUDA graph, so that launches cost nothing; on a CPU the median of plain runs.
There are no requests here: all rows have one length and nothing is scheduled.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from minipaged.config import ModelConfig
from minipaged.kernels.attention import paged_prefill
from minipaged.kernels.cache import rope_write_kv, write_kv
from minipaged.kernels.sampling import draw_tokens
from minipaged.lab.measure.attention_variants import Cells, Decode, written_out_prefill
from minipaged.model.llama import Layer, Llama, angle_table

MAX_RUNS = 40
REPLAYS = 12


def time_of(work: Callable[[], Any], device: torch.device, *, seconds: float = 0.6) -> float:
    """Seconds of one call of `work`, after a first one that is not counted."""
    if device.type == "cuda":
        from minipaged.lab.measure.timing import capture, replay_us

        return replay_us(capture(work), REPLAYS) / 1e6
    work()
    times: list[float] = []
    while not times or (sum(times) < seconds and len(times) < MAX_RUNS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


class SlotPool:
    """Keys and values of some layers as plain slots, seen as blocks of any size. Filled with noise."""

    def __init__(self, config: ModelConfig, layers: int, slots: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (slots, config.num_kv_heads, config.head_dim)
        self.layers = [
            (torch.randn(shape, dtype=dtype, device=device), torch.randn(shape, dtype=dtype, device=device))
            for _ in range(layers)
        ]
        self.slots, self.device = slots, device

    def cells(self, layer: int, rows: int, context: int, block_size: int, tables: Tensor) -> Cells:
        """One layer's keys and values in blocks, and where the rows lie in them. It is noise, so the same memory serves as
        dense tensors too, in the layout that those have.
        """
        slots, kv_heads, head_dim = self.layers[layer][0].shape
        blocks = (
            x[: slots // block_size * block_size].view(-1, block_size, kv_heads, head_dim) for x in self.layers[layer]
        )
        dense = (x[: rows * context].view(rows, kv_heads, context, head_dim) for x in self.layers[layer])
        lengths = torch.full((rows,), context, dtype=torch.int32, device=self.device)
        return Cells(*blocks, tables, lengths, *dense)  # type: ignore[call-arg]

    def tables(self, rows: int, context: int, block_size: int, *, shuffled: bool) -> Tensor:
        """Block tables of rows that fill consecutive blocks, or blocks strewn over the whole pool. int32 [rows, width]."""
        width = -(-context // block_size)
        if shuffled:
            order = torch.randperm(self.slots // block_size, generator=torch.Generator().manual_seed(0))[: rows * width]
        else:
            order = torch.arange(rows * width)
        return order.to(torch.int32).view(rows, width).to(self.device)


def decode_step(
    model: Llama,
    pool: SlotPool,
    rows: int,
    context: int,
    attend: Decode,
    *,
    block_size: int = 16,
    shuffled: bool = False,
    fused: bool | None = None,
) -> Callable[[], Tensor]:
    """A whole decode step of `rows` rows whose contexts, the new token included, are `context` long. `fused`: as the engine's
    graphs compute it; None for what the engine does on this device.
    """
    device, scale = pool.device, model.config.head_dim**-0.5
    tables = pool.tables(rows, context, block_size, shuffled=shuffled)
    cells = [pool.cells(i, rows, context, block_size, tables) for i in range(len(model.layers))]
    token_ids = torch.randint(0, model.config.vocab_size, (rows,), device=device)
    positions = torch.full((rows,), context - 1, device=device)
    slots = tables[:, (context - 1) // block_size].long() * block_size + (context - 1) % block_size
    if device.type == "cuda" if fused is None else fused:
        angles = angle_table(model.frequencies, context)
        rotations, writes = positions.int(), slots.int()

        def raw(layer: Layer, heads: Tensor) -> Tensor:
            own = cells[layer.index]
            query, key, value = layer.split(heads)
            where = (own.keys, own.values, writes)
            rope_write_kv(query, key, value, rotations, layer.angles(angles), *where, **layer.head_norms())
            return attend(query, own, scale)

        def whole() -> Tensor:
            hidden = functional.embedding(token_ids, model.embedding)
            return draw_tokens(model.head(model.run_layers(hidden, raw), norm=model.norm))

        return whole

    def plain(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        own = cells[layer]
        write_kv(key, value, own.keys, own.values, slots)
        return attend(query.contiguous(), own, scale)

    return lambda: model.logits(model(token_ids, positions, plain)).argmax(dim=-1)


def prefill_step(
    model: Llama, pool: SlotPool, length: int, *, fused: bool, block_size: int = 16
) -> Callable[[], Tensor]:
    """The whole step of one fresh prompt of `length` tokens; its attention in one pass (`fused`) or written out."""
    device, scale = pool.device, model.config.head_dim**-0.5
    tables = pool.tables(1, length, block_size, shuffled=True)
    cells = [pool.cells(i, 1, length, block_size, tables) for i in range(len(model.layers))]
    token_ids = torch.randint(0, model.config.vocab_size, (length,), device=device)
    positions = torch.arange(length, device=device)
    slots = tables[0].long()[positions // block_size] * block_size + positions % block_size
    starts = torch.tensor([0, length], dtype=torch.int32, device=device)

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        own = cells[layer]
        write_kv(key, value, own.keys, own.values, slots)
        if not fused:
            return written_out_prefill(query, key, value, scale)
        return paged_prefill(query, own.keys, own.values, tables, own.lengths, starts, length, scale)

    return lambda: model.logits(model(token_ids, positions, attend)[-1:]).argmax(dim=-1)
