"""What the lessons lean on: the manager so far, the tape, the replays, the runner, and solved lessons."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from minipaged.learn import so_far
from minipaged.learn.catalog import lesson, lessons
from minipaged.learn.checking import check
from minipaged.learn.replays import SCENES, record
from minipaged.learn.runner import find_tests, load, run
from minipaged.learn.solve import solve, source_of, stubs
from minipaged.learn.tape import Tape
from minipaged.learn.workspace import PROGRESS
from minipaged.trace.events import StepDelta
from minipaged.trace.snapshot import Snapshot, fold
from minipaged.trace.sources import FileSource


def test_the_manager_so_far_is_a_solution_of_lesson_8(tmp_path: Path) -> None:
    path = tmp_path / "lesson.py"
    path.write_text(lesson(8).solved(), encoding="utf-8")
    module = load(path)
    vars(module).update(Manager=so_far.Manager, OutOfBlocks=so_far.OutOfBlocks)
    for _, _, function in find_tests(module):
        function()


def test_a_tape_shows_what_was_recorded(tmp_path: Path) -> None:
    tape = Tape(6, 4)
    tape.note({"A": [2]}, {"A": 3})
    tape.note({"A": [2, 4], "B": [5]}, {"A": 6, "B": 1})
    tape.note({"B": [5]}, {"B": 2})
    tape.write(tmp_path / "x.trace")
    source = FileSource(tmp_path / "x.trace")
    states = [fold([source.delta(i) for i in range(n)]) for n in range(1, 4)]
    assert states[1].tables == {0: (2, 4), 1: (5,)}
    assert states[1].device.fill.tolist() == [0, 0, 4, 0, 2, 1]
    assert states[1].stats.free_blocks == 2
    assert [len(s.token_ids) for s in states[1].sequences.values()] == [6, 1], "the map draws a slot for each of them"
    assert states[2].tables == {1: (5,)}
    assert states[2].sequences[0].status == "finished"
    assert [(e.kind, e.block) for e in source.delta(2).events] == [("free", 4), ("free", 2)]


def test_a_tape_is_kept_only_in_a_learners_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tape = Tape(4, 4)
    tape.note({"A": [1]}, {"A": 1})
    assert tape.save("x") is None
    assert list(tmp_path.iterdir()) == []
    (tmp_path / PROGRESS).write_text("{}", encoding="utf-8")
    assert tape.save("x") == Path(".recordings") / "x.trace"


@pytest.mark.parametrize(
    ("number", "kinds"),
    [(8, {"fork", "copy"}), (9, {"fork", "prune"}), (10, {"cache_hit"}), (11, {"preempt", "swap_out", "swap_in"})],
)
def test_a_replay_shows_what_its_lesson_is_about(number: int, kinds: set[str], tmp_path: Path) -> None:
    record(SCENES[number], tmp_path / "x.trace")
    source = FileSource(tmp_path / "x.trace")
    assert kinds <= {event.kind for i in range(len(source)) for event in source.delta(i).events}


def replayed(number: int, tmp_path: Path) -> list[StepDelta]:
    record(SCENES[number], tmp_path / "x.trace")
    source = FileSource(tmp_path / "x.trace")
    return [source.delta(i) for i in range(len(source))]


def test_replay_2_writes_one_slot_a_step(tmp_path: Path) -> None:
    written = [delta.stats.token_slots for delta in replayed(2, tmp_path)]
    prompt, *growth = [written[0], *(b - a for a, b in pairwise(written) if b)]
    assert prompt > 1
    assert set(growth) == {1}
    assert len(growth) >= 10


def test_replay_3_hands_out_what_came_back_last(tmp_path: Path) -> None:
    back: list[int] = []
    again = 0
    for event in (event for delta in replayed(3, tmp_path) for event in delta.events):
        if event.kind == "free":
            back.append(event.block)
        elif event.kind == "alloc" and back:
            assert event.block == back.pop()
            again += 1
    assert again >= 10


def test_replay_7_keeps_its_budget_and_nobody_who_writes_waits(tmp_path: Path) -> None:
    state = Snapshot()
    chunks = 0
    for delta in replayed(7, tmp_path):
        before = {key: s.num_computed - s.num_cached for key, s in state.sequences.items()}
        running = {key: s for key, s in state.sequences.items() if s.status == "running"}
        writing = [key for key, s in running.items() if len(s.token_ids) - s.num_computed == 1]
        state.apply(delta)
        computed = {key: s.num_computed - s.num_cached - before.get(key, 0) for key, s in state.sequences.items()}
        assert sum(computed.values()) <= 24
        for key in writing:
            assert computed[key] == 1 or state.sequences[key].status != "running", f"{key} was writing and had to wait"
        chunks += sum(1 < count < 24 for count in computed.values())
    assert chunks > 0


def test_replay_14_computes_in_chunks_and_the_second_begins_over_a_prefix(tmp_path: Path) -> None:
    deltas = replayed(14, tmp_path)
    state, computed = Snapshot(), []
    for delta in deltas:
        before = {key: s.num_computed - s.num_cached for key, s in state.sequences.items()}
        state.apply(delta)
        after = {key: s.num_computed - s.num_cached for key, s in state.sequences.items()}
        computed.append(sum(n - before.get(key, 0) for key, n in after.items()))
    assert max(computed) == 32
    assert computed.count(32) >= 3
    hits = {event.sequence for delta in deltas for event in delta.events if event.kind == "cache_hit"}
    assert len(hits) == 1


def test_replay_16_releases_all_but_the_first_block_and_the_window(tmp_path: Path) -> None:
    released = [event.amount for delta in replayed(16, tmp_path) for event in delta.events if event.kind == "release"]
    assert sorted(released) == list(range(1, len(released) + 1)), "each once; the first block, with the sinks, never"
    assert len(released) > 10


def test_every_lesson_has_a_replay() -> None:
    assert {one.number for one in lessons()} - set(SCENES) <= {13}, "lesson 13 records its own"


EXERCISE = """class Pool:
    @property
    def size(self) -> int:
        \"\"\"How many.\"\"\"
        raise NotImplementedError("lesson 1, task 1: Pool.size")


