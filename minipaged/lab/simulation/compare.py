"""Systems side by side on the same traffic: one saturated or timed run each, and latency over a sweep of rates.

Knows how to run and to lay out; the numbers come from simulate.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minipaged.config import Progress, check_real
from minipaged.errors import InputError
from minipaged.lab.paper.figure_types import Curve
from minipaged.lab.report.html import Page
from minipaged.lab.report.simulation_report import (
    LATENCY_COLUMNS,
    SPEED_COLUMNS,
    WASTE_COLUMNS,
    latency_row,
    result_dict,
    speed_row,
    waste_row,
)
from minipaged.lab.report.svg import line_chart, stacked_bars
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


def latency_curves(comparison: Comparison) -> list[Curve]:
    """Normalized latency over rate, one curve a system; the main run is one of the points."""
    runs = sorted([*comparison.sweep, (comparison.rate, comparison.results)], key=lambda run: run[0])
    names = [r.system for r in comparison.results]
    return [
        Curve(name, tuple((rate, results[i].normalized_latency) for rate, results in runs))
        for i, name in enumerate(names)
    ]


BINS = 80  # of the plot of batches over time


def batch_curves(results: Sequence[Result]) -> list[Curve]:
    """Requests that run, over time, averaged over short spans, until the first system is through with all requests."""
    end = min(r.outcome.makespan for r in results)
    curves = []
    for result in results:
        spans: dict[int, list[int]] = {}
        for sample in result.outcome.samples:
            if sample.seconds <= end:
                spans.setdefault(min(BINS - 1, int(BINS * sample.seconds / end)) if end else 0, []).append(
                    sample.requests
                )
        points = [((i + 0.5) * end / BINS, sum(seen) / len(seen)) for i, seen in sorted(spans.items())]
        curves.append(Curve(result.system, tuple(points)))
    return curves


def comparison_dict(comparison: Comparison) -> dict[str, Any]:
    """As JSON can hold it."""
    return {
        "workload": comparison.source,
        "rate": comparison.rate,
        "results": [result_dict(r) for r in comparison.results],
        "sweep": [
            {
                "rate": rate,
                "results": [{k: v for k, v in result_dict(r).items() if k != "timeline"} for r in results],
            }
            for rate, results in comparison.sweep
        ],
    }


def comparison_page(comparison: Comparison) -> Page:
    """Tables and plots on one page."""
    first = comparison.results[0]
    page = Page(f"{comparison.source} on {first.server.describe()}")
    page.notes(
        (
            "Simulated: every system on the same model, roofline clock and traffic; only what it holds and whom it lets in differs.",
        )
    )
    page.heading("Speed")
    page.table(SPEED_COLUMNS, [speed_row(r) for r in comparison.results])
    page.heading("Latency: over the answer's length, to the first token, between the next")
    page.table(LATENCY_COLUMNS, [latency_row(r) for r in comparison.results])
    page.heading("Where the pool goes, percent")
    page.table(WASTE_COLUMNS, [waste_row(r) for r in comparison.results])
    page.svg(stacked_bars("The pool", {r.system: r.shares for r in comparison.results}, "percent of the pool"))
    page.heading("Batch over time")
    page.notes(("Until the first system is through; the others go on.",))
    page.svg(line_chart("Requests that run", batch_curves(comparison.results), "seconds", "requests"))
    if comparison.sweep:
        page.heading("Latency against rate")
        curves = latency_curves(comparison)
        page.svg(line_chart("Normalized latency", curves, "requests a second", "seconds a token", log_y=True))
        rates = [p[0] for p in curves[0].points]
        page.table(
            ("system", *(f"{rate:g}/s" for rate in rates)),
            [(c.name, *(f"{y:.3g}" for _, y in c.points)) for c in curves],
        )
    return page
