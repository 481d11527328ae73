"""Copying whole blocks inside the cache: what copy-on-write does.

The Triton kernel is in block_copy_triton.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minipaged.kernels.cache.quantize import movable
from minipaged.kernels.checks import shape_of
from minipaged.kernels.dispatch import use_triton


def copy_blocks(caches: Sequence[Tensor], pairs: Tensor) -> None:
    """cache[destination] = cache[source] for every (source, destination) of `pairs`, in every tensor of `caches`.

    caches: tensors [num_blocks, ...] on one device, of any dtype (keys, values, scales). pairs: int64 [N, 2] on any device.
    The copies happen at once: destinations must differ from each other and from every source of another pair, except that a block
    may be copied to itself (padding). Moves N blocks in and N out per tensor. Raises ValueError on shapes or dtypes that do not fit.
    """
    if pairs.dim() != 2 or pairs.shape[1] != 2 or pairs.dtype != torch.int64:
        raise ValueError(f"pairs is {pairs.dtype} {shape_of(pairs)}; it must be torch.int64 [copies, 2]")
    if not caches or pairs.shape[0] == 0:
        return
    device = caches[0].device
    for cache in caches:
        if cache.dim() < 1 or cache.device != device:
            raise ValueError(
                f"a cache is {shape_of(cache)} on {cache.device}; all must be [num_blocks, ...] on {device}"
            )
    if use_triton(caches[0]):
        from minipaged.kernels.cache.block_copy_triton import copy_blocks_triton

        copy_blocks_triton(caches, pairs)
    else:
        copy_blocks_torch(caches, pairs)


def copy_blocks_torch(caches: Sequence[Tensor], pairs: Tensor) -> None:
    """The twin of copy_blocks_triton."""
    source, destination = pairs.to(caches[0].device).unbind(1)
    for cache in map(movable, caches):
        cache.index_copy_(0, destination, cache.index_select(0, source))
