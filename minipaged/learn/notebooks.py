"""The lessons as cells: notebooks, made when they are asked for, and pages of the site. The files in tutorials/ are the only source."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from minipaged.errors import InputError
from minipaged.learn.catalog import lessons

CELL = re.compile(r"^# %%(.*)$", re.MULTILINE)
LINK = re.compile(r"\]\((\d\d_\w+)\.py\b")
ABOUT = (
    "> This notebook was made from `{name}` by `minipaged learn notebooks`. Run the cells from the top. A cell that only calls"
    " tests stands behind those that define them; where it fails, the lesson says what to write.\n"
)


class Cell(NamedTuple):
    """A cell of a lesson. kind: markdown or code."""

    kind: str
    text: str


def cells_of(lesson: str) -> list[Cell]:
    """The `# %%` cells of a lesson's file; prose without its comment signs."""
    _, *parts = CELL.split(lesson)
    found = []
    for mark, body in zip(parts[::2], parts[1::2], strict=True):
        if mark.strip() == "[markdown]":
            lines = [line.removeprefix("#").removeprefix(" ") for line in body.strip("\n").splitlines()]
            found.append(Cell("markdown", "\n".join(lines).strip("\n")))
        else:
            found.append(Cell("code", body.strip("\n")))
    return found


def notebook(lesson: str, name: str) -> dict[str, Any]:
    """A lesson's file as a notebook (nbformat 4.5). Behind a cell with tests stands one that calls them."""
    cells: list[Cell] = []
    for cell in cells_of(lesson):
        if cell.kind == "markdown":
            cells.append(Cell("markdown", LINK.sub(r"](\1.ipynb", cell.text)))
            continue
        cells.append(cell)
        tests = [
            node.name
            for node in ast.parse(cell.text).body
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        ]
        if tests:
            cells.append(Cell("code", "\n".join(f"{test}()" for test in tests)))
    cells.insert(1, Cell("markdown", ABOUT.format(name=name)))
    return {
        "cells": [_as_json(number, cell) for number, cell in enumerate(cells)],
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def _as_json(number: int, cell: Cell) -> dict[str, Any]:
    found: dict[str, Any] = {"cell_type": cell.kind, "id": f"cell-{number}", "metadata": {}}
    if cell.kind == "code":
        found |= {"execution_count": None, "outputs": []}
    return found | {"source": cell.text.splitlines(keepends=True)}


def write_notebooks(folder: Path, *, solved: bool = False) -> list[Path]:
    """Write every lesson as a notebook to a folder. InputError, and nothing is written, where one is there already.

    solved: with the solutions in their places.
    """
    texts = {one.path.stem: one.solved() if solved else one.path.read_text(encoding="utf-8") for one in lessons()}
    there = [name for name in texts if (folder / f"{name}.ipynb").exists()]
    if there:
        raise InputError(f"{folder / there[0]}.ipynb exists: what you wrote in it stays; name another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        for name, text in texts.items():
            path = folder / f"{name}.ipynb"
            path.write_text(json.dumps(notebook(text, f"{name}.py"), indent=1) + "\n", encoding="utf-8")
            written.append(path)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}") from None
    return written
