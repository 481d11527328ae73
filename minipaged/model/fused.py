"""The same network with fewer kernels a layer: residual + norm, SiLU * gate, and rotation + cache write each in one pass.

A layer takes four matrix products and five small kernels instead of about twenty. The plain forward of llama.py is the oracle; this one
differs from it by rounding only. Knows the arithmetic; knows nothing of pages: `attend` rotates, writes and attends.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

import kernels
from minipaged.model.llama import Llama

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""attend(layer, query [T, H, D], key [T, KH, D], value [T, KH, D]), not rotated yet -> [T, H, D]."""


def fused_forward(model: Llama, token_ids: Tensor, attend: Attend) -> Tensor:
    """Hidden states after the last norm, [T, hidden_size], for token_ids int64 [T]."""
    layers = model.layers
    num_tokens, num_heads, num_kv_heads = len(token_ids), layers[0].num_heads, layers[0].num_kv_heads
    residual = functional.embedding(token_ids, model.embedding)
    normed = kernels.rms_norm(residual, layers[0].attention_norm.weight, model.norm.eps)
    for layer in layers:
        heads = layer.qkv(normed).view(num_tokens, -1, layer.head_dim)  # [T, H + 2 KH, D]
        query, key, value = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
        if layer.query_norm is not None and layer.key_norm is not None:
            query = kernels.rms_norm(query, layer.query_norm.weight, layer.query_norm.eps)
            key = kernels.rms_norm(key, layer.key_norm.weight, layer.key_norm.eps)
        mixed = layer.output(attend(layer.index, query, key, value).reshape(num_tokens, -1))
        normed, residual = kernels.add_rms_norm(mixed, residual, layer.mlp_norm.weight, model.norm.eps)
        inner = layer.down(kernels.silu_mul(layer.gate_up(normed)))
        following = layers[layer.index + 1].attention_norm if layer.index + 1 < len(layers) else model.norm
        normed, residual = kernels.add_rms_norm(inner, residual, following.weight, model.norm.eps)
    return normed


def angle_table(model: Llama, num_positions: int) -> Tensor:
    """Cosines, then sines, of every position's angles: float32 [num_positions, head_dim], for kernels.rope_write_kv."""
    positions = torch.arange(num_positions, device=model.frequencies.device, dtype=torch.float32)
    angles = positions[:, None] * model.frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)
