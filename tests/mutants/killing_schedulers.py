"""Does the spec find a bug in a scheduler? Runs one of its laws, or all of them up to the first that is broken, in this process."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import pytest
from hypothesis import Phase, settings

from minipaged.memory.block_manager import BlockManager
from tests.laws import test_scheduler_details, test_scheduler_laws

Law = Callable[..., None]
MODULES = (test_scheduler_laws, test_scheduler_details)


@cache
def laws() -> list[Law]:
    """The laws of a scheduler as functions of its class. Nothing is shrunk: a mutant only has to be found.

    Hypothesis fixes a test's settings where it is defined, so this is the module loaded once more.
    """
    before = settings()
    settings.register_profile(
        "mutants", before, phases=[Phase.explicit, Phase.generate], derandomize=True, database=None
    )
    settings.load_profile("mutants")
    try:
        modules = [_once_more(str(module.__file__)) for module in MODULES]
    finally:
        settings.register_profile("mutants", before)
        settings.load_profile("mutants")
    tests = [value for module in modules for name, value in vars(module).items() if name.startswith("test_")]
    return [test for test in tests if "scheduler_class" in inspect.signature(test).parameters]


def _once_more(path: str) -> ModuleType:
    """The module at `path`, run anew."""
    spec = importlib.util.spec_from_file_location("laws_of_a_scheduler", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"no module at {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def verdict(scheduler: Any, words: str = "") -> tuple[str, BaseException] | None:
    """The first law that is broken, and how; None if all hold. words: only the laws whose names begin like this, after `test_`."""
    chosen = [law for law in laws() if law.__name__.removeprefix("test_").startswith(words)]
    if not chosen:
        raise ValueError(f"no law is called {words}")
    for law in chosen:
        try:
            law(block_manager_class=BlockManager, scheduler_class=scheduler)
        except (Exception, pytest.fail.Exception) as error:
            return law.__name__, error
    return None


def killed(mutant: Any, law: str) -> None:
    """Fails unless the law finds the mutant, and not because the mutant no longer fits the class that it changes."""
    found = verdict(mutant, law)
    assert found is not None, f"the spec has a hole: {law} does not find that {mutant.__doc__}"
    assert not isinstance(found[1], AttributeError | TypeError | NameError), f"{mutant.__name__} fell over: {found}"
