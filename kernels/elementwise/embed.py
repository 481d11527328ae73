"""The embedding of a step's tokens, some of which only the device knows: those that the step before drew.

The Triton kernel is in embed_triton.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minipaged.kernels.checks import FLOAT_DTYPES, INDEX_DTYPES, check_integers, shape_of
from minipaged.kernels.dispatch import use_triton


def embed_tokens(table: Tensor, token_ids: Tensor, newest: Tensor, batch_indices: Tensor) -> Tensor:
    """table[token_ids[t]], or table[newest[batch_indices[t]]] where token_ids[t] is negative: a new tensor [T, size].

    Where that is negative too, since nothing could be drawn, it is table[0]: its sequence ends once the host knows.
    table: [vocab, size], contiguous. token_ids, batch_indices: int32 or int64 [T]. newest: int64 [any]. Moves T * size elements in and out.
    Raises ValueError on shapes, dtypes or devices that do not fit.
    """
    if table.dim() != 2 or table.dtype not in FLOAT_DTYPES or not table.is_contiguous():
        raise ValueError(
            f"table is {table.dtype} {shape_of(table)} with strides {table.stride()}; it must be float32, float16 or bfloat16 "
            "[vocab, size], contiguous"
        )
    check_integers("token_ids", token_ids, INDEX_DTYPES, None, table.device)
    check_integers("batch_indices", batch_indices, INDEX_DTYPES, len(token_ids), table.device)
    check_integers("newest", newest, torch.int64, None, table.device)
    if use_triton(table):
        from minipaged.kernels.elementwise.embed_triton import embed_tokens_triton

        return embed_tokens_triton(table, token_ids, newest, batch_indices)
    return embed_tokens_torch(table, token_ids, newest, batch_indices)


def embed_tokens_torch(table: Tensor, token_ids: Tensor, newest: Tensor, batch_indices: Tensor) -> Tensor:
    """The twin of embed_tokens_triton."""
    known = token_ids >= 0
    return table.index_select(0, torch.where(known, token_ids, newest.index_select(0, batch_indices).clamp(min=0)))
