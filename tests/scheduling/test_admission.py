"""Who is admitted, with how much, and what comes back after it was sent away."""

from __future__ import annotations

from typing import Any

import pytest

from minipaged.config import SamplingParams
from minipaged.errors import RequestError
from minipaged.scheduling.request import Request, Sequence
from minipaged.scheduling.running_set import SchedulerEvent
from tests.scheduling.drawer import Drawer, run, scheduler_of


def test_a_resumed_requests_hits_are_its_own() -> None:
    """L35: what was preempted finds its own blocks, counted apart and exactly."""
    scheduler, drawer = scheduler_of(num_blocks=15, preemption="recompute"), Drawer(1)
    for i in range(2):
        scheduler.add(Request(i, tuple(range(10 * i, 10 * i + 9)), SamplingParams(max_tokens=24, ignore_eos=True)))
    events: list[Any] = []

    run(scheduler, drawer, lambda plan: events.extend(scheduler.take_events()))
    events.extend(scheduler.take_events())
    told = [e for e in events if isinstance(e, SchedulerEvent)]
    assert scheduler.counters.preemptions == sum(e.kind == "preempt" for e in told) == 1
    again = [e for e in told if e.kind == "admit"][2:]
    assert scheduler.counters.own_hit_tokens == sum(e.amount for e in again) > 0
    assert scheduler.counters.hit_tokens == 0
    assert scheduler.counters.queried_tokens == 18
    assert scheduler.counters.swaps == 0


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("num_prompt", [1, 3, 4, 5, 17, 30])
@pytest.mark.parametrize("limits", [{"num_blocks": 12}, {"max_model_len": 33}], ids=["pool", "context"])
def test_the_room_is_the_longest_answer_that_is_taken(limits: dict[str, int], num_prompt: int, width: int) -> None:
    """What an answer without a limit is given, and what a server tells a client that asks for more."""
    scheduler = scheduler_of(**limits)
    most = scheduler.room.most_tokens(num_prompt, width)
    assert most > 0
    for asked, taken in ((most, True), (most + 1, False)):
        params = SamplingParams(max_tokens=asked, n=width, temperature=1.0)
        request = Request(0, tuple(range(num_prompt)), params)
        if taken:
            scheduler.check(request)
        else:
            with pytest.raises(RequestError, match=r"num_blocks|max_tokens may be at most"):
                scheduler.check(request)


def test_what_just_fits_is_served_and_one_more_is_refused() -> None:
    """The context's length, the pool, the sequences at once and the tokens a step, each at its edge."""
    for limits, good, bad in (
        ({"max_model_len": 20}, (15, SamplingParams(max_tokens=5)), (15, SamplingParams(max_tokens=6))),
        ({"max_model_len": 20}, (19, SamplingParams(max_tokens=1)), (20, SamplingParams(max_tokens=1))),
        ({"num_blocks": 6}, (12, SamplingParams(max_tokens=8)), (12, SamplingParams(max_tokens=9))),
        (
            {"max_num_seqs": 3},
            (3, SamplingParams(n=3, temperature=1.0, max_tokens=2)),
            (3, SamplingParams(n=4, temperature=1.0, max_tokens=2)),
        ),
        (
            {"max_num_batched_tokens": 3},
            (3, SamplingParams(n=3, temperature=1.0, max_tokens=2)),
            (3, SamplingParams(n=4, temperature=1.0, max_tokens=2)),
        ),
    ):
        scheduler = scheduler_of(**limits)  # type: ignore[arg-type]
        with pytest.raises(RequestError):
            scheduler.add(Request(1, (1,) * bad[0], bad[1]))
        scheduler.add(Request(1, (1,) * good[0], good[1]))
        run(scheduler, Drawer())
        assert scheduler.batch.num_free == scheduler.config.max_num_seqs


