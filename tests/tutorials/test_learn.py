"""`minipaged learn` as a learner uses it: start, check, hint, solution, reset, watch, show."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from minipaged.cli.learn import app
from minipaged.errors import InputError
from minipaged.learn.catalog import lesson, lessons
from minipaged.learn.checking import check
from minipaged.learn.replays import recording
from minipaged.learn.tape import Tape
from minipaged.learn.workspace import PROGRESS, Workspace


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Workspace.start(tmp_path / "mine")
    return tmp_path / "mine"


def learn(*words: object, answer: str = "") -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(word) for word in words], input=answer, env={"COLUMNS": "200"})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.output


def solve(folder: Path, number: int) -> None:
    one = lesson(number)
    (folder / one.path.name).write_text(one.solution.read_text(encoding="utf-8"), encoding="utf-8")


def test_start_copies_and_never_overwrites(folder: Path) -> None:
    mine = folder / lesson(1).path.name
    mine.write_text("mine", encoding="utf-8")
    (folder / lesson(2).path.name).unlink()
    code, text = learn("start", folder)
    assert code == 0
    assert "1 files copied" in text
    assert mine.read_text(encoding="utf-8") == "mine"
    assert (folder / "glossary.md").is_file()
    assert not (folder / "solutions").exists()


def test_list_shows_every_lesson_with_or_without_a_folder(folder: Path) -> None:
    solve(folder, 1)
    learn("check", 1, "--dir", folder)
    code, text = learn("list", "--dir", folder)
    assert code == 0
    assert all(one.title in text for one in lessons())
    assert "✓\u00a0split" in text
    assert "minipaged learn watch 2" in text
    assert "minipaged learn start DIR" in learn()[1]


def test_check_names_the_next_task(folder: Path) -> None:
    code, text = learn("check", 1, "--dir", folder)
    assert code == 1
    assert "0 of 2 tasks" in text
    assert "Next: write split in 01_the_waste.py" in text


def test_check_shows_what_went_wrong_and_where(folder: Path) -> None:
    mine = folder / lesson(1).path.name
    text = mine.read_text(encoding="utf-8")
    mine.write_text(
        text.replace('raise NotImplementedError("lesson 1, task 1: split")', "return Split(1, 2, 3)"), encoding="utf-8"
    )
    code, said = learn("check", 1, "--dir", folder)
    assert code == 1
    assert "✗ task 1: split" in said
    assert "test_1_a_request_in_the_middle" in said
    assert "line " in said


def test_check_remembers_what_is_solved_and_what_is_no_longer(folder: Path) -> None:
    solve(folder, 1)
    code, text = learn("check", 1, "--dir", folder)
    assert code == 0
    assert "All done" in text
    assert Workspace(folder).solved(lesson(1)) == [1, 2]
    (folder / lesson(1).path.name).write_text(lesson(1).path.read_text(encoding="utf-8"), encoding="utf-8")
    learn("check", 1, "--dir", folder)
    assert Workspace(folder).solved(lesson(1)) == []


def test_a_file_that_does_not_parse_is_a_line_and_not_a_traceback(folder: Path) -> None:
    (folder / lesson(1).path.name).write_text("def split(:\n", encoding="utf-8")
    code, text = learn("check", 1, "--dir", folder)
    assert code == 1
    assert "SyntaxError" in text
    assert "line 1" in text


def test_an_endless_loop_is_stopped(folder: Path) -> None:
    mine = folder / lesson(1).path.name
    text = mine.read_text(encoding="utf-8").replace("    raise Not", "    while True: pass\n    raise Not", 1)
    mine.write_text(text, encoding="utf-8")
    result = check(lesson(1), mine, limit_seconds=4)
    assert result.failure is not None
    assert "a loop that never ends" in result.failure.message


def test_hints_go_from_a_nudge_to_nearly_the_answer(folder: Path) -> None:
    task = lesson(1).tasks[0]
    for level in (1, 2, 3, 3):
        code, text = learn("hint", 1, "--dir", folder)
        assert code == 0
        assert f"hint {level} of 3" in text
        assert task.hints[level - 1][:40] in text
    assert "hint 1 of 3" in learn("hint", 1, "--task", 2, "--dir", folder)[1]


def test_solution_asks_first(folder: Path) -> None:
    _, text = learn("solution", 1, "--dir", folder, answer="n\n")
    assert "reserved=needed - written" not in text
    code, text = learn("solution", 1, "--dir", folder, answer="y\n")
    assert code == 0
    assert "reserved=needed - written" in text


def test_reset_keeps_what_was_written(folder: Path) -> None:
    solve(folder, 1)
    learn("check", 1, "--dir", folder)
    code, text = learn("reset", 1, "--yes", "--dir", folder)
    assert code == 0
    assert (folder / "01_the_waste.mine1.py").read_bytes() == lesson(1).solution.read_bytes()
    assert "01_the_waste.mine1.py" in text
    assert (folder / "01_the_waste.py").read_bytes() == lesson(1).path.read_bytes()
    assert Workspace(folder).solved(lesson(1)) == []


def test_watch_ends_when_the_lesson_is_solved(folder: Path) -> None:
    solve(folder, 1)
    code, text = learn("watch", 1, "--runs", 1, "--dir", folder)
    assert code == 0
    assert "All done" in text


def test_show_opens_the_lessons_replay(folder: Path, tmp_path: Path) -> None:
    picture = tmp_path / "screen.svg"
    code, text = learn("show", 8, "--dir", folder, "--headless", "--screenshot", picture)
    assert code == 0
    assert "Four samples of one prompt" in text
    assert "<svg" in picture.read_text(encoding="utf-8")


def test_show_prefers_what_the_learners_own_run_left(folder: Path, tmp_path: Path) -> None:
    tape = Tape(6, 4)
    tape.note({"A": [3]}, {"A": 2})
    recording(folder, lesson(6)).parent.mkdir()
    tape.write(recording(folder, lesson(6)))
    code, text = learn("show", 6, "--dir", folder, "--headless", "--screenshot", tmp_path / "x.svg")
    assert code == 0
    assert "What your own run left behind" in text


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("check", 99), "lesson must be from 1 to"),
        (("hint", 1, "--task", 9), "task must be from 1 to 2"),
        (("check", 1, "--dir", "/nowhere"), "is no folder of lessons"),
        (("show", 13, "--headless"), "shows your own run, and there is none yet"),
    ],
)
def test_bad_input_is_one_clear_line(folder: Path, words: tuple[object, ...], told: str) -> None:
    extra = () if "--dir" in words else ("--dir", folder)
    with pytest.raises(InputError, match=told):
        learn(*words, *extra)


def test_a_damaged_progress_file_is_named(folder: Path) -> None:
    (folder / PROGRESS).write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match="cannot be read"):
        Workspace.find(folder)


def test_check_shows_what_a_law_found(folder: Path) -> None:
    solve(folder, 3)
    code, text = learn("check", 3, "--dir", folder)
    assert code == 0
    assert "your law finds 9 of 9 bugs" in text


def test_check_shows_what_a_failing_test_printed_and_both_sides(folder: Path) -> None:
    mine = folder / lesson(1).path.name
    wrong = "    print('written is', written)\n    return Split(written, 0, 0)"
    stub = f'    raise NotImplementedError("{lesson(1).stub(1)}")'
    mine.write_text(mine.read_text(encoding="utf-8").replace(stub, wrong), encoding="utf-8")
    code, text = learn("check", 1, "--dir", folder)
    assert code == 1
    assert "written is 15" in text
    assert "on the left   Split(token=15, reserved=0, internal=0)" in text
    assert "on the right  Split(token=15, reserved=25, internal=60)" in text
