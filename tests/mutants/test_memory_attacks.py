"""Every bug that an attacker put into the block manager is found by the spec: one item a mutant."""

from __future__ import annotations

from typing import Any

import pytest

from tests.mutants.killing import killed
from tests.mutants.memory_attacks import ATTACKS


@pytest.mark.parametrize("mutant", [pytest.param(m, id=m.__name__) for m in ATTACKS])
def test_the_spec_finds(mutant: Any) -> None:
    """The mutant's own docstring says what is wrong with it."""
    killed(mutant)
