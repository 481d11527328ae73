"""The event loop (lab's short scheduler) against the engine itself on the simulated runner: same workload, same memory, same run."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest

from minipaged.lab.simulation.engine_run import run_engine
from minipaged.lab.simulation.event_loop import Outcome
from minipaged.lab.simulation.servers import paper_server
from minipaged.lab.simulation.simulate import simulate
from minipaged.lab.simulation.workloads import make_workload

SERVER = paper_server("opt-13b")
HALF_A_POINT = 0.005  # of the pool. The loop counts a step's state before its last tokens leave, the engine after.
BLOCKED = ("paged", "tgi-paged", "orca-max", "orca-pow2", "orca-oracle")  # the systems that the engine can run as well


@cache
def both(system: str, workload: str, rate: float, count: int) -> tuple[Outcome, Outcome]:
    """(the loop's outcome, the engine's)."""
    load = make_workload(workload, rate=rate, count=count)
    return simulate(system, load, SERVER).outcome, run_engine(load, SERVER, system=system)


@pytest.mark.parametrize(("workload", "rate", "count"), [("sharegpt", 2.0, 60), ("alpaca", 30.0, 300)])
@pytest.mark.parametrize("system", BLOCKED)
def test_every_request_enters_and_ends_at_the_same_femtosecond(
    system: str, workload: str, rate: float, count: int
) -> None:
    short, full = both(system, workload, rate, count)
    np.testing.assert_array_equal(short.first_token, full.first_token)
    np.testing.assert_array_equal(short.finish, full.finish)
    np.testing.assert_array_equal(np.argsort(short.finish, kind="stable"), np.argsort(full.finish, kind="stable"))
    assert (short.steps, short.preemptions, short.refused) == (full.steps, full.preemptions, full.refused)
    assert short.makespan == full.makespan


@pytest.mark.parametrize(("workload", "rate", "count"), [("sharegpt", 2.0, 60), ("alpaca", 30.0, 300)])
@pytest.mark.parametrize("system", BLOCKED)
def test_the_pool_over_time_is_the_same_within_half_a_point(
    system: str, workload: str, rate: float, count: int
) -> None:
    """All parts for paging. A system that reserves shows the engine only its tokens and what is free: those two."""
    short, full = both(system, workload, rate, count)
    ours, engines = short.averages.whole, full.averages.whole
    assert ours.weight == engines.weight
    shares, expected = ours.shares(), engines.shares()
    for part in shares if system == "paged" else ("token", "idle"):
        assert shares[part] == pytest.approx(expected[part], abs=HALF_A_POINT), part
    assert ours.mean_requests == pytest.approx(engines.mean_requests, rel=0.03)


def test_preempted_requests_return_in_the_engines_order() -> None:
    """Two hundred requests in a pool that binds: many leave and are computed anew."""
    short, full = both("paged", "sharegpt", 2.0, 250)
    np.testing.assert_array_equal(short.first_token, full.first_token)
    np.testing.assert_array_equal(short.finish, full.finish)
    assert (short.steps, short.preemptions) == (full.steps, full.preemptions)
    assert full.preemptions > 50


@pytest.mark.parametrize(("workload", "bound"), [("alpaca-n2", 0.02), ("alpaca-n4", 0.01)])
def test_blocks_that_samples_share_are_the_engines_within_two_percent(workload: str, bound: float) -> None:
    short, full = both("paged", workload, math.inf, 100)
    assert short.averages.whole.saving == pytest.approx(full.averages.whole.saving, abs=bound)
    assert short.makespan == pytest.approx(full.makespan, rel=0.01)
    assert (short.preemptions, short.refused) == (full.preemptions, full.refused)
