"""`minipaged learn` as a learner uses it: start, check, hint, solution, reset, watch, show."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from minipaged.cli.learn import app
from minipaged.errors import InputError
from minipaged.learn.catalog import lesson, lessons
from minipaged.learn.checking import LIMIT_SECONDS, check
from minipaged.learn.replays import failed_run, recording
from minipaged.learn.tape import Tape
from minipaged.learn.workspace import PROGRESS, Workspace
from minipaged.trace.player import Player
from minipaged.trace.sources import FileSource


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
    (folder / one.path.name).write_text(one.solved(), encoding="utf-8")


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


def test_what_a_file_prints_before_it_fails_to_load_is_shown_once(folder: Path) -> None:
    (folder / lesson(1).path.name).write_text("print('loading')\n1 / 0\n", encoding="utf-8")
    code, text = learn("check", 1, "--dir", folder)
    assert code == 1
    assert "line 2: 1 / 0\nZeroDivisionError: division by zero\nloading\n" in text
    assert text.count("loading") == 1


def test_a_file_that_does_not_parse_is_a_line_and_not_a_traceback(folder: Path) -> None:
    (folder / lesson(1).path.name).write_text("def split(:\n", encoding="utf-8")
    code, text = learn("check", 1, "--dir", folder)
    assert code == 1
    assert "SyntaxError" in text
    assert "line 1" in text


@pytest.mark.parametrize(
    "loop", ["while True: pass", "sum(iter(int, 1))", "while True:\n        try: 1 / 0\n        except: pass"]
)
def test_an_endless_loop_is_stopped_and_named(folder: Path, loop: str) -> None:
    """In Python, inside of C code, and where the learner's code catches everything."""
    mine = folder / lesson(1).path.name
    stub = f'raise NotImplementedError("{lesson(1).stub(1)}")'
    text = mine.read_text(encoding="utf-8").replace(stub, f"print('before the loop')\n    {loop}")
    mine.write_text(text, encoding="utf-8")
    failure = check(lesson(1), mine, limit_seconds=1).failure
    assert failure is not None
    assert (failure.task, failure.test) == (1, "test_1_a_request_in_the_middle")
    assert failure.message == "stopped after 1 seconds: a loop that never ends?"
    assert failure.where in [
        f"line {number}: {line.strip()}" for number, line in enumerate(text.splitlines(), 1) if line.strip() in loop
    ]
    assert failure.printed == "before the loop\n"


def test_an_endless_loop_is_shown_with_its_test(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert LIMIT_SECONDS == 20
    monkeypatch.setitem(check.__kwdefaults__, "limit_seconds", 1)
    mine = folder / lesson(1).path.name
    mine.write_text(mine.read_text(encoding="utf-8").replace("    raise Not", "    while True: pass\n    raise Not", 1))
    code, text = learn("check", 1, "--dir", folder)
    assert code == 1
    assert "✗ task 1: split   test_1_a_request_in_the_middle" in text
    assert "stopped after 1 seconds: a loop that never ends?" in text
    assert "while True: pass" in text


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "def test_1_x():\n    import os\n    os._exit(3)\n",
            "the run ended with the exit status 3 before the end of test_1_x",
        ),
        ("def test_1_x():\n    import os\n    os.abort()\n", "the run ended with the signal SIGABRT"),
        ("x = 1\n", "there are no tests in this file"),
        ("while True: pass\n", "stopped after 3 seconds: a loop that never ends?"),
    ],
)
def test_a_run_that_ends_early_says_why(folder: Path, source: str, message: str) -> None:
    mine = folder / lesson(1).path.name
    mine.write_text(source, encoding="utf-8")
    failure = check(lesson(1), mine, limit_seconds=1).failure
    assert failure is not None
    assert failure.message == message


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the time limit ends the child")
@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_the_lessons_process_ends_with_its_parent(folder: Path, ending: signal.Signals) -> None:
    mine = folder / lesson(1).path.name
    pid_file = folder / "pid"
    mine.write_text(
        f"import os\nopen({str(pid_file)!r}, 'w').write(f'{{os.getpid()}} ')\nwhile True: pass\n", encoding="utf-8"
    )
    command = [sys.executable, "-m", "minipaged", "learn", "check", "1", "--dir", str(folder)]
    parent = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: pid_file.exists() and pid_file.read_text().endswith(" "))
        parent.send_signal(ending)
        parent.wait(timeout=30)
    finally:
        parent.kill()
    wait_until(lambda: not is_running(int(pid_file.read_text())))


