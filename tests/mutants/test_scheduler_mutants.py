"""Every bug that is put into the scheduler is found by the law that it breaks, in bounded steps: one item a mutant.

Each takes a second at most. A livelock is found as one: a world ends the run (L43) when a step asks for room without end, or when steps get
nowhere (tests/laws/token_world.py).
"""

from __future__ import annotations

from typing import Any

import pytest

from minipaged.scheduling.scheduler import Scheduler
from tests.mutants.killing_schedulers import killed, laws, verdict
from tests.mutants.scheduler_attacks import ATTACKS
from tests.mutants.scheduler_bugs import HISTORICAL

MUTANTS = [*HISTORICAL, *ATTACKS]


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("mutant", "law"), [pytest.param(m, law, id=m.__name__) for m, law in MUTANTS])
def test_the_spec_finds(mutant: Any, law: str) -> None:
    """The mutant's own docstring says what is wrong with it."""
    killed(mutant, law)


def test_the_real_scheduler_obeys_what_finds_mutants() -> None:
    """One of the laws stands for all here: `pytest tests/laws` runs each."""
    assert verdict(Scheduler, "a_group_that_runs_dry") is None
    assert len(laws()) >= 20


@pytest.mark.slow
@pytest.mark.parametrize("mutant", [pytest.param(m, id=m.__name__) for m, _ in MUTANTS])
def test_all_laws_together_find_it(mutant: Any) -> None:
    """Nothing depends on which law is tried: the whole spec, from its first law on."""
    assert verdict(mutant) is not None
