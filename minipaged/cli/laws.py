"""`minipaged laws`: the laws of a paged engine, and where each is tested."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from minipaged.cli.terminal import note
from minipaged.laws import LAWS, tests_of


def show_laws(tests: Path) -> int:
    """Print the laws with their tests; without a tests folder, the laws alone, and say so."""
    found = tests_of(tests) if tests.is_dir() else {}
    table = Table("law", "what must hold", title="The laws", title_justify="left")
    table.add_column("tested in", overflow="fold")
    for law in LAWS:
        table.add_row(law[0], law[2], "\n".join(found.get(law[0], ())) or "–")
    Console().print(table)
    if not tests.is_dir():
        note(f"There is no tests folder at {tests}: give it with --tests to see where each law is tested.")
    return 0
