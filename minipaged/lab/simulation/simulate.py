"""Runs a named system over a workload on a server and sums up what came out.

It chooses the memory and the behaviour that go with the name; the event loop does the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from minipaged.baselines.systems import PAGED, SYSTEMS, reservations, todays_name
from minipaged.errors import InputError
from minipaged.lab.simulation.engine_run import run_engine
from minipaged.lab.simulation.event_loop import EventLoop, Outcome, SystemBehaviour
from minipaged.lab.simulation.servers import Server
from minipaged.lab.simulation.simulated_memory import BeamMemory, PagedMemory, ReservingMemory, SimulatedMemory
from minipaged.lab.simulation.workloads import Workload

ENGINE = "engine"
_BEHAVIOURS: dict[str, dict[str, bool]] = {
    "webui": {"copies_each_step": True},
    "static": {"padded": True, "ended_rows_run": True},
    "fastertransformer": {"ended_rows_run": True},
    "tgi-early": {"copies_on_merge": True},
}


@dataclass(frozen=True, slots=True, eq=False)
class Result:
    """One system on one workload. Seconds, tokens, shares of the pool."""

    system: str
    workload: Workload
    server: Server
    outcome: Outcome

    @property
    def mean_batch(self) -> float:
        """Requests that ran, on average while somebody waited (else over the whole run after the warm-up)."""
        return self.outcome.averages.steady.mean_requests

    @property
    def shares(self) -> dict[str, float]:
        """The shares of the pool breakdown over the same span."""
        return self.outcome.averages.steady.shares()

    @property
    def finished(self) -> int:
        """Requests that were answered."""
        return len(self.workload) - self.outcome.refused

    @property
    def requests_per_second(self) -> float:
        """Answers over the whole run."""
        return self.finished / self.outcome.makespan if self.outcome.makespan else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens of answers over the whole run, all samples counted."""
        done = ~np.isnan(self.outcome.finish)
        tokens = int(self.workload.outputs[done].sum()) * (1 if self.workload.beams else self.workload.samples)
        return tokens / self.outcome.makespan if self.outcome.makespan else 0.0

    @property
    def normalized_latency(self) -> float:
        """Mean of (end-to-end latency / output length), seconds a token (paper, section 6.1); nan if nothing was
        answered.
        """
        latency = (self.outcome.finish - self.workload.arrivals) / self.workload.outputs
        return float(np.nanmean(latency)) if self.finished else float("nan")

    def first_token(self, percent: float) -> float:
        """A percentile of the time to the first token, seconds; nan if nothing was answered."""
        waits = self.outcome.first_token - self.workload.arrivals
        return float(np.nanpercentile(waits, percent)) if self.finished else float("nan")

    def per_token(self, percent: float) -> float:
        """A percentile of the time between tokens after the first, one value a request, seconds; nan if no answer
        had two.
        """
        more = self.workload.outputs > 1
        spans = (self.outcome.finish - self.outcome.first_token)[more] / (self.workload.outputs[more] - 1)
        spans = spans[~np.isnan(spans)]
        return float(np.percentile(spans, percent)) if len(spans) else float("nan")


def make_memory(system: str, server: Server, load: Workload, *, block_size: int = 16) -> SimulatedMemory:
    """The memory of a system. Raises InputError that lists the known ones."""
    if system == PAGED:
        kind = BeamMemory if load.beams and load.samples > 1 else PagedMemory
        return kind(server.pool, load, block_size=block_size)
    if system not in SYSTEMS:
        raise InputError(f"unknown system {system!r}; known: {', '.join(SYSTEMS)}")
    return ReservingMemory(reservations(system, server.pool, max_len=server.max_len, block_size=block_size), load)


def simulate(
    system: str,
    load: Workload,
    server: Server,
    *,
    block_size: int = 16,
    max_rows: int = 256,
    jump: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Result:
    """Run it. `jump` False takes every step by itself, with the same outcome. The system `engine` is this project's own
    scheduler and block manager, run in full; `paged` is the event loop's short account of the same.
    """
    system = todays_name(system)
    if system == ENGINE:
        outcome = run_engine(load, server, block_size=block_size, max_rows=max_rows, progress=progress)
        return Result(system, load, server, outcome)
    memory = make_memory(system, server, load, block_size=block_size)
    behaviour = SystemBehaviour(
        max_rows=max(max_rows, load.samples), max_len=server.max_len, **_BEHAVIOURS.get(system, {})
    )
    loop = EventLoop(load, memory, server.clock, behaviour, jump=jump, progress=progress)
    return Result(system, load, server, loop.run())


def parse_systems(text: str) -> tuple[str, ...]:
    """`all`, or names with commas between them. Raises InputError naming the first unknown one."""
    if text == "all":
        return SYSTEMS
    names = tuple(todays_name(name.strip()) for name in text.split(",") if name.strip())
    for name in names:
        if name not in (*SYSTEMS, ENGINE):
            raise InputError(f"unknown system {name!r}; known: {', '.join(SYSTEMS)}, {ENGINE}, or all")
    if not names:
        raise InputError(f"no system given; known: {', '.join(SYSTEMS)}, or all")
    return names
