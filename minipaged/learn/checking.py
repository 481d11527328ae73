"""Checks a learner's file: its tests run in a process of their own, with a time limit, and come back as results by task."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from minipaged.learn.catalog import Lesson
from minipaged.learn.runner import MARK

LIMIT_SECONDS = 180.0


@dataclass(frozen=True, slots=True)
class Failure:
    """The test that ended the run."""

    task: int  # 0: the file could not be loaded
    test: str
    message: str
    where: str  # the line of the learner's file
    stub: str  # the task's name, where the failure is only that it is not written yet
    said: str = ""  # what was printed while that test ran


@dataclass(frozen=True, slots=True)
class Result:
    """One check of one lesson."""

    solved: tuple[int, ...]  # tasks whose tests all passed
    failure: Failure | None
    said: str  # what the file printed outside of its tests, errors of the interpreter included
    notes: Mapping[int, str]  # task -> what was printed while its tests passed


def check(one: Lesson, path: Path, *, limit_seconds: float = LIMIT_SECONDS) -> Result:
    """Run the tests of `path`, a copy of lesson `one`."""
    command = [sys.executable, "-m", "minipaged.learn.runner", str(path.resolve())]
    here = str(Path(__file__).resolve().parents[2])  # the lesson sees the minipaged that checks it
    search = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH", ""))))
    environment = {**os.environ, "PYTHONPATH": search}
    timed_out = False
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=limit_seconds, env=environment, cwd=path.resolve().parent, check=False
        )
        out, err = done.stdout, done.stderr
    except subprocess.TimeoutExpired as stopped:
        out, err = stopped.stdout or b"", stopped.stderr or b""
        timed_out = True
    lines = out.decode(errors="replace").splitlines()
    told = [json.loads(line.removeprefix(MARK)) for line in lines if line.startswith(MARK)]
    said = "\n".join([line for line in lines if not line.startswith(MARK)] + err.decode(errors="replace").splitlines())
    failed = next((row for row in told if not row["passed"]), None)
    failure = None
    if failed is not None:
        failure = Failure(**{name: failed[name] for name in ("task", "test", "message", "where", "stub", "said")})
    elif timed_out or len(told) == 0:
        running = told[-1]["task"] if told else 0
        reason = (
            f"stopped after {limit_seconds:g} seconds: a loop that never ends?"
            if timed_out
            else "the run ended without a word"
        )
        failure = Failure(running, "", reason, "", "")
    passed = {row["task"] for row in told if row["passed"]}
    if failure is not None:
        passed -= {t for t in passed if t >= failure.task}
    notes = {t: "".join(row["said"] for row in told if row["task"] == t).strip() for t in passed}
    return Result(tuple(sorted(passed)), failure, said.strip(), {t: note for t, note in notes.items() if note})
