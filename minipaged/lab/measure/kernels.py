"""`minipaged bench kernels`: every kernel on a GPU beside the ceilings of the machine and its peers, by graph replay.

Each shape gets random data, shuffled pages and as many copies as it takes for the cache (50-60 MB) to hold none of them; a graph goes over
all copies until milliseconds have passed. Before it is timed, a peer's output is compared with ours: what does not agree is not timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from minipaged.errors import InputError
from minipaged.lab.measure.peers import PEERS, Attend, Case, PeerMissingError, make_case, minipaged
from minipaged.lab.measure.pools import Pool, make_pool
from minipaged.lab.measure.rows import OURS, PAST_CACHE_BYTES, Ceilings, Row, make_row
from minipaged.lab.measure.small_kernels import small_rows
from minipaged.lab.measure.timing import Notes, Race, Timing, Work, race, race_alone

MOST_COPIES = 32
AGREEMENT = 2e-2  # of the norms, bfloat16
DECODE_SHAPES: tuple[tuple[str, tuple[int, ...], int, int, int], ...] = (
    # name, contexts, heads, kv heads, head dim
    ("64 x 4096, 32/8", (4096,) * 64, 32, 8, 128),
    ("64 x 1024, 32/32", (1024,) * 64, 32, 32, 128),
    ("1 x 16384, 32/8", (16384,), 32, 8, 128),
    ("256 x 1024, 32/8", (1024,) * 256, 32, 8, 128),
    ("16 x 8192, 16/8", (8192,) * 16, 16, 8, 128),
    ("8 x 1024, 32/32", (1024,) * 8, 32, 32, 128),
    ("1 x 2048, 32/8", (2048,), 32, 8, 128),
    ("64 x uniform 100-2048, 32/8", (), 32, 8, 128),  # contexts are drawn, see ragged()
    ("one 32768 among 63 x 256, 32/8", (32768, *(256,) * 63), 32, 8, 128),
)
PREFILL_SHAPES = (
    # sequences, new tokens each, tokens already in the cache, heads, kv heads, head dim
    (4, 4096, 0, 32, 32, 128),
    (16, 1024, 0, 32, 8, 128),
    (1, 16384, 0, 32, 8, 128),
    (4, 512, 0, 32, 8, 128),
    (4, 512, 1024, 32, 8, 128),
    (4, 512, 4096, 32, 8, 128),
    (4, 512, 16384, 32, 8, 128),
)


def ceiling_rows(timed: Race = race) -> Iterator[Row]:
    """The two ceilings."""
    yield make_row("copy", "2 GiB", "torch", *_copy(timed), "GB/s")
    yield make_row("matrix product", "8192^3", "torch", *_product(timed), "TFLOP/s")


def _copy(timed: Race) -> tuple[Timing, float]:
    """Two gibibytes through an elementwise kernel, for a graph's own copies take a slower engine: read and written together."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    taken = race_alone(timed, lambda: torch.neg(source, out=target), 1)
    return taken, 2 * source.numel() * 4 / 1e3


def _product(timed: Race) -> tuple[Timing, float]:
    """The product of two square bfloat16 matrices."""
    one, other = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(one)
    taken = race_alone(timed, lambda: torch.mm(one, other, out=product), 1)
    return taken, 2 * 8192**3 / 1e6


def ragged(count: int = 64) -> tuple[int, ...]:
    """Context lengths uniform from 100 to 2048, from a fixed seed."""
    drawn = torch.randint(100, 2049, (count,), generator=torch.Generator().manual_seed(0))
    return tuple(int(n) for n in drawn)


def decode_rows(
    peers: tuple[str, ...],
    ceilings: Ceilings,
    note: Notes,
    *,
    shapes: tuple[tuple[str, tuple[int, ...], int, int, int], ...] = DECODE_SHAPES,
    timed: Race = race,
    device: str = "cuda",
) -> Iterator[Row]:
    """Paged decode on every shape; bytes are those of the keys and values."""
    for name, contexts, heads, kv_heads, head_dim in shapes:
        lengths = contexts or ragged()
        pools = _copies(lengths, kv_heads, head_dim, device)
        cases = [make_case(pool, heads, 1) for pool in pools]
        yield from _contest("decode", name, cases, peers, ceilings, note, timed, pools[0].kv_bytes / 1e3, "GB/s")


