"""Writing keys and values into their slots of the paged cache, rotating them on the way, and copying whole blocks."""

from minipaged.kernels.cache.block_copy import copy_blocks
from minipaged.kernels.cache.cache_write import write_kv
from minipaged.kernels.cache.rope_write import rope_write_kv

__all__ = ["copy_blocks", "rope_write_kv", "write_kv"]
