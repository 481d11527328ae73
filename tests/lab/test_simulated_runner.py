"""The simulated runner's clock and its scripted tokens."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipaged.config import ModelConfig
from minipaged.errors import InputError
from minipaged.lab.simulation.hardware import GPUS, find_gpu
from minipaged.lab.simulation.roofline import FEMTO, roofline
from minipaged.lab.simulation.simulated_runner import SimulatedRunner
from minipaged.scheduling.plan import LogitAdjustments, PromptQuery, StepPlan

SHAPE = ModelConfig("llama-7b", 32000, 4096, 11008, 32, 32, 32, 128, 4096)


def plan_of(
    starts: list[int], lengths: list[int], *, step: int = 0, copies: int = 0, top_logprobs: int = -1
) -> StepPlan:
    rows = len(starts)
    everyone = np.arange(rows, dtype=np.int32)
    return StepPlan(
        step=step,
        swap_outs=(),
        swap_ins=(),
        copies=tuple((i + 1, i + 100) for i in range(copies)),
        seq_ids=everyone.astype(np.int64),
        slots=everyone,
        starts=np.array(starts, np.int32),
        lengths=np.array(lengths, np.int32),
        token_ids=np.zeros(sum(lengths), np.int32),
        tables=np.zeros((rows, 1), np.int32),
        draw_rows=everyone,
        draw_slots=everyone,
        sampling=None,
        top_logprobs=top_logprobs,
    )


def runner(**settings: object) -> SimulatedRunner:
    return SimulatedRunner(SHAPE, find_gpu("h100"), num_blocks=64, **settings)  # type: ignore[arg-type]


def test_one_decode_costs_the_weights_and_its_context() -> None:
    sim = runner()
    sim.launch(plan_of([99], [1]))
    weights = (SHAPE.num_parameters() - 32000 * 4096) * 2
    expected = (weights + 100 * SHAPE.kv_bytes_per_token()) / 3.35e12
    assert sim.now == pytest.approx(expected, rel=1e-6)


def test_a_long_prompt_is_bound_by_arithmetic() -> None:
    sim = runner()
    sim.launch(plan_of([0], [2048]))
    layers = SHAPE.num_parameters() - 2 * 32000 * 4096
    products = 2 * layers * 2048 + 2 * 32000 * 4096
    scores = 4 * 32 * 4096 * (2048 * 2049 // 2)
    assert sim.now == pytest.approx((products + scores) / 989e12, rel=1e-6)


def test_chunks_of_a_prompt_score_the_pairs_that_the_whole_scores() -> None:
    one, two = runner(), runner()
    pairs = lambda s, plan: s.plan_fs(plan)  # noqa: E731
    whole = pairs(one, plan_of([0], [4096]))
    halves = pairs(two, plan_of([0], [2048])) + pairs(two, plan_of([2048], [2048]))
    assert halves == pytest.approx(whole, rel=1e-3)


def test_same_step_same_tokens_and_slots_differ() -> None:
    a, b = runner(), runner()
    plan = plan_of([5] * 64, [1] * 64, step=9)
    first, second = a.launch(plan).tokens(), b.launch(plan).tokens()
    assert first.token_ids.tolist() == second.token_ids.tolist()
    assert len(set(first.token_ids.tolist())) > 32
    assert first.token_ids.min() >= 0
    assert first.token_ids.max() < SHAPE.vocab_size


def test_logprobs_are_sorted_and_start_with_the_drawn_token() -> None:
    drawn = runner().launch(plan_of([5] * 8, [1] * 8, top_logprobs=4)).tokens()
    assert drawn.top_ids is not None
    assert drawn.top_logprobs is not None
    assert drawn.logprobs is not None
    assert drawn.top_ids.shape == (8, 4)
    assert (drawn.top_ids[:, 0] == drawn.token_ids).all()
    assert (np.diff(drawn.top_logprobs, axis=1) < 0).all()
    assert (drawn.top_logprobs[:, 0] == drawn.logprobs).all()


def test_prompt_logprobs_answer_every_query() -> None:
    plan = dataclasses.replace(plan_of([0, 4], [3, 1]), prompt_queries=(PromptQuery(0, (7, 8), 2),))
    found = runner().launch(plan).tokens().prompt_logprobs
    assert found is not None
    assert list(found) == [0]
    assert found[0].top_ids.tolist() == [[7, 8], [8, 9]]
    assert found[0].chosen.tolist() == found[0].top_values[:, 0].tolist() == [-1.0, -1.0]


def test_banned_tokens_are_not_drawn() -> None:
    plan = plan_of([5] * 8, [1] * 8)
    free = runner().launch(plan).tokens().token_ids
    bans = tuple(LogitAdjustments(banned=(int(t), (int(t) + 1) % SHAPE.vocab_size)) for t in free)
    kept = runner().launch(dataclasses.replace(plan, adjustments=bans)).tokens().token_ids
    assert kept.tolist() == [(int(t) + 2) % SHAPE.vocab_size for t in free]


def test_copies_move_a_block_each_twice() -> None:
    sim = runner()
    with_copies = sim.plan_fs(plan_of([64], [1], copies=3)) - sim.plan_fs(plan_of([64], [1]))
    assert with_copies / FEMTO == pytest.approx(3 * 16 * 2 * SHAPE.kv_bytes_per_token() / 3.35e12, rel=1e-6)


def test_tensor_parallel_splits_the_reading_and_adds_the_all_reduce() -> None:
    one, four = roofline(SHAPE, find_gpu("h100")), roofline(SHAPE, find_gpu("h100"), tp=4)
    assert four.weight_fs == pytest.approx(one.weight_fs / 4, rel=1e-6)
    assert four.kv_fs == pytest.approx(one.kv_fs / 4, rel=1e-6)
    assert one.reduce_fs == 0
    assert four.reduce_fs > 0


@given(
    gpu=st.sampled_from(sorted(GPUS)),
    tp=st.sampled_from([1, 2, 8]),
    steps=st.integers(0, 300),
    rows=st.integers(1, 600),
    context=st.integers(0, 500_000),
)
def test_k_steps_in_closed_form_equal_the_k_steps_one_by_one(
    gpu: str, tp: int, steps: int, rows: int, context: int
) -> None:
    clock = roofline(SHAPE, GPUS[gpu], tp=tp, overhead_seconds=1e-4, efficiency=0.7)
    one_by_one = sum(clock.step(rows, rows, context + i * rows, context + i * rows) for i in range(steps))
    assert clock.decode_steps(steps, rows, context) == one_by_one


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"tp": 0}, "tp"),
        ({"dtype": "int3"}, "int3"),
        ({"efficiency": 0.0}, "efficiency"),
        ({"efficiency": 1.5}, "efficiency"),
        ({"overhead_seconds": float("nan")}, "overhead_seconds"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, object], word: str) -> None:
    with pytest.raises(InputError, match=word):
        runner(**settings)


def test_unknown_gpu_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match="a100-40"):
        find_gpu("a9000")
