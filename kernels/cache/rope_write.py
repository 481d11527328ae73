"""Rotating queries and keys by their positions, and writing keys and values to the cache, in one pass; before it, where a model has
one, the norm of each head.

The Triton kernel is in rope_write_triton.py.
Source: RoFormer (Su et al., 2021), in the half-split form of GPT-NeoX and Hugging Face; the norm of queries and keys: Qwen 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minipaged.kernels.cache.cache_write import check_write, write_kv_torch
from minipaged.kernels.cache.quantize import Scales
from minipaged.kernels.checks import INDEX_DTYPES, check_integers, check_like_cache, shape_of
from minipaged.kernels.dispatch import use_triton
from minipaged.kernels.elementwise.norm import check_norm, rms_norm_torch


def rope_write_kv(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    scales: Scales | None = None,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """Rotate query in place; write the rotated key, and value, to their slots. key itself is left as it was.

    The pair (x[i], x[i + head_dim / 2]) turns by its position's angle: (x1 cos - x2 sin, x2 cos + x1 sin), computed in float32 and
    rounded once, to the key's dtype, before a quantized cache rounds again. query: [T, heads, head_dim]. key, value, the caches,
    slot_mapping and scales: as in write_kv; a slot of -1 writes nothing. positions: int64 or int32 [T], each below max_pos (padded rows
    too). cos_sin: [max_pos, head_dim], the cosines of head_dim / 2 angles, then their sines; float32 or the query's dtype. query_norm,
    key_norm: [head_dim], both or neither: each head is RMS-normed by them first, with `eps` and the rounding of rms_norm. Moves
    T * (2 * heads + 4 * kv_heads) * head_dim elements, where separate operations move 2 * kv_heads * head_dim more, and for a norm all
    heads twice more. Raises ValueError on shapes, dtypes or devices that do not fit.
    """
    check_write(key, value, key_cache, value_cache, slot_mapping, scales)
    num_tokens, _, head_dim = key.shape
    if query.dim() != 3 or query.shape[0] != num_tokens or query.shape[2] != head_dim:
        raise ValueError(f"query has shape {shape_of(query)}; it must be [{num_tokens}, heads, {head_dim}]")
    check_like_cache("query", query, key_cache)
    if query.dtype != key.dtype:
        raise ValueError(f"query is {query.dtype}, but key is {key.dtype}")
    check_integers("positions", positions, INDEX_DTYPES, num_tokens, query.device)
    if head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}: rotation pairs dimensions, so it must be even")
    if cos_sin.dim() != 2 or cos_sin.shape[1] != head_dim or cos_sin.device != query.device or cos_sin.stride(1) != 1:
        raise ValueError(
            f"cos_sin is {shape_of(cos_sin)} with strides {cos_sin.stride()} on {cos_sin.device}; it must be "
            f"[max_pos, {head_dim}], contiguous in its last dimension, on {query.device}"
        )
    if cos_sin.dtype not in (torch.float32, query.dtype):
        raise ValueError(f"cos_sin is {cos_sin.dtype}; it must be torch.float32 or the query's {query.dtype}")
    if (query_norm is None) != (key_norm is None):
        raise ValueError("query_norm and key_norm go together: give both, or neither for no norm")
    if query_norm is not None and key_norm is not None:
        check_norm(query, query_norm, eps)
        check_norm(key, key_norm, eps)
    if use_triton(query):
        from minipaged.kernels.cache.rope_write_triton import rope_write_kv_triton as run
    else:
        run = rope_write_kv_torch
    run(
        query,
        key,
        value,
        positions,
        cos_sin,
        key_cache,
        value_cache,
        slot_mapping,
        scales=scales,
        query_norm=query_norm,
        key_norm=key_norm,
        eps=eps,
    )


def rope_write_kv_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    scales: Scales | None = None,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """The twin of rope_write_kv_triton."""
    rotated_query = query
    if query_norm is not None and key_norm is not None:
        rotated_query, key = rms_norm_torch(query, query_norm, eps), rms_norm_torch(key, key_norm, eps)
    cos, sin = cos_sin.index_select(0, positions).float()[:, None].chunk(2, dim=-1)  # [T, 1, head_dim / 2] each
    query.copy_(_rotated(rotated_query, cos, sin))
    write_kv_torch(_rotated(key, cos, sin).to(key.dtype), value, key_cache, value_cache, slot_mapping, scales)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
