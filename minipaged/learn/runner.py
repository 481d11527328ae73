"""Runs one lesson's tests in a process of its own: python -m minipaged.learn.runner FILE PARENT SECONDS

A test is a function test_N_...: it belongs to task N. Tests run in the order in which they stand in the file; the first one that
fails ends the run, since what follows builds on it. A test that takes longer than SECONDS ends the process, and so does the end of
the process PARENT.

Each test writes two lines of JSON to standard output, both behind MARK: which test begins, and how it ended. What the test prints
stands between the two.
"""

from __future__ import annotations

import ast
import ctypes
import faulthandler
import importlib.util
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from io import TextIOWrapper
from pathlib import Path
from types import ModuleType
from typing import Any

from minipaged.learn.replays import failed_run
from minipaged.learn.witness import Witness

MARK = "::lesson:: "
LOADING = 3  # loading the file may take so many times longer than one test: it imports torch
MISSING = {  # a module that a lesson needs and minipaged itself does without -> what to do
    "hypothesis": f"this lesson needs Hypothesis: {sys.executable} -m pip install hypothesis",
    "triton": "this lesson needs Triton, which is made for Linux: read along here, or write it there",
}
PR_SET_PDEATHSIG = 1  # linux/prctl.h
_TEST = re.compile(r"test_(\d+)_\w+")


def load(path: Path) -> ModuleType:
    """Import a lesson's file; its name may begin with a digit. Its bare comparisons say what they compared."""
    spec = importlib.util.spec_from_file_location(f"lesson_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    tree = _Comparisons().visit(ast.parse(path.read_text(encoding="utf-8"), str(path)))
    vars(module)[_BOTH_SIDES] = both_sides
    exec(compile(tree, str(path), "exec", dont_inherit=True), vars(module))
    return module


def find_tests(module: ModuleType) -> list[tuple[int, str, Callable[[], object]]]:
    """(task, name, function) of a lesson's tests, as they stand in the file."""
    found = ((re.fullmatch(_TEST, name), value) for name, value in vars(module).items())
    return [(int(match[1]), match[0], value) for match, value in found if match is not None]


def run(path: Path, begin: Callable[[int, str], None] = lambda task, test: None) -> Iterator[dict[str, Any]]:
    """Results as they come: {"task", "test", "passed"}, and for the first failure, which is the last: "message", "where", "stub",
    "last_call" (of the learner's manager, whose run up to there was recorded; "" if there is none).

    `begin` is called with task and test before each of them, and with 0 and "" before the file is loaded.
    """
    begin(0, "")
    try:
        module = load(path)
    except Exception as error:
        yield {"task": 0, "test": "", "passed": False, **_describe(error, path), "last_call": ""}
        return
    witness = Witness()
    with witness.follow(module):
        for task, test, function in find_tests(module):
            begin(task, test)
            witness.forget()
            try:
                function()
            except Exception as error:
                told = _describe(error, path)
                failed = failed_run(path)
                last_call = witness.save(failed) if not told["stub"] and failed is not None else ""
                yield {"task": task, "test": test, "passed": False, **told, "last_call": last_call}
                return
            yield {"task": task, "test": test, "passed": True}


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
    elif message and not message.startswith((LEFT, YOURS)):
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


# Comparisons that say what they compared: `assert f(2) == 5` fails with both sides, not with an empty line. Each side is computed
# once and in its order, as without this. An assertion that brings its own message keeps it.

LONGEST = 300  # characters of one side; what stands in the middle of a longer one is left out
LEFT, RIGHT = "on the left  ", "on the right "
YOURS, EXPECTED = "you said ", "right    "  # where it is plain which side the learner's code has computed
_BOTH_SIDES = "__minipaged_both_sides__"


def both_sides(left: object, right: object, yours: str = "") -> str:
    """The two sides of a comparison that did not hold, a line each. yours: the side that the learner's code computed, if that is plain."""
    if yours:
        said, expected = (left, right) if yours == "left" else (right, left)
        return f"{YOURS} {_short(said)}\n{EXPECTED} {_short(expected)}"
    return f"{LEFT} {_short(left)}\n{RIGHT} {_short(right)}"


def _yours(left: ast.expr, right: ast.expr) -> str:
    """Which side of an equality is the learner's: the one opposite a side that is written out, or the left one if it alone calls something.
    "" where both may be. Written out: literals, constants and objects of them, such as Split(1, 2); their names begin with a capital."""

    def written_out(side: ast.expr) -> bool:
        return all(node.id[:1].isupper() for node in ast.walk(side) if isinstance(node, ast.Name))

    def calls(side: ast.expr) -> bool:
        return any(isinstance(node, ast.Call) for node in ast.walk(side))

    if written_out(left) != written_out(right):
        return "right" if written_out(left) else "left"
    return "left" if not written_out(left) and calls(left) and not calls(right) else ""


def _short(value: object) -> str:
    """The value's repr, cut in the middle; of a tensor its shape and a few numbers."""
    shape = getattr(value, "shape", None)
    text, longest = repr(value), LONGEST
    if shape is not None:
        text, longest = f"{list(shape)} {' '.join(text.split())}", LONGEST // 2
    return text if len(text) <= longest else f"{text[: longest // 2]} … {text[-longest // 2 :]}"


class _Comparisons(ast.NodeTransformer):
    """`assert a == b` becomes: left = a; right = b; assert left == right, both_sides(left, right). torch.equal(a, b) likewise."""

    def visit_Assert(self, node: ast.Assert) -> ast.AST | list[ast.stmt]:
        test = node.test
        if node.msg is not None:
            return node
        if isinstance(test, ast.Compare) and len(test.ops) == 1:
            values = [test.left, test.comparators[0]]
        elif isinstance(test, ast.Call) and ast.unparse(test.func) == "torch.equal" and len(test.args) == 2:
            values = list(test.args)
        else:
            return node
        names = [f"{_BOTH_SIDES}{side}" for side in ("left", "right")]
        keep: list[ast.stmt] = [
            ast.Assign([ast.Name(name, ast.Store())], value) for name, value in zip(names, values, strict=True)
        ]
        kept: list[ast.expr] = [ast.Name(name, ast.Load()) for name in names]
        if isinstance(test, ast.Compare):
            again: ast.expr = ast.Compare(kept[0], test.ops, [kept[1]])
        else:
            again = ast.Call(test.func, kept, [])
        equality = not isinstance(test, ast.Compare) or isinstance(test.ops[0], ast.Eq)
        told = [*kept, ast.Constant(_yours(values[0], values[1]) if equality else "")]
        compare = ast.Assert(again, ast.Call(ast.Name(_BOTH_SIDES, ast.Load()), told, []))
        return [ast.fix_missing_locations(ast.copy_location(each, node)) for each in (*keep, compare)]


def end_with(parent: int) -> None:
    """End when the process that started this one ends, however it ends. On Linux at once; elsewhere the time limit ends it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the line above
            sys.exit(1)


def main(path: Path, parent: int, seconds: float) -> int:
    """Run and print; 0 if every test passed."""
    end_with(parent)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # what a test printed is there even if the test never ends

    def write(row: dict[str, Any]) -> None:
        print(f"\n{MARK}{json.dumps(row)}", flush=True)

    def begin(task: int, test: str) -> None:
        # A thread of C code watches the time: it also ends a loop that never comes back to the interpreter.
        faulthandler.dump_traceback_later(seconds if task else LOADING * seconds, exit=True)
        write({"task": task, "test": test})

    passed = True
    for result in run(path.resolve(), begin):
        faulthandler.cancel_dump_traceback_later()
        write(result)
        passed = result["passed"]
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
