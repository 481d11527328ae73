"""The classes under the spec, and the state machine's verdict on a law, as fixtures."""

from __future__ import annotations

from collections.abc import Callable, Generator

import pytest
from hypothesis import settings

from tests import laws_options
from tests.laws.call_replay import Noted, leave_call_replay
from tests.laws.model import BrokenLawError
from tests.laws.run import run_machine
from tests.laws.token_world import World
from tests.laws.world_replay import leave_replay

SHARED_EXAMPLES = 15  # times the profile's, for the one run in which all laws are watched together
AT_ONCE = 3000  # examples of one run: Hypothesis remembers each of them, so a longer one is several
FEW = 3  # laws asked for: each then has a run of its own


@pytest.fixture(autouse=True)
def _no_world_before() -> None:
    """A test shows no world and no manager of an earlier one."""
    World.last = Noted.last = None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed law of a scheduler or a manager says how to see its run; the state machine's say so themselves (run.py)."""
    report = yield
    if report.when == "call" and report.failed:
        name = "".join(c if c.isalnum() else "_" for c in item.name)
        path, finding = laws_options.replay_dir() / f"{name}.trace", _finding(item, call)
        command = None
        if World.last is not None:
            command = leave_replay(World.last, path, finding)
        elif Noted.last is not None:
            command = leave_call_replay(Noted.last, path, finding)
        if command is not None:
            report.sections.append(("replay", f"See it: {command}"))
    return report


def _finding(item: pytest.Item, call: pytest.CallInfo[None]) -> str:
    """The law that failed, and the first line of what it says."""
    said = str(call.excinfo.value).splitlines() if call.excinfo is not None else []
    return f"{item.name.removeprefix('test_')}: {said[0] if said else 'failed'}"


@pytest.fixture(scope="session")
def block_manager_class() -> type:
    """What --block-manager names."""
    return laws_options.block_manager_class()


@pytest.fixture(scope="session")
def scheduler_class() -> type:
    """What --scheduler names."""
    return laws_options.scheduler_class()


class SharedRun:
    """One long run with every law watched; made when first asked for."""

    def __init__(self, make: type) -> None:
        self._make = make
        self._done = False
        self._error: Exception | None = None

    def error(self) -> Exception | None:
        """What ended the run, or None."""
        if not self._done:
            self._done = True
            replay, left = laws_options.replay_dir() / "all_laws.trace", SHARED_EXAMPLES * settings().max_examples
            try:
                while left > 0:
                    run_machine(self._make, replay=replay, max_examples=min(left, AT_ONCE))
                    left -= AT_ONCE
            except Exception as error:
                self._error = error
        return self._error


@pytest.fixture(scope="session")
def shared_run(request: pytest.FixtureRequest, block_manager_class: type) -> SharedRun | None:
    """The long run, if more than a few laws are asked for."""
    asking = sum("obeys" in getattr(item, "fixturenames", ()) for item in request.session.items)
    return SharedRun(block_manager_class) if asking > FEW else None


@pytest.fixture
def obeys(block_manager_class: type, shared_run: SharedRun | None) -> Callable[[str], None]:
    """A function that raises unless the state machine finds the law obeyed.

    The long run's verdict stands for all laws if it found nothing, and for the law that it found broken. The others then
    have a run in which they alone are watched.
    """

    def check(law: str) -> None:
        error = shared_run.error() if shared_run is not None else None
        if shared_run is not None and error is None:
            return
        if error is not None and (not isinstance(error, BrokenLawError) or error.law == law):
            raise error
        replay = laws_options.replay_dir() / f"{law}.trace"
        run_machine(block_manager_class, frozenset({law}), replay=replay)

    return check
