"""Every bug that is put into the engine, or into what it hands out, is found by the named law of tests/scheduling/test_callers.py."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from minipaged import assembly
from minipaged.api import LLM
from minipaged.scheduling import request
from tests.mutants.engine_bugs import ENGINES, OUTPUTS
from tests.scheduling import test_callers


def broken_by(law: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the law on a new LLM, as its own test does."""
    check: Callable[..., None] = getattr(test_callers, law)
    given = {"llm": lambda: LLM("toy", num_blocks=400, block_size=4), "monkeypatch": lambda: monkeypatch}
    check(**{name: given[name]() for name in inspect.signature(check).parameters})


def killed(mutant: type, law: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails unless the law is broken, and not because the mutant no longer fits the class that it changes."""
    error: BaseException | None = None
    try:
        broken_by(law, monkeypatch)
    except (Exception, pytest.fail.Exception) as found:
        error = found
    assert error is not None, f"the spec has a hole: {law} does not find that {mutant.__doc__}"
    assert not isinstance(error, AttributeError | TypeError | NameError), f"{mutant.__name__} fell over: {error!r}"


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("mutant", "law"), [pytest.param(m, law, id=m.__name__) for m, law in ENGINES])
def test_the_laws_of_callers_find(mutant: Any, law: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant's own docstring says what is wrong with it."""
    monkeypatch.setattr(assembly, "Engine", mutant)
    killed(mutant, law, monkeypatch)


@pytest.mark.parametrize(("mutant", "law"), [pytest.param(m, law, id=m.__name__) for m, law in OUTPUTS])
def test_the_laws_of_outputs_find(mutant: Any, law: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for what is handed out."""
    monkeypatch.setattr(request, "RequestOutput", mutant)
    killed(mutant, law, monkeypatch)


@pytest.mark.parametrize("law", sorted({law for _, law in (*ENGINES, *OUTPUTS)}))
def test_the_real_engine_obeys_what_finds_them(law: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the same way, so that it is the bug that was found."""
    broken_by(law, monkeypatch)
