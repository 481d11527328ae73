"""The ground floor: one function per operation on the paged KV cache, each with a torch twin and a Triton kernel of one signature.

KV layout: key_cache, value_cache [num_blocks, block_size, kv_heads, head_dim]; slot = block * block_size + offset.
Knows tensors; knows nothing of sequences, models or schedulers. Importing this needs torch alone: triton is imported when a CUDA
tensor (or MINIPAGED_KERNELS=triton) first asks for it. See kernels/README.md for what each kernel must move and compute.
"""

from kernels.block_copy import copy_blocks
from kernels.cache_write import write_kv
from kernels.decode import paged_decode
from kernels.prefill import paged_prefill

__all__ = ["copy_blocks", "paged_decode", "paged_prefill", "write_kv"]
