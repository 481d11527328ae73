"""`minipaged learn break`: each bug shows in its recording, none without it, and the answer is judged."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from minipaged.cli.learn import app, law_of
from minipaged.errors import InputError
from minipaged.learn.breaks import BREAKS, Break, candidates, play
from minipaged.learn.catalog import lesson
from minipaged.memory.block_manager import BlockManager
from minipaged.trace.snapshot import Snapshot
from minipaged.trace.sources import FileSource

each_break = pytest.mark.parametrize("one", BREAKS, ids=lambda one: one.kind.__name__)


def shown(one: Break, kind: type[BlockManager], path: Path) -> tuple[str, list[dict[str, object]]]:
    """How the story ended, and what the screen reads at each step."""
    ended, state, seen = play(one, kind, path), Snapshot(), []
    source = FileSource(path)
    for i in range(len(source)):
        state.apply(source.delta(i))
        counts = dict(enumerate(state.device.refs.tolist()))
        tables: dict[str, object] = {f"{k}": t for k, t in state.tables.items()}
        hosts: dict[str, object] = {f"host {k}": t for k, t in state.host_tables.items()}
        seen.append({"counts": counts, "free": state.stats.free_blocks} | tables | hosts)
    return ended, seen


@each_break
def test_a_break_shows_and_the_right_manager_does_not(one: Break, tmp_path: Path) -> None:
    ended, right = shown(one, BlockManager, tmp_path / "right.trace")
    assert ended == "", "the story itself must be sound"
    _, wrong = shown(one, one.kind, tmp_path / "wrong.trace")
    assert wrong != right, "nothing of the bug can be seen"
    assert wrong[0] == right[0], "it begins as it should"


@each_break
def test_a_break_names_laws_and_a_lesson_that_exist(one: Break) -> None:
    assert [law_of(name).id for name in one.laws] == list(one.laws)
    assert one.laws[0] in candidates()
    assert lesson(one.lesson)
    assert one.kind.__doc__


def said(*words: object, answer: str = "") -> tuple[int, str]:
    done = CliRunner().invoke(app, ["break", *map(str, words), "--headless"], input=answer, env={"COLUMNS": "200"})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.output


def test_the_answer_is_judged(tmp_path: Path) -> None:
    code, text = said(1, "--screenshot", tmp_path / "x.svg", answer="l12\n")
    assert code == 0
    assert "Right: L12. A fork allocates nothing" in text
    assert "The bug: A fork copies the table and counts no new holder." in text
    assert "<svg" in (tmp_path / "x.svg").read_text(encoding="utf-8")
    code, text = said(1, answer="24\n")
    assert code == 1
    assert "No: you said L24." in text
    assert "It was L12. A fork allocates nothing" in text
    code, text = said(1, "--answer", "L02")
    assert code == 0
    assert "It is best told by L12." in text


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((99,), "break must be from 1 to"),
        (("--lesson", 1), "no break is about lesson 1: there are some about 6, 8, 10, 11, 16"),
        ((1, "--answer", "L99"), "a law is named as L12 is, not 'L99'"),
    ],
)
def test_bad_input_is_told_before_anything_runs(words: tuple[object, ...], told: str) -> None:
    with pytest.raises(InputError, match=told):
        said(*words)
