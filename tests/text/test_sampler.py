"""Draws follow the distribution that was asked for, and depend on nothing but their own row and stream."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minipaged.execution.sampler import adjust, sample
from minipaged.scheduling.plan import LogitAdjustments, SamplingColumns
from minipaged.scheduling.step_builder import uniform

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0, 0.5])


def columns(n: int, **asked: Any) -> SamplingColumns:
    rows = np.arange(n, dtype=np.int64)
    return SamplingColumns(
        temperature=np.full(n, asked.get("temperature", 1.0), np.float32),
        top_p=np.full(n, asked.get("top_p", 1.0), np.float32),
        top_k=np.full(n, asked.get("top_k", 0), np.int32),
        min_p=np.full(n, asked.get("min_p", 0.0), np.float32),
        uniform=uniform(np.full(n, 7, np.int64), np.zeros(n, np.int64), rows),
    )


def frequencies(n: int = 20_000, **asked: Any) -> torch.Tensor:
    drawn = sample(LOGITS.repeat(n, 1), columns(n, **asked))
    return torch.bincount(drawn, minlength=len(LOGITS)) / n


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature(temperature: float) -> None:
    expected = (LOGITS / temperature).softmax(-1)
    assert torch.allclose(frequencies(temperature=temperature), expected, atol=0.015)


@pytest.mark.parametrize(("top_k", "kept"), [(1, [0]), (3, [0, 1, 5]), (100, [0, 1, 2, 3, 4, 5])])
def test_top_k(top_k: int, kept: list[int]) -> None:
    mask = torch.full_like(LOGITS, float("-inf"))
    mask[kept] = 0.0
    assert torch.allclose(frequencies(top_k=top_k), (LOGITS + mask).softmax(-1), atol=0.015)


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    probabilities = LOGITS.softmax(-1)
    found = frequencies(top_p=float(probabilities[0] + probabilities[1] - 0.01))
    assert (found > 0).nonzero().flatten().tolist() == [0, 1]
    assert float(found[0] / found[1]) == pytest.approx(float(probabilities[0] / probabilities[1]), rel=0.05)


def test_top_p_counts_what_top_k_left() -> None:
    # of the two best, the first alone holds 73 %: top_p 0.7 keeps only it, though it holds less of the whole
    assert frequencies(top_k=2, top_p=0.7)[0] == 1.0


def test_min_p() -> None:
    kept = (frequencies(min_p=0.2) > 0).nonzero().flatten().tolist()
    probabilities = LOGITS.softmax(-1)
    assert kept == [i for i in range(6) if probabilities[i] >= 0.2 * probabilities[0]]


def test_a_draw_does_not_depend_on_its_neighbours() -> None:
    n = 64
    logits = torch.randn(n, 50, generator=torch.Generator().manual_seed(1))
    asked = columns(n, top_p=0.9)
    together = sample(logits, asked)
    for i in range(n):
        alone = SamplingColumns(*(column[i : i + 1] for column in asked))
        assert sample(logits[i : i + 1], alone)[0] == together[i]


def test_temperature_zero_is_greedy_beside_others() -> None:
    asked = columns(2)._replace(temperature=np.array([0.0, 1.0], np.float32))
    assert sample(LOGITS.repeat(2, 1), asked)[0] == 0


def test_a_seen_token_is_penalized_and_a_banned_one_impossible() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5]])
    adjust(logits, [LogitAdjustments(seen=(0, 1), repetition=2.0)])
    assert logits.tolist() == [[1.0, -2.0, 0.5]]
    adjust(logits, [LogitAdjustments(banned=(0, 2))])
    assert int(logits.argmax()) == 1


def reference(logits: torch.Tensor, asked: LogitAdjustments | None) -> torch.Tensor:
    """One row, token by token, in the words of the OpenAI API and of Keskar et al."""
    row = logits.clone()
    if asked is None:
        return row
    seen, drawn, bias = set(asked.seen), dict(asked.drawn), dict(asked.bias)
    for token in range(len(row)):
        value = float(row[token])
        if (asked.allowed is not None and token not in asked.allowed) or token in asked.banned:
            value = float("-inf")
        value += bias.get(token, 0.0)
        if token in seen:
            value = value / asked.repetition if value > 0 else value * asked.repetition
        count = drawn.get(token, 0)
        row[token] = value - asked.frequency * count - asked.presence * (count > 0)
    return row


@given(seed=st.integers(0, 999), draws=st.integers(1, 5))
def test_adjustments_of_many_draws_equal_a_plain_reference(seed: int, draws: int) -> None:
    """Each row gets its own, whatever its neighbours ask, and the others nothing."""
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(0, 3, (draws, 12)).astype(np.float32))

    def some(most: int = 6) -> tuple[int, ...]:
        return tuple(rng.permutation(12)[: rng.integers(0, most)].tolist())

    asked: list[LogitAdjustments | None] = [
        LogitAdjustments(
            allowed=(*some(), 3) if rng.random() < 0.4 else None,
            banned=some(3),
            bias=tuple((token, float(rng.normal())) for token in some()),
            seen=some(),
            repetition=float(rng.uniform(0.5, 2.0)),
            drawn=tuple((token, int(rng.integers(1, 4))) for token in some()),
            presence=float(rng.uniform(-2, 2)),
            frequency=float(rng.uniform(-2, 2)),
        )
        if rng.random() < 0.8
        else None
        for _ in range(draws)
    ]
    wanted = torch.stack([reference(row, each) for row, each in zip(logits, asked, strict=True)])
    assert torch.allclose(adjust(logits.clone(), asked), wanted, atol=1e-5)


def test_streams_are_uniform_and_differ() -> None:
    n = 50_000
    positions = np.arange(n, dtype=np.int64)
    first = uniform(np.full(n, 1, np.int64), np.zeros(n, np.int64), positions)
    second = uniform(np.full(n, 1, np.int64), np.ones(n, np.int64), positions)
    assert first.min() >= 0.0
    assert first.max() < 1.0
    assert abs(first.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.02
