"""How each Triton kernel is launched: tile sizes, warps and stages by head dimension, dtype and grouping, as data.

The rows for head dimension 128 in sixteen bits were chosen by measuring on an H100 (kernels/README.md), the others by hand; nothing is
searched at run time, so that a run's first step is like its second. Imports torch only to ask the device for its limits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch

MAX_HEAD_DIM = 256


@dataclass(frozen=True, slots=True)
class DecodeLaunch:
    """How paged_decode runs.

    tile: KV positions per step of the loop. loop_stages: stages asked for the loop itself, which pipelines loads that feed no dot
    (None leaves it to num_stages). min_chunk: a row is never split into chunks shorter than this many positions.
    programs_per_multiprocessor: split rows until about this many programs run per multiprocessor. Without a need to split
    (rows times KV heads at least `enough_waves` times that) the splitting is compiled out.
    """

    tile: int
    num_warps: int
    num_stages: int
    loop_stages: int | None = None
    min_chunk: int = 256
    programs_per_multiprocessor: int = 4
    enough_waves: int = 8

    def shared_parts(self, tiles_and_heads: int, programs: int) -> int:
        """Into how many parts the tokens that rows share are cut: a power of two, so that about `programs` run if all tiles are used."""
        return min(16, max(4, next_power_of_two(programs // tiles_and_heads)))


@dataclass(frozen=True, slots=True)
class PrefillLaunch:
    """How paged_prefill runs.

    query_tile: rows of a tile, which are queries times packed heads. kv_tile: KV positions per step of the loop. pack: heads of a KV group
    per tile, at most. overlapped: the product with the values runs a tile late, beside the next softmax. section_bytes: so many
    bytes of keys and values run together, their longest tiles first; 0 is one KV head of one row at a time.
    """

    query_tile: int
    kv_tile: int
    num_warps: int
    num_stages: int
    pack: int = 4
    overlapped: bool = False
    section_bytes: int = 16 << 20


@dataclass(frozen=True, slots=True)
class HopperPrefillLaunch:
    """How paged_prefill runs on Hopper (prefill_hopper.py): tiles of 128 rows against kv_tile positions, num_stages tiles loaded ahead.

    persistent: one program a multiprocessor takes one tile of queries after the other, loading ahead for the next; else each tile is a
    program of its own, and the GPU hands them out as others end. pack, section_bytes: as in PrefillLaunch.
    """

    kv_tile: int
    num_stages: int
    persistent: bool
    pack: int = 4
    section_bytes: int = 16 << 20

    def section(self, pairs: int, pairs_per_kv_head: int, kv_bytes: int) -> int:
        """Pairs of (row, heads) that run together: as many as divide them all and have at most section_bytes of keys and values.

        kv_bytes: of one KV head of one row. All sections are full: who is given nothing by its fixed list leaves the work to others.
        """
        most = min(pairs, max(1, self.section_bytes // kv_bytes) * pairs_per_kv_head)
        return next(n for n in range(most, 0, -1) if pairs % n == 0)


@dataclass(frozen=True, slots=True)
class LinearLaunch:
    """How a product of few rows runs: rows of x, outputs and inputs per tile."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class PackedLaunch:
    """How a product of several rows with a packed weight runs: rows of x and outputs per tile.

    split: blocks of inputs that are taken at once, each summed by itself; 1 by tiles.
    """

    rows: int
    columns: int
    split: int
    num_warps: int
    num_stages: int


