"""The compiled Triton kernels on a CUDA GPU: errors over a table of shapes, CUDA graphs, and caches past 2**31 elements.

MINIPAGED_KERNEL_REPORT=FILE appends each shape's errors to a Markdown table.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minipaged.kernels.attention import paged_decode, paged_prefill
from minipaged.kernels.cache import copy_blocks, rope_write_kv, write_kv
from minipaged.kernels.elementwise import rms_norm, silu_mul
from minipaged.lab.measure.timing import capture
from tests.kernels.paged_cases import (
    PagedCase,
    assert_close,
    dense_attention,
    largest_error,
    make_case,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.usefixtures("unset_choice"),
]

# head_dim, kv_heads, group, block_size, window, a table per KV head: each value of each axis, not their product.
SHAPES = [
    (32, 2, 1, 1, None, False),
    (32, 1, 8, 16, 50, False),
    (64, 3, 3, 16, None, False),
    (64, 2, 4, 256, None, True),
    (64, 4, 1, 64, 700, False),
    (80, 2, 1, 16, None, False),
    (80, 2, 7, 1, None, True),
    (96, 2, 3, 16, 64, False),
    (128, 2, 4, 16, None, False),
    (128, 4, 1, 16, None, False),
    (128, 2, 8, 64, 1000, True),
    (128, 2, 1, 256, None, False),
    (128, 1, 17, 1, None, False),
    (256, 2, 1, 16, None, False),
    (256, 2, 8, 64, None, False),
    (256, 1, 4, 256, 100, False),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def lengths_around(block_size: int) -> list[int]:
    """Ragged lengths: one token, block boundaries and their neighbours, tile boundaries, and a long row."""
    return [1, max(1, block_size - 1), block_size, block_size + 1, 63, 64, 65, 4096, 1000, 3 * block_size]


def report(operation: str, case: PagedCase, error: float, twin_error: float) -> None:
    """One line of the error table, if a report was asked for."""
    if not (path := os.environ.get("MINIPAGED_KERNEL_REPORT")):
        return
    _, block_size, kv_heads, head_dim = case.key_cache.shape
    columns = {
        "kernel": operation,
        "dtype": str(case.query.dtype).removeprefix("torch."),
        "head dim": head_dim,
        "heads": f"{case.query.shape[1]}/{kv_heads}",
        "block": block_size,
        "window": case.window or "-",
        "tables": "per head" if case.block_tables.dim() == 3 else "shared",
        "max error": f"{error:.1e}",
        "twin's": f"{twin_error:.1e}",
        "device": torch.cuda.get_device_name(),
    }
    with Path(path).open("a") as file:
        if file.tell() == 0:
            print("|", " | ".join(columns), "|", file=file)
            print("|" + " --- |" * len(columns), file=file)
        print("|", " | ".join(str(value) for value in columns.values()), "|", file=file)


def names(shape: tuple[object, ...]) -> str:
    head_dim, kv_heads, group, block_size, window, per_head = shape
    return f"d{head_dim}-kv{kv_heads}-g{group}-b{block_size}-w{window}{'-per_head' if per_head else ''}"


def gpu_case(shape: tuple[int, int, int, int, int | None, bool], dtype: torch.dtype, prefill: bool) -> PagedCase:
    head_dim, kv_heads, group, block_size, window, table_per_head = shape
    context_lens = lengths_around(block_size)
    if prefill:  # whole prompts, chunks after a prefix, and single tokens
        query_lens = [1, context_lens[1], 1, context_lens[3], 63, 7, 0, 300, 1000, block_size]
    else:
        context_lens = [*context_lens, 0, 0]
        query_lens = [1] * len(context_lens)
    # A wrong read of an entry that is not there gives NaN here, and not the end of the CUDA context.
    return make_case(
        context_lens,
        query_lens,
        kv_heads=kv_heads,
        group=group,
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
        window=window,
        table_per_head=table_per_head,
        device="cuda",
        unused_entry=0,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=names)
def test_L64_decode_on_the_gpu(
    shape: tuple[int, int, int, int, int | None, bool], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = gpu_case(shape, dtype, prefill=False)
    expected = dense_attention(case)
    out = paged_decode(*case.decode(), window=case.window)
    permuted = paged_decode(*case.permuted(1).decode(), window=case.window)
    monkeypatch.setenv("MINIPAGED_KERNELS", "torch")
    twin = paged_decode(*case.decode(), window=case.window)
    report("paged_decode", case, largest_error(out, expected), largest_error(twin, expected))
    assert_close(out, expected)
    assert largest_error(twin, expected) < 0.1  # torch may choose TF32 for it here; the CPU's tests hold it to more
    assert torch.equal(out, permuted), "L63"
    assert not out[-2:].any(), "padded rows give zeros"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=names)
def test_L64_prefill_on_the_gpu(
    shape: tuple[int, int, int, int, int | None, bool], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = gpu_case(shape, dtype, prefill=True)
    expected = dense_attention(case)
    out = paged_prefill(*case.prefill(), window=case.window)
    permuted = paged_prefill(*case.permuted(1).prefill(), window=case.window)
    monkeypatch.setenv("MINIPAGED_KERNELS", "torch")
    twin = paged_prefill(*case.prefill(), window=case.window)
    report("paged_prefill", case, largest_error(out, expected), largest_error(twin, expected))
    assert_close(out, expected)
    assert largest_error(twin, expected) < 0.1  # torch may choose TF32 for it here; the CPU's tests hold it to more
    assert torch.equal(out, permuted), "L63"


@pytest.mark.parametrize(("rows", "lengths"), [(1, [16384]), (3, [9000, 1, 257]), (40, [300]), (300, [70, 1])])
@pytest.mark.parametrize("group", [1, 4])
def test_split_decode_at_every_batch_size(rows: int, lengths: list[int], group: int) -> None:
    """From one long row in many chunks to so many rows that nothing is split."""
    context_lens = [lengths[row % len(lengths)] for row in range(rows)]
    case = make_case(
        context_lens,
        [1] * rows,
        kv_heads=8,
        group=group,
        head_dim=64,
        block_size=16,
        dtype=torch.float16,
        device="cuda",
        unused_entry=0,
    )
    assert_close(paged_decode(*case.decode()), dense_attention(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("head_dim", "kv_heads", "block_size"), [(32, 1, 1), (80, 9, 16), (128, 32, 64), (256, 3, 256)]
)
def test_L64_writes_and_copies_on_the_gpu(dtype: torch.dtype, head_dim: int, kv_heads: int, block_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    num_blocks = max(16, 600 // block_size)
    slots = torch.randperm(num_blocks * block_size, generator=generator)[:300]
    slots[::7] = -1
    key, value = torch.randn(2, len(slots), kv_heads, head_dim, generator=generator).to(dtype)
    caches = torch.randn(2, num_blocks, block_size, kv_heads, head_dim, generator=generator).to(dtype)
    pairs = torch.randperm(num_blocks, generator=generator)[:14].view(7, 2)
    scales = torch.randint(0, 99, (num_blocks, 3), dtype=torch.int8)
    on_gpu = [x.cuda() for x in (*caches, scales)]
    write_kv(key.cuda(), value.cuda(), on_gpu[0], on_gpu[1], slots.cuda())
    copy_blocks(on_gpu, pairs)
    copy_blocks(on_gpu, torch.zeros(3, 2, dtype=torch.int64, device="cuda"))
    on_cpu = [*caches.unbind(0), scales]
    write_kv(key, value, on_cpu[0], on_cpu[1], slots)
    copy_blocks(on_cpu, pairs)
    for one, other in zip(on_gpu, on_cpu, strict=True):
        assert torch.equal(one.cpu(), other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "inner"), [(9, 3, 64, 1536), (32, 32, 128, 11008), (5, 1, 80, 7)]
)
def test_L64_fusions_on_the_gpu(dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, inner: int) -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    tokens, size, block_size = 37, heads * head_dim, 16
    x, weight = normal(tokens, size), normal(size)
    assert_close(rms_norm(x.cuda(), weight.cuda(), 1e-5).cpu(), rms_norm(x, weight, 1e-5))
    gate_up = normal(tokens, 2 * inner)
    assert_close(silu_mul(gate_up.cuda()).cpu(), silu_mul(gate_up))

    merged = normal(tokens, heads + 2 * kv_heads, head_dim)
    head_weight = normal(head_dim)
    assert_close(
        rms_norm(merged.cuda()[:, :heads], head_weight.cuda(), 1e-5).cpu(),
        rms_norm(merged[:, :heads], head_weight, 1e-5),
    )
    positions = torch.randint(0, 5000, (tokens,), generator=generator)
    angle = torch.arange(5000)[:, None] * 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    cos_sin = torch.cat([angle.cos(), angle.sin()], 1)
    slots = torch.randperm(tokens * 2, generator=generator)[:tokens]
    slots[::5] = -1
    caches = torch.zeros(2, tokens * 2 // block_size + 1, block_size, kv_heads, head_dim, dtype=dtype)
    results = []
    for device in ("cuda", "cpu"):
        query, key, value = merged.clone().to(device).split([heads, kv_heads, kv_heads], 1)
        key_cache, value_cache = caches.clone().to(device)
        rope_write_kv(
            query, key, value, positions.to(device), cos_sin.to(device), key_cache, value_cache, slots.to(device)
        )
        results.append([x.cpu() for x in (query, key_cache, value_cache)])
    for one, other in zip(*results, strict=True):
        assert_close(one, other)
    assert torch.equal(results[0][2], results[1][2])


def captured_step(case: PagedCase, out: torch.Tensor, slots: torch.Tensor) -> torch.cuda.CUDAGraph:
    """A graph of one cache write and one decode."""

    def step() -> None:
        new = case.query[:, : case.key_cache.shape[2]]
        write_kv(new, new, case.key_cache, case.value_cache, slots)
        paged_decode(*case.decode(), window=case.window, out=out)

    return capture(step)


@pytest.mark.parametrize("window", [None, 600])
@pytest.mark.parametrize("group", [1, 4])
def test_a_captured_decode_follows_its_inputs(group: int, window: int | None) -> None:
    """Lengths, tables, slots and queries change in place under a graph; padded rows have length 0 and slot -1."""
    rows, kv_heads, block_size = 6, 2, 16
    case = make_case(
        [2000] * rows,
        [1] * rows,
        kv_heads=kv_heads,
        group=group,
        head_dim=64,
        block_size=block_size,
        dtype=torch.bfloat16,
        window=window,
        device="cuda",
        unused_entry=0,
    )
    full_tables = case.block_tables.clone()
    slots = torch.full((rows,), -1, dtype=torch.int64, device="cuda")
    out = torch.empty_like(case.query)
    graph = captured_step(case, out, slots)
    for step, lengths in enumerate([[1, 0, 16, 17, 1500, 2000], [2000] * rows, [0] * rows, [5, 300, 0, 0, 0, 0]]):
        case.context_lens.copy_(torch.tensor(lengths, dtype=torch.int32))
        case.block_tables.copy_(full_tables.roll(step, 0))
        case.query.copy_(torch.randn(case.query.shape, generator=torch.Generator().manual_seed(step)))
        last = case.context_lens.clamp(min=1).long() - 1
        block = case.block_tables.gather(1, (last // block_size)[:, None]).squeeze(1)
        slots.copy_(torch.where(case.context_lens > 0, block * block_size + last % block_size, -1))
        graph.replay()
        eager = paged_decode(*case.decode(), window=window)
        assert torch.equal(out, eager), f"step {step}"
        assert_close(out, dense_attention(case))


def test_offsets_past_two_to_the_31() -> None:
    """The pages lie at the end of a cache of more than 2**31 elements."""
    block_size, kv_heads, head_dim = 16, 8, 128
    num_blocks = 2**31 // (block_size * kv_heads * head_dim) + 200
    if torch.cuda.mem_get_info()[0] < 5 * num_blocks * block_size * kv_heads * head_dim:
        pytest.skip("not enough free GPU memory for two caches of 2**31 elements")
    small = make_case(
        [500, 900],
        [500, 300],
        kv_heads=kv_heads,
        group=4,
        head_dim=head_dim,
        block_size=block_size,
        dtype=torch.bfloat16,
        device="cuda",
        unused_entry=0,
    )
    used = small.key_cache.shape[0]
    moved_by = num_blocks - used
    key_cache, value_cache = (
        torch.empty(num_blocks, block_size, kv_heads, head_dim, dtype=torch.bfloat16, device="cuda") for _ in range(2)
    )
    every_slot = torch.arange(used * block_size, device="cuda")
    key, value = small.key_cache.flatten(0, 1), small.value_cache.flatten(0, 1)
    write_kv(key, value, key_cache, value_cache, every_slot)
    here = torch.arange(used, device="cuda")
    copy_blocks([key_cache, value_cache], torch.stack([here, here + moved_by], 1))
    case = replace(small, key_cache=key_cache, value_cache=value_cache, block_tables=small.block_tables + moved_by)
    expected = dense_attention(small)
    assert_close(paged_prefill(*case.prefill()), expected)
    last = small.query_starts[1:].long() - 1
    decode = replace(case, query=case.query[last])
    assert_close(paged_decode(*decode.decode()), expected[last])
