"""Every historical bug that is put into the block manager is found by the spec: one item a mutant."""

from __future__ import annotations

from typing import Any

import pytest

from tests.laws.test_laws_memory import __dict__ as items
from tests.mutants.killing import PROPERTIES, SLOW, killed
from tests.mutants.memory_bugs import HISTORICAL


@pytest.mark.parametrize("mutant", [pytest.param(m, id=m.__name__) for m in HISTORICAL])
def test_the_spec_finds(mutant: Any) -> None:
    """The mutant's own docstring says what is wrong with it."""
    killed(mutant)


def test_every_property_is_an_item_of_the_spec_too() -> None:
    """What finds mutants is what `pytest tests/laws` runs."""
    used = {name for item in items.values() if hasattr(item, "__code__") for name in item.__code__.co_names}
    assert {check.__name__ for check in (*PROPERTIES, SLOW)} <= used
