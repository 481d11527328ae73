"""Attention of one step in the ways it has been written: with its scores in memory, in one pass, in one pass over parts.

Sources: FlashAttention (Dao et al., 2022); Flash-Decoding (Dao et al., 2023): parts of a row run side by side and are
weighed by their softmax denominators.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from minipaged.kernels.attention import paged_decode

MIN_PART = 128  # positions: no shorter part is worth its reduction


@dataclass(frozen=True, slots=True)
class Cells:
    """Where `rows` rows of one context length lie, in blocks and, for attention without tables, in dense tensors.

    keys, values: [blocks, block_size, kv_heads, head_dim]; tables: int32 [rows, width]; lengths: int32 [rows];
    dense_keys, dense_values: [rows, kv_heads, context, head_dim], the traditional cache.
    """

    keys: Tensor
    values: Tensor
    tables: Tensor
    lengths: Tensor
    dense_keys: Tensor
    dense_values: Tensor


Decode = Callable[[Tensor, Cells, float], Tensor]
"""decode(query [rows, heads, head_dim], cells, scale) -> [rows, heads, head_dim]."""


def written_out(query: Tensor, cells: Cells, scale: float) -> Tensor:
    """softmax(scale q K^T) V as three operations over the dense tensors; scores and weights go to memory and come back."""
    keys, values = cells.dense_keys, cells.dense_values
    scores = torch.matmul(_grouped(query, keys), keys.transpose(2, 3)) * scale
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights, values).flatten(1, 2)


def one_pass(query: Tensor, cells: Cells, scale: float) -> Tensor:
    """The online softmax over each row from its first token to its last: our kernel on a GPU, torch's elsewhere."""
    if query.is_cuda:
        from minipaged.kernels.attention.decode_triton import paged_decode_triton
        from minipaged.kernels.launch_table import decode_launch

        launch = replace(decode_launch(query.shape[-1], query.element_size(), query.device), enough_waves=0)
        return paged_decode_triton(query, cells.keys, cells.values, cells.tables, cells.lengths, scale, launch=launch)
    return torch_dense(query, cells, scale)


def split(query: Tensor, cells: Cells, scale: float) -> Tensor:
    """The same over parts of each row side by side, where there are too few rows to fill the device."""
    return paged(query, cells, scale) if query.is_cuda else split_torch(query, cells, scale, torch.get_num_threads())


def paged(query: Tensor, cells: Cells, scale: float) -> Tensor:
    """What the engine runs, over any tables."""
    return paged_decode(query, cells.keys, cells.values, cells.tables, cells.lengths, scale)


def torch_dense(query: Tensor, cells: Cells, scale: float) -> Tensor:
    """torch's own fused attention over the dense tensors; the heads of a group stand where queries of a prompt would."""
    keys, values = cells.dense_keys, cells.dense_values
    return functional.scaled_dot_product_attention(_grouped(query, keys), keys, values, scale=scale).flatten(1, 2)


def split_torch(query: Tensor, cells: Cells, scale: float, parts: int) -> Tensor:
    """Flash-Decoding on a CPU: parts of a row are rows of their own, then the mean weighed by their softmax denominators.

    Takes the largest number of equal parts, up to `parts`, that are not shorter than MIN_PART.
    """
    keys, values = cells.dense_keys, cells.dense_values
    rows, kv_heads, context, head_dim = keys.shape
    count = next(n for n in range(max(1, parts), 0, -1) if context % n == 0 and (n == 1 or context // n >= MIN_PART))
    cut = (rows, kv_heads * count, context // count, head_dim)  # heads first, parts within
    grouped = _grouped(query, keys).repeat_interleave(count, dim=1)
    outputs, denominators = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        grouped, keys.reshape(cut), values.reshape(cut), scale=scale
    )
    by_part = (rows, kv_heads, count, *outputs.shape[2:])
    weights = denominators.view(by_part[:-1]).softmax(dim=2)[..., None].to(query.dtype)
    mixed: Tensor = (outputs.reshape(by_part) * weights).sum(dim=2).flatten(1, 2)
    return mixed


def _grouped(query: Tensor, keys: Tensor) -> Tensor:
    """[rows, heads, head_dim] -> [rows, kv_heads, heads of a group, head_dim]."""
    return query.reshape(query.shape[0], keys.shape[1], -1, query.shape[-1])


def written_out_prefill(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention of one fresh prompt with its scores in memory. query [T, heads, D], key and value [T, kv_heads, D]."""
    length, _, head_dim = query.shape
    q = query.transpose(0, 1).reshape(key.shape[1], -1, length, head_dim)  # [kv_heads, group, T, D]
    k, v = (x.transpose(0, 1)[:, None] for x in (key, value))  # [kv_heads, 1, T, D]
    later = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    scores = (torch.matmul(q, k.transpose(2, 3)) * scale).masked_fill(later, float("-inf"))
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights, v).flatten(0, 1).transpose(0, 1)


DECODES: dict[str, Decode] = {"written out": written_out, "one pass": one_pass, "one pass, split": split}