# (head dimension up to, bytes per element) -> launch. Sixteen-bit products run on tensor cores; float32 ones are computed exactly
# ("ieee") on the ordinary ones and need small tiles.
DECODE: dict[tuple[int, int], DecodeLaunch] = {
    (64, 2): DecodeLaunch(tile=64, num_warps=2, num_stages=3),
    (128, 2): DecodeLaunch(tile=64, num_warps=2, num_stages=3, min_chunk=128, enough_waves=2),
    (256, 2): DecodeLaunch(tile=32, num_warps=2, num_stages=3),
    (64, 4): DecodeLaunch(tile=32, num_warps=8, num_stages=2),
    (128, 4): DecodeLaunch(tile=32, num_warps=8, num_stages=2),
    (256, 4): DecodeLaunch(tile=16, num_warps=8, num_stages=2),
}
PREFILL: dict[tuple[int, int], PrefillLaunch] = {
    (64, 2): PrefillLaunch(query_tile=128, kv_tile=64, num_warps=4, num_stages=2),
    (128, 2): PrefillLaunch(query_tile=128, kv_tile=64, num_warps=4, num_stages=2),
    (256, 2): PrefillLaunch(query_tile=128, kv_tile=32, num_warps=8, num_stages=2),
    (64, 4): PrefillLaunch(query_tile=32, kv_tile=32, num_warps=4, num_stages=1),
    (128, 4): PrefillLaunch(query_tile=32, kv_tile=32, num_warps=8, num_stages=1),
    (256, 4): PrefillLaunch(query_tile=32, kv_tile=16, num_warps=8, num_stages=1),
}
# For long contexts, and for grids too small for two programs a multiprocessor: a program that is fast alone.
PREFILL_ALONE: dict[tuple[int, int], PrefillLaunch] = {
    (128, 2): PrefillLaunch(query_tile=128, kv_tile=128, num_warps=8, num_stages=2, pack=1, overlapped=True),
}
LONG_CONTEXT = 8192
HOPPER = (9, 0)
HOPPER_PREFILL_HEAD_DIMS = (64, 128)
CACHE_BYTES = 48 << 20  # of keys and values that stay in an H100's second cache, of 50 MiB


DECODE_ROWS = (1, 32, 256, 1024)
FEW_ROWS = LinearLaunch(rows=16, columns=16, depth=256, num_warps=2, num_stages=4)
FEW_ROWS_OUTPUTS = 4096  # wider products have enough tiles for torch's kernels


def one_row_launch(n_size: int, gated: bool) -> LinearLaunch:
    """The launch for the product of one row with n_size outputs, twice as many if gated. Chosen on an H100 (kernels/README.md)."""
    if gated:
        return LinearLaunch(rows=1, columns=4, depth=512, num_warps=2, num_stages=1)
    if n_size <= 2048:  # few programs: each keeps more of the weight in flight
        return LinearLaunch(rows=1, columns=4, depth=1024, num_warps=8, num_stages=1)
    return LinearLaunch(rows=1, columns=4, depth=512, num_warps=4, num_stages=1)


def decode_rows(num_rows: int) -> int:
    """Room for so many rows' lengths in a program that cuts rows into chunks: one of few sizes, since each is a kernel to compile.

    One row needs no sums. 32 are a warp's own, 256 four a thread; a program reads them once, beside at least 128 positions of keys.
    """
    return next((room for room in DECODE_ROWS if num_rows <= room), next_power_of_two(num_rows))


@dataclass(frozen=True, slots=True)
class PackedOneRowLaunch:
    """How a product of one row with a packed weight runs: outputs of a program; its warps share each of their rows."""

    rows: int
    num_warps: int


def packed_one_row_launch(n_size: int, k_size: int, gated: bool) -> PackedOneRowLaunch:
    """The launch for one row of k_size inputs and n_size outputs of a packed weight, twice as many if gated.

    Chosen on an H100 (kernels/README.md); for short rows so few warps that each has a part of every row.
    """
    num_warps = 4 if gated or max(n_size, k_size) <= 4096 else 2
    while num_warps > 1 and 512 * num_warps >= k_size:  # a warp takes 1,024 inputs at once
        num_warps //= 2
    return PackedOneRowLaunch(rows=8, num_warps=num_warps)


FEW_PACKED_ROWS = 16  # beyond, a product with a packed weight runs by tiles
MOST_TILE_ROWS = 128  # beyond, the weight is dequantized and the product is torch's


def packed_rows_launch(num_rows: int) -> PackedLaunch:
    """The launch for a few rows and a packed weight; num_rows at most 16 in each tile."""
    rows = 8 if num_rows <= 8 else 16
    return PackedLaunch(rows=rows, columns=32, split=4, num_warps=4, num_stages=4 if rows == 8 else 3)


