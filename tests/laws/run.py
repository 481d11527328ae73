"""Running the state machine: with all laws or one of them watched, in pytest or for a mutant. A failure names its replay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from tests.laws.machine_swap import FullMachine
from tests.laws.replay import write_replay


def run_machine(
    make: Callable[..., Any], laws: frozenset[str] | None = None, *, replay: Path | None = None, **chosen: Any
) -> None:
    """Drive `make` through the state machine; raises what it finds.

    laws: those that are watched, None for all; replay: a file for the failing run's trace; chosen: Hypothesis settings
    that differ from the profile's.
    """

    class Machine(FullMachine):
        pass

    Machine.make = staticmethod(make)
    Machine.laws = laws
    try:
        run_state_machine_as_test(Machine, settings=settings(report_multiple_bugs=False, **chosen))
    except Exception as error:
        if replay is not None and Machine.last is not None:
            Machine.last.record_as_it_stands()
            error.add_note(f"See it: {write_replay(replay, Machine.last.records, str(error).splitlines()[0])}")
        raise