def given() -> None:
    raise NotImplementedError("not a task")


def law(pool: Pool) -> None:
    pool.size  # given
    raise NotImplementedError("lesson 1, task 2: law")
"""
SOLUTIONS = """class Pool:
    @property
    def size(self) -> int:
        \"\"\"lesson 1, task 1: Pool.size\"\"\"
        # the only one
        return 1


def law(pool: Pool) -> None:
    \"\"\"lesson 1, task 2: law\"\"\"
    assert pool.size == 1
"""


def test_a_solved_lesson_is_the_exercise_with_the_solutions_bodies() -> None:
    first = EXERCISE.replace(
        '        raise NotImplementedError("lesson 1, task 1: Pool.size")', "        # the only one\n        return 1"
    )
    both = first.replace('raise NotImplementedError("lesson 1, task 2: law")', "assert pool.size == 1")
    assert solve(EXERCISE, SOLUTIONS, tasks=0) == EXERCISE
    assert solve(EXERCISE, SOLUTIONS, tasks=1) == first
    assert solve(EXERCISE, SOLUTIONS) == both
    assert list(stubs(EXERCISE)) == ["Pool.size", "law"]
    assert stubs(both) == {}
    assert source_of(["Pool.size"], both) == (
        '@property\ndef size(self) -> int:\n    """How many."""\n    # the only one\n    return 1'
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("def law(", "def lore(", "law is a stub in the exercise and has no solution"),
        ("class Pool", "class Tank", "Pool.size is a stub in the exercise and has no solution"),
        (
            "def law(",
            "def more() -> None:\n    ...\n\n\ndef law(",
            "more has a solution and is no stub in the exercise",
        ),
        ("task 2: law", "task 3: law", "law must begin with the docstring 'lesson 1, task 2: law'"),
        ('    """lesson 1, task 2: law"""\n', "", "law must begin with the docstring 'lesson 1, task 2: law'"),
        ("pool: Pool", "tank: Pool", "law has the signature .*tank: Pool.*, not .*pool: Pool"),
        ("    @property\n", "", "Pool.size has the signature 'def size"),
        ("    assert pool.size == 1\n", "", "the solution of law is empty"),
        ("def law(", "import os\n\n\ndef law(", "line 9 of the solutions is no function: import os"),
        ("class Pool:\n", "class Pool:\n    most = 4\n\n", "line 2 of the solutions is no function: most = 4"),
    ],
)
def test_an_exercise_and_solutions_that_do_not_agree_are_refused(old: str, new: str, message: str) -> None:
    assert old in SOLUTIONS
    with pytest.raises(ValueError, match=message):
        solve(EXERCISE, SOLUTIONS.replace(old, new))


def test_the_runner_stops_at_the_first_failure_and_says_where(tmp_path: Path) -> None:
    path = tmp_path / "lesson.py"
    path.write_text(
        "def test_1_fine(): pass\n"
        "def test_2_wrong():\n    assert 1 == 2, 'one is not two'\n"
        "def test_2_never_reached(): raise SystemExit\n",
        encoding="utf-8",
    )
    first, second = run(path)
    assert (first["test"], first["passed"]) == ("test_1_fine", True)
    assert (second["task"], second["passed"], second["message"]) == (2, False, "one is not two")
    assert second["where"] == "line 3"


def told_by(tmp_path: Path, source: str) -> tuple[str, str]:
    """(message, where) of a lesson whose only test fails."""
    path = tmp_path / "lesson.py"
    path.write_text(source, encoding="utf-8")
    (told,) = run(path)
    assert not told["passed"]
    return told["message"], told["where"]


def test_a_comparison_tells_both_sides_and_computes_them_once(tmp_path: Path) -> None:
    source = '"""A lesson."""\nfrom __future__ import annotations\nseen = []\n'
    source += "def test_1_x():\n    assert len(seen.append(4) or seen) == 2\n"
    assert told_by(tmp_path, source) == (
        "you said  1\nright     2",
        "line 5: assert len(seen.append(4) or seen) == 2",
    )
    for comparison, told in (
        ("2 == abs(1)", "you said  1\nright     2"),
        ("abs(1) == two", "you said  1\nright     2"),
        ("abs(1) == (1, -two)", "you said  1\nright     (1, -2)"),
        ("two == abs(1)", "on the left   2\non the right  1"),  # who knows
        ("abs(1) == abs(two)", "on the left   1\non the right  2"),
        ("two < 2", "on the left   2\non the right  2"),
        ("abs(1) > two", "on the left   1\non the right  2"),
    ):
        assert told_by(tmp_path, f"two = 2\ndef test_1_x():\n    assert {comparison}\n")[0] == told
    message, _ = told_by(tmp_path, "def test_1_x():\n    assert list(range(999)) == []\n")
    assert len(message) < 400
    assert told_by(tmp_path, "def test_1_x():\n    assert not 4\n") == ("this does not hold", "line 2: assert not 4")


def test_what_a_test_printed_comes_with_its_result(tmp_path: Path) -> None:
    path = tmp_path / "lesson.py"
    path.write_text(
        "print('loading')\n"
        "def test_1_x():\n    print('here')\n"
        "def test_2_x():\n    print('there', end='')\n    1 / 0\n",
        encoding="utf-8",
    )
    result = check(lesson(1), path)
    assert (result.printed, result.solved, result.notes) == ("loading", (1,), {1: "here"})
    assert result.failure is not None
    assert (result.failure.message, result.failure.printed) == ("ZeroDivisionError: division by zero", "there")


def test_a_missing_module_is_named_with_what_to_do(tmp_path: Path) -> None:
    message, _ = told_by(tmp_path, "raise ModuleNotFoundError('x', name='hypothesis')\n")
    assert message.endswith("-m pip install hypothesis")
    message, _ = told_by(tmp_path, "raise ModuleNotFoundError('x', name='triton')\n")
    assert "Linux" in message
    message, _ = told_by(tmp_path, "raise ModuleNotFoundError('no x', name='x')\n")
    assert message == "ModuleNotFoundError: no x"
