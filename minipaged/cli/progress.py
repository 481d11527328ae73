"""One line of progress on standard error: a bar in a terminal, a line per stage elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich import progress as rich_progress
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn

from minipaged.config import Progress
from minipaged.text.safe import printable

MEGABYTE = 1_000_000  # from here on an amount is a number of bytes


@contextmanager
def status_line(console: Console | None = None) -> Iterator[Progress]:
    """Yields the function to report with; the line disappears at the end. Standard output stays free for what a command answers."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        last: list[str] = []

        def write_once(message: str, done: int, total: int) -> None:
            if last != [message]:
                last[:] = [message]
                console.print(printable(message), highlight=False, markup=False, emoji=False, soft_wrap=True)

        yield write_once
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeElapsedColumn(),
    )
    bar = rich_progress.Progress(*columns, console=console, transient=True)

    def show(message: str, done: int, total: int) -> None:
        message = printable(message)
        new = bar.tasks[0].description != message
        bar.update(task, description=message, completed=done, total=total or None, amount=_amount(done, total))
        if new:  # a stage that ends before the next repaint is seen all the same
            bar.refresh()

    try:
        with bar:
            task = bar.add_task("starting", total=None, amount="")
            yield show
    except (
        BaseException
    ):  # a signal may have come while the bar itself was being ended, before it showed the cursor again
        bar.stop()
        console.show_cursor()
        raise


def _amount(done: int, total: int) -> str:
    if total >= MEGABYTE:
        return f"{done / MEGABYTE:.0f} of {total / MEGABYTE:.0f} MB"
    return f"{100 * done / total:.0f} %" if total else ""
