"""Attention sinks: the torch twin against StreamingLLM's definition in float64, and the Triton kernels against the twin."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minipaged.kernels.attention import paged_decode, paged_prefill
from minipaged.kernels.attention.decode import paged_decode_torch
from minipaged.kernels.attention.prefill import paged_prefill_torch
from minipaged.kernels.attention.sinks import Sinks
from minipaged.kernels.launch_table import DecodeLaunch, PrefillLaunch
from minipaged.memory.retention import Retention
from tests.kernels.paged_cases import FEW_HEADS, assert_close, examples

SCALE = 0.3
SHORT_CHUNKS = DecodeLaunch(16, 1, 1, min_chunk=16, programs_per_multiprocessor=6, enough_waves=1000)


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    """Each pair (x[i], x[i + D/2]) of [T, heads, D] turned by its position's angle."""
    half = x.shape[-1] // 2
    angle = positions.double()[:, None, None] * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    first, second = x.double().chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@dataclass(frozen=True)
class Stream:
    """Rows of a stream behind sinks, in pages of which the spare ones are gone, and what StreamingLLM's definition says of them."""

    arguments: tuple[Any, ...]  # of paged_prefill; of paged_decode where every row has one query
    window: int
    sinks: Sinks
    expected: Tensor

    def decode(self) -> tuple[Any, ...]:
        return (*self.arguments[:5], self.arguments[-1])


