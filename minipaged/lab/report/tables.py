"""Prints a table, and writes a result as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from minipaged.errors import InputError
from minipaged.text.safe import printable

LONGEST_NAME = 24


def table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    notes: Sequence[str] = (),
    words: int = 1,
    lines: bool = False,
    width: int | None = None,
) -> None:
    """One table. The first `words` columns hold words and are left-aligned, the others numbers; so is a last column
    that is called `how` or `why`. Notes follow, a line each. `lines` draws one between rows. width: columns of the page, None for
    those of the terminal. Any text may be a stranger's.
    """
    console = Console(markup=False, emoji=False, width=width)
    grid = Table(title=printable(title), title_justify="left", show_lines=lines)
    numbers = (
        [max(len(name), *(len(row[i]) for row in rows)) for i, name in enumerate(columns) if i >= words] if rows else []
    )
    fits = sum(numbers) + 3 * len(columns) + 8 < console.width
    for i, name in enumerate(columns):
        prose = name in ("how", "why")
        whole = all(len(row[i]) <= LONGEST_NAME for row in rows) if i < words else not prose
        grid.add_column(
            name,
            justify="left" if i < words or prose else "right",
            overflow="fold",
            no_wrap=whole and (fits or i < words),
        )
    for row in rows:
        grid.add_row(*map(printable, row))
    console.print(grid)
    for note in notes:
        console.print(printable(note), highlight=False)


def plain(value: Any) -> Any:
    """A result as JSON can hold it: dataclasses as objects, nan as null."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path: Path, value: Any) -> None:
    """Write a result. Raises InputError where the file cannot be written."""
    try:
        path.write_text(json.dumps(plain(value), indent=1) + "\n")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None
