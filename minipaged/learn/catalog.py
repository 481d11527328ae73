"""Which lessons there are: files, titles, tasks and hints, read from the tutorials folder."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from minipaged.errors import InputError
from minipaged.learn.solve import solve, source_of, stubs

HINT_LEVELS = 3


@dataclass(frozen=True, slots=True)
class Task:
    """One thing to write."""

    number: int
    name: str  # the function or class to write
    hints: tuple[str, ...]  # from a nudge to nearly the answer


@dataclass(frozen=True, slots=True)
class Lesson:
    """One lesson. `path` is the unsolved file as it was shipped, not a learner's copy."""

    number: int
    title: str
    minutes: int  # to work through; the compute takes seconds
    path: Path
    tasks: tuple[Task, ...]

    @property
    def solutions(self) -> Path:
        """The file with the solutions of its tasks."""
        return self.path.parent / "solutions" / self.path.name

    def stub(self, task: int) -> str:
        """What the stubs of a task raise."""
        return f"lesson {self.number}, task {task}: {self.tasks[task - 1].name}"

    def solved(self, tasks: int | None = None) -> str:
        """The text of the solved lesson; with `tasks`, only its first so many tasks are solved."""
        return solve(self.path.read_text(encoding="utf-8"), self.solutions.read_text(encoding="utf-8"), tasks)

    def answer(self, task: int) -> str:
        """The functions of one task, solved."""
        found = stubs(self.path.read_text(encoding="utf-8"))
        names = [name for name, (title, _) in found.items() if title == self.stub(task)]
        return source_of(names, self.solved())


def tutorials_folder() -> Path:
    """Where the shipped lessons lie: inside the package in a wheel, beside it in a checkout."""
    package = files("minipaged")
    for folder in (package / "tutorials", package / ".." / "tutorials"):
        if isinstance(folder, Path) and (folder / "solutions").is_dir():
            return folder.resolve()
    raise InputError("the lessons are not installed: clone the repository and run `pip install -e '.[test]'` in it")


@cache
def lessons() -> tuple[Lesson, ...]:
    """All lessons, in order."""
    folder = tutorials_folder()
    return tuple(_read(path) for path in sorted(folder.glob("[0-9][0-9]_*.py")))


def lesson(number: int) -> Lesson:
    """Lesson `number`. InputError if there is none."""
    for one in lessons():
        if one.number == number:
            return one
    raise InputError(f"lesson must be from 1 to {len(lessons())}, not {number}")


def task_of(one: Lesson, number: int) -> Task:
    """Task `number` of a lesson. InputError if there is none."""
    if not 1 <= number <= len(one.tasks):
        raise InputError(f"task must be from 1 to {len(one.tasks)} in lesson {one.number}, not {number}")
    return one.tasks[number - 1]


def _read(path: Path) -> Lesson:
    number = int(path.name[:2])
    heading = next(line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# # "))
    details = tomllib.loads((path.parent / "hints" / f"{path.stem}.toml").read_text(encoding="utf-8"))
    tasks = tuple(Task(i, row["name"], tuple(row["hints"])) for i, row in enumerate(details["task"], 1))
    return Lesson(number, heading.removeprefix("# # ").split(". ", 1)[1], details["minutes"], path, tasks)
