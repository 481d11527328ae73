"""`minipaged bench host`: what a decode step costs beside the GPU's work, at a full batch.

The host gap is the wall time of a step less the time that its graph takes when the next replay always waits on the GPU already: launch gaps
inside a graph are the device's; whatever the host, and copies to and from it, add is the gap.
Every measurement is a phase of its own over the same contexts: requests are submitted, brought to plain decoding, measured and aborted.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, NamedTuple

import torch

from minipaged.api import LLM
from minipaged.config import SamplingParams
from minipaged.engine import Engine
from minipaged.errors import InputError
from minipaged.lab.simulation.workloads import engine_requests
from minipaged.scheduling.plan import Pending, StepPlan, StepTokens
from minipaged.trace.events import StepDelta
from minipaged.trace.file import StreamWriter, header_of

REPLAYS = 20
STEPS, PHASES = 60, 3  # decode steps of a phase, and phases of a measurement: medians over the phases
WARM_TOKENS = 8  # of every answer, before a phase is measured
PAIRS, PAIR_STEPS = 16, 30  # of the trace's cost: steps with and without a listener, in turn


class HostRow(NamedTuple):
    """One figure. goal: what it should stay below, in the same unit; None where the row explains another."""

    what: str
    value: float
    unit: str
    goal: float | None = None


def phase(engine: Engine, batch: int, steps: int, measured: Callable[[], None]) -> None:
    """Bring `batch` requests to plain decoding, call `measured`, which may take `steps` steps, and abort them."""
    room = len(engine_requests(f"b{batch}")[0][0]) + WARM_TOKENS + steps + 2 * PAIR_STEPS
    if batch > engine.scheduler.config.max_num_seqs:
        raise InputError(f"batch must be at most max_num_seqs ({engine.scheduler.config.max_num_seqs}), not {batch}")
    blocks, size = engine.runner.num_blocks() - 1, engine.scheduler.block_size
    if batch * -(-room // size) > blocks:
        raise InputError(
            f"batch {batch} needs {batch * -(-room // size)} blocks of {size} tokens; the pool has {blocks}"
        )
    params = SamplingParams(max_tokens=room, ignore_eos=True)
    vocabulary = engine.codec.vocab_size if engine.codec is not None else 1 << 31
    outputs = [
        engine.ask([token % vocabulary for token in prompt], params) for prompt, _ in engine_requests(f"b{batch}")
    ]
    refused = next((output.error for output in outputs if output.error), None)
    if refused is not None:
        raise InputError(refused)
    while min(len(output.outputs[0].token_ids) if output.outputs else 0 for output in outputs) < WARM_TOKENS:
        engine.step()
    _synchronize()
    measured()
    for output in outputs:
        engine.abort(output.request_id)
    while engine.has_work:
        engine.step()


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def step_us(engine: Engine, steps: int) -> float:
    """Microseconds of wall time a step, over `steps` steps, until the GPU is done."""
    _synchronize()
    started = time.perf_counter()
    for _ in range(steps):
        engine.step()
    _synchronize()
    return (time.perf_counter() - started) / steps * 1e6


# ---- the GPU's side


@contextmanager
def replayed_graphs() -> Iterator[list[Any]]:
    """Every graph that is replayed meanwhile, in order."""
    graphs: list[Any] = []
    kind: Any = torch.cuda.CUDAGraph
    replay = kind.replay

    def noted(graph: torch.cuda.CUDAGraph) -> None:
        graphs.append(graph)
        replay(graph)

    kind.replay = noted
    try:
        yield graphs
    finally:
        kind.replay = replay


def busy_us(graph: Any) -> float:
    """Microseconds that the GPU takes for a step's graph when the next replay is always there already."""
    for _ in range(3):
        graph.replay()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(REPLAYS):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) * 1e3 / REPLAYS


def last_graph(graphs: list[Any]) -> Any:
    """The newest of them. InputError if no graphs were replayed."""
    if not graphs:
        raise InputError("no graphs were replayed: the host gap is that of graph steps, so graphs must be on")
    return graphs[-1]


def kernel_us(engine: Engine, steps: int) -> float:
    """Microseconds a step that all kernels and copies took, one by one, from the profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            engine.step()
        torch.cuda.synchronize()
    return float(sum(event.self_device_time_total for event in profile.key_averages())) / steps


def gpu_rows(engine: Engine, batch: int) -> Iterator[HostRow]:
    """Wall time of a step, the GPU's part of it, what is left for the host, and the sum of the kernels."""
    found: list[tuple[float, float]] = []

    def measured() -> None:
        with replayed_graphs() as graphs:
            step_us(engine, 2)
        before = busy_us(last_graph(graphs))
        with replayed_graphs() as graphs:
            wall = step_us(engine, STEPS)
        found.append((wall, (before + busy_us(last_graph(graphs))) / 2))  # contexts grow meanwhile

    for _ in range(PHASES):
        phase(engine, batch, STEPS, measured)
    wall, busy = (statistics.median(values) for values in zip(*found, strict=True))
    gap = max(0.0, wall - busy)
    sums: list[float] = []
    phase(engine, batch, STEPS, lambda: sums.append(kernel_us(engine, STEPS)))
    yield HostRow("step, wall time", wall, "us")
    yield HostRow("GPU busy: the step's graph, replayed without a pause", busy, "us")
    yield HostRow("host gap, wall time less busy time", gap, "us", 100.0)
    yield HostRow("host gap, part of a step", 100 * gap / wall, "%", 2.0)
    yield HostRow("kernels, summed", sums[0], "us")


