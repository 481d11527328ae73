"""`minipaged learn`: the lessons. Lists them, copies them, checks them, helps, and opens the screen on a lesson's own replay."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from rich import markup
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

from minipaged.cli.keys import Keys
from minipaged.errors import InputError
from minipaged.laws import LAWS, Law
from minipaged.learn.catalog import Lesson, Task, lesson, lessons, task_of
from minipaged.learn.checking import Result
from minipaged.learn.checking import check as run_check
from minipaged.learn.workspace import Workspace
from minipaged.text.safe import printable

app = typer.Typer(help="Rebuild PagedAttention in lessons, each one checked.", pretty_exceptions_enable=False)
console = Console(highlight=False, emoji=False)
KEYS = "h hint · s answer · v screen · n next lesson · ctrl+c ends"
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
    if result.failure is None:
        return
    if result.failure.last_call and console.is_terminal:
        with Keys() as keys:
            if keys.come:
                console.print("[dim]v opens it, any other key ends[/dim]")
                if keys.wait() == "v":
                    keys.lend(partial(_open_screen, one, workspace, mine=True))
    raise typer.Exit(1)


@app.command()
def watch(
    number: Number,
    folder: Folder = None,
    runs: Annotated[int | None, typer.Option(help="Stop after so many checks.", hidden=True)] = None,
) -> None:
    """Check a lesson again each time you save it. Keys: h a hint, s the answer, v the screen, n the next lesson; ctrl+c ends it."""
    one = lesson(number)
    workspace = Workspace.find(folder)
    workspace.file(one)
    seen: tuple[int, int] | None = None
    asked_for_answer = False
    count = 0
    with Keys() as keys:
        while runs is None or count < runs:
            stamp = _stamp(workspace, one)
            if stamp is not None and stamp != seen:  # some editors replace the file: it is gone for a moment
                seen, count, asked_for_answer = stamp, count + 1, False
                if console.is_terminal:
                    console.clear()
                result = _check(workspace, one)
                if result.failure is None and not keys.come:
                    return
                console.print(f"[dim]watching {escape(str(workspace.file(one)))}; {KEYS}[/dim]")
            match keys.get(0.3):
                case "h":
                    _show_hint(workspace, one, task_of(one, _next_task(workspace, one)))
                case "s" if not asked_for_answer:
                    asked_for_answer = True
                    console.print(f"[dim]s again shows the answer to task {_next_task(workspace, one)}[/dim]")
                case "s":
                    _show_answer(one, task_of(one, _next_task(workspace, one)))
                case "v":
                    keys.lend(partial(_open_screen, one, workspace, mine=_failed_run(workspace, one) is not None))
                    seen = None
                case "n" if one.number < len(lessons()):
                    one, seen = lesson(one.number + 1), None
                    workspace.file(one)
                case "n":
                    console.print("This is the last lesson.")


@app.command()
def hint(number: Number, task: TaskNumber = None, folder: Folder = None) -> None:
    """The next hint for a task: first a nudge, then the idea, then nearly the answer."""
    one = lesson(number)
    workspace = Workspace.find(folder)
    chosen = task_of(one, task if task is not None else _next_task(workspace, one))
    _show_hint(workspace, one, chosen)


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
    _show_answer(one, chosen)


@app.command()
def show(
    number: Number,
    folder: Folder = None,
    mine: Annotated[
        bool, typer.Option("--mine", help="Your own run that the last check failed in, at its last call.")
    ] = False,
    headless: Annotated[bool, typer.Option("--headless", help="Run without a terminal and end at once.")] = False,
    screenshot: Annotated[Path | None, typer.Option(help="Write the screen as SVG to this file.")] = None,
) -> None:
    """Open the screen on the lesson's replay: record a small run that shows its idea, then play it."""
    one = lesson(number)
    workspace = Workspace.find(folder) if mine else _workspace_or_none(folder)
    raise typer.Exit(_open_screen(one, workspace, mine=mine, headless=headless, screenshot=screenshot))


