"""Ranks as threads of one process: the parts of a model and their runners as they are, the sums through a list instead of gloo."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from minipaged.model.split import Part
from minipaged.scheduling.plan import Pending, StepPlan

T = TypeVar("T")


class ThreadCollectives:
    """What `ranks` threads compute together (split.Collectives)."""

    def __init__(self, rank: int, ranks: int, meeting: tuple[threading.Barrier, list[Any]]) -> None:
        self.rank, self.ranks = rank, ranks
        self._barrier, self._brought = meeting

    def all_gather(self, x: Tensor) -> Tensor:
        self._brought[self.rank] = x
        self._barrier.wait(20)
        gathered = torch.stack(self._brought)
        self._barrier.wait(20)
        return gathered

    def all_reduce(self, x: Tensor) -> Tensor:
        gathered = self.all_gather(x)
        total = gathered[0]
        for other in gathered[1:]:
            total.add_(other)
        return total

    exchange = all_gather


class OneBuffer(ThreadCollectives):
    """Every sum of a rank lies in the same memory, as sums by peers' memory do (collectives.CudaCollectives.two_shot)."""

    def all_reduce(self, x: Tensor) -> Tensor:
        if not hasattr(self, "buffer"):
            self.buffer = torch.full((2**20,), float("nan"))
        shared = self.buffer[: x.numel()].view(x.shape)
        if shared.data_ptr() != x.data_ptr():
            self.buffer.fill_(float("nan"))
            shared.copy_(x)
        total = super().all_reduce(shared.clone())
        return shared.copy_(total)


def on_ranks(
    ranks: int,
    work: Callable[[Part, ThreadCollectives], T],
    collectives: type[ThreadCollectives] = ThreadCollectives,
) -> list[T]:
    """What `work` returns on each rank. If it raises on one, that is raised here."""
    meeting = (threading.Barrier(ranks), [None] * ranks)

    def one(rank: int) -> T:
        try:
            return work(Part(rank, ranks), collectives(rank, ranks, meeting))
        except BaseException:
            meeting[0].abort()
            raise

    with ThreadPoolExecutor(ranks) as pool:
        futures = [pool.submit(one, rank) for rank in range(ranks)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    return [future.result() for future in futures]


class ThreadRunner:
    """As RankRunner, with threads for ranks: every runner launches every plan, and rank 0's tokens count (scheduling.plan.Runner)."""

    def __init__(self, runners: list[Any]) -> None:
        self.runners = runners
        self._pool = ThreadPoolExecutor(len(runners))

    def num_blocks(self) -> int:
        return min(runner.num_blocks() for runner in self.runners)

    def launch(self, plan: StepPlan) -> Pending:
        pending = list(self._pool.map(lambda runner: runner.launch(plan), self.runners))
        return pending[0]
