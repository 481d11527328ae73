"""Knobs: settings turned while an engine runs act from the next step on, are told in the trace, and never lose a request."""

from __future__ import annotations

from typing import Any

import pytest

from minipaged.api import LLM
from minipaged.config import SamplingParams
from minipaged.errors import InputError
from minipaged.scheduling.runtime_settings import SETTINGS, SettingChange
from minipaged.trace.events import StepDelta


def toy(**settings: Any) -> LLM:
    return LLM("toy", **{"num_blocks": 64, "block_size": 4, **settings})


def run(llm: LLM, most: int = 400) -> None:
    steps = 0
    while llm.engine.has_work:
        llm.engine.step()
        steps += 1
        assert steps < most, "the engine does not come to an end"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("temprature", 1.0, "there is no setting 'temprature': there are temperature, watermark, batching, policy"),
        ("temperature", -1, "temperature must be at least 0 and at most 10, not -1"),
        ("temperature", float("nan"), "finite"),
        ("watermark", 0.9, "at most 0.5"),
        ("batching", "sometimes", "batching must be one of continuous, static, one"),
        ("policy", 3, "policy must be one of fcfs, priority"),
        ("preemption", "", "one of auto, recompute, swap"),
    ],
)
def test_what_cannot_be_turned_is_refused_and_changes_nothing(name: str, value: object, words: str) -> None:
    engine = toy().engine
    before = engine.describe()
    with pytest.raises(InputError, match=words):
        engine.knob(name, value)
    assert not engine.has_work
    assert engine.describe() == before


@pytest.mark.parametrize("depth", [0, 1])
def test_the_temperature_is_that_of_a_run_begun_with_it(depth: int) -> None:
    params = SamplingParams(max_tokens=12, seed=3, ignore_eos=True)
    plain, turned, warm = toy(overlap=depth), toy(overlap=depth), toy(overlap=depth)
    cold_text = plain.generate("a page", params)[0].outputs[0].token_ids
    warm_text = warm.generate("a page", SamplingParams(max_tokens=12, seed=3, ignore_eos=True, temperature=2.0))
    request = turned.engine.ask("a page", params)
    turned.engine.knob("temperature", 2.0)
    run(turned)
    assert request.outputs[0].token_ids == warm_text[0].outputs[0].token_ids != cold_text
    late = toy(overlap=depth)
    request = late.engine.ask("a page", params)
    for _ in range(5):
        late.engine.step()
    known = len(request.request.sequences[0].token_ids)
    assert late.engine.knob("temperature", 2) == "temperature is 2"
    run(late)
    ids = request.outputs[0].token_ids
    head = known - request.request.num_prompt
    assert list(ids[:head]) == list(cold_text[:head])
    assert list(ids) != list(cold_text)


def running_at_once(batching: str, *, depth: int = 0, policy: str = "fcfs", blocks: int = 64) -> list[set[int]]:
    llm = toy(overlap=depth, policy=policy, num_blocks=blocks, num_host_blocks=32)
    engine, seen = llm.engine, []
    engine.knob("batching", batching)
    engine.trace.subscribe(lambda delta: seen.append(set(delta.queues.running)))
    for priority, length in enumerate((6, 12, 9)):
        engine.submit("a page of words", SamplingParams(max_tokens=length, ignore_eos=True, priority=-priority))
    for _ in range(4):
        engine.step()
    engine.submit("a late one", SamplingParams(max_tokens=5, n=2, ignore_eos=True, priority=-9))
    run(llm)
    assert seen
    return seen


def test_batching_says_who_may_join() -> None:
    continuous = running_at_once("continuous")
    assert any({0, 3} <= now for now in continuous), "the late one joins those that run"
    static = running_at_once("static")
    assert any({0, 1, 2} <= now for now in static)
    assert all(not now & {0, 1, 2} for now in static if 3 in now), "it waits until the whole batch is done"
    assert all(len({0, 1, 2} & now) <= 1 and not (now & {0, 1, 2} and 3 in now) for now in running_at_once("one"))


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
@pytest.mark.parametrize("batching", ["static", "one"])
def test_a_pool_too_small_for_all_never_sticks(batching: str, policy: str, depth: int) -> None:
    running_at_once(batching, depth=depth, policy=policy, blocks=12)


def test_policy_and_preemption_turn_under_way() -> None:
    llm = toy(num_blocks=14, num_host_blocks=32, max_num_seqs=3)
    engine = llm.engine
    deltas: list[StepDelta] = []
    engine.trace.subscribe(deltas.append)
    outputs = [
        engine.ask("some words " * 2, SamplingParams(max_tokens=14, ignore_eos=True, priority=9 - n)) for n in range(6)
    ]
    turns = [("preemption", "swap"), ("policy", "priority"), ("preemption", "recompute"), ("policy", "fcfs")]
    while engine.has_work:
        if len(deltas) % 5 == 4 and turns:
            engine.knob(*turns.pop(0))
        engine.step()
        keys = [engine.scheduler.service_key(request) for request in engine.scheduler.running]
        assert keys == sorted(keys)
    assert not turns
    kinds = {event.kind for delta in deltas for event in delta.events}
    assert {"preempt", "swap_out", "knob"} <= kinds
    want = toy(num_blocks=64).generate("some words " * 2, SamplingParams(max_tokens=14, ignore_eos=True))
    assert all(output.outputs[0].token_ids == want[0].outputs[0].token_ids for output in outputs)


def test_the_watermark_keeps_newcomers_out() -> None:
    def most_at_once(share: float) -> int:
        llm = toy(num_blocks=21)
        llm.engine.knob("watermark", share)
        most = 0
        for n in range(4):
            llm.engine.submit(f"{n} some words", SamplingParams(max_tokens=6, ignore_eos=True))
        while llm.engine.has_work:
            llm.engine.step()
            most = max(most, len(llm.engine.scheduler.running))
        return most

    assert most_at_once(0.5) < most_at_once(0.0) == 4


def test_turns_are_told_in_the_trace() -> None:
    llm = toy()
    told: list[StepDelta] = []
    llm.engine.trace.subscribe(told.append)
    llm.engine.knob("watermark", 0.25)
    llm.engine.knob("batching", "static")
    llm.engine.step()
    turns = [SettingChange(event.other, event.amount).words for event in told[0].events if event.kind == "knob"]
    assert turns == ["watermark is 0.25", "batching is static"]
    assert not llm.engine.has_work
    assert llm.engine.describe()["engine"]["batching"] == "static"  # type: ignore[index]
    assert "does not know" in SettingChange(len(SETTINGS), 1).words
    assert "?" in SettingChange(2, 99).words


def test_a_sequence_that_has_ended_is_told_once() -> None:
    llm = toy(num_blocks=128)
    told: list[StepDelta] = []
    llm.engine.trace.subscribe(told.append)
    llm.engine.submit("some words", SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=30, stop=("e", "a")))
    run(llm)
    ends: dict[int, int] = {}
    for delta in told:
        for patch in delta.sequences:
            if patch.status == "finished":
                ends[patch.sequence] = ends.get(patch.sequence, 0) + 1
    steps = {delta.step for delta in told for patch in delta.sequences if patch.status == "finished"}
    assert len(ends) == 3
    assert set(ends.values()) == {1}
    assert len(steps) > 1, "they ended in different steps, so a sibling lived on"
