"""How each Triton kernel is launched: tile sizes, warps and stages by head dimension, dtype and grouping, as data.

The rows for head dimension 128 in sixteen bits were chosen by measuring on an H100 (kernels/README.md), the others by hand; nothing is
searched at run time, so that a run's first step is like its second. Imports torch only to ask the device for its limits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

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

    def heads_packed(self, group: int) -> int:
        """Heads per tile: the largest power of two that divides the group and is at most `pack`."""
        return min(self.pack, group & -group)


@dataclass(frozen=True, slots=True)
class LinearLaunch:
    """How a product of few rows runs: rows of x, outputs and inputs per tile."""

    rows: int
    columns: int
    depth: int
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


FEW_ROWS = LinearLaunch(rows=16, columns=16, depth=256, num_warps=2, num_stages=4)
FEW_ROWS_OUTPUTS = 4096  # wider products have enough tiles for torch's kernels


def one_row_launch(n_size: int, gated: bool) -> LinearLaunch:
    """The launch for the product of one row with n_size outputs, twice as many if gated. Chosen on an H100 (kernels/README.md)."""
    if gated:
        return LinearLaunch(rows=1, columns=4, depth=512, num_warps=2, num_stages=1)
    if n_size <= 2048:  # few programs: each keeps more of the weight in flight
        return LinearLaunch(rows=1, columns=4, depth=1024, num_warps=8, num_stages=1)
    return LinearLaunch(rows=1, columns=4, depth=512, num_warps=4, num_stages=1)


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
    limit = shared_memory_bytes(device)
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
    pack = launch.heads_packed(group)
    programs = rows * (heads // pack) * -(-max_query_len * pack // launch.query_tile)
    if longest >= LONG_CONTEXT or programs < 2 * multiprocessors(device):
        return _fitted(PREFILL_ALONE[key], head_dim, element_bytes, device)
    return launch


@cache
def _fitted(launch: PrefillLaunch, head_dim: int, element_bytes: int, device: torch.device) -> PrefillLaunch:
    """The launch, its stages and tiles cut to the shared memory of `device`."""
    limit = shared_memory_bytes(device)
    row_bytes = head_block(head_dim) * element_bytes

    def needed(launch: PrefillLaunch) -> int:
        return row_bytes * (launch.query_tile + 2 * launch.kv_tile * launch.num_stages)

    while needed(launch) > limit and (launch.num_stages > 1 or launch.query_tile > 16):
        if launch.num_stages > 1:
            launch = replace(launch, num_stages=launch.num_stages - 1)
        else:
            launch = replace(launch, query_tile=launch.query_tile // 2)
    return launch


def _row(head_dim: int) -> int:
    return next(limit for limit in (64, 128, 256) if head_dim <= limit)


@cache
def shared_memory_bytes(device: torch.device) -> int:
    """Shared memory that one program may have; without a CUDA device (the interpreter) an H100's."""
    if device.type != "cuda":
        return 227 << 10
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", 96 << 10))


@cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of the device; 1 without a CUDA device (the interpreter)."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 1
