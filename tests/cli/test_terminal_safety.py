"""L75: whatever a file, a name, a model or a program of a stranger says, no command passes it to the terminal as it is."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from minipaged.cli.learn import app as learn_app
from minipaged.cli.main import app
from minipaged.cli.terminal import run_guarded
from minipaged.text.safe import REPLACED, steers

ROOT = Path(__file__).resolve().parents[2]
EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e[/b][red]:smile:"
NAME = "evil\x1b[2J\x9b[red]"  # what a file may be called


def hostile_model(folder: Path) -> list[str]:
    (folder / NAME).mkdir()
    (folder / NAME / "config.json").write_text(json.dumps({"model_type": EVIL, "architectures": [EVIL]}))
    return ["generate", "x", "--model", str(folder / NAME)]


def hostile_prompts(folder: Path) -> list[str]:
    (folder / NAME).write_text(EVIL + "\n" + EVIL * 200 + "\n")
    return ["tui", "--model", "toy", "--prompts", str(folder / NAME), "--num-blocks", "40"]


def hostile_trace(folder: Path) -> list[str]:
    (folder / NAME).write_bytes(b"minipaged trace" + EVIL.encode() * 20)
    return ["tui", "--replay", str(folder / NAME), "--headless"]


def hostile_results(folder: Path) -> list[str]:
    row = {"model": EVIL, "contender": "minipaged", "workload": EVIL, "requests": 1, "output_tokens": 1, "seconds": 1.0}
    head = {"command": EVIL, "date": EVIL, "device": EVIL, "versions": {"torch": EVIL}, "python": EVIL}
    measured = {"tokens_per_second": 1.0, "ratio": None, "kind": "engine", "prompt_tokens": 1}
    (folder / "engine.json").write_text(json.dumps({**head, "rows": [{**row, **measured}], "notes": [EVIL]}))
    return ["bench", "report", str(folder)]


def hostile_tests(folder: Path) -> list[str]:
    (folder / f"test_{NAME}.py").write_text("def test_L07_x(): pass\n")
    return ["laws", "--tests", str(folder)]


def hostile_traffic(folder: Path) -> list[str]:
    (folder / f"{NAME}.csv").write_text("arrival,prompt_tokens,output_tokens\n0,10,5\n1,20,7\n")
    return ["lab", "simulate", "--trace", str(folder / f"{NAME}.csv")]


def hostile_lesson(folder: Path) -> list[str]:
    run_guarded(partial(learn_app, args=["start", str(folder / NAME)]))
    (one,) = (folder / NAME).glob("01_*.py")
    source = one.read_text()
    at = source.index("def test_1_")
    body = source.index(":\n", at) + 2
    one.write_text(source[:body] + f"    print({EVIL!r})\n    raise ValueError({EVIL!r})\n" + source[body:])
    return ["learn", "check", "1", "--dir", str(folder / NAME)]


def hostile_command(folder: Path) -> list[str]:
    return [EVIL]


def hostile_option(folder: Path) -> list[str]:
    return ["generate", "x", f"--{EVIL}"]


def hostile_answer(folder: Path) -> list[str]:
    """The toy writes bytes at random: control characters among them."""
    return ["generate", EVIL, "--model", "toy", "--max-tokens", "150", "--temperature", "5", "--seed", "1"]


@pytest.mark.parametrize(
    "arrange",
    [
        hostile_model, hostile_prompts, hostile_trace, hostile_results, hostile_tests, hostile_traffic, hostile_lesson,
        hostile_command, hostile_option, hostile_answer,
    ],
)  # fmt: skip
def test_L75_no_command_steers_the_terminal(
    arrange: Callable[[Path], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = arrange(tmp_path)
    capsys.readouterr()
    run_guarded(partial(app, args=command))
    shown = capsys.readouterr()
    said = shown.out + shown.err
    assert REPLACED in said or "\\x1b" in said, (
        f"the stranger's text was not shown at all, so nothing was tested: {said[:300]!r}"
    )
    assert not [char for char in said if char not in "\n\t" and steers(char)]
    shutil.rmtree(tmp_path, ignore_errors=True)


def test_L75_tables_are_drawn_in_one_place() -> None:
    """There every cell is made safe. The lessons' list holds nothing of a stranger's."""
    drawers = set()
    for part in ("minipaged/cli", "minipaged/lab", "minipaged/learn", "minipaged/serving", "tui"):
        for path in (ROOT / part).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and node.module == "rich.table":
                    drawers.add(path.relative_to(ROOT).as_posix())
    assert drawers == {"minipaged/lab/report/tables.py", "minipaged/cli/learn.py"}
