"""Throughput of models that do not fit: the sums by hand, what grows with the batch, and FlexGen's table."""

from __future__ import annotations

import pytest

from minipaged.errors import InputError
from minipaged.lab.paper.claims import unlimited
from minipaged.lab.simulation.hardware import find_gpu
from minipaged.lab.simulation.offload import (
    Policy,
    against_batch,
    against_published,
    parse_batches,
    throughput,
)
from minipaged.model.loading.shapes import shape

T4 = find_gpu("t4")


def test_a_small_batch_takes_the_time_of_the_link() -> None:
    """All weights cross it in each step, and nothing else takes as long."""
    config = shape("opt-30b")
    found = throughput(config, T4, Policy(1.0), 1, 8, 4)
    seconds = 2 * config.num_parameters() / T4.host_bytes
    assert found.limit == "host link"
    assert found.step_seconds == pytest.approx(seconds)
    assert found.tokens_per_second == pytest.approx(1 / seconds)


def test_keys_and_values_on_disk_are_read_in_each_step() -> None:
    config = shape("opt-175b")
    found = throughput(config, T4, Policy(0.5, 0.5, kv="disk"), 256, 512, 32)
    kv, weights = 256 * config.kv_bytes_per_token("float16"), 2 * config.num_parameters()
    assert found.limit == "disk"
    assert found.step_seconds == pytest.approx((0.5 * weights + kv * 528) / 2e9 + kv / 1e9)


def test_a_batch_shares_the_reading_until_its_memory_is_gone() -> None:
    found = against_batch(shape("opt-30b"), T4, (1, 2, 4, 8, 10_000), 512, 32)
    assert found[-1] is None
    speeds = [t.tokens_per_second for t in found if t is not None]
    assert speeds[1] == pytest.approx(2 * speeds[0], rel=0.05)
    assert speeds == sorted(speeds)
    streamed = [t.streamed_bytes for t in found if t is not None]
    assert streamed == sorted(streamed)  # keys and values drive weights out
    assert against_batch(shape("opt-125m"), T4, (1,), 8, 8)[0].streamed_bytes == 0  # type: ignore[union-attr]


def test_a_slower_link_is_slower() -> None:
    fast, slow = (against_batch(shape("opt-30b"), T4, (1,), 8, 8, link)[0] for link in (None, 8e9))
    assert fast is not None
    assert slow is not None
    assert slow.step_seconds == pytest.approx(2 * fast.step_seconds)


def test_the_published_table_orders_as_the_bounds_do() -> None:
    """Perfect overlap on a data sheet's rates is no slower than what was measured, where that has more than one digit, but for a fifth."""
    for row, found in against_published():
        if row.tokens_per_second > 0.1:
            assert found.tokens_per_second > 0.8 * row.tokens_per_second, row
    flexgen = {row.model: found.tokens_per_second for row, found in against_published() if row.system == "FlexGen"}
    others = {row.model: found.tokens_per_second for row, found in against_published() if row.system == "Accelerate"}
    assert flexgen["opt-30b"] > 5 * others["opt-30b"]
    assert flexgen["opt-175b"] > 5 * others["opt-175b"]


def test_the_claim_is_judged_by_these() -> None:
    assert unlimited().verdict == "half true"


@pytest.mark.parametrize("text", ["", "1,x", "0", "1,-2"])
def test_other_batches_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="batches must be"):
        parse_batches(text)
