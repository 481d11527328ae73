"""What was measured on this device, for the terminal, for JSON, and as pages and plots: systems side by side, and the ablation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from minipaged.errors import InputError
from minipaged.lab.formats import percent, seconds, speed
from minipaged.lab.measure.ablate import Ablation, Measure
from minipaged.lab.measure.device_run import DeviceResult
from minipaged.lab.measure.rows import ENOUGH_STEPS, SECTIONS, too_few_steps
from minipaged.lab.report.html import Page
from minipaged.lab.report.svg import bars
from minipaged.lab.report.tables import plain, table
from minipaged.text.safe import printable

DEVICE_COLUMNS = ("system", "pool", "tok/s", "rows", "used %", "finished", "preempted", "same text %")
DEVICE_LATENCY_COLUMNS = ("system", "pool", "first p50", "first p99", "gap p50", "gap p99", "latency a token")


def device_row(result: DeviceResult) -> tuple[str, ...]:
    """A run on a real device: how fast, and what it held."""

    def share(value: float) -> str:
        return "-" if math.isnan(value) else percent(value)

    few = result.too_few_steps
    return (
        *_whose(result),
        "-" if few else speed(result.tokens_per_second),
        "-" if few else f"{result.mean_rows:.1f}",
        "-" if few else share(result.token_share),
        f"{result.finished:,}/{result.requests:,}",
        f"{result.preemptions:,}",
        share(result.same_answers),
    )


def device_latency_row(result: DeviceResult) -> tuple[str, ...]:
    """The same run: how long requests waited."""
    times = (*result.first_token, *result.per_token, result.normalized_latency)
    return (
        *_whose(result),
        *(f"> {result.seconds:,.0f} s" if math.isinf(value) else seconds(value) for value in times),
    )


def _whose(result: DeviceResult) -> tuple[str, str]:
    return result.system, f"{result.pool:,}" if result.pool else "all"


def print_device(title: str, results: Sequence[DeviceResult]) -> None:
    """Two tables and what a reader must know."""
    table(title, DEVICE_COLUMNS, [device_row(r) for r in results])
    table(
        "how long requests waited",
        DEVICE_LATENCY_COLUMNS,
        [device_latency_row(r) for r in results],
        notes=device_notes(results),
    )


def device_dict(result: DeviceResult) -> dict[str, Any]:
    """As JSON can hold it; what was never reached is null."""
    found: dict[str, Any] = plain(result)
    return {**found, "tokens_per_second": plain(result.tokens_per_second)}


def device_notes(results: Sequence[DeviceResult]) -> list[str]:
    """What a reader must know beside the table."""
    notes = [
        "One model, pool, scheduler and set of kernels; systems differ in what memory a request holds and in who may enter. "
        "All requests wait from the start.",
        "pool: slots for keys and values. rows, used %: means over time. gap: mean time between a request's tokens.",
    ]
    if any(r.too_few_steps for r in results):
        notes.append(f"Systems with - made fewer than {ENOUGH_STEPS} steps in the time limit: they are not ranked.")
    if any(r.note.startswith("stopped") for r in results):
        notes.append(
            "A system stopped at the time limit is measured up to there, while others wait; one that was through, with its shrinking end. "
            "Requests that were not reached count as later than the limit."
        )
    if any(r.same_answers < 1 for r in results):
        notes.append(
            "Texts differ where sums do: the order of a product's additions depends on the batch, and random weights sit on ties."
        )
    return notes + [
        f"{r.system}, pool {r.pool:,}: {r.note}"
        for r in results
        if r.note and r.note != f"stopped after {r.seconds:.0f} s"
    ]


ABLATION_COLUMNS = ("what", "time", "tok/s", "factor", "why")


def ablation_rows(measures: Sequence[Measure]) -> list[tuple[str, ...]]:
    """One section's rows."""
    return [
        (
            m.name,
            seconds(m.seconds),
            speed(m.tokens_per_second),
            "-" if math.isnan(m.ratio) else f"{m.ratio:.2f}x",
            m.note,
        )
        for m in measures
    ]


