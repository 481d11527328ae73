"""Hypothesis profiles and the spec's options. HYPOTHESIS_PROFILE chooses: ci (fixed examples, the default), quick (for mutants), long."""

from __future__ import annotations

import ctypes
import os
import signal

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a run in the background; its children must hear ctrl+c
    ctypes.CDLL(None).signal(signal.SIGINT, 0)  # from any thread, unlike signal.signal
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch is imported: two workers with two threads each would fight over two cores
os.environ.setdefault("MINIPAGED_WARM_UP", "0")  # tests on a GPU build many small engines, each of which needs little

import pytest
from hypothesis import HealthCheck, Verbosity, settings
from hypothesis.internal.conjecture import providers

from tests.laws_options import pytest_addoption, pytest_configure

__all__ = ["pytest_addoption", "pytest_configure"]

pytest.register_assert_rewrite(  # so that a failing law says which values it saw
    "tests.laws.properties", "tests.laws.properties_cache", "tests.laws.properties_steps"
)

_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("ci", max_examples=60, stateful_step_count=40, derandomize=True, database=None, **_COMMON)
settings.register_profile("quick", max_examples=25, stateful_step_count=40, derandomize=True, database=None, **_COMMON)
settings.register_profile(
    "long", max_examples=3000, stateful_step_count=60, print_blob=True, verbosity=Verbosity.normal, **_COMMON
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# Hypothesis also draws the constants that it finds in the modules loaded so far, so fixed examples would depend on which tests ran before.
if settings.get_current_profile_name() != "long" and hasattr(providers, "_get_local_constants"):
    providers._get_local_constants = lambda: providers._local_constants
