"""Rotating queries and keys by their positions, and writing keys and values to the cache, in one pass.

Knows positions and slots; knows nothing of sequences or of how the angles were scaled. The Triton kernel is in rope_write_triton.py.
Source: RoFormer (Su et al., 2021), in the half-split form of GPT-NeoX and Hugging Face.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cache_write import check_write, write_kv_torch
from kernels.checks import check_integers, check_like_cache, shape_of
from kernels.dispatch import use_triton


def rope_write_kv(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
) -> None:
    """Rotate query in place; write the rotated key, and value, to their slots. key itself is left as it was.

    The pair (x[i], x[i + head_dim / 2]) turns by its position's angle: (x1 cos - x2 sin, x2 cos + x1 sin), computed in float32 and
    rounded once. query: [T, heads, head_dim]. key, value, the caches and slot_mapping: as in write_kv; a slot of -1 writes nothing.
    positions: int64 [T], each below max_pos (padded rows too). cos_sin: [max_pos, head_dim], the cosines of head_dim / 2 angles, then
    their sines; float32 or the query's dtype. Moves T * (2 * heads + 4 * kv_heads) * head_dim elements where separate operations move
    2 * kv_heads * head_dim more. Raises ValueError on shapes, dtypes or devices that do not fit.
    """
    check_write(key, value, key_cache, value_cache, slot_mapping)
    num_tokens, _, head_dim = key.shape
    if query.dim() != 3 or query.shape[0] != num_tokens or query.shape[2] != head_dim:
        raise ValueError(f"query has shape {shape_of(query)}; it must be [{num_tokens}, heads, {head_dim}]")
    check_like_cache("query", query, key_cache)
    check_integers("positions", positions, torch.int64, num_tokens, query.device)
    if head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}: rotation pairs dimensions, so it must be even")
    if cos_sin.dim() != 2 or cos_sin.shape[1] != head_dim or cos_sin.device != query.device or cos_sin.stride(1) != 1:
        raise ValueError(
            f"cos_sin is {shape_of(cos_sin)} with strides {cos_sin.stride()} on {cos_sin.device}; it must be "
            f"[max_pos, {head_dim}], contiguous in its last dimension, on {query.device}"
        )
    if cos_sin.dtype not in (torch.float32, query.dtype):
        raise ValueError(f"cos_sin is {cos_sin.dtype}; it must be torch.float32 or the query's {query.dtype}")
    if use_triton(query):
        from kernels.rope_write_triton import rope_write_kv_triton

        rope_write_kv_triton(query, key, value, positions, cos_sin, key_cache, value_cache, slot_mapping)
    else:
        rope_write_kv_torch(query, key, value, positions, cos_sin, key_cache, value_cache, slot_mapping)


def rope_write_kv_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
) -> None:
    """The twin of rope_write_kv_triton."""
    cos, sin = cos_sin.index_select(0, positions).float()[:, None].chunk(2, dim=-1)  # [T, 1, head_dim / 2] each
    query.copy_(_rotated(query, cos, sin))
    write_kv_torch(_rotated(key, cos, sin).to(key.dtype), value, key_cache, value_cache, slot_mapping)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
