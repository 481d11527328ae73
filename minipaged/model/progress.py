"""A progress bar on stderr for `pull` and `load`.

Knows rich; nothing of models. Stdout stays free for what a command answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

MEGABYTE = 1_000_000


@contextmanager
def terminal_progress(console: Console | None = None) -> Iterator[Callable[[str, int, int], None]]:
    """Yield a callback for `pull(..., progress)` and `load(..., progress=...)` that draws one bar for each stage.

    The bars vanish when done. Where stderr is no terminal, each stage is one plain line.
    """
    console = console or Console(stderr=True)
    amount = TextColumn("{task.fields[amount]}")
    columns = (TextColumn("{task.description}"), BarColumn(), amount, TimeRemainingColumn())
    bars = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    stages: dict[str, TaskID] = {}

    def report(what: str, done: int, total: int) -> None:
        if what not in stages:
            if not console.is_terminal:
                console.print(what, highlight=False)
            for earlier in stages.values():
                bars.remove_task(earlier)
            stages.clear()
            stages[what] = bars.add_task(what, total=total or None, amount="")
        in_bytes = total >= MEGABYTE
        amount = (
            f"{done / MEGABYTE:.0f} of {total / MEGABYTE:.0f} MB" if in_bytes else f"{done} of {total}" if total else ""
        )
        bars.update(stages[what], completed=done, total=total or None, amount=amount)

    with bars:
        yield report
