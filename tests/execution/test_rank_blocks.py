"""The same block ids on every rank: each has its heads of what one rank would have there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from minipaged.assembly import assemble_engine, build_runner
from minipaged.config import CacheConfig, EngineConfig, SamplingParams
from minipaged.engine import Engine
from minipaged.execution.eager import TorchRunner
from minipaged.model.loading import zoo
from minipaged.model.split import Part
from minipaged.scheduling.plan import Pending, StepPlan
from tests.execution.thread_ranks import ThreadCollectives, ThreadRunner, on_ranks

CACHE = CacheConfig(block_size=4, num_blocks=30, num_host_blocks=30, watermark=0.0)
CONFIG = EngineConfig(max_num_seqs=8, max_num_batched_tokens=24, max_model_len=200, preemption="swap")


def runners(ranks: int, runner_class: type[TorchRunner] = TorchRunner, cache: CacheConfig = CACHE) -> list[TorchRunner]:
    def one(part: Part, collectives: ThreadCollectives) -> TorchRunner:
        loaded = zoo.load("toy", device="cpu", part=part)
        part.connect(loaded.model, loaded.config, collectives)
        runner = build_runner(loaded, cache, CONFIG, device=torch.device("cpu"), dtype="float32")
        runner.__class__ = runner_class
        return runner

    return on_ranks(ranks, one)


def engine_over(runner: Any, cache: CacheConfig = CACHE) -> Engine:
    return assemble_engine(zoo.load("toy", device="cpu"), cache, CONFIG, runner, dtype="float32")


def run(engine: Engine) -> list[list[int]]:
    """Requests that share a beginning, fork, copy, and make way for each other."""
    common = SamplingParams(max_tokens=20, ignore_eos=True)
    asked = [common, replace(common, n=3, temperature=0.8, seed=4), common, replace(common, max_tokens=12)]
    outputs = [engine.ask(f"the same beginning{i * ' more'}", params) for i, params in enumerate(asked)]
    while engine.has_work:
        engine.step()
    return [completion.token_ids for output in outputs for completion in output.outputs]


@pytest.mark.parametrize("retention", ["window:9", "sinks:3+window:9", "h2o:6+4"])
def test_L61_L71_L72_ranks_forget_alike(retention: str) -> None:
    cache = replace(CACHE, retention=retention)
    (alone,), parts = runners(1, cache=cache), runners(2, cache=cache)
    first, second = engine_over(alone, cache), engine_over(ThreadRunner(parts), cache)
    assert run(first) == run(second)
    assert first.scheduler.batch.any_left_out


@pytest.mark.parametrize("ranks", [2, 4])
def test_L61_each_rank_has_its_heads_of_every_block(ranks: int) -> None:
    """Four ranks have two KV heads: each head lies on two of them."""
    (alone,), parts = runners(1), runners(ranks)
    first, second = engine_over(alone), engine_over(ThreadRunner(parts))
    assert run(first) == run(second)
    assert first.scheduler.counters.swaps > 0
    heads = first.runner.kv.keys[0].shape[2]  # type: ignore[attr-defined]
    for rank, part in enumerate(parts):
        own = [rank * heads // ranks]
        for name, whole in alone.kv.tensors.items():
            torch.testing.assert_close(part.kv.tensors[name], whole[:, :, own], rtol=1e-3, atol=1e-3)
        for name, whole in alone.kv.host.items():
            torch.testing.assert_close(part.kv.host[name], whole[:, :, own], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_L60_L61_each_rank_has_the_codes_and_scales_of_its_heads(kind: Any, ranks: int) -> None:
    """A number that lies between two codes may fall on either side: sums over ranks are rounded otherwise. So texts may differ."""
    cache = replace(CACHE, kv_cache_dtype=kind)
    (alone,), parts = runners(1, cache=cache), runners(ranks, cache=cache)
    prompt = SamplingParams(max_tokens=1, ignore_eos=True)
    for runner in (alone, ThreadRunner(parts)):
        engine = engine_over(runner)
        engine.submit("a prompt that is read in several chunks", prompt)
        while engine.has_work:
            engine.step()
    heads = alone.kv.keys[0].shape[2]
    for rank, part in enumerate(parts):
        own = [rank * heads // ranks]
        for name, whole in alone.kv.tensors.items():
            found = part.kv.tensors[name]
            if name.startswith(("key_scale", "value_scale")):
                torch.testing.assert_close(found, whole[:, own], rtol=1e-4, atol=1e-6)
                assert found.any()
            else:
                differing = (found.view(torch.uint8) != whole[:, :, own].view(torch.uint8)).sum()
                assert differing <= 3
                assert found.view(torch.uint8).any()


class LeavesOutCopies(TorchRunner):
    """A rank that does not do what comes before a step's writes: its forks read what it has in their new blocks."""

    def _move_blocks(self, plan: StepPlan) -> None:
        if self.model.split is not None and self.model.split.first:  # type: ignore[attr-defined]
            return
        super()._move_blocks(plan)


class SkipsAStep(TorchRunner):
    """A rank whose blocks of one step are not written: it runs the step over blocks nobody reads."""

    def launch(self, plan: StepPlan) -> Pending:
        if plan.step == 1 and self.model.split is not None and self.model.split.first:  # type: ignore[attr-defined]
            plan = replace(plan, tables=plan.tables * 0)
        return super().launch(plan)


@pytest.mark.parametrize("bug", [LeavesOutCopies, SkipsAStep])
def test_L61_L73_a_rank_with_other_blocks_is_seen_in_the_text(bug: type[TorchRunner]) -> None:
    expected = run(engine_over(runners(1)[0]))
    assert run(engine_over(ThreadRunner(runners(2, bug)))) != expected
    assert run(engine_over(ThreadRunner(runners(2)))) == expected
