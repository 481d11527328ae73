"""`minipaged bench kernels`: paged attention on a GPU beside the copy ceiling and its peers, by graph replay.

Each shape gets random data, shuffled pages and enough copies of its KV that the cache (50-60 MB) cannot hold them;
the graph runs over all copies, and a time is the median of its replays divided by the copies. Peers that are not
installed are skipped with a note.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

import kernels
from minipaged.errors import InputError

BLOCK = 16
PAST_CACHE_BYTES = 256 * 2**20
DECODE_SHAPES = (
    # sequences, context, heads, kv heads, head dim
    (64, 4096, 32, 8, 128),
    (64, 1024, 32, 32, 128),
    (1, 16384, 32, 8, 128),
    (256, 1024, 32, 8, 128),
    (16, 8192, 16, 8, 128),
    (8, 1024, 32, 32, 128),
    (1, 2048, 32, 8, 128),
)
PREFILL_SHAPES = (
    # sequences, new tokens each, tokens already in the cache, heads, kv heads, head dim
    (4, 4096, 0, 32, 32, 128),
    (16, 1024, 0, 32, 8, 128),
    (1, 16384, 0, 32, 8, 128),
    (4, 512, 4096, 32, 8, 128),
    (4, 512, 16384, 32, 8, 128),
)


@dataclass(frozen=True)
class Row:
    """One measurement. value: GB/s of KV read (decode), TFLOP/s (prefill) or GB/s read and written (copy)."""

    kernel: str
    shape: str
    contender: str
    microseconds: float
    value: float
    unit: str


def graph_us(work: Callable[[], Any], calls: int, replays: int = 20) -> float:
    """Microseconds a call of `work`, which makes `calls` calls: captured once, the median of the replays."""
    work()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times = []
    for i in range(replays + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if i >= 3:
            times.append(begin.elapsed_time(end) * 1e3)
    return float(statistics.median(times)) / calls


def copy_ceiling() -> Row:
    """Two gibibytes through an elementwise kernel, read and written bytes together: a graph's own copies take a slower engine."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    us = graph_us(lambda: torch.neg(source, out=target), 1)
    return Row("copy", "2 GiB", "torch", us, 2 * source.numel() * 4 / us / 1e3, "GB/s")


@dataclass
class Pool:
    """One KV pool with shuffled pages, and the same keys and values as dense tensors' shape would need."""

    keys: torch.Tensor
    values: torch.Tensor
    tables: torch.Tensor
    lengths: torch.Tensor


