"""Runs one lesson's tests in a process of its own: python -m minipaged.learn.runner FILE

A test is a function test_N_...: it belongs to task N. Tests run in the order they stand in the file; a task whose test fails
ends the run, since what follows builds on it. Each result is a line of JSON on standard output that starts with MARK, and brings
what was printed while the test ran. Knows files and functions; knows nothing of progress or hints.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

from minipaged.learn.asserting import LEFT, telling

MARK = "::lesson:: "
MISSING = {  # a module that a lesson needs and minipaged itself does without -> what to do
    "hypothesis": f"this lesson needs Hypothesis: {sys.executable} -m pip install hypothesis",
    "triton": "this lesson needs Triton, which is made for Linux: read along here, or write it there",
}
LONGEST_SAID = 4_000  # characters of what a test printed: the last ones
_TEST = re.compile(r"test_(\d+)_\w+")


def load(path: Path) -> ModuleType:
    """Import a lesson's file; its name may begin with a digit."""
    spec = importlib.util.spec_from_file_location(f"lesson_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    exec(compile(telling(path.read_text(encoding="utf-8"), path), str(path), "exec", dont_inherit=True), vars(module))
    return module


def find_tests(module: ModuleType) -> list[tuple[int, str, Callable[[], object]]]:
    """(task, name, function) of a lesson's tests, as they stand in the file."""
    found = ((re.fullmatch(_TEST, name), value) for name, value in vars(module).items())
    return [(int(match[1]), match[0], value) for match, value in found if match is not None]


def run(path: Path) -> Iterator[dict[str, Any]]:
    """Results as they come: {"test", "task", "passed", "said", "message", "where"}; the first failure is the last."""
    try:
        module = load(path)
    except Exception as error:
        yield {"test": "", "task": 0, "passed": False, "said": "", **_describe(error, path)}
        return
    for task, name, function in find_tests(module):
        told: dict[str, Any] = {"test": name, "task": task, "passed": True}
        said = StringIO()
        try:
            with redirect_stdout(said):
                function()
        except Exception as error:
            told.update(passed=False, **_describe(error, path))
        yield told | {"said": said.getvalue()[-LONGEST_SAID:]}
        if not told["passed"]:
            return


def _describe(error: Exception, path: Path) -> dict[str, str]:
    """What went wrong in a few lines, and the last line of the lesson's file that it passed through."""
    where = ""
    if isinstance(error, SyntaxError) and error.lineno is not None:
        where = f"line {error.lineno}"
    for frame in traceback.extract_tb(error.__traceback__):
        if Path(frame.filename) == path:
            where = f"line {frame.lineno}: {frame.line}"
    stub = stub_in(error)
    notes = "\n".join(getattr(error, "__notes__", ()))
    message = str(error)
    if not isinstance(error, AssertionError | NotImplementedError):
        message = f"{type(error).__name__}: {message}".removesuffix(": ")
    elif message and not message.startswith(LEFT):
        where = where.partition(":")[0]  # the line would only say the same again
    elif not message:
        message = "this does not hold"
    if isinstance(error, ModuleNotFoundError) and error.name in MISSING:
        message = MISSING[error.name]
    return {"message": stub or "\n".join(filter(None, (message, notes))), "where": where, "stub": stub}


def stub_in(error: BaseException | None) -> str:
    """The name of the unsolved task behind an error, through whatever wrapped it (Hypothesis and Triton's interpreter do)."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        match = re.search(r"lesson \d+, task \d+: [^'\"]+", str(error))
        if match and "NotImplementedError" in f"{type(error).__name__} {error}":
            return match[0]
        error = error.__cause__ or error.__context__
    return ""


def main(path: Path) -> int:
    """Run and print; 0 if every test passed."""
    passed = True
    for told in run(path.resolve()):
        print(MARK + json.dumps(told), flush=True)
        passed = told["passed"]
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
