"""A plan that went to another process is the plan."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from minipaged import LLM, SamplingParams
from minipaged.execution.plan_bytes import pack_plan, pack_tokens, unpack_plan, unpack_tokens
from minipaged.scheduling.plan import LogitAdjustments, StepPlan, StepTokens
from tests.execution.plans import plan_of


def assert_same(found: Any, sent: Any) -> None:
    if isinstance(sent, dict):
        assert_same(tuple(found.items()), tuple(sent.items()))
    elif isinstance(sent, np.ndarray):
        assert (found.dtype, found.shape) == (sent.dtype, sent.shape)
        assert np.array_equal(found, sent)
    elif isinstance(sent, tuple):
        assert type(found) is type(sent)
        assert len(found) == len(sent)
        for a, b in zip(found, sent, strict=True):
            assert_same(a, b)
    else:
        assert found == sent
        assert isinstance(found, type(sent)) or isinstance(sent, np.integer)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=30),
        SamplingParams(max_tokens=30, n=4, temperature=0.7, top_p=0.9, top_k=20, min_p=0.01, seed=2),
        SamplingParams(max_tokens=12, beam_width=3),
        SamplingParams(max_tokens=12, logprobs=2, prompt_logprobs=1, min_tokens=3),
        SamplingParams(
            max_tokens=12,
            temperature=1.0,
            repetition_penalty=1.3,
            presence_penalty=0.1,
            frequency_penalty=0.3,
            logit_bias={3: 0.1, 7: -2.5},
            bad_words=["ab"],
        ),
        SamplingParams(max_tokens=5, allowed_token_ids=(97, 98, 99)),
    ],
    ids=["greedy", "sampled", "beams", "logprobs", "adjusted", "allowed"],
)
@pytest.mark.parametrize("retention", ["all", "sinks:1+window:6"])
def test_every_field_arrives(params: SamplingParams, retention: str) -> None:
    pool: dict[str, Any] = {"num_blocks": 48, "block_size": 4, "num_host_blocks": 16, "preemption": "swap"}
    llm = LLM("toy", device="cpu", retention=retention, max_num_batched_tokens=32, **pool)
    runner, plans, drawn = llm.engine.runner, [], []
    launch = runner.launch

    def spy(plan: StepPlan) -> Any:
        plans.append(plan)
        pending = launch(plan)
        drawn.append(pending.tokens())
        return pending

    runner.launch = spy  # type: ignore[method-assign]
    llm.generate(["hello there", "hello then", "abc"], params)
    assert plans
    assert any(plan.num_left_out is not None for plan in plans) is (retention != "all")
    for plan in plans:
        found = unpack_plan(pack_plan(plan))
        for field in fields(StepPlan):
            assert_same(getattr(found, field.name), getattr(plan, field.name))
        assert found.tables.flags.writeable  # torch warns of arrays that are not
    assert drawn
    for step, tokens in enumerate(drawn):
        number, found_tokens = unpack_tokens(pack_tokens(step, tokens))
        assert number == step
        for field in fields(StepTokens):
            assert_same(getattr(found_tokens, field.name), getattr(tokens, field.name))


def test_a_grammars_mask_arrives() -> None:
    adjustments = (None, LogitAdjustments(mask=bytes(range(256))), LogitAdjustments(bias=((3, 0.5),)))
    plan = replace(plan_of([(4, 1), (5, 1), (6, 1)]), adjustments=adjustments)
    assert unpack_plan(pack_plan(plan)).adjustments == adjustments