# ---- the host's side


class _TimedPending:
    """A launched step; the wait for its tokens is timed."""

    def __init__(self, pending: Pending, taken: list[float]) -> None:
        self._pending = pending
        self._taken = taken

    def tokens(self) -> StepTokens:
        started = time.perf_counter()
        tokens = self._pending.tokens()
        self._taken.append(time.perf_counter() - started)
        return tokens


def part_rows(engine: Engine, batch: int) -> Iterator[HostRow]:
    """Host time of each part of a step, microseconds, medians."""
    taken: dict[str, list[float]] = {
        "schedule": [], "launch": [], "wait for tokens": [], "commit": [], "trace, nobody listening": [],
    }  # fmt: skip

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*arguments: Any) -> Any:
            started = time.perf_counter()
            result = call(*arguments)
            taken[name].append(time.perf_counter() - started)
            return result

        return measured

    launch = timed("launch", engine.runner.launch)

    def timed_launch(plan: StepPlan) -> Pending:
        return _TimedPending(launch(plan), taken["wait for tokens"])

    wrapped: list[tuple[Any, str, Callable[..., Any]]] = [
        (engine.scheduler, "schedule", timed("schedule", engine.scheduler.schedule)),
        (engine.scheduler, "commit", timed("commit", engine.scheduler.commit)),
        (engine.runner, "launch", timed_launch),
        (engine.trace, "emit", timed("trace, nobody listening", engine.trace.emit)),
    ]
    for owner, name, call in wrapped:
        setattr(owner, name, call)

    def measured() -> None:
        for values in taken.values():
            values.clear()
        step_us(engine, STEPS)
        for name, values in taken.items():
            taken[name] = list(values[:STEPS])

    try:
        phase(engine, batch, STEPS, measured)
    finally:
        for owner, name, _ in wrapped:
            delattr(owner, name)
    for name, values in taken.items():
        if values:
            yield HostRow(f"host: {name}", statistics.median(values) * 1e6, "us")


class _Counter:
    """A binary stream that forgets what it is told."""

    def __init__(self) -> None:
        self.written = 0

    def write(self, data: bytes) -> int:
        self.written += len(data)
        return len(data)

    def flush(self) -> None:
        """Nothing waits."""


def listener_rows(engine: Engine, batch: int) -> Iterator[HostRow]:
    """What a listener of the trace costs: steps with and without it, in turn, the order changing from pair to pair."""
    yield HostRow("trace: a listener", _listener_percent(engine, batch, lambda: lambda delta: None), "%", 2.0)

    def recorder() -> Callable[[StepDelta], None]:
        stream: Any = _Counter()
        out: BinaryIO = stream
        return StreamWriter(out, header_of(engine), state=engine.trace.state).delta

    yield HostRow("trace: a listener that records", _listener_percent(engine, batch, recorder), "%")


def _listener_percent(engine: Engine, batch: int, make: Callable[[], Callable[[StepDelta], None]]) -> float:
    """Percent of tokens per second that the listener takes: the median over the pairs that begin with it, and over those that end with
    it, and the mean of the two, for whoever comes first may be slower.
    """
    lost: list[float] = []

    def with_listener() -> float:
        leave = engine.trace.subscribe(make())
        engine.step()  # its first delta tells all there is
        taken = step_us(engine, PAIR_STEPS)
        leave()
        return taken

    def pair(first: bool) -> None:
        engine.step()
        heard = with_listener() if first else 0.0
        alone = step_us(engine, PAIR_STEPS)
        heard = heard or with_listener()
        lost.append(100 * (1 - alone / heard))

    for i in range(PAIRS):
        phase(engine, batch, 2 * PAIR_STEPS, lambda i=i: pair(i % 2 == 0))  # type: ignore[misc]
    return (statistics.median(lost[::2]) + statistics.median(lost[1::2])) / 2


def measure(llm: LLM, batch: int) -> Iterator[HostRow]:
    """All figures; those of the GPU only where there is one."""
    if torch.cuda.is_available():
        yield from gpu_rows(llm.engine, batch)
    yield from part_rows(llm.engine, batch)
    yield from listener_rows(llm.engine, batch)
