"""What was simulated or calculated, as tables, as values for JSON, and as pages: runs, comparisons, the paper's figures, plans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from minipaged.lab.advise.calculators import Capacity, Deployment, Fleet, Load
from minipaged.lab.formats import percent, seconds, size
from minipaged.lab.paper.figure_types import Curve, Figure
from minipaged.lab.report.html import Page
from minipaged.lab.report.svg import line_chart, stacked_bars
from minipaged.lab.report.tables import table
from minipaged.lab.simulation.compare import Comparison
from minipaged.lab.simulation.simulate import Result
from minipaged.memory.types import PoolBreakdown


def result_dict(result: Result) -> dict[str, Any]:
    """One result as JSON can hold it."""
    outcome = result.outcome
    return {
        "system": result.system,
        "workload": result.workload.name,
        "server": result.server.describe(),
        "requests": len(result.workload),
        "refused": outcome.refused,
        "preemptions": outcome.preemptions,
        "steps": outcome.steps,
        "makespan_s": outcome.makespan,
        "requests_per_s": result.requests_per_second,
        "tokens_per_s": result.tokens_per_second,
        "mean_batch": result.mean_batch,
        "normalized_latency_s": result.normalized_latency,
        "first_token_p50_s": result.first_token(50),
        "first_token_p99_s": result.first_token(99),
        "per_token_p50_s": result.per_token(50),
        "per_token_p99_s": result.per_token(99),
        "pool_shares": result.shares,
        "blocks_saved_share": outcome.averages.steady.saving,
        "timeline": [
            {"s": sample.seconds, "requests": sample.requests, **sample.pool._asdict()} for sample in outcome.samples
        ],
    }


SPEED_COLUMNS = ("system", "tok/s", "req/s", "batch", "preempted", "refused")
LATENCY_COLUMNS = ("system", "a token", "first p50", "first p99", "next p50", "next p99")
WASTE_COLUMNS = ("system", *PoolBreakdown._fields)


def speed_row(result: Result) -> tuple[str, ...]:
    """How fast it was."""
    return (
        result.system,
        f"{result.tokens_per_second:,.0f}",
        f"{result.requests_per_second:,.2f}",
        f"{result.mean_batch:,.2f}",
        f"{result.outcome.preemptions:,}",
        f"{result.outcome.refused:,}",
    )


def latency_row(result: Result) -> tuple[str, ...]:
    """How long requests waited: latency over answer length, the first token, the gap between the next ones."""
    times = (result.first_token(50), result.first_token(99), result.per_token(50), result.per_token(99))
    return (result.system, seconds(result.normalized_latency), *map(seconds, times))


def waste_row(result: Result) -> tuple[str, ...]:
    """What the pool held, percent."""
    return (result.system, *(percent(result.shares[part]) for part in PoolBreakdown._fields))


def print_results(results: Sequence[Result]) -> None:
    """Speed first, then what the pool held."""
    first = results[0]
    load = first.workload
    title = f"{load.name}, {len(load):,} requests: {first.server.describe()}"
    table(title, SPEED_COLUMNS, [speed_row(r) for r in results])
    table(
        "latency: over the answer's length, to the first token, between the next",
        LATENCY_COLUMNS,
        [latency_row(r) for r in results],
    )
    note = "Averages over the time in which requests waited (or, if none ever did, over the run after its first tenth)."
    table("percent of the pool", WASTE_COLUMNS, [waste_row(r) for r in results], notes=(note,))


def print_plan(deployment: Deployment, load: Load, fits: Capacity, fleet: Fleet | None) -> None:
    """The calculator's answers, each with the sum it came from."""
    model, gpus = deployment.model, deployment.gpus
    groups = f"{model.num_layers} layers x {model.num_kv_heads} KV heads x {model.head_dim} x 2"
    rows = [
        ("KV of a token", size(deployment.kv_bytes), f"{deployment.kv_bytes:,} B = {groups} x {deployment.kv_dtype}"),
        ("weights", size(deployment.weights), f"{model.num_parameters():,} parameters at {deployment.weight_bits:g} bits"),
        ("memory", size(gpus * deployment.gpu.memory_bytes), f"{gpus} x {deployment.gpu.name}, {100 * deployment.utilization:g} % used"),
        ("pool", f"{fits.slots:,} tokens", "what is left, over the KV of a token"),
        ("sequences, full", f"{fits.full_sequences:,}", f"each holding {load.prompt} + {load.output} tokens"),
        ("sequences, on average", f"{fits.mean_sequences:,}", f"each holding {load.prompt} + {load.output}/2 tokens and half a block"),
        ("rows that run", f"{fits.rows:,}", "what fits" if fits.rows == fits.mean_sequences else "fewer than fit, as asked"),
        ("next token", seconds(fits.seconds_per_token), f"bound by {fits.bound_by}"),
        ("first token", seconds(fits.first_token_seconds), f"of a lone prompt of {load.prompt} tokens"),
        ("answers", f"{fits.tokens_per_second:,.0f} tok/s", f"{fits.requests_per_second:,.2f} requests a second at most"),
    ]  # fmt: skip
    if fleet is not None:
        rows.append(
            (
                "copies",
                f"{fleet.copies:,}",
                f"{fleet.gpus:,} GPU{'s'[: fleet.gpus != 1]} for {load.rate:g} requests a second",
            )
        )
        if fleet.dollars_per_hour is not None and fleet.dollars_per_million_tokens is not None:
            cost = f"${fleet.dollars_per_million_tokens:,.2f} per million answer tokens at that load"
            rows.append(("cost", f"${fleet.dollars_per_hour:,.2f} an hour", cost))
    table(
        f"{model.name} on {gpus} x {deployment.gpu.name} (tp {deployment.tp}, pp {deployment.pp})",
        ("what", "value", "how"),
        rows,
        notes=(
            "Speeds are rooflines of the data sheet: nothing real is faster."
            if deployment.efficiency == 1
            else f"Speeds are {100 * deployment.efficiency:g} % of the data sheet's.",
        ),
    )


FIGURE_COLUMNS = ("what", "paper", "here", "unit", "difference")


def figure_rows(figure: Figure) -> list[tuple[str, ...]]:
    """The paper's number, ours and the difference."""
    return [(r.what, r.paper_text, f"{r.ours:,.3g}", r.unit, r.difference) for r in figure.rows]


def figure_page(figures: Sequence[Figure]) -> Page:
    """All figures on one page."""
    page = Page("The figures of the PagedAttention paper, simulated")
    for figure in figures:
        page.heading(f"Fig. {figure.name}: {figure.title}")
        page.table(FIGURE_COLUMNS, figure_rows(figure))
        page.notes(figure.notes)
        if figure.curves:
            page.svg(
                line_chart(f"Fig. {figure.name}", figure.curves, figure.x_label, figure.y_label, log_x=figure.log_x)
            )
    return page


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