def packed_tile_launch(num_rows: int, n_size: int, k_size: int) -> PackedLaunch:
    """The launch for more rows, of k_size inputs, and n_size outputs. Chosen on an H100 (kernels/README.md)."""
    if num_rows <= 32 or (
        num_rows <= 64 and k_size > 8192
    ):  # long rows: more programs are worth reading the weight twice
        return PackedLaunch(rows=32, columns=64, split=1, num_warps=4, num_stages=4)
    if n_size <= 8192:
        return PackedLaunch(rows=64, columns=64, split=1, num_warps=4, num_stages=3 if num_rows <= 64 else 4)
    if num_rows <= 64:
        return PackedLaunch(rows=64, columns=128, split=1, num_warps=4, num_stages=3)
    return PackedLaunch(rows=128, columns=64, split=1, num_warps=4, num_stages=3)


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least n and at least 1."""
    return 1 << max(0, n - 1).bit_length()


def head_block(head_dim: int) -> int:
    """A head's dimensions padded to what a dot takes: a power of two, at least 16."""
    return max(16, next_power_of_two(head_dim))


def check_layout(block_size: int, head_dim: int) -> None:
    """ValueError unless the Triton kernels take this cache."""
    if block_size != next_power_of_two(block_size):
        raise ValueError(
            f"block_size is {block_size}: the Triton kernels take powers of two; MINIPAGED_KERNELS=torch takes any"
        )
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(
            f"head_dim is {head_dim}: the Triton kernels take at most {MAX_HEAD_DIM}; MINIPAGED_KERNELS=torch takes any"
        )


