"""`minipaged laws`: the laws of a paged engine, and where each is tested."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from minipaged.laws import LAWS, tests_of


def show_laws(tests: Path) -> int:
    """Print the laws with their tests; without a tests folder, the laws alone."""
    found = tests_of(tests) if tests.is_dir() else {}
    table = Table("law", "what must hold", "tested in", title="The laws", title_justify="left")
    for law in LAWS:
        table.add_row(law[0], law[2], "\n".join(found.get(law[0], ())) or "–")
    Console().print(table)
    return 0
