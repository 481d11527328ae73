"""From a solved lesson to the one a learner gets: the marked bodies become stubs, all else stays word for word.

A task's body stands between two comments:

    def split(...):
        # solution: lesson 1, task 1: split
        ...
        # end of solution

and becomes `raise NotImplementedError("lesson 1, task 1: split")`. The solved file is the only source; `python -m
minipaged.learn.strip` writes the others, and a test asserts that they agree. Knows text; knows nothing of running it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

START, END = "# solution: ", "# end of solution"


class Body(NamedTuple):
    """A solved body, as it stands in the file. A task that asks for several functions has several."""

    title: str  # "lesson 1, task 1: split"
    head: tuple[str, ...]  # the function's signature and docstring
    lines: tuple[str, ...]

    @property
    def task(self) -> int:
        """The task's number."""
        return int(self.title.split("task ")[1].split(":")[0])


def bodies(solved: str) -> list[Body]:
    """The marked bodies, in order. ValueError where a mark has no partner."""
    found: list[Body] = []
    title: str | None = None
    head: list[str] = []
    lines: list[str] = []
    for number, line in enumerate(solved.splitlines(), 1):
        text = line.strip()
        if title is None and text.startswith("def "):
            head = []
        if title is None and text != END:
            head.append(line)
        if text.startswith(START):
            if title is not None:
                raise ValueError(f"line {number}: {title!r} has not ended")
            title, lines = text.removeprefix(START), []
            head.pop()
        elif text == END:
            if title is None:
                raise ValueError(f"line {number}: nothing to end")
            found.append(Body(title, tuple(head), tuple(lines)))
            title, head = None, []
        elif title is not None:
            lines.append(line)
    if title is not None:
        raise ValueError(f"{title!r} never ends")
    return found


def strip(solved: str) -> str:
    """The lesson with a stub in place of each marked body."""
    bodies(solved)  # raises where the marks do not pair
    kept: list[str] = []
    inside = False
    for line in solved.splitlines():
        text = line.strip()
        if text.startswith(START):
            indent = line[: len(line) - len(line.lstrip())]
            kept.append(f'{indent}raise NotImplementedError("{text.removeprefix(START)}")')
            inside = True
        elif text == END:
            inside = False
        elif not inside:
            kept.append(line)
    return "\n".join(kept) + "\n"


def main(folder: Path) -> int:
    """Write every unsolved lesson of a tutorials folder from its solution; names those that changed."""
    for solved in sorted((folder / "solutions").glob("[0-9][0-9]_*.py")):
        target, text = folder / solved.name, strip(solved.read_text(encoding="utf-8"))
        if not target.exists() or target.read_text(encoding="utf-8") != text:
            target.write_text(text, encoding="utf-8")
            print(f"wrote {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "tutorials")))