@app.command("break")
def break_it(
    number: Annotated[int | None, typer.Argument(metavar="[N]", help="Which break; any one if left out.")] = None,
    about: Annotated[int | None, typer.Option("--lesson", help="Any one on the subject of this lesson.")] = None,
    answer: Annotated[str | None, typer.Option(help="The law, such as L12, instead of asking for it.")] = None,
    headless: Annotated[bool, typer.Option("--headless", help="Run without a terminal and end at once.")] = False,
    screenshot: Annotated[Path | None, typer.Option(help="Write the screen as SVG to this file.")] = None,
) -> None:
    """A bug of the past is put into a copy of the block manager: watch the run, and name the law that broke."""
    from minipaged.cli.show import show as open_screen
    from minipaged.config import DEFAULT_MODEL
    from minipaged.learn import breaks

    if number is None:
        fitting = [i for i, one in enumerate(breaks.BREAKS, 1) if about in (None, one.lesson)]
        if not fitting:
            taken = ", ".join(str(n) for n in sorted({one.lesson for one in breaks.BREAKS}))
            raise InputError(f"no break is about lesson {about}: there are some about {taken}")
        number = random.choice(fitting)
    chosen = breaks.choose(number)
    given = law_of(answer) if answer is not None else None
    console.print(f"[bold]Break {number} of {len(breaks.BREAKS)}[/bold]. One bug is in this block manager.")
    console.print(f"{chosen.look_at} Keys: ] and \\[ step, q ends. Then name the law.")
    if not headless:
        typer.prompt("Enter opens the screen", default="", show_default=False)
    with TemporaryDirectory(prefix="minipaged-") as scratch:
        path = Path(scratch) / "break.trace"
        ended = breaks.play(chosen, chosen.kind, path)
        code = open_screen(DEFAULT_MODEL, replay=path, headless=headless, screenshot=screenshot)
    if code:
        raise typer.Exit(code)
    if ended:
        console.print(f"\nThe run ended early: {escape(ended)}")
    if given is None:
        console.print("\nWhich of these broke?")
        for each in [each for each in LAWS if each.id in breaks.candidates()]:
            console.print(f"  {each.id}  {escape(each.sentence)}")
        given = law_of(typer.prompt("The law"))
    best = law_of(chosen.laws[0])
    right = given.id in chosen.laws
    console.print(
        f"\n[green]Right[/green]: {given.id}. {given.sentence}" if right else f"\n[red]No[/red]: you said {given.id}."
    )
    if given.id != best.id:
        console.print(f"{'It is best told by' if right else 'It was'} {best.id}. {best.sentence}")
    console.print(f"The bug: {escape(chosen.kind.__doc__ or '')}")
    if not right:
        raise typer.Exit(1)


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


def law_of(name: str) -> Law:
    """The law of this id, in any case, with or without its L and zero. InputError if there is none."""
    digits = name.strip().upper().removeprefix("L")
    for one in LAWS:
        if digits.isdecimal() and one.id == f"L{int(digits):02}":
            return one
    raise InputError(f"a law is named as L12 is, not {name.strip()!r}: minipaged laws lists them")


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


def _stamp(workspace: Workspace, one: Lesson) -> tuple[int, int] | None:
    """What changes when the file is saved; None while it is not there."""
    try:
        found = (workspace.folder / one.path.name).stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def _show_hint(workspace: Workspace, one: Lesson, chosen: Task) -> None:
    level = workspace.next_hint(one, chosen.number, len(chosen.hints))
    console.print(
        f"[bold]lesson {one.number}, task {chosen.number}: {chosen.name}[/bold] · hint {level} of {len(chosen.hints)}\n"
    )
    console.print(escape(chosen.hints[level - 1]))
    if level == len(chosen.hints):
        console.print(
            f"\n[dim]That was the last one. The answer: minipaged learn solution {one.number} --task {chosen.number}[/dim]"
        )


def _show_answer(one: Lesson, chosen: Task) -> None:
    console.print(f"\n[bold]{escape(one.stub(chosen.number))}[/bold]")
    console.print(Syntax(one.answer(chosen.number), "python", background_color="default", word_wrap=True))


def _open_screen(
    one: Lesson,
    workspace: Workspace | None,
    *,
    mine: bool = False,
    headless: bool = False,
    screenshot: Path | None = None,
) -> int:
    """The screen on the learner's own run if there is one, else on the lesson's replay. Returns the exit code.

    mine: on the run that the last check failed in, at its last call. InputError if there is none.
    """
    from minipaged.cli.show import show as open_screen
    from minipaged.config import DEFAULT_MODEL
    from minipaged.learn.replays import replay

    failed = _failed_run(workspace, one) if mine else None
    if mine:
        if failed is None:
            raise InputError(
                f"no run of yours that failed: minipaged learn check {one.number} leaves one when a test of your manager fails"
            )
        console.print(f"[bold]{one.number}. {one.title}[/bold]\nYour run, at its last call. \\[ steps back, ] on.")
        return open_screen(DEFAULT_MODEL, replay=failed, at_end=True, headless=headless, screenshot=screenshot)
    with TemporaryDirectory(prefix="minipaged-") as scratch:
        path, look_for = replay(one, workspace.folder if workspace is not None else None, Path(scratch))
        console.print(f"[bold]{one.number}. {one.title}[/bold]\n{escape(look_for)}")
        return open_screen(DEFAULT_MODEL, replay=path, headless=headless, screenshot=screenshot)


def _failed_run(workspace: Workspace | None, one: Lesson) -> Path | None:
    """The recording of the run that the last check failed in, if it left one."""
    from minipaged.learn.replays import failed_run

    path = failed_run(workspace.folder / one.path.name) if workspace is not None else None
    return path if path is not None and path.is_file() else None


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
    if failed.last_call:
        console.print(
            f"\nYour own run, at its end (the last call was {escape(failed.last_call)}):\n"
            f"  [bold]minipaged learn show {one.number} --mine[/bold]"
        )
    console.print(f"[dim]stuck? minipaged learn hint {one.number}[/dim]")
    return result
