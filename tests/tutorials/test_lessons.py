"""A lesson cannot rot: the unsolved file fails at its first task, the solution passes, and its text names only what exists."""

from __future__ import annotations

import ast
import doctest
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from minipaged.cli.learn import app
from minipaged.learn.catalog import HINT_LEVELS, Lesson, lessons, tutorials_folder
from minipaged.learn.checking import check
from minipaged.learn.runner import load, run
from minipaged.learn.strip import bodies, strip
from minipaged.memory.types import PoolBreakdown
from minipaged.trace.events import Event

ROOT = Path(__file__).resolve().parents[2]
IN_A_PROCESS_OF_ITS_OWN = (12,)  # it asks Triton for the interpreter, which must not reach other tests
each_lesson = pytest.mark.parametrize("lesson", lessons(), ids=lambda one: one.path.stem)


def prose(path: Path) -> str:
    """The text of a lesson's prose cells."""
    cells = re.split(r"^# %%", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    texts = [cell for cell in cells if cell.startswith(" [markdown]")]
    return "\n".join(re.sub(r"^# ?", "", line) for text in texts for line in text.splitlines()[1:])


@each_lesson
def test_unsolved_file_is_the_solution_without_its_bodies(lesson: Lesson) -> None:
    solved = lesson.solution.read_text(encoding="utf-8")
    assert lesson.path.read_text(encoding="utf-8") == strip(solved), "run python -m minipaged.learn.strip"


@each_lesson
def test_tasks_marks_and_hints_agree(lesson: Lesson) -> None:
    titles = list(dict.fromkeys(body.title for body in bodies(lesson.solution.read_text(encoding="utf-8"))))
    assert titles == [f"lesson {lesson.number}, task {task.number}: {task.name}" for task in lesson.tasks]
    for task in lesson.tasks:
        assert f"## Task {task.number}: `{task.name}`" in prose(lesson.path)
        assert len(task.hints) == len(set(task.hints)) == HINT_LEVELS
        assert min(map(len, task.hints)) > 10


@each_lesson
def test_unsolved_file_fails_at_its_first_task(lesson: Lesson) -> None:
    stub = lesson.stub(1)
    if lesson.number in IN_A_PROCESS_OF_ITS_OWN:
        failure = check(lesson, lesson.path).failure
        assert failure is not None
        assert (failure.task, failure.stub) == (1, stub)
    else:
        *before, last = run(lesson.path)
        assert not before
        assert (last["passed"], last["task"], last["stub"]) == (False, 1, stub)
    told = re.search(r"\$ python (\S+)\n(\w+): (.*)\n", prose(lesson.path))
    assert told is not None, "the lesson must show the command that fails first"
    assert told.groups() == (lesson.path.name, "NotImplementedError", stub)


@each_lesson
def test_solution_passes(lesson: Lesson) -> None:
    if lesson.number in IN_A_PROCESS_OF_ITS_OWN:
        result = check(lesson, lesson.solution)
        assert result.failure is None, result
        assert list(result.solved) == [task.number for task in lesson.tasks]
        return
    results = list(run(lesson.solution))
    assert [told for told in results if not told["passed"]] == []
    assert {told["task"] for told in results} == {task.number for task in lesson.tasks}, "every task has a test"


@each_lesson
def test_every_task_shows_an_example_that_its_solution_fulfils(lesson: Lesson) -> None:
    if lesson.number in IN_A_PROCESS_OF_ITS_OWN:
        command = [sys.executable, "-m", "doctest", str(lesson.solution)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert ">>> bytes_to_move(" in lesson.path.read_text(encoding="utf-8")
        return
    module = load(lesson.solution)
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
    for path, symbols in places(prose(lesson.path)):
        assert (ROOT / path).exists(), f"{path} does not exist"
        missing = [symbol for symbol in symbols if not defines(ROOT / path, symbol)]
        assert not missing, f"{path} has no {missing}"


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


def places(text: str) -> list[tuple[str, list[str]]]:
    """(path, symbols) of each line that names files of this repository; the symbols are those that follow the path."""
    found = []
    for part in re.split(r"\n(?=- )|\n\n", text):
        path = None
        symbols: list[str] = []
        for name in re.findall(r"`([^`\n]+)`", part):
            if re.fullmatch(r"(minipaged|kernels|tui|tests|tutorials)/[\w/.]*", name):
                if path is not None:
                    found.append((path, symbols))
                path, symbols = name, []
            elif path is not None and re.fullmatch(r"[A-Za-z_][\w.]*", name):
                symbols.append(name)
        if path is not None:
            found.append((path, symbols))
    return found


def defines(path: Path, symbol: str) -> bool:
    """Whether a file defines a name: a module's, a class' (Class.name), or one of any class in it."""
    if path.is_dir() or path.suffix != ".py":
        return symbol in path.read_text(encoding="utf-8") if path.is_file() else False
    owner, _, name = symbol.rpartition(".")
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            for inner in ast.walk(node):
                if isinstance(inner, ast.FunctionDef):
                    names.add(f"{node.name}.{inner.name}")
                if isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name):
                    names |= {inner.target.id, f"{node.name}.{inner.target.id}"}
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        for target in targets:
            names |= {each.id for each in ast.walk(target) if isinstance(each, ast.Name)}
    return symbol in names if owner else name in names


def test_readme_and_glossary_name_only_what_exists() -> None:
    for name in ("README.md", "glossary.md"):
        text = (tutorials_folder() / name).read_text(encoding="utf-8")
        for line in text.splitlines():
            for path, symbols in places(line):
                assert (ROOT / path).exists(), f"{name}: {path} does not exist"
                missing = [symbol for symbol in symbols if not defines(ROOT / path, symbol)]
                assert not missing, f"{name}: {path} has no {missing}"


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


def test_a_lesson_is_a_script() -> None:
    """Solved, it prints its measurements; unsolved, it ends in the words that its text foretells."""
    one = lessons()[0]
    solved = script(one.solution)
    assert solved.returncode == 0, solved.stderr
    assert "paged" in solved.stdout
    unsolved = script(one.path)
    assert unsolved.returncode == 1
    assert unsolved.stderr.splitlines()[-1] == f"NotImplementedError: {one.stub(1)}"


@pytest.mark.slow
@each_lesson
def test_every_solution_runs_as_a_script(lesson: Lesson) -> None:
    before = os.times()
    done = script(lesson.solution)
    after = os.times()
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    computed = after.children_user - before.children_user + after.children_system - before.children_system
    assert computed < 60, f"{computed:.0f} seconds of computing: a lesson promises less than a minute"


@pytest.mark.slow
@each_lesson
def test_every_solution_is_a_pytest_file(lesson: Lesson) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", str(lesson.solution)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_last_lessons_manager_stands_under_the_specification() -> None:
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", str(ROOT / "tests" / "spec")]
    command += ["-k", "laws_memory or laws_machine", "--block-manager", "13_your_own:MyBlockManager"]
    folder = tutorials_folder() / "solutions"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HYPOTHESIS_PROFILE": "quick"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=280, env=environment, cwd=folder, check=False
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
def test_lesson_12_on_a_gpu() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LESSON_ON_GPU": "1"}
    command = [sys.executable, str(lessons()[11].solution)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "minipaged's" in done.stdout
