"""Steps that are cut short, swaps that come back alone, and parameters at the ends of their ranges, through a whole engine."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from minipaged.api import LLM
from minipaged.config import EngineConfig, SamplingParams
from minipaged.errors import RequestError
from minipaged.memory.block_manager import BlockManager
from minipaged.scheduling.plan import StepPlan, StepTokens
from minipaged.scheduling.request import Request
from minipaged.scheduling.scheduler import Scheduler


def toy(**settings: Any) -> LLM:
    return LLM("toy", num_blocks=64, block_size=4, **settings)


class CutShort:
    """A launch, or the tokens of one, that ctrl+c interrupts."""

    def __init__(self, llm: LLM, where: str, step: int) -> None:
        self._launch, self._where, self._left = llm.engine.runner.launch, where, step
        llm.engine.runner.launch = self.launch  # type: ignore[method-assign]

    def launch(self, plan: StepPlan) -> Any:
        self._left -= 1
        if self._left == 0 and self._where == "launch":
            raise KeyboardInterrupt
        pending = self._launch(plan)
        return self if self._left == 0 else pending

    def tokens(self) -> StepTokens:
        raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["launch", "tokens"])
@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("stream", [False, True])
def test_after_a_step_that_was_cut_short_the_engine_goes_on(where: str, overlap: int, stream: bool) -> None:
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    wanted = toy().generate("hello", params)[0].outputs[0].token_ids
    llm = toy(overlap=overlap)
    CutShort(llm, where, step=3)
    call = llm.stream if stream else llm.generate
    with pytest.raises(KeyboardInterrupt):
        list(call(["hello", "and more"], params))
    assert not llm.engine.scheduler.requests
    assert llm.engine.scheduler.manager.usage().referenced == 0
    assert llm.generate("hello", params)[0].outputs[0].token_ids == wanted
    assert not llm.engine.has_work


def test_a_request_ended_by_a_lost_step_says_so() -> None:
    llm = toy()
    output = llm.engine.ask("hello", SamplingParams(max_tokens=6))
    CutShort(llm, "launch", step=2)
    llm.engine.step()
    with pytest.raises(KeyboardInterrupt):
        llm.engine.step()
    assert llm.engine.step() == [output]
    assert output.finished
    assert output.outputs[0].finish_reason == "error"


@pytest.mark.parametrize("seed", range(100))
def test_whoever_comes_back_from_the_host_is_in_the_plan(seed: int) -> None:
    """Even where all others wait for a step in flight and the one that returns has no room to compute anything yet."""
    choose = random.Random(seed)
    block_size = choose.choice([2, 4])
    manager = BlockManager(choose.randint(8, 16), block_size, num_host_blocks=40, watermark=0.0)
    limits = EngineConfig(max_num_seqs=8, max_num_batched_tokens=8, max_model_len=200, preemption="swap", depth=1)
    scheduler = Scheduler(limits, manager, block_size)
    flights: list[StepPlan] = []
    for step in range(50):
        prompt = tuple(choose.randrange(9) for _ in range(choose.randint(2, 6 * block_size)))
        request = Request(step, prompt, SamplingParams(max_tokens=choose.randint(1, 6)))
        if len(scheduler.requests) < 4:
            try:
                scheduler.add(request)
            except RequestError:
                continue
        plan = scheduler.schedule()
        came_back = [e for e in scheduler.take_events() if e.kind == "swap_in"]
        assert bool(came_back) == (plan is not None and bool(plan.swap_ins))
        flights.extend([plan] if plan is not None else [])
        if flights and (plan is None or len(flights) > 1):
            oldest = flights.pop(0)
            scheduler.commit(oldest, StepTokens(np.zeros(len(oldest.draw_rows), np.int32)))


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(stop_token_ids=(257,), min_tokens=2),
        SamplingParams(stop_token_ids=(2**31,)),
        SamplingParams(beam_width=2, stop=("a",)),
        SamplingParams(beam_width=2, min_tokens=1),
        SamplingParams(beam_width=2, repetition_penalty=1.5),
    ],
    ids=["stop outside the vocabulary", "stop outside int32", "beams stop", "beams min", "beams penalty"],
)
def test_what_no_step_could_serve_is_refused(params: SamplingParams) -> None:
    llm = toy()
    with pytest.raises(RequestError):
        llm.generate("hello", params)
    assert not llm.engine.has_work


def test_parameters_at_the_ends_of_their_ranges() -> None:
    llm = toy()
    greedy = llm.generate("hello", SamplingParams(max_tokens=4))[0].outputs[0].token_ids
    cold = SamplingParams(max_tokens=4, temperature=1e-38)
    assert llm.generate("hello", cold)[0].outputs[0].token_ids == greedy
    warm = SamplingParams(max_tokens=4, temperature=1.0, seed=1, top_k=257)
    all_kept = SamplingParams(max_tokens=4, temperature=1.0, seed=1, top_k=2**31)
    assert (
        llm.generate("hello", all_kept)[0].outputs[0].token_ids == llm.generate("hello", warm)[0].outputs[0].token_ids
    )
    narrow = SamplingParams(max_tokens=4, temperature=1.0, seed=1, top_p=1e-50)
    assert llm.generate("hello", narrow)[0].outputs[0].token_ids == greedy


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "beyond", [{"temperature": 1e300}, {"repetition_penalty": 1e300}, {"repetition_penalty": 1e-300}]
)
def test_what_float32_cannot_hold_counts_as_the_most_that_it_can(beyond: dict[str, float]) -> None:
    """The end is banned, which is -inf: over an infinite temperature that would be no number."""
    llm = toy()
    within = {name: max(min(value, 1e30), 1e-30) for name, value in beyond.items()}
    drawn = [
        llm.generate("hello", SamplingParams(max_tokens=6, min_tokens=6, seed=1, **{"temperature": 1.0, **asked}))
        for asked in (beyond, within)
    ]
    first, second = (answers[0].outputs[0].token_ids for answers in drawn)
    assert first == second


def test_more_logprobs_than_a_beam_search_looks_at() -> None:
    beams = toy().generate("hello", SamplingParams(max_tokens=4, beam_width=1, logprobs=9))[0].outputs[0]
    assert beams.logprobs is not None
    assert [len(entry) for entry in beams.logprobs] == [9] * 4


def test_prompt_logprobs_of_a_single_token() -> None:
    prompt = {"prompt_token_ids": [5]}
    assert toy().generate(prompt, SamplingParams(max_tokens=1, prompt_logprobs=2))[0].prompt_logprobs == [None]


def test_one_victim_is_enough_where_it_leaves_by_swap() -> None:
    """Its blocks are handed out from the next step on; until then whoever needs them waits, and nobody else is sent away."""
    manager = BlockManager(21, 4, num_host_blocks=100, watermark=0.0)
    scheduler = Scheduler(EngineConfig(max_model_len=200, preemption="swap"), manager, 4)
    for number in range(4):
        scheduler.add(Request(number, (number,) * 12, SamplingParams(max_tokens=40)))
    before = [0, 1, 2, 3]
    while not scheduler.counters.preemptions:
        plan = scheduler.schedule()
        assert plan is not None
        scheduler.commit(plan, StepTokens(np.zeros(len(plan.draw_rows), np.int32)))
    assert scheduler.counters.swaps == 1
    assert [request.request_id for request in scheduler.running] == before[:3]
    plan = scheduler.schedule()
    assert plan is not None
    assert plan.seq_ids.tolist() == before[:3]
