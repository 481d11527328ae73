"""Streams of random numbers, and the logprobs and ranks that come with what was drawn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipaged.config import SamplingParams
from minipaged.scheduling.request import Logprob, Request
from minipaged.scheduling.step_builder import uniform
from tests.scheduling.drawer import Drawer, drawn, run, scheduler_of, stream


@given(
    st.lists(st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 50), st.integers(0, 10**6)), min_size=1, max_size=9)
)
def test_streams_are_splitmix64(asked: list[tuple[int, int, int]]) -> None:
    seeds, indices, positions = (np.array(column, np.int64) for column in zip(*asked, strict=True))
    assert uniform(seeds, indices, positions).tolist() == [stream(*one) for one in asked]


@pytest.mark.parametrize("top", [0, 1, 3])
def test_a_token_and_the_best_have_their_logprobs_and_ranks(top: int) -> None:
    scheduler, drawer = scheduler_of(), Drawer(top)
    request = Request(1, (1, 2, 3), SamplingParams(max_tokens=6, logprobs=top, ignore_eos=True))
    scheduler.add(request)
    run(scheduler, drawer)
    wanted, total = [], 0.0
    for d, token, said in drawn(drawer, 0):
        assert said.logprobs is not None and said.ranks is not None  # noqa: PT018
        assert said.top_ids is not None and said.top_logprobs is not None  # noqa: PT018
        entry = {token: Logprob(float(said.logprobs[d]), int(said.ranks[d]))}
        for place in range(top):
            entry.setdefault(int(said.top_ids[d, place]), Logprob(float(said.top_logprobs[d, place]), place + 1))
        wanted.append(entry)
        total += entry[token].logprob
    [answer] = request.output.outputs
    assert answer.logprobs == wanted
    assert answer.cumulative_logprob == pytest.approx(total)


@pytest.mark.parametrize("top", [0, 2])
@pytest.mark.parametrize("budget", [3, 64])
def test_prompt_logprobs_of_every_chunk(top: int, budget: int) -> None:
    scheduler, drawer = scheduler_of(max_num_batched_tokens=budget), Drawer(9)
    prompt = tuple(range(10))
    request = Request(1, prompt, SamplingParams(max_tokens=2, prompt_logprobs=top, ignore_eos=True))
    scheduler.add(request)
    run(scheduler, drawer)
    wanted: list[Any] = [None]
    for said in drawer.said:
        for found in (said.prompt_logprobs or {}).values():
            for i in range(len(found.chosen)):
                entry = {prompt[found.start + i + 1]: Logprob(float(found.chosen[i]), int(found.ranks[i]))}
                for place in range(top):
                    entry.setdefault(
                        int(found.top_ids[i, place]), Logprob(float(found.top_values[i, place]), place + 1)
                    )
                wanted.append(entry)
    assert request.output.prompt_logprobs == wanted
    assert len(wanted) == len(prompt)


def test_best_of_gives_the_best_first() -> None:
    scheduler, drawer = scheduler_of(), Drawer(4)
    request = Request(1, (1, 2, 3), SamplingParams(n=2, best_of=4, temperature=1.0, max_tokens=5, ignore_eos=True))
    scheduler.add(request)
    run(scheduler, drawer)
    sums = sorted((s.cumulative_logprob for s in request.sequences), reverse=True)
    assert len(set(sums)) == 4
    assert [o.cumulative_logprob for o in request.output.outputs] == sums[:2]
    assert [o.index for o in request.output.outputs] == [0, 1]
    assert all(o.logprobs is None for o in request.output.outputs)


def test_seeds_that_differ_give_streams_that_differ() -> None:
    """Also where they differ in their highest bit only."""
    seeds = [0, 1, 2, 2**31, 2**61, 2**62, 2**62 + 1]
    request = Request(0, (1,), SamplingParams(temperature=1.0), arrival=0)
    assert len({scheduler_of(seed=seed).running_set.seed_of(request) for seed in seeds}) == len(seeds)
