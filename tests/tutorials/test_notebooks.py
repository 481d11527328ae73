"""The lessons as notebooks: cell by cell what the files say, and they run from top to bottom."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minipaged.errors import InputError
from minipaged.learn.catalog import Lesson, lessons
from minipaged.learn.notebooks import cells_of, write_notebooks

ROOT = Path(__file__).resolve().parents[2]
each_lesson = pytest.mark.parametrize("lesson", lessons(), ids=lambda lesson: lesson.path.stem)


@pytest.fixture(scope="module")
def solved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("notebooks")
    written = write_notebooks(folder, solved=True)
    assert [path.stem for path in written] == [one.path.stem for one in lessons()]
    return folder


def sources(path: Path, kind: str) -> list[str]:
    found = json.loads(path.read_text(encoding="utf-8"))
    assert (found["nbformat"], found["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in found["cells"]]
    assert len(set(ids)) == len(ids)
    return ["".join(cell["source"]) for cell in found["cells"] if cell["cell_type"] == kind]


@each_lesson
def test_a_notebook_holds_the_lesson(lesson: Lesson, solved: Path) -> None:
    code = "\n".join(sources(solved / f"{lesson.path.stem}.ipynb", "code"))
    tree = ast.parse(code)
    calls = [node for node in tree.body if isinstance(node, ast.Expr) and ast.unparse(node).startswith("test_")]
    tests = [n.name for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")]
    assert [ast.unparse(call) for call in calls] == [f"{name}()" for name in tests]
    tree.body = [node for node in tree.body if node not in calls]
    assert ast.unparse(tree) == ast.unparse(ast.parse(lesson.solved()))
    prose = sources(solved / f"{lesson.path.stem}.ipynb", "markdown")
    assert prose[0].startswith(f"# {lesson.number}. {lesson.title}")
    assert len(prose) == 1 + sum(cell.kind == "markdown" for cell in cells_of(lesson.solved()))
    assert not any(".py)" in text and "](0" in text for text in prose), "links lead to notebooks"


def run(path: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests/tutorials/run_notebook.py"), str(path)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=200, env=environment, cwd=path.parent, check=False
    )


def test_a_solved_notebook_runs_and_an_unsolved_one_says_what_to_write(solved: Path, tmp_path: Path) -> None:
    one = lessons()[3]
    done = run(solved / f"{one.path.stem}.ipynb")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    write_notebooks(tmp_path)
    unsolved = run(tmp_path / f"{one.path.stem}.ipynb")
    assert unsolved.returncode == 1
    assert unsolved.stderr.splitlines()[-1] == f"NotImplementedError: {one.stub(1)}"
    with pytest.raises(InputError, match="exists: what you wrote in it stays"):
        write_notebooks(tmp_path)


@pytest.mark.slow
@each_lesson
def test_every_solved_notebook_runs(lesson: Lesson, solved: Path) -> None:
    done = run(solved / f"{lesson.path.stem}.ipynb")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_kernel_runs_a_notebook(solved: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    found = nbformat.read(solved / "04_translation.ipynb", as_version=4)
    nbformat.validate(found)
    nbclient.NotebookClient(found, timeout=120, kernel_name="python3").execute()
