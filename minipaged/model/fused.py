"""The same network with fewer kernels a layer: each norm, residual sum and gate rides on a matrix product, the norm and rotation of heads
on the cache write.

With the few rows of a decode step a layer takes six kernels instead of about twenty. The plain forward of llama.py is the oracle; this one
differs from it by rounding only. Knows the arithmetic; knows nothing of pages: `attend` norms, rotates, writes and attends.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from minipaged.kernels.cache import rope_write_kv
from minipaged.kernels.linear import gated_linear, linear
from minipaged.model.llama import Layer, Llama

Attend = Callable[[Layer, Tensor, Tensor, Tensor], Tensor]
"""attend(layer, query [T, H, D], key [T, KH, D], value [T, KH, D]), as projected -> [T, H, D]."""


def fused_forward(model: Llama, hidden: Tensor, attend: Attend) -> Tensor:
    """Hidden states before the last norm, for those after the embedding: [T, hidden_size], changed in place and returned."""
    num_tokens, eps = len(hidden), model.norm.eps
    for layer in model.layers:
        norm = layer.attention_norm.weight
        heads = linear(hidden, layer.qkv.weight, layer.qkv.bias, norm=norm, eps=eps)
        heads = heads.view(num_tokens, -1, layer.head_dim)  # [T, H + 2 KH, D]
        query, key, value = torch.split(heads, [layer.num_heads, layer.num_kv_heads, layer.num_kv_heads], dim=1)
        attended = attend(layer, query, key, value).reshape(num_tokens, -1)
        linear(attended, layer.output.weight, layer.output.bias, residual=hidden)
        norm = layer.mlp_norm.weight
        inner = gated_linear(hidden, layer.gate_up.weight, layer.gate_up.bias, norm=norm, eps=eps)
        linear(inner, layer.down.weight, layer.down.bias, residual=hidden)
    return hidden


def fused_logits(model: Llama, hidden: Tensor) -> Tensor:
    """Scores of the next token, [R, vocab_size] in the model's dtype, for hidden states before the last norm."""
    return linear(hidden, model.head.weight, norm=model.norm.weight, eps=model.norm.eps)


def rope_write(layer: Layer, query: Tensor, key: Tensor, value: Tensor, where: tuple[Tensor, ...]) -> None:
    """Norm (where the model has one) and rotate query in place; the same for key, and write it and value to the cache.

    where: positions, angle table, key cache, value cache, slots, as rope_write_kv takes them.
    """
    positions, angles, keys, values, slots = where
    if layer.query_norm is None or layer.key_norm is None:
        rope_write_kv(query, key, value, positions, angles, keys, values, slots)
        return
    rope_write_kv(
        query,
        key,
        value,
        positions,
        angles,
        keys,
        values,
        slots,
        query_norm=layer.query_norm.weight,
        key_norm=layer.key_norm.weight,
        eps=layer.query_norm.eps,
    )


def angle_table(model: Llama, num_positions: int) -> Tensor:
    """Cosines, then sines, of every position's angles: float32 [num_positions, head_dim], for rope_write_kv."""
    positions = torch.arange(num_positions, device=model.frequencies.device, dtype=torch.float32)
    angles = positions[:, None] * model.frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)
