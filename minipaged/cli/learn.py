"""`minipaged learn`: the lessons. Lists them, copies them, checks them, helps, and opens the screen on a lesson's own replay."""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from rich import markup
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

from minipaged.errors import InputError
from minipaged.learn.catalog import Lesson, lesson, lessons, task_of
from minipaged.learn.checking import Result
from minipaged.learn.checking import check as run_check
from minipaged.learn.workspace import Workspace
from minipaged.text.safe import printable

app = typer.Typer(help="Rebuild PagedAttention in lessons, each one checked.", pretty_exceptions_enable=False)
console = Console(highlight=False, emoji=False)
NOTE_LINES, PRINTED_LINES = 4, 20  # the last lines of what tests printed that passed, and of the one that failed

Number = Annotated[int, typer.Argument(metavar="N", help="The lesson's number.")]
Folder = Annotated[
    Path | None, typer.Option("--dir", metavar="DIR", help="The folder of your lessons, if it is not this one.")
]
TaskNumber = Annotated[int | None, typer.Option("--task", help="The task; the first unsolved one if left out.")]


@app.callback(invoke_without_command=True)
def home(context: typer.Context, folder: Folder = None) -> None:
    """The lessons, and how far you are."""
    if context.invoked_subcommand is None:
        show_list(folder)


@app.command("list")
def list_lessons(folder: Folder = None) -> None:
    """The lessons, and how far you are."""
    show_list(folder)


