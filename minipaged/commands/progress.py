"""One line of progress on standard error: a bar in a terminal, a line per stage elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

Report = Callable[[str, int, int], None]  # (what is going on, how much is done, how much there is)


@contextmanager
def status_line() -> Iterator[Report]:
    """Yields the function to report with; the line disappears at the end."""
    console = Console(stderr=True)
    if not console.is_terminal:
        last: list[str] = []

        def say(message: str, done: int, total: int) -> None:
            if last != [message]:
                last[:] = [message]
                console.print(message, highlight=False)

        yield say
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda message, done, total: bar.update(task, description=message, completed=done, total=total)
