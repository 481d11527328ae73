"""Compile every Triton kernel for an H100 without one: what its compiler refuses, the interpreter accepts.

Run by test_compiles.py in a process of its own, for Triton here must not interpret. Prints a line per compiled kernel.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from minipaged.kernels import launch_table
from minipaged.kernels.attention import decode_triton, prefill_triton
from minipaged.kernels.attention.decode_triton import paged_decode_triton
from minipaged.kernels.attention.heavy_hitters import Budget
from minipaged.kernels.attention.heavy_hitters_triton import keep_heaviest_triton
from minipaged.kernels.attention.prefill_triton import paged_prefill_triton
from minipaged.kernels.cache import rope_write_triton
from minipaged.kernels.cache.block_copy_triton import copy_blocks_triton
from minipaged.kernels.cache.cache_write_triton import write_kv_triton
from minipaged.kernels.cache.dequantize_triton import dequantize_pages_triton
from minipaged.kernels.cache.quantize import LARGEST_CODE
from minipaged.kernels.cache.rope_write_triton import rope_write_kv_triton
from minipaged.kernels.dispatch import gluon_runs
from minipaged.kernels.elementwise import activation_triton, embed_triton, norm_triton
from minipaged.kernels.elementwise.activation_triton import silu_mul_triton
from minipaged.kernels.elementwise.embed_triton import embed_tokens_triton
from minipaged.kernels.elementwise.norm_triton import rms_norm_triton
from minipaged.kernels.linear import matmul_triton as linear_triton
from minipaged.kernels.linear import packed_triton
from minipaged.kernels.linear.matmul_triton import few_rows_triton, one_row_triton
from minipaged.kernels.sampling import draw_triton, truncate_parts_triton, truncate_triton
from minipaged.kernels.sampling.draw_triton import draw_tokens_triton
from minipaged.kernels.sampling.truncate_parts_triton import truncation_threshold_by_parts
from minipaged.kernels.sampling.truncate_triton import truncation_threshold_triton
from minipaged.memory.retention import Retention
from tests.kernels.paged_cases import make_case
from tests.kernels.test_decode_shared import shared_case
from tests.kernels.test_gpu import DTYPES, SHAPES, names
from tests.kernels.test_heavy_hitters import rows_of
from tests.kernels.test_quantized import quantized
from tests.kernels.test_sinks import stream_of

SHARED_MEMORY = 227 << 10


class HopperDriver:
    """As much of Triton's driver as compiling asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


launch = JITFunction.run
DISASSEMBLER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
MEMORY = re.compile(
    r"\b(LDG|LDGSTS|LD|STG|ST|ATOM|ATOMG|RED|REDG|UBLKCP)\b"
)  # machine instructions that touch global memory


