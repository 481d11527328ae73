"""What a sum over ranks costs inside a CUDA graph, by each of the ways: `python -m minipaged.lab.measure.all_reduce [RANKS]`.

Every rank runs this module; rank 0 starts the others and prints a line for each size.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from minipaged.execution.collectives import CudaCollectives
from minipaged.execution.ranks import start_ranks

KIB = 1024
SIZES = (4 * KIB, 16 * KIB, 32 * KIB, 64 * KIB, 128 * KIB, 256 * KIB, 512 * KIB, 1024 * KIB, 4096 * KIB)  # bytes
CALLS, REPLAYS = 20, 30  # sums in a graph, and how often it is replayed


class Row(NamedTuple):
    """Microseconds a sum of so many bytes takes, by each way."""

    bytes: int
    one_shot: float
    two_shot: float
    nccl: float


def measure(collectives: CudaCollectives) -> Iterator[Row]:
    """A row for each size. Sums of ones are checked on the way; RuntimeError if one is wrong."""
    ways = (collectives.one_shot, collectives.two_shot, collectives.nccl)
    for size in SIZES:
        yield Row(size, *(_microseconds(way, size, collectives) for way in ways))


def _microseconds(way: Callable[[Tensor], Tensor], size: int, collectives: CudaCollectives) -> float:
    x = torch.ones(size // 2, dtype=torch.bfloat16, device=collectives.device)
    found = way(x.clone())
    if not bool((found == collectives.ranks).all()):
        raise RuntimeError(f"{way.__name__} of {size} bytes: the sum is wrong")
    x.zero_()  # a sum in place would grow beyond all bounds
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(CALLS):
            way(x)
    times = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / CALLS)
    return float(statistics.median(times))


def main() -> None:
    """Measure on all ranks, print on rank 0."""
    number = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    command = (sys.executable, "-m", "minipaged.lab.measure.all_reduce", str(number))
    ranks = start_ranks(number, torch.device("cuda"), {}, command=command)
    with torch.inference_mode():
        if not isinstance(ranks.collectives, CudaCollectives):
            raise RuntimeError("this measures GPUs")
        if ranks.rank == 0:
            print(f"{number} x {torch.cuda.get_device_name()}, us a sum in a graph")
            print(f"{'KB':>6} {'one shot':>9} {'two shot':>9} {'NCCL':>9}")
        for row in measure(ranks.collectives):
            if ranks.rank == 0:
                print(f"{row.bytes // KIB:>6} {row.one_shot:>9.1f} {row.two_shot:>9.1f} {row.nccl:>9.1f}", flush=True)
    if ranks.rank == 0:
        ranks.close()
    else:
        ranks.wait_for_end()


if __name__ == "__main__":
    main()