def stream_of(
    rows: list[tuple[int, int]],
    retention: Retention,
    *,
    block_size: int,
    heads: tuple[int, int] = (2, 2),
    head_dim: int = 16,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    seed: int = 0,
) -> Stream:
    """rows: (position of the first query, queries) of each. Keys are rotated once, by their true positions; slots nobody owns are NaN."""
    generator = torch.Generator().manual_seed(seed)
    kv_heads, group = heads
    window, count = retention.window or 0, retention.sinks
    tables, lengths, queries, turns, expected, pages = [], [], [], [], [], []
    for start, num_queries in rows:
        length = start + num_queries
        key, value = (torch.randn(length, kv_heads, head_dim, generator=generator) for _ in range(2))
        query = torch.randn(num_queries, kv_heads * group, head_dim, generator=generator)
        at = torch.arange(start, length)
        queries.append(rotated(query, at))
        turns.append(torch.clamp(at, max=count + window - 1) - at)
        for i in range(num_queries):
            kept = [j for j in range(start + i + 1) if j > start + i - window or j < count]
            # The definition: positions are those within the cache.
            keys = rotated(key[kept], torch.arange(len(kept))).repeat_interleave(group, dim=1)
            placed = rotated(query[i : i + 1], torch.tensor([len(kept) - 1]))[0]
            weights = (torch.einsum("hd,jhd->hj", placed, keys) * SCALE).softmax(dim=-1)
            expected.append(torch.einsum("hj,jhd->hd", weights, value[kept].double().repeat_interleave(group, dim=1)))
        spare = retention.spare(start, block_size)
        padding = torch.full((-length % block_size, kv_heads, head_dim), math.nan)
        whole = [torch.cat((x.double(), padding.double())) for x in (rotated(key, torch.arange(length)), value)]
        blocks = [b for b in range(len(whole[0]) // block_size) if b not in spare]
        tables.append(list(range(len(pages) + 1, len(pages) + 1 + len(blocks))))
        pages += [tuple(x[b * block_size : (b + 1) * block_size] for x in whole) for b in blocks]
        lengths.append(length - len(spare) * block_size)
    assert all(len(table) == -(-length // block_size) for table, length in zip(tables, lengths, strict=True))
    nobody = torch.full((block_size, kv_heads, head_dim), math.nan, dtype=torch.float64)
    caches = [torch.stack([nobody, *column]).to(device, dtype) for column in zip(*pages, strict=True)]
    wide = torch.zeros(len(rows), max(map(len, tables)), dtype=torch.int32)
    for row, table in enumerate(tables):
        wide[row, : len(table)] = torch.tensor(table, dtype=torch.int32)
    half = head_dim // 2
    angle = torch.cat(turns).double()[:, None] * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    turn = torch.cat((angle.cos(), angle.sin()), dim=1)
    starts = torch.tensor([0, *(n for _, n in rows)]).cumsum(0).to(device, torch.int32)
    return Stream(
        (
            torch.cat(queries).to(device, dtype),
            *caches,
            wide.to(device),
            torch.tensor(lengths, dtype=torch.int32, device=device),
            starts,
            max(n for _, n in rows),
            SCALE,
        ),
        window,
        Sinks(count, turn.to(device, dtype if dtype == torch.float64 else torch.float32)),
        torch.stack(expected).to(device),
    )


POLICIES = st.builds(Retention, window=st.integers(1, 40), sinks=st.integers(1, 20))


@examples(50)
@given(
    policy=POLICIES,
    starts=st.lists(st.integers(0, 150), min_size=1, max_size=4),
    block_size=st.integers(1, 20),
    heads=FEW_HEADS,
    seed=st.integers(0, 99),
)
def test_L57_decode_twin_is_the_definition(
    policy: Retention, starts: list[int], block_size: int, heads: tuple[int, int], seed: int
) -> None:
    """In float64, to 1e-9: keys rotated once and a second query give what positions within the cache give."""
    stream = stream_of([(n, 1) for n in starts], policy, block_size=block_size, heads=heads, seed=seed)
    out = paged_decode_torch(*stream.decode(), window=stream.window, sinks=stream.sinks)
    assert (out - stream.expected).abs().max() < 1e-9


@examples(50)
@given(
    policy=POLICIES,
    rows=st.lists(st.tuples(st.integers(0, 100), st.integers(1, 60)), min_size=1, max_size=3),
    block_size=st.integers(1, 20),
    heads=FEW_HEADS,
    seed=st.integers(0, 99),
)
def test_L57_prefill_twin_is_the_definition(
    policy: Retention, rows: list[tuple[int, int]], block_size: int, heads: tuple[int, int], seed: int
) -> None:
    stream = stream_of(rows, policy, block_size=block_size, heads=heads, seed=seed)
    out = paged_prefill_torch(*stream.arguments, window=stream.window, sinks=stream.sinks)
    assert (out - stream.expected).abs().max() < 1e-9


@pytest.mark.usefixtures("interpreted", "unset_choice")
@examples(16)
@given(
    policy=POLICIES,
    starts=st.lists(st.integers(0, 120), min_size=1, max_size=3),
    block_size=st.sampled_from([1, 4, 16, 64]),
    heads=FEW_HEADS,
    head_dim=st.sampled_from([16, 64, 80]),
    launch=st.sampled_from([None, SHORT_CHUNKS]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_L57_L64_decode_kernel_equals_the_definition(
    policy: Retention,
    starts: list[int],
    block_size: int,
    heads: tuple[int, int],
    head_dim: int,
    launch: Any,
    dtype: Any,
) -> None:
    """Rows that are cut into chunks too: the sinks come with the first one, and are counted once."""
    from minipaged.kernels.attention.decode_triton import paged_decode_triton

    rows = [(n, 1) for n in starts]
    stream = stream_of(rows, policy, block_size=block_size, heads=heads, head_dim=head_dim, dtype=dtype)
    out = paged_decode_triton(*stream.decode(), window=stream.window, sinks=stream.sinks, launch=launch)
    assert_close(out, stream.expected)


@pytest.mark.usefixtures("interpreted", "unset_choice")
@pytest.mark.parametrize("overlapped", [False, True])
@examples(8)
@given(
    policy=POLICIES,
    rows=st.lists(st.tuples(st.integers(0, 60), st.integers(2, 50)), min_size=1, max_size=2),
    block_size=st.sampled_from([1, 4, 16]),
    heads=FEW_HEADS,
    pack=st.sampled_from([1, 4]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_L57_L64_prefill_kernel_equals_the_definition(
    overlapped: bool,
    policy: Retention,
    rows: list[tuple[int, int]],
    block_size: int,
    heads: tuple[int, int],
    pack: int,
    dtype: Any,
) -> None:
    from minipaged.kernels.attention.prefill_triton import paged_prefill_triton

    launch = PrefillLaunch(32, 16, 1, 1, pack=pack, overlapped=overlapped, section_bytes=0)
    stream = stream_of(rows, policy, block_size=block_size, heads=heads, head_dim=32, dtype=dtype)
    out = paged_prefill_triton(*stream.arguments, window=stream.window, sinks=stream.sinks, launch=launch)
    assert_close(out, stream.expected)


@pytest.mark.parametrize("run", [paged_decode, paged_prefill])
def test_sinks_that_do_not_fit_are_refused(run: Any) -> None:
    stream = stream_of([(30, 1)], Retention(8, 4), block_size=4, dtype=torch.float32)
    arguments = stream.decode() if run is paged_decode else stream.arguments
    for window, sinks, words in (
        (None, stream.sinks, "with a window"),
        (8, Sinks(0, stream.sinks.turn), "at least 1"),
        (8, Sinks(4, stream.sinks.turn[:, :8]), "turn has shape"),
    ):
        with pytest.raises(ValueError, match=words):
            run(*arguments, window=window, sinks=sinks)
