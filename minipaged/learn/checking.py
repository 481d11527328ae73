"""Checks a learner's file: its tests run in a process of their own, and come back as results by task."""

from __future__ import annotations

import json
import linecache
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minipaged.learn.catalog import Lesson
from minipaged.learn.replays import failed_run
from minipaged.learn.runner import LOADING, MARK

LIMIT_SECONDS = 20.0  # for one test
LONGEST_PRINTED = 4_000  # characters of what a test printed: the last ones


@dataclass(frozen=True, slots=True)
class Failure:
    """The test that ended the run."""

    task: int  # 0: the file could not be loaded
    test: str
    message: str
    where: str  # the line of the learner's file
    stub: str  # the task's name, where the failure is only that it is not written yet
    printed: str  # what the test printed
    last_call: str = ""  # of the learner's manager, whose run up to there is recorded; "": no run of it was seen


@dataclass(frozen=True, slots=True)
class Result:
    """One check of one lesson."""

    solved: tuple[int, ...]  # tasks whose tests all passed
    failure: Failure | None
    printed: str  # what the file printed while it was loaded, and the interpreter's errors
    notes: Mapping[int, str]  # task -> what its tests printed, if they passed


def check(one: Lesson, path: Path, *, limit_seconds: float = LIMIT_SECONDS) -> Result:
    """Run the tests of `path`, a copy of lesson `one`. A test that takes longer than `limit_seconds` is ended, and has failed."""
    path = path.resolve()
    command = [sys.executable, "-m", "minipaged.learn.runner", str(path), str(os.getpid()), str(limit_seconds)]
    failed = failed_run(path)
    if failed is not None:
        failed.unlink(missing_ok=True)
    here = str(Path(__file__).resolve().parents[2])  # the lesson imports the minipaged that checks it
    search = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH", ""))))
    done = subprocess.run(
        command,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, "PYTHONPATH": search, "PYTHONIOENCODING": "utf-8"},
        cwd=path.parent,
        check=False,
    )
    results, running, while_loading = _read(done.stdout)
    failure = None
    if results and not results[-1]["passed"]:
        failure = Failure(**{name: results[-1][name] for name in Failure.__slots__})
    elif running is not None:
        failure = _ended(running, done, path, limit_seconds)
    passed = {row["task"] for row in results if row["passed"]}
    if failure is not None:
        passed -= {task for task in passed if task >= failure.task}
    notes = {task: "".join(row["printed"] for row in results if row["task"] == task).strip() for task in passed}
    printed = f"{while_loading}\n{done.stderr}".strip()
    return Result(tuple(sorted(passed)), failure, printed, {task: note for task, note in notes.items() if note})


def _read(output: str) -> tuple[list[dict[str, Any]], dict[str, Any] | None, str]:
    """The runner's output as results, the test (or the loading of the file) that did not come to an end, and what loading printed."""
    before, *parts = f"\n{output}".split(f"\n{MARK}")
    results: list[dict[str, Any]] = []
    running: dict[str, Any] | None = {"task": 0, "test": "", "printed": before}
    while_loading = ""
    for part in parts:
        line, _, printed = part.partition("\n")
        row = json.loads(line)
        if "passed" in row:
            results.append({"printed": "", **(running or {}), **row})
            running = None
        else:
            running = {**row, "printed": printed[-LONGEST_PRINTED:]}
            while_loading = while_loading if row["task"] else printed[-LONGEST_PRINTED:]
    return results, running, while_loading


def _ended(
    running: dict[str, Any], done: subprocess.CompletedProcess[str], path: Path, limit_seconds: float
) -> Failure:
    """The failure of a test that ended the runner's process: by its time limit, or by what the learner's code did."""
    where = ""
    if "Timeout (" in done.stderr:
        seconds = limit_seconds if running["task"] else LOADING * limit_seconds
        message = f"stopped after {seconds:g} seconds: a loop that never ends?"
        at = re.search(rf'File "{re.escape(str(path))}", line (\d+)', done.stderr.partition("Timeout (")[2])
        if at is not None:
            where = f"line {at[1]}: {linecache.getline(str(path), int(at[1])).strip()}"
    elif done.returncode < 0:
        message = f"the run ended with the signal {signal.Signals(-done.returncode).name}"
    elif running["task"] == 0 and done.returncode == 0:
        message = "there are no tests in this file"
    else:
        message = (
            f"the run ended with the exit status {done.returncode} before the end of {running['test'] or path.name}"
        )
    return Failure(running["task"], running["test"], message, where, "", running["printed"])
