"""Attention over the paged cache: one new token a sequence (decode), or chunks of a prompt (prefill).

key_cache, value_cache: [num_blocks, block_size, kv_heads, head_dim]; slot = block * block_size + offset.
"""

from minipaged.kernels.attention.decode import paged_decode
from minipaged.kernels.attention.prefill import paged_prefill

__all__ = ["paged_decode", "paged_prefill"]
