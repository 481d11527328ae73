"""paged_prefill on Hopper: FlashAttention-3's division of labour over pages. Sixteen bits, heads of 64 or 128, no window.

Triton's own loop (prefill_loops.py) waits for the scores before it asks for the product with the values, so one of the two is always
waited for. Here, in Triton's lower language Gluon, a program's three warpgroups run code of their own and wait for nothing but buffers:

    one loading warpgroup             two computing warpgroups, each 64 of 128 rows (queries times packed heads)
    (prefill_hopper_loads.py)         (prefill_hopper_loops.py)

    queries ──────── full ────────>   once an item
    keys of n ────── full ────────>   ask for scores n      ┐ the tensor cores compute both; the softmax of n begins
    values of n-1 ── full ────────>   ask for product n-1   ┘ when scores n are there, beside product n-1
    <──────── keys of n empty ─────   scores n are there
    <──── values of n-1 empty ─────   product n-1 is there
    <────────── queries empty ─────   the item's output has left, through their buffer

Each kind of buffer is a ring in shared memory with two barriers a buffer: "full" ends a phase when all 128 loading threads' copies have
come, "empty" when both computing warpgroups have said so. So loads run up to a ring ahead, and into the next item.

Bytes: the keys and values up to the diagonal once per 128 rows, mostly from L2, as in prefill_triton; operations: the same. Predicted
from FlashAttention-3 timed beside it: 1.25 to 1.35 times prefill_triton. Measured (H100, kernels/README.md): 1.21 to 1.45 times.
Source: FlashAttention-3 (Shah et al., 2024), sections 3.1 and 3.2.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803

import math

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from minipaged.kernels.attention.prefill_hopper_items import HALF
from minipaged.kernels.attention.prefill_hopper_loads import THREADS, produce
from minipaged.kernels.attention.prefill_hopper_loops import consume
from minipaged.kernels.launch_table import HopperPrefillLaunch, gpu_of, packed_heads

SLOTS = 2  # tiles of queries: one in use, one loaded ahead
# Registers a thread: the computing warps take what the loading ones do not need.
EVEN_REGISTERS, COMPUTING_REGISTERS, LOADING_REGISTERS = 168, 216, 72


@gluon.jit
def allocate_barriers(BUFFERS: gl.constexpr, ARRIVALS: gl.constexpr):
    """A barrier for each buffer of a ring; a phase of one ends after so many arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    for buffer in gl.static_range(BUFFERS):
        mbarrier.init(barriers.index(buffer), count=ARRIVALS)
    return barriers


@gluon.jit(do_not_specialize=["num_rows", "tiles", "section", "turns", "stride_table", "stride_table_head"])
def _hopper_prefill_kernel(
    out_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    block_tables_ptr,
    context_lens_ptr,
    query_starts_ptr,
    num_rows,
    scale,  # above 0; with log2(e) in it, for the softmax is in base 2
    tiles,  # of the longest row
    section,  # pairs of (row, heads) that run together
    turns,  # items of a program
    stride_out,
    stride_out_head,
    stride_query,
    stride_query_head,
    stride_block,
    stride_slot,
    stride_head,
    stride_table,
    stride_table_head,
    HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    PACK: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    PAGE_BITS: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
    SLOTS: gl.constexpr,
    WIDE: gl.constexpr,
    COMPUTING_REGISTERS: gl.constexpr,
    LOADING_REGISTERS: gl.constexpr,
    num_warps: gl.constexpr,
):
    dtype: gl.constexpr = key_ptr.dtype.element_ty
    shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, HEAD_DIM], dtype)
    shared_half: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF, HEAD_DIM], dtype)
    queries = gl.allocate_shared_memory(dtype, [2 * SLOTS, HALF, HEAD_DIM], shared_half)
    keys = gl.allocate_shared_memory(dtype, [STAGES, TILE, HEAD_DIM], shared)
    values = gl.allocate_shared_memory(dtype, [STAGES, TILE, HEAD_DIM], shared)
    buffers = (queries, keys, values)
    barriers = (
        allocate_barriers(SLOTS, THREADS),  # full ones are signalled by the loading warpgroup's threads,
        allocate_barriers(SLOTS, 2),  # empty ones by the two computing warpgroups
        allocate_barriers(STAGES, THREADS),
        allocate_barriers(STAGES, 2),
        allocate_barriers(STAGES, THREADS),
        allocate_barriers(STAGES, 2),
    )
    strides = (
        stride_out, stride_out_head, stride_query, stride_query_head,
        stride_block, stride_slot, stride_head, stride_table, stride_table_head,
    )  # fmt: skip
    work = (query_starts_ptr, context_lens_ptr, num_rows, tiles, section)
    pointers = (query_ptr, key_ptr, value_ptr, block_tables_ptr)
    gl.warp_specialize(
        [
            (consume, (0, work, turns, buffers, barriers, out_ptr, strides, scale, HEADS, PACK)),
            (consume, (1, work, turns, buffers, barriers, out_ptr, strides, scale, HEADS, PACK)),
            (produce, (work, turns, buffers, barriers, pointers, strides, PAGE_BITS, WIDE, HEADS, GROUP, PACK)),
        ],
        [4, 4],
        [COMPUTING_REGISTERS, LOADING_REGISTERS],
    )


def paged_prefill_hopper(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    query_starts: torch.Tensor,
    max_query_len: int,
    scale: float,
    *,
    out: torch.Tensor | None = None,
    launch: HopperPrefillLaunch,
) -> torch.Tensor:
    """See paged_prefill. launch: of launch_table.hopper_prefill_launch, which says what the kernel takes."""
    _, heads, head_dim = query.shape
    num_blocks, block_size, kv_heads, _ = key_cache.shape
    out = torch.empty_like(query, memory_format=torch.contiguous_format) if out is None else out
    num_rows = context_lens.shape[0]
    if num_rows == 0 or max_query_len == 0:
        return out
    group = heads // kv_heads
    pack = packed_heads(launch, group)
    tiles = triton.cdiv(max_query_len, 2 * HALF.value // pack)
    pairs = num_rows * heads // pack
    kv_bytes = 2 * block_tables.shape[-1] * block_size * head_dim * key_cache.element_size()
    section = launch.section(pairs, group // pack, kv_bytes)
    items = pairs * tiles
    programs = min(items, gpu_of(query.device).multiprocessors) if launch.persistent else items
    _hopper_prefill_kernel[(programs,)](
        out,
        query,
        key_cache,
        value_cache,
        block_tables,
        context_lens,
        query_starts,
        num_rows,
        scale * math.log2(math.e),
        tiles,
        section,
        triton.cdiv(items, programs),
        out.stride(0),
        out.stride(1),
        query.stride(0),
        query.stride(1),
        key_cache.stride(0),
        key_cache.stride(1),
        key_cache.stride(2),
        block_tables.stride(0),
        block_tables.stride(1) if block_tables.dim() == 3 else 0,
        HEADS=heads,
        GROUP=group,
        PACK=pack,
        HEAD_DIM=head_dim,
        PAGE_BITS=block_size.bit_length() - 1,
        TILE=launch.kv_tile,
        STAGES=launch.num_stages,
        SLOTS=SLOTS,
        WIDE=(num_blocks - 1) * key_cache.stride(0) + block_size * key_cache.stride(1) >= 2**31,
        COMPUTING_REGISTERS=COMPUTING_REGISTERS,
        LOADING_REGISTERS=LOADING_REGISTERS,
        num_warps=4,
        maxnreg=EVEN_REGISTERS,
    )
    return out