def test_a_prompt_that_reads_no_cache_is_admitted_whole_or_not_at_all() -> None:
    """The last token of its first chunk counts too, when it is the one that takes another block."""
    scheduler, drawer = scheduler_of(num_blocks=6, max_num_batched_tokens=6, preemption="recompute"), Drawer()
    scheduler.add(Request(0, (1,) * 13, SamplingParams(max_tokens=3, ignore_eos=True)))
    for _ in range(3):
        plan = scheduler.schedule()
        assert plan is not None
        scheduler.commit(plan, drawer.answer(plan))
    scheduler.add(Request(1, (2,) * 9, SamplingParams(max_tokens=2, prompt_logprobs=0)))
    plan = scheduler.schedule()
    assert plan is not None
    assert [r.request_id for r in scheduler.running] == [0]
    assert [r.request_id for r in scheduler.waiting] == [1]
    assert scheduler.batch.num_free == scheduler.config.max_num_seqs - 1
    scheduler.commit(plan, drawer.answer(plan))
    run(scheduler, drawer)


def test_a_group_that_returns_is_promised_no_more_than_the_step_can_compute() -> None:
    """After a recompute it comes back as one sequence: room for more than the step computes would be blocks held idle."""
    scheduler, drawer = scheduler_of(max_num_batched_tokens=8, preemption="recompute"), Drawer(2)
    scheduler.add(Request(0, (1,) * 20, SamplingParams(n=2, temperature=1.0, max_tokens=12, ignore_eos=True)))
    for _ in range(8):
        plan = scheduler.schedule()
        assert plan is not None
        scheduler.commit(plan, drawer.answer(plan))
    [request] = scheduler.running
    assert len(request.alive) == 2
    scheduler.manager.begin_step()
    scheduler.running_set.preempt(request)
    assert scheduler.manager.reset_prefix_cache()
    plan = scheduler.schedule()
    assert plan is not None
    assert plan.num_tokens <= 8
    [first] = [s for s in request.alive if s.slot >= 0]
    assert len(scheduler.manager.table(first.seq_id)) == 2
    scheduler.commit(plan, drawer.answer(plan))
    run(scheduler, drawer)


def test_tokens_at_their_edges() -> None:
    """0 and 2**31 - 1 are tokens; their neighbours outside are refused."""
    scheduler = scheduler_of()
    scheduler.add(Request(0, (0, 2**31 - 1), SamplingParams(max_tokens=1)))
    for i, bad in enumerate((-1, 2**31), 1):
        with pytest.raises(RequestError, match=str(bad)):
            scheduler.add(Request(i, (0, bad), SamplingParams(max_tokens=1)))
    run(scheduler, Drawer())


def test_who_waits_has_found_nothing_yet() -> None:
    scheduler = scheduler_of()
    scheduler.add(Request(0, (1, 2, 3), SamplingParams()))
    [sequence] = scheduler.sequences.values()
    assert (sequence.num_cached, sequence.num_computed, sequence.index) == (0, 0, 0)
    assert Sequence(7, sequence.request, [1]).index == 0


def test_a_prompt_is_admitted_by_what_is_left_of_it() -> None:
    """L08: five blocks are held by a request with the same beginning; one more (and the watermark's) is enough for the second."""
    scheduler, drawer = scheduler_of(num_blocks=8), Drawer()
    prompt = tuple(range(16))
    scheduler.add(Request(0, (*prompt, 20), SamplingParams(max_tokens=3, ignore_eos=True)))
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.commit(plan, drawer.answer(plan))
    scheduler.add(Request(1, (*prompt, 21), SamplingParams(max_tokens=3, ignore_eos=True)))
    plan = scheduler.schedule()
    assert plan is not None
    assert plan.seq_ids.tolist() == [0, 1]
    assert plan.starts.tolist() == [17, 16]


def test_all_that_fit_come_back_in_one_step() -> None:
    """Two requests that were swapped out return together once the pool is empty."""
    scheduler, drawer = scheduler_of(num_blocks=14, preemption="swap"), Drawer()
    requests = [
        Request(i, (i, 1, 2), SamplingParams(max_tokens=n, ignore_eos=True)) for i, n in enumerate((46, 40, 40))
    ]
    for request in requests:
        scheduler.add(request)
    out = {1, 2}
    for _ in range(200):
        if {r.request_id for r in scheduler.swapped} == out:
            break
        plan = scheduler.schedule()
        assert plan is not None
        scheduler.commit(plan, drawer.answer(plan))
    assert {r.request_id for r in scheduler.swapped} == out
    scheduler.abort(0)
    plan = scheduler.schedule()
    assert plan is not None
    assert len(plan.seq_ids) == 2
    assert len(scheduler.swapped) == 0
