"""Writing new keys and values into their slots of the paged cache.

Three functions store them: `write_kv_torch` here, on CPUs (rope_write.py calls it too); on GPUs `_write_kernel` in cache_write_triton.py,
and `_rope_write_kernel` in rope_write_triton.py, which rotates the keys first.
"""

from __future__ import annotations

from torch import Tensor

from minipaged.kernels.cache.quantize import Scales, movable, quantize
from minipaged.kernels.checks import (
    INDEX_DTYPES,
    check_caches,
    check_integers,
    check_like_cache,
    check_scales,
    shape_of,
)
from minipaged.kernels.dispatch import use_triton


def write_kv(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    scales: Scales | None = None,
    check: bool = True,
) -> None:
    """cache[slot // block_size, slot % block_size] = key, value, for each token's slot.

    key, value: [T, kv_heads, head_dim]. key_cache, value_cache: [num_blocks, block_size, kv_heads, head_dim].
    slot_mapping: int64 or int32 [T]; -1 skips the token (a padded row). Two tokens must not name one slot.
    scales: of keys and of values, float32 [num_blocks, kv_heads, block_size] each, with a cache of int8 or float8_e4m3fn: it gets codes,
    they the scale of each token and head (quantize.py). Moves 2 * T * kv_heads * head_dim elements in and as many out. Raises
    ValueError on shapes, dtypes or devices that do not fit, unless `check` is False: for a caller that has had such tensors checked, as
    those of the step's first layer.
    """
    if check:
        check_write(key, value, key_cache, value_cache, slot_mapping, scales)
    if use_triton(key_cache):
        from minipaged.kernels.cache.cache_write_triton import write_kv_triton

        write_kv_triton(key, value, key_cache, value_cache, slot_mapping, scales)
    else:
        write_kv_torch(key, value, key_cache, value_cache, slot_mapping, scales)


def check_write(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    scales: Scales | None = None,
) -> None:
    """The arguments of a cache write fit each other."""
    check_caches(key_cache, value_cache)
    check_scales(scales, key_cache)
    _, _, kv_heads, head_dim = key_cache.shape
    if key.dim() != 3 or key.shape[1:] != (kv_heads, head_dim) or key.shape != value.shape:
        raise ValueError(
            f"key {shape_of(key)} and value {shape_of(value)}: both must be [tokens, {kv_heads}, {head_dim}] as in the cache"
        )
    check_like_cache("key", key, key_cache)
    check_like_cache("value", value, key_cache)
    if key.dtype != value.dtype:
        raise ValueError(f"key is {key.dtype}, but value is {value.dtype}")
    check_integers("slot_mapping", slot_mapping, INDEX_DTYPES, key.shape[0], key_cache.device)


def write_kv_torch(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    scales: Scales | None = None,
) -> None:
    """The twin of write_kv_triton."""
    slot_mapping = slot_mapping.long()
    written = slot_mapping >= 0
    if not bool(written.all()):
        key, value, slot_mapping = key[written], value[written], slot_mapping[written]
    if scales is not None:
        block_size = key_cache.shape[1]
        (key, key_scale), (value, value_scale) = (quantize(x, key_cache.dtype) for x in (key, value))
        for kept, new in zip(scales, (key_scale, value_scale), strict=True):
            kept[slot_mapping // block_size, :, slot_mapping % block_size] = new
        key_cache, value_cache, key, value = map(movable, (key_cache, value_cache, key, value))
    for cache, new in ((key_cache, key), (value_cache, value)):
        block_size = cache.shape[1]
        if cache.stride(0) == block_size * cache.stride(1):
            cache.flatten(0, 1).index_copy_(0, slot_mapping, new)  # slots are evenly spaced, so flatten is a view
        else:
            cache[slot_mapping // block_size, slot_mapping % block_size] = new
