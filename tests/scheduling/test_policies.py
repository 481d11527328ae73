"""The cost model that chooses between recompute and swap."""

from __future__ import annotations

import math
from typing import Any

import pytest

from minipaged.config import EngineConfig
from minipaged.scheduling.policies import PreemptionCost, wants_swap


@pytest.mark.parametrize("policy", ["auto", "swap", "recompute"])
def test_the_cost_model_is_its_formula(policy: Any) -> None:
    config = EngineConfig(preemption=policy)
    cost = PreemptionCost(seconds_per_block=1.0, seconds_per_token=0.5, seconds_per_transfer=3.0, seconds_per_pass=2.0)
    for blocks in (1, 2, 5):
        for tokens in range(0, 40):
            swap = 2 * (blocks * 1.0 + 3.0) < tokens * 0.5 + 2.0
            assert wants_swap(config, cost, blocks, tokens) is (swap if policy == "auto" else policy == "swap")
    assert PreemptionCost(0.0, 0.0, 0.0, 0.0).swap_is_cheaper(1, 1) is False


@pytest.mark.parametrize("policy", ["auto", "swap", "recompute"])
def test_who_has_computed_nothing_has_nothing_to_swap(policy: Any) -> None:
    """Sent away before its first chunk, it waits for admission as before, and no swap is counted (found by the long profile)."""
    free = PreemptionCost(0.0, 0.0, 0.0, seconds_per_pass=1.0)
    assert wants_swap(EngineConfig(preemption=policy), free, 0, 0) is False


def test_the_default_costs_break_even_where_their_comments_say() -> None:
    """26 us a block and 20 us a transfer, both ways, against 4 us a token and 2 ms a pass."""
    cost = PreemptionCost()
    for tokens in (0, 16, 1000, 50_000):
        even = ((tokens * 4 + 2000) / 2 - 20) / 26
        assert cost.swap_is_cheaper(math.floor(even - 1e-6), tokens)
        assert not cost.swap_is_cheaper(math.ceil(even + 1e-6), tokens)
