"""One run of the tests in a forked child: with a module's code replaced in memory, or watching which lines each test runs.

automatic.py chooses the mutants and counts them. A child tells its parent through a pipe, one line a message:
`start ITEM`, `failed ITEM`, `left out N` (no time for the rest) and `done`.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType, ModuleType
from typing import Any

from tests.mutants.automatic_operators import Mutant, compiled

TESTS = ["tests/memory", "tests/scheduling", "tests/baselines", "tests/laws"]
LEFT_OUT = (
    "constant_time",  # a clock's verdict on a busy machine is no evidence
    "leaves_a_replay",  # of replays, on mutants of their own
)
FACTORS = {"quick": 0.5, "ci": 1.0}  # of the profile's examples: a quick child has to end inside its seconds
MOST_MEMORY = 6 * 2**30
SPARE = 1.2  # seconds of processor time that collecting and reporting take


@dataclass
class Chosen:
    """What a child is to do. order: items in the order to run them, None for all as they come; expected: seconds of each."""

    profile: str
    seconds: int  # of processor time, for everything
    order: list[str] | None = None
    expected: dict[str, float] | None = None
    watch: Path | None = None  # write here which lines of which files each item runs
    files: frozenset[str] = frozenset()  # those that are watched


class Replacing(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives one module other code."""

    def __init__(self, name: str, path: str, code: CodeType) -> None:
        self.name, self.path, self.code = name, path, code

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> Any:
        """The spec of the one module."""
        if fullname != self.name:
            return None
        return importlib.util.spec_from_file_location(fullname, self.path, loader=self)

    def exec_module(self, module: ModuleType) -> None:
        """Run the other code."""
        exec(self.code, module.__dict__)


class Lines:
    """The lines of some files that run between `begin` and `end`, by a trace function that sleeps in code it has seen whole."""

    def __init__(self, files: frozenset[str]) -> None:
        self._files = {str(Path(f).resolve()): f for f in files}
        self._seen: dict[str, set[int]] = {}
        self._left: dict[CodeType, set[int]] = {}

    def begin(self) -> None:
        """Forget what was seen, and watch."""
        self._seen, self._left = {}, {}
        sys.settrace(self._on_call)

    def end(self) -> dict[str, list[int]]:
        """Watch no more; file -> lines."""
        sys.settrace(None)
        return {self._files[path]: sorted(lines) for path, lines in self._seen.items()}

    def _on_call(self, frame: FrameType, event: str, arg: Any) -> Callable[..., Any] | None:
        code = frame.f_code
        if code.co_filename not in self._files:
            return None
        left = self._left.get(code)
        if left is None:
            left = self._left[code] = {line for *_, line in code.co_lines() if line is not None}
        if not left:
            return None
        seen = self._seen.setdefault(code.co_filename, set())
        seen.add(frame.f_lineno)
        left.discard(frame.f_lineno)

        def on_line(frame: FrameType, event: str, arg: Any) -> Callable[..., Any]:
            seen.add(frame.f_lineno)
            left.discard(frame.f_lineno)
            return on_line

        return on_line


