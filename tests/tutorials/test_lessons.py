"""A lesson cannot rot: the unsolved file fails at its first task, the solution passes, and its text names only what exists."""

from __future__ import annotations

import doctest
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from minipaged.cli.learn import app
from minipaged.learn.catalog import HINT_LEVELS, Lesson, lesson, lessons, tutorials_folder
from minipaged.learn.checking import check
from minipaged.learn.runner import load, run
from minipaged.learn.solve import stubs
from minipaged.memory.types import PoolBreakdown
from minipaged.trace.events import Event
from tests.names_in_text import FILE, ROOT, wrong_names

IN_A_PROCESS_OF_ITS_OWN = (12,)  # it asks Triton for the interpreter, which must not reach other tests
each_lesson = pytest.mark.parametrize("lesson", lessons(), ids=lambda one: one.path.stem)


def prose(path: Path) -> str:
    """The text of a lesson's prose cells."""
    cells = re.split(r"^# %%", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    texts = [cell for cell in cells if cell.startswith(" [markdown]")]
    return "\n".join(re.sub(r"^# ?", "", line) for text in texts for line in text.splitlines()[1:])


@pytest.fixture(scope="module")
def solved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every lesson, solved."""
    folder = tmp_path_factory.mktemp("solved")
    for one in lessons():
        (folder / one.path.name).write_text(one.solved(), encoding="utf-8")
    return folder


@each_lesson
def test_a_solved_lesson_is_as_clean_as_all_other_code(lesson: Lesson) -> None:
    for command in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--stdin-filename", str(lesson.path), "-"]
        done = subprocess.run(ruff, input=lesson.solved(), capture_output=True, text=True, cwd=ROOT, check=False)
        assert done.returncode == 0, done.stdout


@each_lesson
def test_tasks_stubs_and_hints_agree(lesson: Lesson) -> None:
    titles = list(dict.fromkeys(title for title, _ in stubs(lesson.path.read_text(encoding="utf-8")).values()))
    assert titles == [lesson.stub(task.number) for task in lesson.tasks]
    for task in lesson.tasks:
        assert f"## Task {task.number}: `{task.name}`" in prose(lesson.path)
        assert len(task.hints) == len(set(task.hints)) == HINT_LEVELS
        assert min(map(len, task.hints)) > 10


@pytest.mark.parametrize(
    ("lesson", "task"),
    [pytest.param(one, task.number, id=f"{one.path.stem}-{task.number}") for one in lessons() for task in one.tasks],
)
def test_each_task_fails_until_it_is_solved(lesson: Lesson, task: int, tmp_path: Path) -> None:
    """With the tasks before it solved: the run ends in this task, and names its stub."""
    path = tmp_path / lesson.path.name
    path.write_text(lesson.solved(tasks=task - 1), encoding="utf-8")
    if lesson.number in IN_A_PROCESS_OF_ITS_OWN:
        failure = check(lesson, path).failure
        assert failure is not None
        assert (failure.task, failure.stub) == (task, lesson.stub(task))
    else:
        *before, last = run(path)
        assert all(result["passed"] for result in before)
        assert {result["task"] for result in before} == set(range(1, task)), "every task before has a test that passes"
        assert (last["passed"], last["task"], last["stub"]) == (False, task, lesson.stub(task))


@each_lesson
def test_the_exercise_is_shipped_unsolved(lesson: Lesson) -> None:
    assert lesson.path.read_text(encoding="utf-8") == lesson.solved(tasks=0)
    shown = re.search(r"\$ python (\S+)\n(\w+): (.*)\n", prose(lesson.path))
    assert shown is not None, "the lesson must show the command that fails first"
    assert shown.groups() == (lesson.path.name, "NotImplementedError", lesson.stub(1))


@each_lesson
def test_solution_passes(lesson: Lesson, solved: Path) -> None:
    path = solved / lesson.path.name
    if lesson.number in IN_A_PROCESS_OF_ITS_OWN:
        result = check(lesson, path)
        assert result.failure is None, result
        assert list(result.solved) == [task.number for task in lesson.tasks]
        return
    results = list(run(path))
    assert [result for result in results if not result["passed"]] == []
    assert {result["task"] for result in results} == {task.number for task in lesson.tasks}, "every task has a test"


def test_lesson_8_catches_a_free_that_forgets_the_length(tmp_path: Path) -> None:
    right = lesson(8).solved()
    wrong = right.replace("        del self.lengths[sequence]\n", "")
    assert wrong != right
    path = tmp_path / lesson(8).path.name
    path.write_text(wrong, encoding="utf-8")
    *_, last = run(path)
    assert (last["passed"], last["task"]) == (False, 3)
    assert "lengths and tables" in last["message"]


WRONG = [  # lesson, what stands in its solution, what a learner may write instead, the task that fails, words of its message
    (
        17,
        "return num_bytes / link.bytes_per_second + pieces *",
        "return num_bytes / link.bytes_per_second +",
        1,
        "right is",
    ),
    (17, "            self._delete(key)\n        self.host[key]", "        self.host[key]", 4, "not those of the keys"),
    (17, "            del self.disk[key]\n            self._delete(key)\n", "            pass\n", 4, "is put again"),
    (
        17,
        "        self.put(key, block)\n        return block",
        "        self.put(key, block)\n        return self.host[key]",
        5,
        "KeyError",
    ),
    (18, "            self.work.clear()\n", "", 3, "again and again without a pause"),
    (18, ".put_nowait(growth)", ".put_nowait(growth.text)", 3, "right is Growth("),
    (
        18,
        "        finally:\n            del self.queues[number]\n",
        "        finally:\n            pass\n",
        4,
        "a queue is left",
    ),
    (19, "[:, :, mine]\n", "[:, :, :2]\n", 2, "you took"),
    (19, "for other in others:", "for other in reversed(others):", 3, "in the order of the ranks"),
    (
        19,
        "first, *others = group.all_gather(x)\n",
        "first, *others = group.all_gather(x)\n    x.zero_()\n",
        3,
        "has changed the tensor",
    ),
    (
        19,
        "x = x + all_reduce(self.group, attended.flatten(1) @ part.out)",
        "x = x + attended.flatten(1) @ part.out",
        4,
        "two sums",
    ),
    (
        19,
        "x = x + all_reduce(self.group, attended",
        "x = all_reduce(self.group, x + attended",
        4,
        "one rank alone was right",
    ),
]


@pytest.mark.parametrize(("number", "right", "wrong", "task", "words"), WRONG)
def test_a_wrong_answer_is_told_what_is_wrong(
    number: int, right: str, wrong: str, task: int, words: str, tmp_path: Path
) -> None:
    solved = lesson(number).solved()
    assert solved.count(right) == 1
    path = tmp_path / lesson(number).path.name
    path.write_text(solved.replace(right, wrong), encoding="utf-8")
    *_, last = run(path)
    assert (last["passed"], last["task"]) == (False, task), last
    assert words in last["message"]


@each_lesson
def test_every_task_shows_an_example_that_its_solution_fulfils(lesson: Lesson, solved: Path) -> None:
    if lesson.number in IN_A_PROCESS_OF_ITS_OWN:
        command = [sys.executable, "-m", "doctest", str(solved / lesson.path.name)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert ">>> bytes_to_move(" in lesson.path.read_text(encoding="utf-8")
        return
    module = load(solved / lesson.path.name)
    for task in lesson.tasks:
        subject = module
        for name in task.name.split("."):
            subject = getattr(subject, name)
        (found,) = doctest.DocTestFinder(recurse=False).find(subject, task.name, module, vars(module))
        assert found.examples, f"{task.name} has no example"
        said: list[str] = []
        doctest.DocTestRunner(verbose=False).run(found, out=said.append)
        assert not said, "".join(said)


@each_lesson
def test_text_names_only_what_exists(lesson: Lesson) -> None:
    for part in re.split(r"\n(?=- )|\n\n", prose(lesson.path)):
        if re.search(rf"`{FILE}`", part):
            assert wrong_names(part) == [], part


@each_lesson
def test_where_this_lives_is_a_list_of_files_and_names(lesson: Lesson) -> None:
    section = prose(lesson.path).partition("## Where this lives in minipaged\n")[2].partition("\n\n\n")[0]
    first, *items = section.split("\n- ")
    assert not first.strip()
    assert items
    for item in items:
        assert re.match(rf"`{FILE}`", item), f"an item begins with a file: {item}"


@each_lesson
def test_prose_states_no_measurement(lesson: Lesson) -> None:
    """A number with a unit of speed, a share or a factor belongs into the output of the code beside the text."""
    text = re.sub(r"```.*?```", "", prose(lesson.path), flags=re.DOTALL)
    assert (
        re.findall(r"\d[\d.,]* ?(?:%|percent|×|ms\b|µs|microseconds|nanoseconds|GB/s|TB/s|tokens/s|times faster)", text)
        == []
    )


@each_lesson
def test_prose_tells_the_whole_story(lesson: Lesson) -> None:
    headings = re.findall(r"^## (.*)$", prose(lesson.path), flags=re.MULTILINE)
    wanted = ["Why", "What was won", "What real engines do", "Where this lives in minipaged"]
    assert [heading for heading in headings if heading in wanted] == wanted
    assert "```" in prose(lesson.path)
    assert re.search(r"^\*\d+ minutes\. ", prose(lesson.path), flags=re.MULTILINE), "the time it takes"
    assert f"*{lesson.minutes} minutes." in prose(lesson.path)


def test_readme_names_only_what_exists() -> None:
    for line in (tutorials_folder() / "README.md").read_text(encoding="utf-8").splitlines():
        if re.search(rf"`{FILE}`", line):
            assert wrong_names(line) == [], line


def test_every_word_of_the_glossary_says_where_it_lives() -> None:
    for word, line in glossary().items():
        where = line.rstrip(" |").rsplit(" | ", 1)[1]
        if word != "word":
            assert re.fullmatch(rf"`{FILE}`( `[\w.]+`)*", where), f"{word}: a file, then names in it, not {where}"
            assert wrong_names(where) == [], word


def test_texts_name_only_modules_that_exist() -> None:
    texts = [path for kind in ("*.py", "*.md", "hints/*.toml") for path in tutorials_folder().glob(kind)]
    for path in texts:
        for name in re.findall(r"\bminipaged(?:\.[a-z_]\w*)+", path.read_text(encoding="utf-8")):
            assert importlib.util.find_spec(name) is not None, f"{path.name}: {name}"


@each_lesson
def test_the_readme_lists_the_lessons_tasks(lesson: Lesson) -> None:
    text = (tutorials_folder() / "README.md").read_text(encoding="utf-8")
    row = f"| {lesson.number} | [{lesson.title}]({lesson.path.name}) | {lesson.minutes} | "
    assert row + ", ".join(f"`{task.name}`" for task in lesson.tasks) + " |" in text


EMPHASIS = {  # bold in a lesson, but no term of the field
    "and for the token it will compute next",
    "and stay findable",
    "at every step",
    "block 0 is never handed out",
    "do not read the bugs yet.",
    "each token takes one slot",
    "find a block by its content",
    "fork the winners before you free the losers.",
    "front",
    "has",
    "interpret",
    "needed",
    "never all of the text",
    "no",
    "running requests first",
    "the text does not change",
    "there",
}
OTHER_FORMS = {
    "logical": "logical block",
    "physical": "physical block",
    "static batch": "static batching",
    "tiles": "tile",
    "strides": "stride",
    "block pool": "pool",
}
OTHER_FORMS |= {"max": "max, pow2", "pow2": "max, pow2", "paged": "paging", "key": "key, value", "value": "key, value"}


def glossary() -> dict[str, str]:
    """word -> its line. "key (of a block)" is the word "key" too."""
    lines = (tutorials_folder() / "glossary.md").read_text(encoding="utf-8").splitlines()
    return {line.split(" | ")[0].removeprefix("| ").lower(): line for line in lines if line.startswith("| ")}


@each_lesson
def test_every_term_that_a_lesson_introduces_is_in_the_glossary(lesson: Lesson) -> None:
    text = re.sub(r"```.*?```", "", prose(lesson.path), flags=re.DOTALL).split("## What real engines do")[0]
    bold = {" ".join(term.split()).lower() for term in re.findall(r"\*\*([^*]+)\*\*", text)} - EMPHASIS
    assert {OTHER_FORMS.get(term, term) for term in bold} - set(glossary()) == set()


def test_the_glossary_has_every_event_and_every_kind_of_slot() -> None:
    told = " ".join((Event.__doc__ or "").split())
    match = re.search(r"block event's \(([a-z_ ]+)\) or one of ([a-z_ ]+)\.", told)
    assert match is not None
    words = glossary()
    for kind in f"{match[1]} {match[2]}".split():
        assert re.search(rf"\b{kind}\b", words["event"]), kind
    for kind in PoolBreakdown._fields:
        assert kind == "token" or kind in words, kind


def test_the_glossary_is_in_order_and_has_no_word_twice() -> None:
    text = (tutorials_folder() / "glossary.md").read_text(encoding="utf-8")
    words = [line.split(" | ")[0].removeprefix("| ").lower() for line in text.splitlines() if line.startswith("| ")]
    assert words[0] == "word"
    assert words[1:] == sorted(set(words[1:]))


def test_readme_lists_every_lesson() -> None:
    text = (tutorials_folder() / "README.md").read_text(encoding="utf-8")
    for one in lessons():
        assert re.search(rf"\| {one.number} \| .*{re.escape(one.title)}.* \| {one.minutes} \|", text), one.title


def test_every_command_that_the_lessons_name_is_there() -> None:
    commands = {info.name or getattr(info.callback, "__name__", "") for info in app.registered_commands}
    texts = [prose(one.path) for one in lessons()] + [(tutorials_folder() / "README.md").read_text(encoding="utf-8")]
    named = {word for text in texts for word in re.findall(r"minipaged learn (\w+)", text)}
    assert named <= commands
    assert {"start", "check", "watch", "hint", "show"} <= named
    files = {name for text in texts for name in re.findall(r"(?:python|pytest) (\d\d_\w+\.py)", text)}
    assert files <= {one.path.name for one in lessons()}


def script(path: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)


def test_a_lesson_is_a_script(solved: Path) -> None:
    """Solved, it prints its measurements; unsolved, it ends in the words that its text foretells."""
    one = lessons()[0]
    done = script(solved / one.path.name)
    assert done.returncode == 0, done.stderr
    assert "paged" in done.stdout
    unsolved = script(one.path)
    assert unsolved.returncode == 1
    assert unsolved.stderr.splitlines()[-1] == f"NotImplementedError: {one.stub(1)}"


@pytest.mark.slow
@each_lesson
def test_every_solution_runs_as_a_script(lesson: Lesson, solved: Path) -> None:
    before = os.times()
    done = script(solved / lesson.path.name)
    after = os.times()
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    computed = after.children_user - before.children_user + after.children_system - before.children_system
    assert computed < 60, f"{computed:.0f} seconds of computing: a lesson promises less than a minute"


@pytest.mark.slow
@each_lesson
def test_every_solution_is_a_pytest_file(lesson: Lesson, solved: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", lesson.path.name]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=180, env=environment, cwd=solved, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_lesson_13s_manager_stands_under_the_laws(solved: Path) -> None:
    """With the command that the lesson's script prints."""
    printed = next(line for line in script(solved / lessons()[12].path.name).stdout.splitlines() if "-k" in line)
    profile, pytest_, *arguments = shlex.split(printed)
    assert (profile, pytest_) == ("HYPOTHESIS_PROFILE=quick", "pytest")
    # -x: Hypothesis takes minutes to make a failing example small, for each law that fails.
    command = [sys.executable, "-m", "pytest", "-x", "-n", "0", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HYPOTHESIS_PROFILE": "quick"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=280, env=environment, cwd=solved, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.mark.slow
def test_lesson_12_compiles_for_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    kept = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "MINIPAGED_KERNELS")}
    done = subprocess.run(
        [sys.executable, "-m", "tests.tutorials.compile_lesson_12", str(tmp_path)],
        cwd=ROOT,
        env=kept | {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-2000:]
    assert done.stdout.count("_decode shared memory") >= 5
    assert "unsolved: lesson 12, task 2: load_page" in done.stdout


@pytest.mark.gpu
def test_lesson_12_on_a_gpu(solved: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LESSON_ON_GPU": "1"}
    command = [sys.executable, str(solved / lessons()[11].path.name)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "minipaged's" in done.stdout
