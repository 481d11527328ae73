"""`minipaged laws`: the laws of a paged engine, and where each is tested."""

from __future__ import annotations

from pathlib import Path

from minipaged.cli.terminal import note
from minipaged.lab.report.tables import table
from minipaged.laws import LAWS, tests_of


def show_laws(tests: Path) -> int:
    """Print the laws with their tests; without a tests folder, the laws alone, and say so."""
    found = tests_of(tests) if tests.is_dir() else {}
    rows = [(law.id, law.sentence, "\n".join(found.get(law.id, ())) or "–") for law in LAWS]
    table("The laws", ("law", "what must hold", "tested in"), rows, words=3)
    if not tests.is_dir():
        note(
            f"There is no tests folder at {tests}: an installed minipaged comes without its tests. They are in the repository; "
            "--tests names their folder."
        )
    return 0
