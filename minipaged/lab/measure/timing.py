"""Times work on a GPU: each contender captured as one CUDA graph, their replays measured in turn, round after round.

Contenders take turns within a round, so a machine that slows down slows all of
them; the ratio of two contenders is the median over the rounds of the ratio within each.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Work = Callable[[], object]
Notes = Callable[[str], None]
"""Told why a contender was left out."""

ROUNDS, REPLAYS, WARM_REPLAYS = 3, 15, 2


@dataclass(frozen=True)
class Timing:
    """Microseconds a call, one figure a round: the median of the round's replays."""

    rounds: tuple[float, ...]

    @property
    def microseconds(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.rounds)

    def speed_against(self, other: Timing) -> float:
        """How many times as fast as `other`: the median over the rounds."""
        return statistics.median(theirs / ours for ours, theirs in zip(self.rounds, other.rounds, strict=True))


Failed = Callable[[str, Exception], None]
"""Told which contender could not be captured, and what happened."""
Race = Callable[[Mapping[str, Work], int, Failed], dict[str, Timing]]
"""race(works, calls, failed): every work makes `calls` calls; returns the time of one call of each that could be captured."""


def capture(work: Work) -> torch.cuda.CUDAGraph:
    """`work` as a graph, after a warm call on another stream."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def replay_us(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    """The median duration of a replay, microseconds. All are queued at once: none waits for the host."""
    for _ in range(WARM_REPLAYS):
        graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]  # type: ignore[no-untyped-call]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    return float(statistics.median(a.elapsed_time(b) * 1e3 for a, b in itertools.pairwise(marks)))


def race(works: Mapping[str, Work], calls: int, failed: Failed) -> dict[str, Timing]:
    """Capture every work, then time them in turn. Each must make `calls` calls and leave its inputs usable."""
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    for name, work in works.items():
        try:
            graphs[name] = capture(work)
        except (RuntimeError, ValueError, TypeError) as error:
            failed(name, error)
    taken: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(ROUNDS):
        for name, graph in graphs.items():
            taken[name].append(replay_us(graph, REPLAYS) / calls)
    return {name: Timing(tuple(times)) for name, times in taken.items()}


def race_alone(timed: Race, work: Work, calls: int) -> Timing:
    """The time of a work that nobody races; what goes wrong is raised."""

    def failed(name: str, error: Exception) -> None:
        raise error

    return timed({"alone": work}, calls, failed)["alone"]
