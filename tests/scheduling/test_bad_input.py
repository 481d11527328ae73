"""Every public call of the scheduler and of SamplingParams with values out of range: a clear error, and nothing changed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipaged.config import CacheConfig, EngineConfig, SamplingParams
from minipaged.errors import InputError, RequestError
from minipaged.memory.block_manager import BlockManager
from minipaged.scheduling.plan import StepTokens
from minipaged.scheduling.policies import PreemptionCost, RequestQueue
from minipaged.scheduling.request import Request
from minipaged.scheduling.scheduler import Scheduler

BAD: dict[str, list[Any]] = {
    "n": [0, -1, 1.5, True, "2", None, 10**9],
    "best_of": [0, -1, 1.5, True],
    "max_tokens": [0, -1, 2.0, True],
    "min_tokens": [-1, 65, 1.0],
    "temperature": [-0.1, math.nan, math.inf, "1", None, True],
    "top_p": [0.0, -1, 1.01, math.nan, "x"],
    "top_k": [-2, 1.5, True],
    "min_p": [-0.1, 1.1, math.nan],
    "repetition_penalty": [0.0, -1, math.nan, math.inf],
    "seed": [1.5, 2**63, "s", True],
    "stop": [("",), (1,), 5],
    "bad_words": [("",), (1,), 5],
    "presence_penalty": [-2.1, 2.1, "x"],
    "frequency_penalty": [math.nan],
    "logit_bias": [5, {"x": 1.0}, {-1: 1.0}, {3: 101.0}, {3: math.inf}, [3], {1.5: 1.0}, {3: None}],
    "allowed_token_ids": [(), 5, (-1,), ("x",)],
    "skip_special_tokens": [1, None],
    "include_stop_str_in_output": ["no"],
    "stop_token_ids": [(-1,), (1.5,), 7],
    "ignore_eos": [1, None],
    "logprobs": [-1, 101, 1.5, True],
    "prompt_logprobs": [-1, 101],
    "beam_width": [0, -1, 1.5, 10**6],
    "length_penalty": [math.nan, math.inf, "x"],
    "early_stopping": [2],
    "priority": [1.5, 2**40, math.nan, "high"],
    "cache_salt": [5, b"x"],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in BAD.items() for v in values], ids=repr)
def test_sampling_params(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=name):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    "both", [{"beam_width": 2, "n": 3}, {"beam_width": 2, "temperature": 1.0}, {"n": 3, "best_of": 2}]
)
def test_params_that_contradict_each_other(both: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        SamplingParams(**both)


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (EngineConfig, "max_num_seqs", 0),
        (EngineConfig, "max_num_batched_tokens", -1),
        (EngineConfig, "policy", "lifo"),
        (EngineConfig, "preemption", "never"),
        (EngineConfig, "depth", -1),
        (CacheConfig, "block_size", 257),
        (CacheConfig, "num_blocks", 1),
        (CacheConfig, "num_host_blocks", -1),
        (CacheConfig, "watermark", math.nan),
        (CacheConfig, "watermark", 0.6),
        (PreemptionCost, "seconds_per_block", -1.0),
    ],
)
def test_configs(kind: type, name: str, value: Any) -> None:
    with pytest.raises(InputError, match=name):
        kind(**{name: value})


def make() -> Scheduler:
    return Scheduler(EngineConfig(max_num_seqs=4, max_model_len=100), BlockManager(10, 4), 4)


@given(
    prompt=st.sampled_from([(), (-1,), (1, True), (1.5,), ("a",), (2**31,), (0,) * 100, (1,) * 30]),
    params=st.sampled_from(
        [SamplingParams(max_tokens=20), SamplingParams(max_tokens=80), SamplingParams(n=5, temperature=1.0)]
    ),
)
def test_a_refused_request_leaves_no_trace(prompt: tuple[Any, ...], params: SamplingParams) -> None:
    scheduler = make()
    before = scheduler.manager.usage()
    with pytest.raises(RequestError):
        scheduler.add(Request(1, prompt, params))
    assert not scheduler.has_work
    assert not scheduler.sequences
    assert scheduler.manager.usage() == before
    assert scheduler.take_events() == []


def test_a_request_id_in_use_and_a_plan_out_of_turn() -> None:
    scheduler = make()
    scheduler.add(Request(1, (1, 2, 3), SamplingParams(max_tokens=2)))
    with pytest.raises(RequestError, match="in use"):
        scheduler.add(Request(1, (4,), SamplingParams(max_tokens=2)))
    plan = scheduler.schedule()
    assert plan is not None
    other = make()
    other.add(Request(1, (1, 2, 3), SamplingParams(max_tokens=2)))
    stranger = other.schedule()
    assert stranger is not None
    drawn = StepTokens(np.array([7], np.int32))
    with pytest.raises(ValueError, match="oldest"):
        scheduler.commit(stranger, drawn)
    assert scheduler.commit(plan, drawn)[0].outputs[0].token_ids == [7]
    with pytest.raises(ValueError, match="oldest"):
        scheduler.commit(plan, drawn)


STRANGE: list[Any] = [None, -1, 1.5, math.nan, True, "x", [], [None], {}, object(), np.array([1, 2]), 10**30]


@pytest.mark.parametrize("value", STRANGE, ids=lambda value: type(value).__name__)
def test_calls_with_something_else_change_nothing(value: Any) -> None:
    """Every public call of the scheduler with what is no request, no number, no sequence, no tokens: one clear error."""
    scheduler = make()
    scheduler.add(Request(1, (1, 2, 3), SamplingParams(max_tokens=2)))
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.take_events()
    before = scheduler.manager.usage(), dict(scheduler.requests), list(scheduler.running)
    calls = [
        lambda: scheduler.add(value),
        lambda: scheduler.check(value),
        lambda: scheduler.commit(plan, value),
        lambda: scheduler.commit(plan, StepTokens(value)),
        lambda: scheduler.commit(value, StepTokens(np.array([7], np.int32))),
    ]
    if not isinstance(value, int) or value < 2:  # a large number is that of a stranger
        calls.append(lambda: scheduler.abort(value))
    calls.append(lambda: scheduler.add(Request(value, (1,), SamplingParams(max_tokens=2))))
    for call in calls:
        with pytest.raises(ValueError, match=r"must be|oldest"):
            call()
        assert (scheduler.manager.usage(), scheduler.requests, scheduler.running) == before
        assert scheduler.take_events() == []
    assert scheduler.commit(plan, StepTokens(np.array([7], np.int32)))[0].outputs[0].token_ids == [7]


def test_aborting_twice_or_a_stranger_does_nothing() -> None:
    """L03: aborting or finishing a request twice does nothing."""
    scheduler = make()
    scheduler.add(Request(1, (1, 2, 3), SamplingParams(max_tokens=2)))
    assert scheduler.abort(1)
    assert not scheduler.abort(1)
    assert not scheduler.abort(99)
    assert [o.request_id for o in scheduler.take_ended()] == [1]
    assert scheduler.take_ended() == []


def test_the_queue() -> None:
    queue = RequestQueue(lambda request: request.service_key)
    requests = [Request(i, (1,), SamplingParams(priority=p)) for i, p in enumerate((3, -1, 0))]
    for request in requests:
        queue.push(request)
    with pytest.raises(ValueError, match="queued already"):
        queue.push(requests[0])
    queue.remove(requests[2])
    with pytest.raises(KeyError):
        queue.remove(requests[2])
    assert [r.request_id for r in queue] == [1, 0]
    assert [queue.pop().request_id, queue.pop().request_id] == [1, 0]
    with pytest.raises(IndexError):
        queue.pop()


@pytest.mark.parametrize(("blocks", "tokens", "swap"), [(1, 16, True), (1000, 16, False), (100, 1600, True)])
def test_the_cheaper_way_out(blocks: int, tokens: int, swap: bool) -> None:
    cost = PreemptionCost(
        seconds_per_block=2e-5, seconds_per_token=4e-6, seconds_per_transfer=0.0, seconds_per_pass=1e-3
    )
    assert cost.swap_is_cheaper(blocks, tokens) is swap
    by_hand = 2 * blocks * 2e-5 < tokens * 4e-6 + 1e-3
    assert by_hand is swap