@cache
def decode_launch(head_dim: int, element_bytes: int, device: torch.device) -> DecodeLaunch:
    """The launch for paged_decode, its stages and tile cut to the shared memory of `device`."""
    launch = DECODE[_row(head_dim), element_bytes]
    limit = gpu_of(device).shared_memory_bytes
    stage_bytes = 2 * head_block(head_dim) * element_bytes  # a key and a value, per position of the tile
    while launch.tile * stage_bytes * launch.num_stages > limit and (launch.num_stages > 1 or launch.tile > 16):
        stages = launch.num_stages
        launch = replace(launch, num_stages=stages - 1) if stages > 1 else replace(launch, tile=launch.tile // 2)
    return launch


def prefill_launch(
    head_dim: int,
    element_bytes: int,
    device: torch.device,
    *,
    rows: int,
    heads: int,
    group: int,
    max_query_len: int,
    longest: int,
) -> PrefillLaunch:
    """The launch for paged_prefill of `rows` rows of at most max_query_len queries, over tables of `longest` positions."""
    key = (_row(head_dim), element_bytes)
    launch = _fitted(PREFILL[key], head_dim, element_bytes, device)
    if key not in PREFILL_ALONE:
        return launch
    pack = packed_heads(launch, group)
    programs = rows * (heads // pack) * -(-max_query_len * pack // launch.query_tile)
    if longest >= LONG_CONTEXT or programs < 2 * gpu_of(device).multiprocessors:
        return _fitted(PREFILL_ALONE[key], head_dim, element_bytes, device)
    return launch


def hopper_prefill_launch(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    max_query_len: int,
    window: int | None,
) -> HopperPrefillLaunch | None:
    """The launch for paged_prefill of these on Hopper; None where prefill_triton has to take them, or takes them better."""
    tokens, _, head_dim = query.shape
    _, block_size, kv_heads, _ = key_cache.shape
    rows = block_tables.shape[0]
    strides = (*query.stride()[:2], *key_cache.stride()[:3])
    takes = (
        gpu_of(query.device).capability == HOPPER
        and window is None
        and query.element_size() == 2
        and head_dim in HOPPER_PREFILL_HEAD_DIMS
        and block_size == next_power_of_two(block_size)
        and all(stride % 16 == 0 for stride in strides)  # copies of 16 bytes; Triton knows of multiples of 16
        and all(tensor.data_ptr() % 16 == 0 for tensor in (query, key_cache, value_cache))
    )
    if not takes:
        return None
    longest = block_tables.shape[-1] * block_size
    kv_bytes = 2 * rows * longest * kv_heads * head_dim * key_cache.element_size()
    return hopper_prefill_settings(longest, max_query_len, kv_bytes, rows * max_query_len / max(1, tokens))


def hopper_prefill_settings(
    longest: int, max_query_len: int, kv_bytes: int, tiles_per_full_tile: float
) -> HopperPrefillLaunch | None:
    """By shapes alone; chosen on an H100 (kernels/README.md). None where prefill_triton is better.

    longest: context of the tables, tokens. kv_bytes: of all rows together, if all were that long. tiles_per_full_tile: how many
    tiles the grid has for one that the tokens can fill; more than 1 in a captured step, which may hold one long chunk or several short
    ones. An empty tile is only a look at the lengths, so a persistent program best passes over a few; of many, prefill_triton's
    small programs rid themselves faster.
    """
    fits_cache = kv_bytes <= CACHE_BYTES
    if tiles_per_full_tile > 4 or (tiles_per_full_tile > 2 and not fits_cache):
        return None
    if longest <= 1024:
        return HopperPrefillLaunch(kv_tile=64, num_stages=4, persistent=True)
    if 2 * max_query_len <= longest and tiles_per_full_tile <= 2:  # chunks after a prefix: tiles are about equally long
        return HopperPrefillLaunch(kv_tile=128, num_stages=2, persistent=longest <= 2048)
    if (
        fits_cache and 1.05 < tiles_per_full_tile <= 2
    ):  # a step of unlike chunks: one list would be all the long ones' to some
        return HopperPrefillLaunch(kv_tile=128, num_stages=2, persistent=True)
    if fits_cache:  # tiles of all lengths: a fixed list is balanced if there is one section
        return HopperPrefillLaunch(kv_tile=128, num_stages=2, persistent=True, section_bytes=CACHE_BYTES)
    return HopperPrefillLaunch(kv_tile=128, num_stages=2, persistent=False)


@cache
def _fitted(launch: PrefillLaunch, head_dim: int, element_bytes: int, device: torch.device) -> PrefillLaunch:
    """The launch, its stages and tiles cut to the shared memory of `device`."""
    limit = gpu_of(device).shared_memory_bytes
    row_bytes = head_block(head_dim) * element_bytes

    def needed(launch: PrefillLaunch) -> int:
        return row_bytes * (launch.query_tile + 2 * launch.kv_tile * launch.num_stages)

    while needed(launch) > limit and (launch.num_stages > 1 or launch.query_tile > 16):
        if launch.num_stages > 1:
            launch = replace(launch, num_stages=launch.num_stages - 1)
        else:
            launch = replace(launch, query_tile=launch.query_tile // 2)
    return launch


def packed_heads(launch: PrefillLaunch | HopperPrefillLaunch, group: int) -> int:
    """Heads per tile: the largest power of two that divides the group and is at most the launch's `pack`."""
    return min(launch.pack, group & -group)


def _row(head_dim: int) -> int:
    return next(limit for limit in (64, 128, 256) if head_dim <= limit)


class Gpu(NamedTuple):
    """What launches are chosen by. capability: of an NVIDIA GPU, (0, 0) of others; shared_memory_bytes: that one program may have."""

    capability: tuple[int, int]
    multiprocessors: int
    shared_memory_bytes: int


INTERPRETED = Gpu(
    (0, 0), 1, 227 << 10
)  # without a CUDA device: an H100's shared memory, so that tiles are those of the real one
H100 = Gpu((9, 0), 132, 227 << 10)
_of_shapes = INTERPRETED


def assume_for_shapes(gpu: Gpu) -> None:
    """The GPU that tensors without contents (the device "meta") count as being on; see variants.py."""
    global _of_shapes
    _of_shapes = gpu


def gpu_of(device: torch.device) -> Gpu:
    """What `device` is to the launch table."""
    return _of_shapes if device.type == "meta" else _gpu_of(device)


@cache
def _gpu_of(device: torch.device) -> Gpu:
    if device.type != "cuda":
        return INTERPRETED
    properties = torch.cuda.get_device_properties(device)
    capability = torch.cuda.get_device_capability(device) if torch.version.hip is None else (0, 0)
    shared = int(getattr(properties, "shared_memory_per_block_optin", 96 << 10))
    return Gpu(capability, int(properties.multi_processor_count), shared)
