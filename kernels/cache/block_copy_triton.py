"""copy_blocks on the GPU: one launch for all tensors whose blocks have one size, through a table of their addresses."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl

TILE_WORDS = 1024


@triton.jit(do_not_specialize=["num_words"])
def _copy_kernel(
    addresses_ptr,  # int64 [tensors]
    pairs_ptr,  # int64 [copies, 2]
    stride_pair,
    stride_pair_end,
    num_words,  # of a block
    stride_block,  # in words
    WORD_BITS: tl.constexpr,
    TILE: tl.constexpr,
):
    copy = tl.program_id(1)
    source = tl.load(pairs_ptr + copy * stride_pair)
    destination = tl.load(pairs_ptr + copy * stride_pair + stride_pair_end)
    if source == destination:
        return
    address = tl.load(addresses_ptr + tl.program_id(2))
    if WORD_BITS == 64:
        base = address.to(tl.pointer_type(tl.int64))
    elif WORD_BITS == 32:
        base = address.to(tl.pointer_type(tl.int32))
    elif WORD_BITS == 16:
        base = address.to(tl.pointer_type(tl.int16))
    else:
        base = address.to(tl.pointer_type(tl.int8))
    word = tl.program_id(0) * TILE + tl.arange(0, TILE)
    mask = word < num_words
    block = tl.load(base + source * stride_block + word, mask=mask)
    tl.store(base + destination * stride_block + word, block, mask=mask)


@lru_cache(maxsize=64)
def _address_table(addresses: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """The addresses on the device. Cached, so that only the first copy of a cache waits for the transfer."""
    return torch.tensor(addresses, dtype=torch.int64, device=device)


def copy_blocks_triton(caches: Sequence[torch.Tensor], pairs: torch.Tensor) -> None:
    """See copy_blocks. Each block must be contiguous in itself (ValueError)."""
    device = caches[0].device
    pairs = pairs.to(device, non_blocking=True)
    by_layout: dict[tuple[int, int], list[int]] = {}
    for cache in caches:
        if cache.shape[0] and not cache[0].is_contiguous():
            raise ValueError(f"a cache {list(cache.shape)} has strides {cache.stride()}; its blocks must be contiguous")
        block_bytes = math.prod(cache.shape[1:]) * cache.element_size()
        by_layout.setdefault((block_bytes, cache.stride(0) * cache.element_size()), []).append(cache.data_ptr())
    for (block_bytes, stride_bytes), addresses in by_layout.items():
        word = math.gcd(8, block_bytes, stride_bytes, *addresses)  # the widest word that every block consists of
        num_words = block_bytes // word
        grid = (triton.cdiv(num_words, TILE_WORDS), pairs.shape[0], len(addresses))
        _copy_kernel[grid](
            _address_table(tuple(addresses), device),
            pairs,
            pairs.stride(0),
            pairs.stride(1),
            num_words,
            stride_bytes // word,
            WORD_BITS=8 * word,
            TILE=TILE_WORDS,
            num_warps=4,
        )
