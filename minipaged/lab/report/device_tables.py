"""Results of `lab compare --device` and `lab ablate` -> Markdown tables, for the report of all results. Knows those rows' form."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from minipaged.lab.report.tables import seconds

Rows = list[dict[str, Any]]
TITLES = {
    "attention": "Attention: one layer's operator, and the whole decode step",
    "prefill": "Attention over a prompt: the whole step, and so the first token",
    "layout": "Contiguous and paged: where the blocks lie",
    "block size": "Block size, shuffled blocks",
    "batching": "Batching: the engine, in a pool that binds",
    "preemption": "Preemption: computed again, or swapped",
    "together": "Do the factors multiply?",
    "ladder": "One thing after the other: decode steps at the batches measured above",
    "heads": "Heads of keys and values",
}


def _first_sentence(note: str) -> str:
    """What an error says first; the rest of it is advice."""
    return re.split(r"\.(?=[A-Z ])", note, maxsplit=1)[0].removesuffix(".")


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
        if row["tokens"]
    ]
    text = (
        "Every system on this engine, its kernels and its scheduler; only what is held and who may enter differs, and all requests wait "
        "from the start. The pool is in slots; P99 over the requests, those that a time limit cut off counted as later than it."
    )
    head = ("system", "pool", "tok/s", "mean batch", "pool used", "finished", "first token P99", "next tokens P99")
    whole = [
        f"{row['system']}: {_first_sentence(row['note'])}."
        for row in rows
        if row["note"] and not row["note"].endswith(" s")
    ]
    return [text, markdown(head, lines), *whole]


def ablation_tables(rows: Rows) -> list[str]:
    """A table a section."""
    parts: list[str] = []
    for section, title in TITLES.items():
        measured = [row for row in rows if row["section"] == section]
        if measured:
            lines = [
                (
                    row["name"],
                    _seconds(row["seconds"]),
                    _whole(row["tokens_per_second"]),
                    f"{row['ratio']:.2f}×",
                    row["note"],
                )
                for row in measured
            ]
            parts += [f"{title}.", markdown(("what", "time", "tok/s", "factor", ""), lines)]
    return parts


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _late(value: float | None, limit: float) -> str:
    return f"> {limit:.0f} s" if value is None else seconds(value)


def _seconds(value: float | None) -> str:
    return "" if value is None else seconds(value)


def _whole(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:,.0f}"