def check_waits(name: str, cubin: bytes) -> None:
    """A dependent kernel's machine code touches no memory before it waits for the kernel before it (ACQBULK), but for one row's weights."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        code = subprocess.run([DISASSEMBLER, "-c", file.name], capture_output=True, text=True, check=True).stdout
    instructions = [line for line in code.splitlines() if "/*" in line]
    before = list(itertools.takewhile(lambda line: "ACQBULK" not in line, instructions))
    if len(before) == len(instructions):
        raise SystemExit(f"{name} is launched dependently and never waits")
    if name not in ("_one_row_kernel", "_packed_one_row_kernel") and any(MEMORY.search(line) for line in before):
        raise SystemExit(f"{name} touches memory before it waits:\n" + "\n".join(before))
    print(name, "waits after", len(before), "instructions")


def compile_only(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
    """Instead of a launch."""
    compiled = launch(self, *arguments, grid=grid, warmup=True, **options)
    shared = compiled.metadata.shared
    print(self.fn.__name__, "shared memory", shared, "registers", getattr(compiled, "n_regs", "?"))
    if shared > SHARED_MEMORY:
        raise SystemExit(f"{self.fn.__name__} needs {shared} bytes of shared memory")
    if (
        options.get("DEPENDENT") and "bf16" in compiled.asm["ttgir"]
    ):  # one dtype will do: disassembling takes as long as compiling
        check_waits(self.fn.__name__, compiled.asm["cubin"])
    return compiled


def compile_prefill_hopper() -> None:
    if not gluon_runs():
        print("_hopper_prefill_kernel: not in this triton")
        return
    from minipaged.kernels.attention.prefill_hopper import paged_prefill_hopper

    for head_dim, dtype, longest in (
        (128, torch.bfloat16, 512),
        (128, torch.bfloat16, 4096),
        (64, torch.float16, 4096),
        (64, torch.bfloat16, 512),
    ):
        case = make_case([5, 2], [5, 1], kv_heads=2, group=4, head_dim=head_dim, block_size=16, dtype=dtype)
        settings = launch_table.hopper_prefill_settings(longest, 16, kv_bytes=0, tiles_per_full_tile=1.0)
        assert settings is not None
        paged_prefill_hopper(*case.prefill(), launch=settings)


def compile_packed() -> None:
    """Both widths of codes, both kinds of scales, with and without padding."""
    from minipaged.kernels.linear import PackedMatrix, pack
    from minipaged.kernels.linear.packed_triton import dequantize_triton, packed_rows_triton, packed_tile_triton

    def matrix(inputs: int, group: int, bits: int, zero_points: bool) -> PackedMatrix:
        scales = torch.ones(256, inputs // group, 2, dtype=torch.float16 if bits == 4 else torch.float32)
        return pack(torch.zeros(256, inputs, dtype=torch.uint8), scales, bits, has_zero_points=zero_points)

    for weight, dtype in (
        (matrix(4096, 128, 4, True), torch.bfloat16),
        (matrix(576, 32, 4, False), torch.float16),
        (matrix(576, 16, 8, True), torch.bfloat16),
    ):
        dequantize_triton(weight, dtype)
        for rows in (1, 5, 16, 40, 100):
            x = torch.zeros(rows, weight.inputs, dtype=dtype)
            packed_rows_triton(x[:16], weight, gated=True)
            packed_tile_triton(x, weight, residual=torch.zeros(rows, 256, dtype=dtype))
        if gluon_runs():
            from minipaged.kernels.linear import packed_one_row

            packed_one_row.dependent_launch = linear_triton.dependent_launch
            packed_one_row.packed_one_row(x[:1], weight, norm=x[0], eps=1e-5)
            packed_one_row.packed_one_row(x[:1], weight, weight.scales[:, 0, 0].to(dtype), gated=True)


# As SHAPES; every width of heads, in groups and not.
CODED_SHAPES = [
    shape for shape in SHAPES if shape[:3] in {(64, 3, 3), (80, 2, 7), (128, 2, 4), (128, 4, 1), (256, 2, 8)}
]


def compile_for_codes() -> None:
    """The kernels that write and read a quantized cache."""
    for shape, dtype, codes in itertools.product(CODED_SHAPES, (torch.float32, torch.bfloat16), LARGEST_CODE):
        print(triton.__version__, names(shape), dtype, codes)
        head_dim, kv_heads, group, block_size, window, per_head = shape
        form = {"block_size": block_size, "window": window, "table_per_head": per_head, "dtype": dtype}
        case, shared = shared_case([(2, 1)], 0, kv_heads=kv_heads, group=group, head_dim=head_dim, **form)
        case, scales, _ = quantized(case, codes)
        settings = launch_table.decode_launch(head_dim, dtype.itemsize, torch.device("cpu"))
        for enough_waves in (0, 1000):
            launch = replace(settings, enough_waves=enough_waves, min_chunk=1)
            paged_decode_triton(*case.decode(), scales=scales, window=window, launch=launch)
        if window is None:
            paged_decode_triton(*case.decode(), scales=scales, shared=shared)
        paged_prefill_triton(*case.prefill(), scales=scales, window=window)
        new, slots = case.query[:, :kv_heads], torch.zeros(len(case.query), dtype=torch.int64)
        caches = (case.key_cache, case.value_cache)
        write_kv_triton(new, new, *caches, slots, scales)
        if case.block_tables.dim() == 2:
            dequantize_pages_triton(*caches, scales, case.block_tables, case.context_lens, dtype)
        rope_write_kv_triton(case.query, new, new, slots, torch.zeros(4, head_dim), *caches, slots, scales=scales)


def compile_for_sinks() -> None:
    """The second query, in both kernels: heads in groups and alone, over numbers and over codes."""
    for heads, head_dim, dtype in itertools.product([(2, 1), (1, 4)], (64, 80, 128), DTYPES):
        stream = stream_of([(9, 1), (4, 1)], Retention(4, 3), block_size=4, heads=heads, head_dim=head_dim, dtype=dtype)
        options = {"window": stream.window, "sinks": stream.sinks}
        settings = launch_table.decode_launch(head_dim, dtype.itemsize, torch.device("cpu"))
        paged_decode_triton(*stream.decode(), **options, launch=replace(settings, enough_waves=1000, min_chunk=1))
        query, keys, values, *rest = stream.arguments
        scales = (torch.ones(len(keys), heads[0], 4), torch.ones(len(keys), heads[0], 4))
        codes = (keys.to(torch.int8), values.to(torch.int8))
        paged_decode_triton(query, *codes, *rest[:2], rest[-1], **options, scales=scales)
        paged_prefill_triton(query, *codes, *rest, **options, scales=scales)
        grid = {"rows": 64, "heads": 32, "group": 1, "max_query_len": 4096}
        for longest in (64, launch_table.LONG_CONTEXT):
            launch = launch_table.prefill_launch(head_dim, dtype.itemsize, torch.device("cpu"), longest=longest, **grid)
            paged_prefill_triton(*stream.arguments, **options, launch=launch)


def compile_for_heavy_hitters() -> None:
    """What chooses the tokens that go: heads in groups and alone, over numbers and over codes."""
    for heads, dtype, codes in itertools.product([(2, 2), (6, 2)], DTYPES, (None, *LARGEST_CODE)):
        case = rows_of([9, 4], Budget(5, 4), heads, 16, codes)
        case["query"] = case["query"].to(dtype)
        if codes is None:
            case |= {name: case[name].to(dtype) for name in ("key_cache", "value_cache")}
        keep_heaviest_triton(**case)


def main() -> None:
    driver.set_active(HopperDriver())
    JITFunction.run = compile_only
    for module in (
        activation_triton,
        decode_triton,
        draw_triton,
        embed_triton,
        linear_triton,
        norm_triton,
        packed_triton,
        prefill_triton,
        rope_write_triton,
        truncate_parts_triton,
        truncate_triton,
    ):  # as on an H100
        module.dependent_launch = lambda device: {"DEPENDENT": True, "launch_pdl": True}
    for dtype in DTYPES:
        weight = torch.zeros(512, 256, dtype=dtype)
        one_row_triton(weight[:1], weight, norm=weight[0])
        one_row_triton(weight[:1], weight, weight[:, 0].contiguous(), norm=weight[0], gated=True)
        for rows in (1, 3, 20):
            x = torch.zeros(rows, 256, dtype=dtype)
            few_rows_triton(x, weight, residual=torch.zeros(rows, 512, dtype=dtype))
            ids = torch.zeros(rows, dtype=torch.int32)
            embed_tokens_triton(weight, ids, torch.zeros(2, dtype=torch.int64), ids)
            draw_tokens_triton(x)
            numbers = torch.zeros(rows, dtype=torch.float64)
            draw_tokens_triton(x, numbers, numbers)
            draw_tokens_triton(x, numbers, numbers, truncation_threshold_triton(x, numbers, numbers, numbers, numbers))
            if dtype.itemsize == 2:
                truncation_threshold_by_parts(x, numbers, numbers, numbers, numbers)
    compile_packed()
    compile_prefill_hopper()
    compile_for_codes()
    compile_for_sinks()
    compile_for_heavy_hitters()
    grid = {"rows": 64, "heads": 32, "group": 1, "max_query_len": 4096}
    for shape, dtype in itertools.product(SHAPES, DTYPES):
        print(triton.__version__, names(shape), dtype)
        head_dim, kv_heads, group, block_size, window, per_head = shape
        case = make_case(
            [5, 2],
            [1, 1],
            kv_heads=kv_heads,
            group=group,
            head_dim=head_dim,
            block_size=block_size,
            dtype=dtype,
            window=window,
            table_per_head=per_head,
        )
        for settings in {
            launch_table.prefill_launch(head_dim, dtype.itemsize, torch.device("cpu"), longest=longest, **grid)
            for longest in (64, launch_table.LONG_CONTEXT)
        }:
            paged_prefill_triton(*case.prefill(), window=window, launch=settings)
        for enough_waves in (0, 1000):  # without and with splitting
            settings = launch_table.decode_launch(head_dim, dtype.itemsize, torch.device("cpu"))
            settings = replace(settings, enough_waves=enough_waves, min_chunk=1)
            paged_decode_triton(*case.decode(), window=window, launch=settings)
        new, slots = case.query[:, :kv_heads], torch.zeros(2, dtype=torch.int64)
        write_kv_triton(new, new, case.key_cache, case.value_cache, slots)
        angles = torch.zeros(4, head_dim)
        rope_write_kv_triton(case.query, new, new, slots, angles, case.key_cache, case.value_cache, slots)
        norms = {"query_norm": angles[0].to(dtype), "key_norm": angles[0].to(dtype), "eps": 1e-5}
        rope_write_kv_triton(case.query, new, new, slots, angles, case.key_cache, case.value_cache, slots, **norms)
        rms_norm_triton(case.query, angles[0].to(dtype), 1e-5)
        flat = case.query.flatten(1)
        silu_mul_triton(flat)
        copy_blocks_triton([case.key_cache, torch.zeros(2, 3, dtype=torch.int8)], torch.zeros(1, 2, dtype=torch.int64))


if __name__ == "__main__":
    main()