class Watching:
    """The child's pytest plugin: picks and orders the items, ends at the first failure, keeps to the time."""

    def __init__(self, pipe: int, chosen: Chosen) -> None:
        self._pipe, self._chosen = pipe, chosen
        self._lines = Lines(chosen.files) if chosen.watch else None
        self._table: dict[str, dict[str, Any]] = {}
        self._started = 0.0

    def _tell(self, message: str) -> None:
        os.write(self._pipe, f"{message}\n".encode())

    def pytest_configure(self) -> None:
        """Take the profile that tests/conftest.py registered, without the phases that only help a reader."""
        from hypothesis import Phase, settings

        base = settings.get_profile(self._chosen.profile)
        examples = max(1, int(base.max_examples * FACTORS[self._chosen.profile]))
        settings.register_profile("mutants", base, max_examples=examples, phases=[Phase.explicit, Phase.generate])
        settings.load_profile("mutants")

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Only what was asked for, in that order. All laws of the state machine count as one: the first that is broken ends the run."""
        items[:] = [item for item in items if not any(words in item.name for words in LEFT_OUT)]
        if self._chosen.order is not None:
            place = {name: i for i, name in enumerate(self._chosen.order)}
            items[:] = sorted((i for i in items if i.nodeid in place), key=lambda i: place[i.nodeid])
        self._tell_of_the_shared_run()

    def _tell_of_the_shared_run(self) -> None:
        from tests.laws import conftest

        error_of, tell = conftest.SharedRun.error, self._tell

        def error(run: Any) -> Exception | None:
            found = error_of(run)
            if found is not None:
                tell(f"failed state machine: {type(found).__name__}")
                os._exit(1)
            return found

        conftest.SharedRun.error = error  # type: ignore[method-assign]

    def pytest_runtest_protocol(self, item: Any) -> None:
        """Before each item: is there time for it?"""
        expected = self._chosen.expected
        if expected is not None:
            left = self._chosen.seconds - time.process_time() - SPARE
            if 1.5 * expected.get(item.nodeid, 0.0) > left:
                self._tell("left out some")
                os._exit(0)
        self._tell(f"start {item.nodeid}")
        self._started = time.process_time()
        if self._lines is not None:
            self._lines.begin()

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """After each item: what it took and ran."""
        row: dict[str, Any] = {"seconds": time.process_time() - self._started}
        if self._lines is not None:
            row["lines"] = self._lines.end()
        self._table[nodeid] = row

    def pytest_runtest_logreport(self, report: Any) -> None:
        """The first failure is the verdict."""
        if report.failed:
            self._tell(f"failed {report.nodeid}")
            if self._chosen.order is not None:
                os._exit(1)

    def pytest_collectreport(self, report: Any) -> None:
        """A module that cannot be imported is a failure too."""
        if report.failed:
            self._tell(f"failed import of {report.nodeid}")

    def pytest_sessionfinish(self) -> None:
        """Leave the table."""
        if self._chosen.watch is not None:
            self._chosen.watch.write_text(json.dumps(self._table))
        self._tell("done")


def run_child(mutant: Mutant | None, chosen: Chosen, pipe: int) -> None:
    """Run the tests in this (forked) process and leave with pytest's status."""
    os.setsid()
    used = int(time.process_time()) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (chosen.seconds + used, chosen.seconds + used + 1))
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    os.environ.update(HYPOTHESIS_PROFILE=chosen.profile, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1", OMP_NUM_THREADS="1")
    if mutant is not None:
        sys.meta_path.insert(0, Replacing(mutant.module, mutant.path, compiled(Path(mutant.path), mutant.number)))
    for name in [n for n in sys.modules if n.split(".")[0] in ("minipaged", "tests")]:
        del sys.modules[name]
    import pytest

    tests = TESTS if chosen.order is None else sorted({name.split("::")[0] for name in chosen.order})
    with tempfile.TemporaryDirectory() as replays:
        options = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-o", "addopts="]
        options += ["-m", "not slow and not gpu", "--replay-dir", replays]
        status = int(pytest.main([*options, *tests], plugins=[Watching(pipe, chosen)]))
    os._exit(status)


@dataclass
class Told:
    """How a child ended. state: killed, hung or survived; test: which item said so; finished: whether every item was run."""

    state: str
    test: str
    seconds: float
    finished: bool
    items: list[str]


class Child:
    """A child at work."""

    def __init__(self, mutant: Mutant | None, chosen: Chosen) -> None:
        self._started = time.monotonic()
        self._limit = 40.0 * chosen.seconds  # of the clock, for one that sleeps: a busy machine must not look like it
        self._pipe, theirs = os.pipe()
        self._heard = b""
        self.pid = os.fork()
        if self.pid == 0:
            try:
                run_child(mutant, chosen, theirs)
            finally:
                os._exit(5)  # an exception out of pytest itself: the mutant broke the run
        os.close(theirs)
        os.set_blocking(self._pipe, False)

    def _listen(self) -> None:
        while True:
            try:
                heard = os.read(self._pipe, 65536)
            except BlockingIOError:
                return
            if not heard:
                return
            self._heard += heard

    def ended(self) -> Told | None:
        """The verdict, once there is one."""
        self._listen()
        if time.monotonic() - self._started > self._limit:
            os.killpg(self.pid, signal.SIGKILL)
        pid, status, usage = os.wait4(self.pid, os.WNOHANG)
        if not pid:
            return None
        self._listen()
        os.close(self._pipe)
        lines = self._heard.decode().splitlines()
        items = [line.removeprefix("start ") for line in lines if line.startswith("start ")]
        failed = [line.removeprefix("failed ") for line in lines if line.startswith("failed ")]
        seconds = usage.ru_utime + usage.ru_stime
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL):
            return Told("hung", items[-1] if items else "", seconds, False, items)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
            return Told("survived", "", seconds, "done" in lines, items)
        return Told("killed", (failed or ["the package or the run broke"])[0], seconds, False, items)

    def wait(self) -> Told:
        """The verdict."""
        while True:
            told = self.ended()
            if told is not None:
                return told
            time.sleep(0.01)