def prefill_rows(
    peers: tuple[str, ...],
    ceilings: Ceilings,
    note: Notes,
    *,
    shapes: tuple[tuple[int, int, int, int, int, int], ...] = PREFILL_SHAPES,
    timed: Race = race,
    device: str = "cuda",
) -> Iterator[Row]:
    """Paged prefill on every shape, with and without a prefix in the cache; multiplications of masked pairs do not count."""
    for batch, new, prefix, heads, kv_heads, head_dim in shapes:
        name = f"{batch} x {new}, {heads}/{kv_heads}" + (f", after {prefix}" if prefix else "")
        pools = _copies((new + prefix,) * batch, kv_heads, head_dim, device)
        cases = [make_case(pool, heads, new) for pool in pools]
        operations = 4 * batch * heads * head_dim * (new * prefix + new * (new + 1) / 2)
        yield from _contest("prefill", name, cases, peers, ceilings, note, timed, operations / 1e6, "TFLOP/s")


def _copies(contexts: tuple[int, ...], kv_heads: int, head_dim: int, device: str) -> list[Pool]:
    """Pools of the same shape, together larger than the cache."""
    first = make_pool(contexts, kv_heads, head_dim, device)
    count = min(MOST_COPIES, -(-PAST_CACHE_BYTES // first.kv_bytes)) if device == "cuda" else 2
    return [first, *(make_pool(contexts, kv_heads, head_dim, device) for _ in range(count - 1))]


def _contest(
    kernel: str,
    shape: str,
    cases: list[Case],
    peers: tuple[str, ...],
    ceilings: Ceilings,
    note: Notes,
    timed: Race,
    work: float,
    unit: str,
) -> Iterator[Row]:
    """One shape: ours and every peer that takes it and agrees with ours. work: of one call, as in make_row."""
    ours = [minipaged(case) for case in cases]
    expected = ours[0]().clone()
    contenders: dict[str, list[Attend]] = {OURS: ours}
    for name, prepare in (entry for peer in peers for entry in PEERS[peer]):
        try:
            calls = [prepare(case) for case in cases]
            check_agreement(calls[0](), expected)
        except PeerMissingError as error:
            note(f"{name}, {kernel} {shape}: {error}")
        except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError) as error:
            note(_why(name, kernel, shape, error))
        else:
            contenders[name] = calls
    passes = ceilings.passes(work, unit, len(cases))
    works = {name: _all_calls(calls, passes) for name, calls in contenders.items()}

    def failed(name: str, error: Exception) -> None:
        if name == OURS:
            raise error
        note(_why(name, kernel, shape, error))

    times = timed(works, len(cases) * passes, failed)
    for name, taken in times.items():
        ratio = times[OURS].speed_against(taken) if name != OURS else None
        yield make_row(kernel, shape, name, taken, work, unit, ceilings=ceilings, ratio=ratio)
    if cases[0].query.is_cuda:
        torch.cuda.empty_cache()


def _why(name: str, kernel: str, shape: str, error: Exception) -> str:
    return f"{name}, {kernel} {shape}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _all_calls(calls: list[Callable[[], Tensor]], passes: int) -> Work:
    def work() -> None:
        for _ in range(passes):
            for call in calls:
                call()

    return work


def check_agreement(found: Tensor, expected: Tensor) -> None:
    """ValueError if a peer computes something else. Compared as [tokens, heads * head_dim]."""
    one, other = found.reshape(expected.shape).float(), expected.float()
    error = float((one - other).norm() / other.norm())
    if not error < AGREEMENT:
        raise ValueError(f"its output is not ours: relative error {error:.1e}")


def measure(peers: tuple[str, ...], note: Notes) -> Iterator[Row]:
    """The ceilings, then every shape of every kernel. InputError without a GPU."""
    if not torch.cuda.is_available():
        raise InputError("bench kernels needs a CUDA GPU; on a CPU the tests compare the kernels with their twins")
    torch.manual_seed(0)
    copy, product = list(ceiling_rows())
    yield copy
    yield product
    torch.cuda.empty_cache()
    ceilings = Ceilings(copy.value, product.value)
    with torch.inference_mode():
        yield from decode_rows(peers, ceilings, note)
        yield from prefill_rows(peers, ceilings, note)
        yield from small_rows(ceilings)