def is_running(pid: int) -> bool:
    """Whether the process is there and not merely waiting to be collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Return when the condition holds; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


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


def test_the_whole_solution_is_a_file_that_passes(folder: Path) -> None:
    code, text = learn("solution", 4, "--whole", "--yes", "--dir", folder)
    assert (code, text) == (0, lesson(4).solved())
    assert "def slot(" not in learn("solution", 4, "--whole", "--dir", folder, answer="n\n")[1]
    (folder / lesson(4).path.name).write_text(text, encoding="utf-8")
    assert "3 of 3 tasks" in learn("check", 4, "--dir", folder)[1]


def test_reset_keeps_what_was_written(folder: Path) -> None:
    solve(folder, 1)
    learn("check", 1, "--dir", folder)
    code, text = learn("reset", 1, "--yes", "--dir", folder)
    assert code == 0
    assert (folder / "01_the_waste.mine1.py").read_bytes() == lesson(1).solved().encode()
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


def test_a_failing_check_leaves_the_learners_own_run(folder: Path, tmp_path: Path) -> None:
    """It ends at the call that broke the rule: here B writes into a block that A holds too. The next check begins without it."""
    path = folder / lesson(8).path.name
    right = lesson(8).solved()
    path.write_text(right.replace("self.ref_counts[table[entry]] > 1", "self.ref_counts[table[entry]] > 2"), "utf-8")
    code, text = learn("check", 8, "--dir", folder)
    assert code == 1
    assert "the last call was append('B', 60)" in text
    assert "minipaged learn show 8 --mine" in text
    source = FileSource(failed_run(path) or path)
    player = Player(source)
    player.seek(len(source))
    assert sorted(player.snapshot.tables.values()) == [(7, 8), (7, 8)]
    assert sorted(each.num_computed for each in player.snapshot.sequences.values()) == [6, 7]
    picture = tmp_path / "screen.svg"
    assert learn("show", 8, "--mine", "--dir", folder, "--headless", "--screenshot", picture)[0] == 0
    assert "3/3" in picture.read_text(encoding="utf-8")
    path.write_text("def", encoding="utf-8")
    check(lesson(8), path)
    with pytest.raises(InputError, match="no run of yours that failed"):
        learn("show", 8, "--mine", "--dir", folder)


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
    assert "you said  Split(token=15, reserved=0, internal=0)" in text
    assert "right     Split(token=15, reserved=25, internal=60)" in text


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals there")
def test_watch_obeys_its_keys(folder: Path) -> None:
    """In a real terminal: a hint, the answer at the second press, the next lesson."""
    import pty

    solve(folder, 1)
    terminal, other = pty.openpty()
    command = [sys.executable, "-m", "minipaged", "learn", "watch", "1", "--dir", str(folder)]
    child = subprocess.Popen(command, stdin=other, stdout=other, stderr=other, env={**os.environ, "TERM": "xterm"})
    os.close(other)
    said = ""

    def until(words: str) -> None:
        nonlocal said
        deadline = time.monotonic() + 60
        while words not in said:
            assert time.monotonic() < deadline, said
            if select.select([terminal], [], [], 0.5)[0]:
                said += os.read(terminal, 65536).decode()
        said = ""

    try:
        for key, words in (
            ("", "All done"),
            ("n", "Next: write"),
            ("h", "hint 1 of 3"),
            ("s", "s again"),
            ("s", "lengths"),
        ):
            os.write(terminal, key.encode())
            until(words)
        child.send_signal(signal.SIGINT)
        child.wait(timeout=30)
    finally:
        child.kill()
        child.wait()
        os.close(terminal)
