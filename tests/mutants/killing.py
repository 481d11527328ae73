"""Does the spec find a bug in a block manager? Runs it in this process, one part after another, up to the first law that is broken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import Phase, settings

from tests.laws import properties, properties_cache, properties_sharing, properties_steps
from tests.laws.run import run_machine

Check = Callable[[Callable[..., Any]], None]


def checks_of(*modules: Any) -> list[Check]:
    """The laws that these modules define as functions of a block manager class."""
    return [f for m in modules for f in vars(m).values() if getattr(f, "__module__", "") == m.__name__ and is_check(f)]


def is_check(candidate: Any) -> bool:
    """Whether this is a law: its only parameter is the class."""
    return callable(candidate) and getattr(candidate, "__annotations__", {}).keys() == {"make", "return"}


SLOW = properties.leaving_the_middle_takes_constant_time
PROPERTIES = [
    check
    for check in checks_of(properties, properties_cache, properties_sharing, properties_steps)
    if check is not SLOW
]
FIRST, THEN = 15, 500  # runs of the machine before and after the properties


def verdict(make: Callable[..., Any]) -> Exception | None:
    """The first thing that the spec finds wrong, or None. Nothing is shrunk: a mutant only has to be found."""
    before = settings()
    settings.register_profile(
        "mutants", before, phases=[Phase.explicit, Phase.generate], derandomize=True, database=None
    )
    settings.load_profile("mutants")
    try:
        run_machine(make, max_examples=FIRST)
        for check in PROPERTIES:
            check(make)
        SLOW(make)
        run_machine(make, max_examples=THEN)
    except Exception as error:
        return error
    finally:
        settings.register_profile("mutants", before)
        settings.load_profile("mutants")
    return None


def killed(mutant: Any) -> None:
    """Fails unless the spec finds the mutant, by a law and not because the mutant no longer fits the class that it changes."""
    error = verdict(mutant)
    assert error is not None, f"the spec has a hole: nothing found that {mutant.__doc__}"
    assert not isinstance(error, AttributeError | TypeError | NameError), f"{mutant.__name__} fell over: {error!r}"
