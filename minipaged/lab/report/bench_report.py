"""Turns results files into the Markdown tables of the READMEs, so that no figure there is typed by hand.

One function for each kind of rows: engine, kernels, host, systems, ablation, screen. measure/results.py has the form of a file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from minipaged.config import check_choice
from minipaged.errors import InputError
from minipaged.lab.formats import seconds
from minipaged.lab.measure.results import read_results
from minipaged.lab.measure.rows import OURS, SECTIONS, too_few_steps

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
KERNEL_TITLES = {
    "decode": "Paged decode attention, block 16, shuffled pages, bfloat16: GB/s of keys and values read",
    "prefill": "Paged causal prefill, the same pages: TFLOP/s",
}
Rows = list[dict[str, Any]]


GROUPS = ("engine", "kernels", "host", "systems", "ablation", "screen")


def report(folder: Path, only: Sequence[str] = ()) -> str:
    """The tables of every results file in `folder`, with commands and what was left out; or, of the groups in `only`, the tables alone.

    InputError if there is no file, or one that cannot be read, or an unknown group.
    """
    for group in only:
        check_choice("only", group, GROUPS)
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise InputError(f"{folder}: no results (*.json) there")
    documents = [read_results(path) for path in paths]
    parts: list[str] = []
    keys = ("workload", "kernel", "what", "system", "section", "screen")
    makers = (engine_tables, kernel_tables, host_tables, system_tables, ablation_tables, screen_tables)
    for title, key, tables in zip(GROUPS, keys, makers, strict=True):
        if only and title not in only:
            continue
        found = [document for document in documents if document["rows"] and key in document["rows"][0]]
        if found:
            first, *rest = tables([row for document in found for row in document["rows"]])
            parts += [
                origin(title, found, commands=not only) + ("\n\n" if first.startswith("|") else " ") + first,
                *rest,
            ]
            parts += [f"Left out: {text}." for text in _notes(found) if not only]
    return "\n\n".join(parts) + "\n"


def origin(title: str, documents: Sequence[dict[str, Any]], *, commands: bool) -> str:
    """Where figures come from: device, versions, date and, if wanted, commands; one sentence for all files that agree."""
    heads: dict[str, list[str]] = {}
    for document in documents:
        versions = ", ".join(
            f"{name} {document['versions'][name]}"
            for name in ("torch", "triton", "vllm", "transformers")
            if document["versions"].get(name, "not installed") != "not installed"
        )
        heads.setdefault(f"{document['device']}, {versions}, {document['date']}", []).append(document["command"])
    return " ".join(
        f"**{title.capitalize()}**, one {head}"
        + (": " + "; ".join(f"`{each}`" for each in found) if commands else "")
        + "."
        for head, found in heads.items()
    )


def _notes(documents: Iterable[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(note for document in documents for note in document.get("notes", ())))


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _contenders(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["contender"] for row in rows))


def _cell(row: dict[str, Any] | None, value: str, form: str) -> str:
    """A peer's figure with our ratio to it behind it, or ours alone; empty if it was not measured."""
    if row is None:
        return ""
    ratio = row.get("ratio")
    return format(row[value], form) + (f" (**{ratio:.2f}×**)" if ratio is not None else "")


def engine_tables(rows: Rows) -> list[str]:
    """Tokens per second: a line for each model and workload, a column for each contender."""
    contenders = _contenders(rows)
    found = {(row["model"], row["workload"], row["contender"]): row for row in rows}
    lines = []
    for model, workload in dict.fromkeys((row["model"], row["workload"]) for row in rows):
        cells = [
            _cell(found.get((model, workload, name)), "tokens_per_second", ",.0f" if workload != "batch:1" else ",.1f")
            for name in contenders
        ]
        lines.append([model.removeprefix("random:"), workload, *cells])
    text = "Output tokens per second, bfloat16, random weights; in brackets how many times as fast minipaged is."
    return [text, _table(["model shape", "workload", *contenders], lines), *_first_passes(rows, contenders)]


def _first_passes(rows: Rows, contenders: Sequence[str]) -> list[str]:
    """What each workload took when it was met for the first time. Files of earlier versions do not say."""
    found = {
        (row["model"], row["workload"], row["contender"]): row for row in rows if row.get("first_seconds") is not None
    }
    lines = [
        [model.removeprefix("random:"), workload]
        + [
            f"{row['first_seconds']:.2f} · {row['seconds']:.2f}" if (row := found.get((model, workload, name))) else ""
            for name in contenders
        ]
        for model, workload in dict.fromkeys((model, workload) for model, workload, _ in found)
    ]
    if not lines:
        return []
    return [
        "Seconds of a workload's first pass · of the median pass after it.",
        _table(["model shape", "workload", *contenders], lines),
    ]


