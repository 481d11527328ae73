"""The ground floor: one function per operation on and around the paged KV cache, a torch twin and a Triton kernel of one signature each.

KV layout: key_cache, value_cache [num_blocks, block_size, kv_heads, head_dim]; slot = block * block_size + offset.
Knows tensors; knows nothing of sequences, models or schedulers. Importing this needs torch alone: triton is imported when a CUDA
tensor (or MINIPAGED_KERNELS=triton) first asks for it. See kernels/README.md for what each kernel must move and compute.
"""

from kernels.activation import silu_mul
from kernels.block_copy import copy_blocks
from kernels.cache_write import write_kv
from kernels.decode import paged_decode
from kernels.draw import draw_tokens
from kernels.embed import embed_tokens
from kernels.linear import gated_linear, linear
from kernels.norm import rms_norm
from kernels.prefill import paged_prefill
from kernels.rope_write import rope_write_kv
from kernels.truncate import least_kept_logit

__all__ = [
    "copy_blocks",
    "draw_tokens",
    "embed_tokens",
    "gated_linear",
    "least_kept_logit",
    "linear",
    "paged_decode",
    "paged_prefill",
    "rms_norm",
    "rope_write_kv",
    "silu_mul",
    "write_kv",
]
