"""The READMEs name only what exists: files and functions, the layers' table, commands and their options."""

from __future__ import annotations

import re
import shlex

import pytest
import typer

from minipaged.cli.main import app
from minipaged.execution.paged_kv import PagedKV
from minipaged.tui.app import ScreenApp
from tests.names_in_text import FILE, ROOT, wrong_names
from tests.test_layers import MAY_IMPORT

README = (ROOT / "README.md").read_text(encoding="utf-8")
REQUESTS_WAY = (ROOT / "minipaged/README.md").read_text(encoding="utf-8")
SERVING = (ROOT / "minipaged/serving/README.md").read_text(encoding="utf-8")
KERNELS = (ROOT / "kernels/README.md").read_text(encoding="utf-8")
ITEMS = re.split(r"\n(?=\d+\. | *- |\|)|\n\n", REQUESTS_WAY)  # a step, a point of a list, a row or a paragraph each
PLACES = re.findall(r"^\| (.*\?) \| (.*) \|$", REQUESTS_WAY, flags=re.MULTILINE)  # (question, answer) of "Where is …?"
STEPS = re.findall(r"^\d+\. \*\*.*?(?=^\d+\. |^## )", REQUESTS_WAY, flags=re.MULTILINE | re.DOTALL)
COMMANDS = [
    line.partition("#")[0].strip()
    for block in [*README.split("```")[1::2], *SERVING.split("```")[1::2]]
    for line in re.split(r"\n| && | \| ", block)
    if line.startswith("minipaged ")
]


@pytest.mark.parametrize("item", [item for item in ITEMS if re.search(rf"`{FILE}`", item)])
def test_a_requests_way_names_only_what_exists(item: str) -> None:
    assert wrong_names(item) == [], item


def test_each_step_of_a_requests_way_names_a_file_and_what_it_does_there() -> None:
    assert [int(step.partition(".")[0]) for step in STEPS] == list(range(1, len(STEPS) + 1))
    assert len(STEPS) > 10
    for step in STEPS:
        assert re.search(rf"`{FILE}`\s+`[\w.]+`", step), step


@pytest.mark.parametrize(("question", "answer"), PLACES)
def test_each_question_is_answered_by_a_file_and_what_to_look_for_there(question: str, answer: str) -> None:
    assert re.search(rf"^`{FILE}`\s+`[\w.]+`", answer), question
    assert wrong_names(answer) == []


def test_the_questions_are_those_that_one_asks() -> None:
    asked = " ".join(question for question, _ in PLACES)
    words = "last reference, stop string, key and value written, scales, screen, model family, preempted, replayed, law, Orca"
    assert [word for word in words.split(", ") if word not in asked] == []


@pytest.mark.parametrize("owner", [PagedKV, ScreenApp])
def test_what_the_table_sends_a_reader_to_names_only_what_exists(owner: type) -> None:
    text = owner.__doc__ or ""
    assert len(re.findall(rf"`{FILE}`", text)) > 4
    spoken = re.sub(r"(?<!\.py` )`(\w+)`", lambda m: m[0] if not hasattr(owner, m[1]) else "", text)
    assert wrong_names(spoken) == []


def test_the_servers_readme_names_only_what_exists() -> None:
    rows = [row for row in SERVING.splitlines() if re.search(rf"`{FILE}`", row)]
    assert len(rows) > 9
    assert [name for row in rows for name in wrong_names(row)] == []


def test_the_readme_has_the_table_of_layers() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([a-z ]*)\|$", README, flags=re.MULTILINE)
    assert {part: may.split() for part, may in rows} == {part: may.split() for part, may in MAY_IMPORT.items()}


def test_the_kernels_readme_names_files_that_exist() -> None:
    there = {path.relative_to(ROOT / "kernels").as_posix() for path in (ROOT / "kernels").rglob("*.py")}
    there |= {path.name for folder in ("kernels", "tests/kernels") for path in (ROOT / folder).rglob("*.py")}
    named = set(re.findall(r"`([a-z]\w*(?:/\w+)?\.py)`", KERNELS))
    assert len(named) > 20
    assert [name for name in named if name not in there and not (ROOT / name).is_file()] == []


def test_the_readme_shows_commands() -> None:
    assert len(COMMANDS) > 5


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_is_understood(command: str) -> None:
    """Parsed as the command line parses it, and not run."""
    found, arguments = typer.main.get_command(app), shlex.split(command)[1:]
    while hasattr(found, "commands"):
        found = found.commands[arguments.pop(0)]
    with found.make_context("minipaged", arguments):
        pass


def test_the_readmes_test_command_is_the_continuous_checks() -> None:
    check = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/pytest" in check
    assert "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/pytest" in README
