"""The kernels around attention, as GB/s of the bytes they must move: rotation with the cache write, norm, SiLU, draws,
and products of few rows.

Each call moves at least 64 MB; buffers rotate past the cache. What must move is each input and each output once, whatever a kernel does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from minipaged.kernels.cache import rope_write_kv
from minipaged.kernels.elementwise import rms_norm, silu_mul
from minipaged.kernels.linear import linear
from minipaged.kernels.sampling import draw_tokens, truncation_threshold
from minipaged.lab.measure.pools import BLOCK
from minipaged.lab.measure.rows import OURS, PAST_CACHE_BYTES, Ceilings, Row, make_row
from minipaged.lab.measure.timing import Race, Work, race, race_alone

EPS = 1e-5


@dataclass(frozen=True)
class Small:
    """A kernel on one shape. prepare(device): buffers of its own, and the call over them; moved: bytes that a call must move."""

    kernel: str
    shape: str
    moved: int
    prepare: Callable[[str], Work]


def rope_write(tokens: int, heads: int, kv_heads: int, head_dim: int) -> Small:
    """Queries and keys rotated, keys and values written: q in and out, k and v in and out, the angles in."""
    moved = tokens * ((2 * heads + 4 * kv_heads) * head_dim * 2 + head_dim * 4 + 16)

    def prepare(device: str) -> Work:
        merged = torch.randn(tokens, heads + 2 * kv_heads, head_dim, device=device, dtype=torch.bfloat16)
        query, key, value = merged[:, :heads], merged[:, heads : heads + kv_heads], merged[:, heads + kv_heads :]
        positions = torch.arange(tokens, device=device)
        angles = torch.rand(tokens, head_dim // 2, device=device)
        cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1)
        shape = (-(-tokens // BLOCK), BLOCK, kv_heads, head_dim)
        key_cache, value_cache = (torch.zeros(shape, device=device, dtype=torch.bfloat16) for _ in range(2))
        pages = torch.randperm(shape[0], device=device)
        slots = pages[positions // BLOCK] * BLOCK + positions % BLOCK
        return lambda: rope_write_kv(query, key, value, positions, cos_sin, key_cache, value_cache, slots)

    return Small("rope + cache write", f"{tokens} tokens, {heads}/{kv_heads} x {head_dim}", moved, prepare)


def norm(tokens: int, size: int) -> Small:
    """In and out; the sum with the residual before it rides on a product."""

    def prepare(device: str) -> Work:
        x = torch.randn(tokens, size, device=device, dtype=torch.bfloat16)
        weight = torch.randn(size, device=device, dtype=torch.bfloat16)
        return lambda: rms_norm(x, weight, EPS)

    return Small("norm", f"{tokens} x {size}", 2 * tokens * size * 2, prepare)


def silu(tokens: int, inner: int) -> Small:
    """Gate and up in, their product out."""

    def prepare(device: str) -> Work:
        gate_up = torch.randn(tokens, 2 * inner, device=device, dtype=torch.bfloat16)
        return lambda: silu_mul(gate_up)

    return Small("SiLU * gate", f"{tokens} x {inner}", 3 * tokens * inner * 2, prepare)


def draws(rows: int, vocabulary: int, *, truncated: bool = False) -> Small:
    """One token a row at temperature 0.6, of all or of the likeliest 95 %: the logits in, once, in bfloat16 as a step's graph has them."""

    def prepare(device: str) -> Work:
        logits = 3 * torch.randn(rows, vocabulary, device=device, dtype=torch.bfloat16)
        temperature = torch.full((rows,), 0.6, dtype=torch.float64, device=device)
        uniform = torch.rand(rows, dtype=torch.float64, device=device)
        if not truncated:
            return lambda: draw_tokens(logits, temperature, uniform)
        no_top_k, top_p, no_min_p = torch.tensor([[0.0], [0.95], [0.0]], device=device).repeat(1, rows).unbind(0)

        def work() -> object:
            threshold = truncation_threshold(logits, temperature, no_top_k, top_p, no_min_p)
            return draw_tokens(logits, temperature, uniform, threshold)

        return work

    return Small(
        "sampling, top-p" if truncated else "sampling", f"{rows} x {vocabulary} logits", rows * vocabulary * 2, prepare
    )


def product(rows: int, inputs: int, outputs: int) -> Small:
    """Rows times a weight, added to a residual: the weight in, once; x and the sums are next to nothing."""

    def prepare(device: str) -> Work:
        x = torch.randn(rows, inputs, device=device, dtype=torch.bfloat16)
        weight = torch.randn(outputs, inputs, device=device, dtype=torch.bfloat16) * inputs**-0.5
        residual = torch.zeros(rows, outputs, device=device, dtype=torch.bfloat16)
        return lambda: linear(x, weight, residual=residual)

    return Small(f"product of {rows}", f"{rows} x {inputs} x {outputs}", inputs * outputs * 2, prepare)


SMALL = (
    rope_write(4096, 32, 32, 128),
    rope_write(8192, 32, 8, 128),
    rope_write(16384, 16, 8, 128),
    norm(8192, 4096),
    norm(32768, 1024),
    silu(2048, 11008),
    silu(8192, 3072),
    draws(256, 151936),
    draws(1024, 32000),
    draws(256, 151936, truncated=True),
    draws(1, 151936, truncated=True),
    product(1, 4096, 12288),
    product(1, 11008, 4096),
    product(16, 11008, 4096),
)


def small_rows(
    ceilings: Ceilings, *, cases: tuple[Small, ...] = SMALL, timed: Race = race, device: str = "cuda"
) -> Iterator[Row]:
    """Every kernel on every shape."""
    for case in cases:
        copies = max(2, -(-PAST_CACHE_BYTES // case.moved)) if device == "cuda" else 2
        calls = [case.prepare(device) for _ in range(copies)]
        passes = ceilings.passes(case.moved / 1e3, "GB/s", copies)

        def work(calls: list[Work] = calls, passes: int = passes) -> None:
            for _ in range(passes):
                for call in calls:
                    call()

        taken = race_alone(timed, work, copies * passes)
        yield make_row(case.kernel, case.shape, OURS, taken, case.moved / 1e3, "GB/s", ceilings=ceilings)
        del calls, work
        if device == "cuda":
            torch.cuda.empty_cache()