def make_pool(batch: int, lengths: list[int], kv_heads: int, head_dim: int) -> Pool:
    """A pool for these contexts, bfloat16."""
    widths = [-(-n // BLOCK) for n in lengths]
    total, width = sum(widths), max(widths)
    keys = torch.randn(total, BLOCK, kv_heads, head_dim, device="cuda", dtype=torch.bfloat16)
    pages = torch.randperm(total, device="cuda").to(torch.int32)
    tables = torch.zeros(batch, width, dtype=torch.int32, device="cuda")
    at = 0
    for row, n in enumerate(widths):
        tables[row, :n] = pages[at : at + n]
        at += n
    return Pool(keys, torch.randn_like(keys), tables, torch.tensor(lengths, dtype=torch.int32, device="cuda"))


def decode_rows(contenders: tuple[str, ...]) -> Iterator[Row]:
    """Paged decode on every shape, also ragged."""
    ragged = torch.randint(100, 2049, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    cases = [(f"{b}x{s} {h}/{kh}", [s] * b, h, kh, d) for b, s, h, kh, d in DECODE_SHAPES]
    cases.append(("64 x uniform 100-2048 32/8", ragged, 32, 8, 128))
    cases.append(("one 32768 among 63 x 256 32/8", [32768] + [256] * 63, 32, 8, 128))
    for name, lengths, heads, kv_heads, head_dim in cases:
        batch, kv_bytes = len(lengths), 4 * sum(lengths) * kv_heads * head_dim
        copies = max(1, -(-PAST_CACHE_BYTES // kv_bytes))
        pools = [make_pool(batch, lengths, kv_heads, head_dim) for _ in range(copies)]
        query = torch.randn(batch, heads, head_dim, device="cuda", dtype=torch.bfloat16)
        out = torch.empty_like(query)
        scale = head_dim**-0.5

        def ours(pools: list[Pool] = pools, query: Any = query, scale: float = scale, out: Any = out) -> None:
            for p in pools:
                kernels.paged_decode(query, p.keys, p.values, p.tables, p.lengths, scale, out=out)

        runs: dict[str, Callable[[], None]] = {"minipaged": ours}
        if "fa3" in contenders and (fa3 := _fa3()) is not None:
            starts = torch.arange(batch + 1, device="cuda", dtype=torch.int32)
            longest = max(lengths)

            def theirs(
                pools: list[Pool] = pools,
                query: Any = query,
                out: Any = out,
                starts: Any = starts,
                longest: int = longest,
                fa3: Any = fa3,
            ) -> None:
                for p in pools:
                    fa3(query, p, starts, 1, longest, out)

            runs["fa3"] = theirs
        if "sdpa" in contenders and len(set(lengths)) == 1:
            runs["sdpa"] = _sdpa_decode(pools, query, lengths[0], kv_heads, head_dim)
        for contender, work in runs.items():
            us = graph_us(work, copies)
            yield Row("decode", name, contender, us, kv_bytes / us / 1e3, "GB/s")
        del pools, runs, ours
        torch.cuda.empty_cache()


def prefill_rows(contenders: tuple[str, ...]) -> Iterator[Row]:
    """Paged prefill on every shape, with and without a prefix in the cache."""
    for batch, new, prefix, heads, kv_heads, head_dim in PREFILL_SHAPES:
        name = f"{batch}x{new} {heads}/{kv_heads}" + (f" after {prefix}" if prefix else "")
        pool = make_pool(batch, [new + prefix] * batch, kv_heads, head_dim)
        query = torch.randn(batch * new, heads, head_dim, device="cuda", dtype=torch.bfloat16)
        starts = torch.arange(batch + 1, device="cuda", dtype=torch.int32) * new
        out, scale = torch.empty_like(query), head_dim**-0.5
        flops = 4 * batch * heads * head_dim * (new * prefix + new * (new + 1) / 2)

        def ours(
            pool: Pool = pool,
            query: Any = query,
            starts: Any = starts,
            new: int = new,
            scale: float = scale,
            out: Any = out,
        ) -> None:
            kernels.paged_prefill(query, pool.keys, pool.values, pool.tables, pool.lengths, starts, new, scale, out=out)

        runs: dict[str, Callable[[], None]] = {"minipaged": ours}
        if "fa3" in contenders and (fa3 := _fa3()) is not None:

            def theirs(
                pool: Pool = pool,
                query: Any = query,
                starts: Any = starts,
                new: int = new,
                prefix: int = prefix,
                out: Any = out,
                fa3: Any = fa3,
            ) -> None:
                fa3(query, pool, starts, new, new + prefix, out)

            runs["fa3"] = theirs
        if "sdpa" in contenders and not prefix:
            runs["sdpa"] = _sdpa_prefill(batch, new, heads, kv_heads, head_dim)
        for contender, work in runs.items():
            us = graph_us(work, 1, replays=8)
            yield Row("prefill", name, contender, us, flops / us / 1e6, "TFLOP/s")
        del pool, runs, ours
        torch.cuda.empty_cache()


def _sdpa_decode(
    pools: list[Pool], query: torch.Tensor, length: int, kv_heads: int, head_dim: int
) -> Callable[[], None]:
    """torch's attention over contiguous keys and values of the same size: what paging is compared with."""
    batch, heads = query.shape[0], query.shape[1]
    dense = [
        (
            p.keys.view(batch, length, kv_heads, head_dim).transpose(1, 2),
            p.values.view(batch, length, kv_heads, head_dim).transpose(1, 2),
        )
        for p in pools
    ]
    one = query.view(batch, heads, 1, head_dim)

    def work() -> None:
        for keys, values in dense:
            torch.nn.functional.scaled_dot_product_attention(one, keys, values, enable_gqa=heads != kv_heads)

    return work


def _sdpa_prefill(batch: int, new: int, heads: int, kv_heads: int, head_dim: int) -> Callable[[], None]:
    """torch's causal flash attention over dense tensors."""
    query = torch.randn(batch, heads, new, head_dim, device="cuda", dtype=torch.bfloat16)
    keys = torch.randn(batch, kv_heads, new, head_dim, device="cuda", dtype=torch.bfloat16)
    values = torch.randn_like(keys)

    def work() -> None:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            torch.nn.functional.scaled_dot_product_attention(
                query, keys, values, is_causal=True, enable_gqa=heads != kv_heads
            )

    return work


def _fa3() -> Callable[..., None] | None:
    """FlashAttention 3 as vLLM ships it, or None where that is not installed."""
    try:
        from vllm.vllm_flash_attn import flash_attn_varlen_func
    except ImportError:
        return None

    def call(
        query: torch.Tensor, pool: Pool, starts: torch.Tensor, longest_q: int, longest_k: int, out: torch.Tensor
    ) -> None:
        flash_attn_varlen_func(
            query,
            pool.keys,
            pool.values,
            max_seqlen_q=longest_q,
            cu_seqlens_q=starts,
            max_seqlen_k=longest_k,
            seqused_k=pool.lengths,
            block_table=pool.tables,
            causal=True,
            out=out,
            fa_version=3,
        )

    return call


def measure(contenders: tuple[str, ...]) -> Iterator[Row]:
    """The ceiling, then every shape. InputError without a GPU."""
    if not torch.cuda.is_available():
        raise InputError("bench kernels needs a CUDA GPU; on a CPU the tests compare the kernels with their twins")
    torch.manual_seed(0)
    yield copy_ceiling()
    yield from decode_rows(contenders)
    yield from prefill_rows(contenders)
