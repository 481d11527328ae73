"""Steps in flight over the stages of a model: who may be in several at once, and blocks that are reused while the last stage lags."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
import torch
from torch import Tensor

from minipaged.assembly import assemble_engine, build_runner
from minipaged.config import CacheConfig, EngineConfig, SamplingParams
from minipaged.engine import Engine
from minipaged.execution.eager import TorchRunner
from minipaged.model.loading import zoo
from minipaged.model.split import Part
from minipaged.scheduling.plan import Pending, StepPlan, StepTokens
from minipaged.scheduling.step_builder import StepBuilder

GREEDY = SamplingParams(max_tokens=16, ignore_eos=True)


class Queue:
    """A pipe within this process (collectives.Pipe)."""

    def __init__(self, hidden: deque[Tensor], *, enters: bool) -> None:
        self.before, self.after = (0, None) if enters else (None, 1)
        self._hidden = hidden

    def receive(self, num_tokens: int) -> Tensor:
        hidden = self._hidden.popleft()
        assert len(hidden) == num_tokens
        return hidden

    def send(self, hidden: Tensor) -> None:
        self._hidden.append(hidden.clone())


class TwoStages:
    """A pipeline whose second stage lags as far as it can: it runs a step when its tokens are asked for (scheduling.plan.Runner)."""

    def __init__(self, cache: CacheConfig, config: EngineConfig) -> None:
        self.hidden: deque[Tensor] = deque()
        self.first, self.second = (self._stage(cache, config, stage) for stage in range(2))
        self.lagging: deque[StepPlan] = deque()
        self.plans: list[StepPlan] = []
        self.in_flight: list[set[int]] = []  # the steps under way when each was launched

    def _stage(self, cache: CacheConfig, config: EngineConfig, stage: int) -> TorchRunner:
        loaded = zoo.load("toy", device="cpu", part=Part(0, 1, stage, 2))
        runner = build_runner(loaded, cache, config, device=torch.device("cpu"), dtype="float32")
        runner.pipe = Queue(self.hidden, enters=stage == 1)  # type: ignore[assignment]
        return runner

    def num_blocks(self) -> int:
        return self.first.num_blocks()

    def launch(self, plan: StepPlan) -> Pending:
        self.first.launch(plan)
        self.in_flight.append({other.step for other in self.lagging})
        self.lagging.append(plan)
        self.plans.append(plan)
        return Asked(self, plan)

    def catch_up(self, plan: StepPlan) -> StepTokens:
        """The second stage runs this step. Those before it have been asked for."""
        assert self.lagging.popleft() is plan
        return self.second.launch(plan).tokens()


class Asked:
    def __init__(self, runner: TwoStages, plan: StepPlan) -> None:
        self.runner, self.plan = runner, plan

    def tokens(self) -> StepTokens:
        return self.runner.catch_up(self.plan)


class NewestFirst(TwoStages):
    """The second stage runs the newest step first: what that reuses, the older one still names."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.done: dict[int, StepTokens] = {}

    def catch_up(self, plan: StepPlan) -> StepTokens:
        while plan.step not in self.done:
            newest = self.lagging.pop()
            # Its hidden states are the last that came.
            if len(newest.token_ids):
                self.hidden.rotate(1)
            self.done[newest.step] = self.second.launch(newest).tokens()
        return self.done[plan.step]


def engine_of(runner_class: type[TwoStages] | None, *, num_blocks: int = 40, **limits: Any) -> Engine:
    """An engine over two stages, or over the whole model."""
    # Without a prefix cache blocks that were given back are handed out next.
    cached = limits.pop("enable_prefix_caching", True)
    cache = CacheConfig(4, num_blocks, num_host_blocks=40, enable_prefix_caching=cached, watermark=0.0)
    stages = 1 if runner_class is None else 2
    limits = {"max_num_seqs": 8, "max_num_batched_tokens": 16, "preemption": "swap", **limits}
    config = EngineConfig(max_model_len=200, depth=stages - 1, pipeline_parallel=stages, **limits)
    loaded = zoo.load("toy", device="cpu")
    if runner_class is None:
        runner: Any = build_runner(loaded, cache, config, device=torch.device("cpu"), dtype="float32")
    else:
        runner = runner_class(cache, config)
    return assemble_engine(loaded, cache, config, runner, dtype="float32")