@app.command()
def start(folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder for your copies.")]) -> None:
    """Copy the lessons to a folder of your own. What is there already stays."""
    workspace, copied = Workspace.start(folder)
    first = next((one for one in lessons() if not _done(workspace, one)), lessons()[0])
    console.print(
        f"{len(copied)} files copied to {escape(str(folder))}."
        if copied
        else f"{escape(str(folder))} has them all already."
    )
    console.print(f"\n  cd {escape(str(folder))}\n  minipaged learn watch {first.number}\n")
    console.print(
        f"and open {first.path.name} in your editor. It is read from the top: prose, code, a task, its tests."
    )


@app.command()
def check(number: Number, folder: Folder = None) -> None:
    """Run a lesson's tests and say which task is next."""
    one = lesson(number)
    workspace = Workspace.find(folder)
    result = _check(workspace, one)
    if result.failure is not None:
        raise typer.Exit(1)


@app.command()
def watch(
    number: Number,
    folder: Folder = None,
    runs: Annotated[int | None, typer.Option(help="Stop after so many checks.", hidden=True)] = None,
) -> None:
    """Check a lesson again each time you save it. ctrl+c ends it."""
    one = lesson(number)
    workspace = Workspace.find(folder)
    path = workspace.file(one)
    seen: tuple[int, int] | None = None
    count = 0
    while runs is None or count < runs:
        try:
            found = path.stat()
        except OSError:  # some editors replace the file: it is gone for a moment
            time.sleep(0.1)
            continue
        if (found.st_mtime_ns, found.st_size) == seen:
            time.sleep(0.3)
            continue
        seen = (found.st_mtime_ns, found.st_size)
        count += 1
        if console.is_terminal:
            console.clear()
        result = _check(workspace, one)
        if result.failure is None:
            return
        console.print(f"[dim]watching {escape(str(path))}; ctrl+c ends[/dim]")


@app.command()
def hint(number: Number, task: TaskNumber = None, folder: Folder = None) -> None:
    """The next hint for a task: first a nudge, then the idea, then nearly the answer."""
    one = lesson(number)
    workspace = Workspace.find(folder)
    chosen = task_of(one, task if task is not None else _next_task(workspace, one))
    level = workspace.next_hint(one, chosen.number, len(chosen.hints))
    console.print(
        f"[bold]lesson {one.number}, task {chosen.number}: {chosen.name}[/bold] · hint {level} of {len(chosen.hints)}\n"
    )
    console.print(escape(chosen.hints[level - 1]))
    if level == len(chosen.hints):
        console.print(
            f"\n[dim]That was the last one. The answer: minipaged learn solution {one.number} --task {chosen.number}[/dim]"
        )


@app.command()
def solution(
    number: Number,
    task: TaskNumber = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Show it without asking.")] = False,
    whole: Annotated[bool, typer.Option("--whole", help="The whole lesson, solved, as a file.")] = False,
    folder: Folder = None,
) -> None:
    """Show the answer to a task. Asks first."""
    one = lesson(number)
    if whole:
        if not yes:
            typer.confirm(f"Show all answers of lesson {one.number}?", abort=True, err=True)
        typer.echo(one.solved(), nl=False)
        return
    if task is None:
        task = _next_task(Workspace.find(folder), one)
    chosen = task_of(one, task)
    if not yes:
        typer.confirm(f"Show the answer to lesson {one.number}, task {chosen.number} ({chosen.name})?", abort=True)
    console.print(f"\n[bold]{escape(one.stub(chosen.number))}[/bold]")
    console.print(Syntax(one.answer(chosen.number), "python", background_color="default", word_wrap=True))


@app.command()
def show(
    number: Number,
    folder: Folder = None,
    headless: Annotated[bool, typer.Option("--headless", help="Run without a terminal and end at once.")] = False,
    screenshot: Annotated[Path | None, typer.Option(help="Write the screen as SVG to this file.")] = None,
) -> None:
    """Open the screen on the lesson's replay: record a small run that shows its idea, then play it."""
    one = lesson(number)
    from minipaged.cli.show import show as open_screen
    from minipaged.config import DEFAULT_MODEL
    from minipaged.learn.replays import replay

    workspace = _workspace_or_none(folder)
    with TemporaryDirectory(prefix="minipaged-") as scratch:
        path, look_for = replay(one, workspace.folder if workspace is not None else None, Path(scratch))
        console.print(f"[bold]{one.number}. {one.title}[/bold]\n{escape(look_for)}")
        raise typer.Exit(open_screen(DEFAULT_MODEL, replay=path, headless=headless, screenshot=screenshot))


@app.command()
def notebooks(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder for them.")],
    solved: Annotated[bool, typer.Option("--solved", help="With the answers in their places.")] = False,
) -> None:
    """Write the lessons as Jupyter notebooks."""
    from minipaged.learn.notebooks import write_notebooks

    written = write_notebooks(folder, solved=solved)
    console.print(f"{len(written)} notebooks written to {escape(str(folder))}: open {written[0].name} first.")


@app.command()
def reset(
    number: Number,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Reset it without asking.")] = False,
    folder: Folder = None,
) -> None:
    """Begin a lesson again. What you wrote is kept beside it under another name."""
    one = lesson(number)
    workspace = Workspace.find(folder)
    if not yes:
        typer.confirm(f"Begin lesson {one.number} again?", abort=True)
    kept = workspace.reset(one)
    console.print(f"{one.path.name} is fresh." + (f" Your version is {escape(kept.name)}." if kept else ""))


def show_list(folder: Path | None) -> None:
    """Print the table of lessons; with a learner's folder, their progress too."""
    workspace = _workspace_or_none(folder)
    table = Table(box=None, pad_edge=False)
    for heading in ("", "lesson", "minutes", "tasks"):
        table.add_column(heading, justify="right" if heading in ("", "minutes") else "left")
    for one in lessons():
        done = workspace.solved(one) if workspace is not None else []
        marks = "  ".join(
            f"[green]✓\u00a0{name}[/green]" if number in done else f"[dim]·\u00a0{name}[/dim]"
            for number, name in ((t.number, t.name.rpartition(".")[2]) for t in one.tasks)
        )
        table.add_row(str(one.number), one.title, str(one.minutes), marks)
    console.print(table)
    if workspace is None:
        console.print("\nTo begin: [bold]minipaged learn start DIR[/bold]")
        return
    following = next((one for one in lessons() if not _done(workspace, one)), None)
    if following is None:
        console.print("\nAll done. You have built PagedAttention.")
    else:
        console.print(
            f"\nNext: [bold]minipaged learn watch {following.number}[/bold]   (hint, solution, show, reset: the same way)"
        )


def escape(text: str) -> str:
    """A learner's text (paths, output, messages) as it is: nothing in it is markup, nothing steers the terminal."""
    return markup.escape(printable(text))


def _done(workspace: Workspace, one: Lesson) -> bool:
    return len(workspace.solved(one)) == len(one.tasks)


def _next_task(workspace: Workspace, one: Lesson) -> int:
    """The first task that has not passed a check yet; the last one if all have."""
    done = workspace.solved(one)
    return next((task.number for task in one.tasks if task.number not in done), len(one.tasks))


def _workspace_or_none(folder: Path | None) -> Workspace | None:
    """The learner's folder; None if there is none and none was named."""
    try:
        return Workspace.find(folder)
    except InputError:
        if folder is not None:
            raise
        return None


def _check(workspace: Workspace, one: Lesson) -> Result:
    """Check, print, remember."""
    path = workspace.file(one)
    result = run_check(one, path)
    workspace.note_solved(one, list(result.solved))
    console.print(f"[bold]{one.number}. {one.title}[/bold] · {len(result.solved)} of {len(one.tasks)} tasks\n")
    failed = result.failure
    for task in one.tasks:
        if task.number in result.solved:
            console.print(f"  [green]✓[/green] task {task.number}: {task.name}")
            for line in result.notes.get(task.number, "").splitlines()[-NOTE_LINES:]:
                console.print(f"      [dim]{escape(line)}[/dim]")
        elif failed is not None and failed.task == task.number and not failed.stub:
            console.print(f"  [red]✗[/red] task {task.number}: {task.name}   [dim]{escape(failed.test)}[/dim]")
        else:
            console.print(f"  [dim]·[/dim] task {task.number}: {task.name}")
    if failed is None:
        console.print(
            f"\nAll done. What was won: [bold]python {path.name}[/bold] · on the screen: [bold]minipaged learn show {one.number}[/bold]"
        )
        return result
    console.print()
    if failed.stub:
        console.print(
            f"Next: write [bold]{escape(one.tasks[max(failed.task, 1) - 1].name)}[/bold] in {escape(path.name)}."
        )
    else:
        if failed.where:
            console.print(f"[dim]{escape(failed.where)}[/dim]")
        console.print(escape(failed.message))
        if failed.printed and failed.test:
            console.print(f"\n[dim]printed while {escape(failed.test)} ran:[/dim]")
            console.print(escape("\n".join(failed.printed.rstrip().splitlines()[-PRINTED_LINES:])))
        if result.printed and not failed.test:  # the file could not be loaded
            console.print(escape(result.printed[-2000:]))
    console.print(f"[dim]stuck? minipaged learn hint {one.number}[/dim]")
    return result
