"""Systems side by side on the same traffic: one run each, and further runs at other rates. report/simulation_report.py lays them out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minipaged.config import Progress, check_real
from minipaged.errors import InputError
from minipaged.lab.simulation.servers import Server
from minipaged.lab.simulation.simulate import Result, simulate
from minipaged.lab.simulation.trace_files import load_workload


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """`results`: one run a system at the given rate. `sweep`: further runs of the same systems at other rates."""

    source: str
    rate: float
    results: tuple[Result, ...]
    sweep: tuple[tuple[float, tuple[Result, ...]], ...]


def compare(
    systems: Sequence[str],
    source: str,
    server: Server,
    *,
    rate: float,
    count: int,
    seed: int = 0,
    block_size: int = 16,
    rates: Sequence[float] = (),
    progress: Progress,
) -> Comparison:
    """Run all. A trace file brings its own arrivals, so it has no sweep: InputError if both are asked for."""
    if rates and source.endswith((".csv", ".jsonl")):
        raise InputError("a trace file has its own arrivals: leave the rates of a sweep out")
    for other in rates:
        check_real("rates", other, 0.0, open_low=True)

    def run(at: float, part: int) -> tuple[Result, ...]:
        load = load_workload(source, rate=at, count=count, seed=seed)
        found = []
        for i, system in enumerate(systems):
            before = (part * len(systems) + i) * len(load)
            whole = (1 + len(rates)) * len(systems) * len(load)

            def tell(done: int, _: int, system: str = system, before: int = before, whole: int = whole) -> None:
                progress(f"{source} at {at:g} a second: {system}", before + done, whole)

            found.append(simulate(system, load, server, block_size=block_size, progress=tell))
        return tuple(found)

    results = run(rate, 0)
    sweep = tuple((other, run(other, i)) for i, other in enumerate(rates, 1))
    return Comparison(source, rate, results, sweep)