def run(engine: Engine, params: list[SamplingParams]) -> list[list[int]]:
    outputs = [engine.ask(f"the same beginning{i * ' and more'}", each) for i, each in enumerate(params)]
    while engine.has_work:
        engine.step()
    assert not any(output.error for output in outputs)
    return [completion.token_ids for output in outputs for completion in output.outputs]


MIXED = [
    GREEDY,
    SamplingParams(max_tokens=16, n=3, temperature=0.8, seed=2, ignore_eos=True),
    SamplingParams(max_tokens=10, beam_width=2, ignore_eos=True),
    GREEDY,
    SamplingParams(max_tokens=30, ignore_eos=True, temperature=0.7, seed=3),
]


def drawers(plan: StepPlan) -> set[int]:
    return set(plan.seq_ids[plan.draw_rows].tolist())


def test_L62_steps_in_flight_share_no_sequence_that_draws() -> None:
    """And every draw's token is known before the next: the first stage has no other way to learn it."""
    engine = engine_of(TwoStages)
    assert run(engine, MIXED) == run(engine_of(None), MIXED)
    runner: Any = engine.runner
    plans = {plan.step: plan for plan in runner.plans}
    assert engine.scheduler.counters.swaps > 0
    overlaps = 0
    for plan, under_way in zip(runner.plans, runner.in_flight, strict=True):
        assert (plan.token_ids >= 0).all()
        for other in (plans[step] for step in under_way):
            overlaps += 1
            assert not drawers(other) & set(plan.seq_ids.tolist())
    assert overlaps > len(runner.plans) / 2


def test_L62_chunks_of_one_prompt_are_in_flight_together() -> None:
    engine = engine_of(TwoStages)
    runner: Any = engine.runner
    engine.submit("a prompt that is read in several chunks, of sixteen tokens each", GREEDY)
    engine.step()
    engine.step()
    assert [len(each) for each in runner.in_flight] == [0, 1]
    assert runner.plans[0].seq_ids.tolist() == runner.plans[1].seq_ids.tolist()
    while engine.has_work:
        engine.step()


def test_decodes_are_shared_out_evenly_among_the_stages() -> None:
    engine = engine_of(TwoStages, num_blocks=200, max_num_batched_tokens=200)
    run(engine, [GREEDY] * 6)
    runner: Any = engine.runner
    rows = [len(plan.seq_ids) for plan in runner.plans[1:]]
    assert rows == [3] * len(rows)
    assert sum(map(bool, runner.in_flight)) >= len(rows) - 2


def reuse_in_flight(runner_class: type[TwoStages] | None) -> tuple[list[int], Any]:
    """A request is aborted while the second stage has yet to run its chunk, and another one gets its blocks."""
    engine = engine_of(runner_class, enable_prefix_caching=False)
    gone = engine.submit("a prompt that goes away too soon to be read", GREEDY)
    engine.step()
    engine.abort(gone)
    output = engine.ask("quite another text, of two chunks", GREEDY)
    while engine.has_work:
        engine.step()
    return output.outputs[0].token_ids, engine.runner


def test_L62_a_block_is_reused_behind_the_steps_that_name_it() -> None:
    expected, _ = reuse_in_flight(None)
    found, runner = reuse_in_flight(TwoStages)
    assert found == expected
    aborted, after = runner.plans[:2]
    assert runner.in_flight[1] == {aborted.step}
    assert set(aborted.tables[0].tolist()) & set(after.tables[0].tolist())
    # The same with stages out of order is seen.
    assert reuse_in_flight(NewestFirst)[0] != expected


class KnowsNoResult(StepBuilder):
    """Sequences in flight are scheduled again before their tokens are known, as on one device."""

    def build(self, number: int, batch: Any) -> StepPlan | None:
        plan = super().build(number, batch)
        batch.awaiting_result[:] = False
        return plan


def test_L62_a_scheduler_that_does_not_wait_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    greedy = [GREEDY] * 3
    expected = run(engine_of(None), greedy)
    assert run(engine_of(TwoStages), greedy) == expected
    monkeypatch.setattr("minipaged.scheduling.scheduler.StepBuilder", KnowsNoResult)
    assert run(engine_of(TwoStages), greedy) != expected