def kernel_tables(rows: Rows) -> list[str]:
    """A table for decode and for prefill, one for the small kernels, and the ceilings."""
    ceilings = [row for row in rows if row["contender"] == "torch" and row["kernel"] in ("copy", "matrix product")]
    measured = [row for row in rows if row not in ceilings]
    parts = [
        "Measured ceilings: "
        + ", ".join(f"{row['kernel']} {row['shape']} {row['value']:,.0f} {row['unit']}" for row in ceilings)
        + "."
    ]
    for kernel, title in KERNEL_TITLES.items():
        ours = [row for row in measured if row["kernel"] == kernel]
        if not ours:
            continue
        contenders = _contenders(ours)
        found = {(row["shape"], row["contender"]): row for row in ours}
        lines = [
            [
                shape,
                *(_cell(found.get((shape, name)), "value", ",.0f") for name in contenders[:1]),
                _share(found.get((shape, OURS))),
                f"{found[shape, OURS]['microseconds']:,.1f}" if (shape, OURS) in found else "",
                *(_cell(found.get((shape, name)), "value", ",.0f") for name in contenders[1:]),
            ]
            for shape in dict.fromkeys(row["shape"] for row in ours)
        ]
        head = ["shape", contenders[0], "of the ceiling", "µs", *contenders[1:]]
        parts += [f"{title}; in brackets how many times as fast minipaged is.", _table(head, lines)]
    small = [row for row in measured if row["kernel"] not in KERNEL_TITLES]
    if small:
        lines = [[r["kernel"], r["shape"], f"{r['value']:,.0f}", _share(r), f"{r['microseconds']:,.1f}"] for r in small]
        parts += [
            "The kernels around attention: GB/s of the bytes that must move.",
            _table(["kernel", "shape", "GB/s", "of the copy ceiling", "µs"], lines),
        ]
    return parts


def _share(row: dict[str, Any] | None) -> str:
    share = row.get("share") if row is not None else None
    return f"{100 * share:.0f} %" if share is not None else ""


def host_tables(rows: Rows) -> list[str]:
    """One line a figure."""
    lines = [
        [
            row["what"],
            f"{row['value']:,.1f} {row['unit']}",
            "" if row["goal"] is None else f"< {row['goal']:g} {row['unit']}",
        ]
        for row in rows
    ]
    return [_table(["what", "measured", "goal"], lines)]


def screen_tables(rows: Rows) -> list[str]:
    """One line a model: rounds with the screen and without, in turn."""
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        without, shown = (
            [r["tokens_per_second"] for r in rows if r["model"] == model and r["screen"] is on] for on in (False, True)
        )
        ratio = median(on / off for on, off in zip(shown, without, strict=False))
        speeds = [f"{median(speed):,.0f}" for speed in (without, shown)]
        lines.append([model.removeprefix("random:"), str(len(shown)), *speeds, f"{100 * ratio:.1f} %"])
    text = "The terminal screen beside the engine, drawn in full: tokens per second without and with it, medians over the rounds."
    return [text, _table(["model", "rounds each", "without", "with the screen", "of the speed"], lines)]


def system_tables(rows: Rows) -> list[str]:
    """A line a system and pool."""
    lines = [
        (
            row["system"],
            f"{row['pool']:,}" if row["pool"] else "all",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['mean_rows']:.1f}",
            "" if row["token_share"] is None else f"{100 * row['token_share']:.0f} %",
            f"{row['finished']:,} of {row['requests']:,}",
            _late(row["first_token"][1], row["seconds"]),
            _late(row["per_token"][1], row["seconds"]),
        )
        for row in rows
        if row["tokens"] and not too_few_steps(row.get("steps"), row["note"])
    ]
    text = (
        "All systems but transformers' two run on this engine, with its kernels and its scheduler. They differ in how much memory a "
        "request holds, and in which requests may run. All requests are there from the start. The pool is counted in slots: a slot holds "
        "one token. First token: how long a request waited for it; next tokens: its mean time for each later one. P99: 99 of 100 requests "
        "were as fast or faster."
    )
    stopped = {row["system"]: f"{row['seconds']:.0f} s" for row in rows if row["note"].startswith("stopped after")}
    if stopped:
        limit = min(stopped.values(), key=lambda words: int(words.split()[0]))
        later = [
            f", {name} after {time}, since a batch that runs goes on" for name, time in stopped.items() if time != limit
        ]
        text += f" A run is stopped after {limit}{''.join(later)}. A request that has no first token by then counts as > {limit}."
    head = ("system", "pool", "tok/s", "mean batch", "pool used", "finished", "first token P99", "next tokens P99")
    whole = [
        f"{row['system']}: {_first_sentence(row['note'])}."
        for row in rows
        if row["note"] and not row["note"].endswith(" s")
    ]
    preempted = [
        f"{row['system']} preempted requests {row['preemptions']:,} times. Such a request waits until it may go on, and that time counts "
        f"in its next tokens. Their median over the requests is {seconds(row['per_token'][0])}."
        for row in rows
        if row.get("preemptions") and row["per_token"][0] is not None
    ]
    return [text, _table(head, lines), *([" ".join(notes)] if (notes := whole + preempted) else [])]


def ablation_tables(rows: Rows) -> list[str]:
    """A table a section."""
    parts: list[str] = []
    for section, title in SECTIONS.items():
        measured = [row for row in rows if row["section"] == section]
        if measured:
            lines = [
                (
                    row["name"],
                    _seconds(row["seconds"]),
                    _whole(row["tokens_per_second"]),
                    "-" if row["ratio"] is None else f"{row['ratio']:.2f}×",
                    row["note"],
                )
                for row in measured
            ]
            parts += [f"{title}.", _table(("what", "time", "tok/s", "factor", ""), lines)]
    return parts


def _first_sentence(note: str) -> str:
    """What an error says first; the rest of it is advice."""
    return re.split(r"\.(?=[A-Z ])", note, maxsplit=1)[0].removesuffix(".")


def _late(value: float | None, limit: float) -> str:
    return f"> {limit:.0f} s" if value is None else seconds(value)


def _seconds(value: float | None) -> str:
    return "" if value is None else seconds(value)


def _whole(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:,.0f}"


def insert(text: str, tables: str) -> str:
    """`text` with what stands between the two marks replaced. InputError if it has not both, once, in order."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise InputError(f"the file must hold one line {BEGIN} and after it one line {END}")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{tables}{END}{after}"
