"""Under the priority policy a waiting request displaces running ones that are less urgent, where that lets it start."""

from __future__ import annotations

from typing import Any

import pytest

from minipaged.api import LLM
from minipaged.config import SamplingParams
from minipaged.scheduling.request import RequestOutput


def toy(**settings: Any) -> LLM:
    return LLM("toy", **{"num_blocks": 4, "block_size": 16, "policy": "priority", "watermark": 0.0, **settings})


def asked(priority: int, max_tokens: int = 8) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, priority=priority, ignore_eos=True)


def start(llm: LLM, *priorities: int, tokens: int = 5) -> list[RequestOutput]:
    """Requests of so many tokens that run: one step each, so that they arrive in this order. Each holds one block of the three."""
    outputs = []
    for place, priority in enumerate(priorities):
        outputs.append(llm.engine.ask([place + 1] * tokens, asked(priority)))
        llm.engine.step()
    return outputs


def running(llm: LLM) -> list[int]:
    return [request.request_id for request in llm.engine.scheduler.running]


def finish(llm: LLM) -> list[int]:
    """Numbers of the requests in the order in which they end."""
    ended = []
    while llm.engine.has_work:
        ended += [output.request_id for output in llm.engine.step() if output.finished]
    return ended


@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_the_least_urgent_makes_way_and_the_urgent_starts_with_the_next_step(preemption: str, overlap: int) -> None:
    """Of two that are equally little urgent, the latest arrival goes. Nobody's text changes."""
    llm = toy(preemption=preemption, num_host_blocks=3, overlap=overlap, enable_prefix_caching=False)
    alone = [toy().generate([[n] * 5], asked(0))[0].outputs[0].token_ids for n in (1, 2, 3, 9)]
    outputs = start(llm, 1, 5, 5)
    assert running(llm) == [0, 1, 2]
    outputs.append(llm.engine.ask([9] * 5, asked(0)))
    llm.engine.step()
    assert running(llm) == [0, 1]
    llm.engine.step()
    assert running(llm) == [3, 0, 1]
    assert finish(llm)[-1] == 2
    assert [output.outputs[0].token_ids for output in outputs] == alone
    assert llm.engine.scheduler.manager.usage().referenced == 0


def test_equals_wait_for_each_other() -> None:
    llm = toy()
    start(llm, 1, 1, 1)
    llm.engine.ask([9] * 5, asked(1))
    before = llm.engine.scheduler.counters.preemptions
    llm.engine.step()
    assert llm.engine.scheduler.counters.preemptions == before
    assert running(llm) == [0, 1, 2]


def test_first_come_first_served_displaces_nobody() -> None:
    llm = toy(policy="fcfs")
    start(llm, 5, 5, 5)
    llm.engine.ask([9] * 5, asked(0))
    llm.engine.step()
    assert running(llm) == [0, 1, 2]


def test_nobody_makes_way_in_vain() -> None:
    """The urgent one needs two blocks; the only one that is less urgent holds one."""
    llm = toy()
    start(llm, 0, 0, 5)
    llm.engine.ask([9] * 30, asked(1))
    llm.engine.step()
    assert running(llm) == [0, 1, 2]


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_as_many_make_way_as_it_takes(preemption: str) -> None:
    """In one step, also where their blocks are swapped out and free with the next."""
    llm = toy(preemption=preemption, num_host_blocks=3)
    start(llm, 0, 5, 5)
    llm.engine.ask([9] * 30, asked(1))
    llm.engine.step()
    assert running(llm) == [0]
    llm.engine.step()
    assert running(llm) == [0, 3]
    assert finish(llm)[-2:] == [1, 2]


def test_no_more_make_way_than_it_takes() -> None:
    """One block is needed: what one victim swaps out will do."""
    llm = toy(preemption="swap", num_host_blocks=3)
    start(llm, 5, 5, 5)
    llm.engine.ask([9] * 5, asked(0))
    llm.engine.step()
    assert running(llm) == [0, 1]


def test_a_slot_is_displaced_as_memory_is() -> None:
    llm = toy(num_blocks=100, max_num_seqs=2)
    start(llm, 3, 4)
    llm.engine.ask([9] * 5, asked(0))
    llm.engine.step()
    llm.engine.step()
    assert running(llm) == [2, 0]


@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_the_only_one_that_runs_makes_way(preemption: str, overlap: int) -> None:
    """That step has nothing else to do, and the engine goes on."""
    llm = toy(num_blocks=2, preemption=preemption, num_host_blocks=1, overlap=overlap)
    alone = [toy().generate([[n] * 5], asked(0))[0].outputs[0].token_ids for n in (1, 9)]
    outputs = start(llm, 5)
    (urgent,) = llm.generate([[9] * 5], asked(0))
    assert not outputs[0].finished
    finish(llm)
    assert [o.outputs[0].token_ids for o in (outputs[0], urgent)] == alone


def test_a_group_makes_way_whole() -> None:
    """Three samples hold a block each, and the urgent one needs all three."""
    llm = toy(preemption="recompute")
    group = llm.engine.ask(
        [1] * 5, SamplingParams(n=3, max_tokens=8, temperature=1.0, priority=5, seed=3, ignore_eos=True)
    )
    alone = toy(num_blocks=40).generate(
        [[1] * 5], SamplingParams(n=3, max_tokens=8, temperature=1.0, priority=5, seed=3, ignore_eos=True)
    )
    for _ in range(4):
        llm.engine.step()
    (urgent,) = llm.generate([[9] * 30], asked(0))
    assert urgent.finished
    assert not group.finished
    finish(llm)
    assert [o.token_ids for o in group.outputs] == [o.token_ids for o in alone[0].outputs]