def load_note(load: float, cores: int, device: str) -> str:
    """A warning where other programs kept the processors busy; "" where they did not, or the work was a GPU's."""
    if device.startswith("cuda") or load <= cores * 1.5:
        return ""
    return f"{load:.0f} programs shared {cores} processors while this ran: do not trust these times, measure again when it is quiet."


def print_ablation(found: Ablation, note: str = "") -> None:
    """A table a section; then a note, if there is one."""
    for section in SECTIONS:
        measures = found.of(section)
        if measures:
            rows = ablation_rows(measures)
            wide = len(ABLATION_COLUMNS) - (not any(row[-1] for row in rows))
            table(f"{SECTIONS[section]} ({found.model})", ABLATION_COLUMNS[:wide], [row[:wide] for row in rows])
    if note:
        Console().print(printable(note), highlight=False, markup=False, emoji=False)


def ablation_dicts(found: Ablation) -> list[dict[str, Any]]:
    """As JSON can hold it: the measures, then the engine's runs."""
    runs = [{"section": "run", **device_dict(r)} for r in found.runs.values()]
    return [*(plain(m) for m in found.measures), *runs]


def ablation_plot(rows: Sequence[Mapping[str, Any]], title: str) -> str:
    """The ladder and the question whether factors multiply, as factors, from a results file's rows."""
    groups: dict[str, list[tuple[str, float, str]]] = {}
    for section in ("ladder", "together", "heads"):
        for row in rows:
            if row.get("section") == section and row["ratio"] is not None:
                ratio = float(row["ratio"])
                groups.setdefault(SECTIONS[section], []).append((_short(row["name"]), ratio, f"{ratio:.1f}x"))
    return bars(title, groups, "times the tokens per second of the first bar of the group")


def _short(name: str) -> str:
    return name if len(name) <= 46 else name[:45] + "…"


def comparison_plot(rows: Sequence[Mapping[str, Any]], title: str) -> str:
    """Tokens per second by system, one group a pool, from a results file's rows."""
    groups: dict[str, list[tuple[str, float, str]]] = {}
    for row in sorted(rows, key=lambda r: str(r["system"]).startswith("transformers")):
        if not row.get("tokens") or too_few_steps(row.get("steps"), row["note"]):
            continue
        pool = f"pool of {row['pool']:,} slots" if row["pool"] else "pool as large as it gets"
        rate = float(row["tokens_per_second"])
        groups.setdefault(pool, []).append((row["system"], rate, f"{speed(rate)} tok/s, {row['mean_rows']:.1f} rows"))
    return bars(title, dict(sorted(groups.items())), "output tokens per second")


def ablation_page(found: Ablation) -> Page:
    """All sections on one page."""
    page = Page(f"What each technique contributes: {found.model} on {found.device}")
    page.notes(
        (
            "Measured on this device with this project's own network, kernels and engine; factors are against the first row.",
        )
    )
    page.svg(ablation_plot(ablation_dicts(found), "Alone and together"))
    for section in SECTIONS:
        if measures := found.of(section):
            page.heading(SECTIONS[section])
            page.table(ABLATION_COLUMNS, ablation_rows(measures))
    return page


def plot_of(results: Mapping[str, Any]) -> str:
    """The plot that goes with a results file, SVG. InputError for results that have none."""
    rows = results["rows"]
    where = f"{results['device']}, {results['date']}"
    if rows and all("section" in row for row in rows):
        return ablation_plot(rows, f"What each technique contributes: {where}")
    if rows and all("system" in row and "mean_rows" in row for row in rows):
        return comparison_plot(rows, f"One engine, other systems' memory: {where}")
    raise InputError("these results have no plot: give a file of `lab compare --device` or `lab ablate`")
