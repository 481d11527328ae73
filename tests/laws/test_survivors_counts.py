"""What the automatic mutation run found untested in scheduling: counters, ends, limits at their edges, long tables and queues."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipaged.config import EngineConfig, SamplingParams
from minipaged.errors import RequestError
from minipaged.memory.block_manager import BlockManager
from minipaged.memory.types import BlockEvent
from minipaged.scheduling.plan import IN_FLIGHT
from minipaged.scheduling.policies import PreemptionCost, wants_swap
from minipaged.scheduling.queue import RequestQueue
from minipaged.scheduling.records import SchedulerEvent
from minipaged.scheduling.request import Request, Sequence, beam_score
from tests.laws.test_scheduler_laws import most_blocks, of_kind, ran, tight, workloads
from tests.laws.test_survivors_scheduling import Drawer, run, scheduler_of
from tests.laws.token_world import Asked, Step, World

# ---- counters and events


@given(workload=workloads(), arrangement=tight, depth=st.sampled_from([0, 1, 3]))
def test_counters_are_sums_over_the_steps(
    block_manager_class: type, scheduler_class: type, workload: list[Asked], arrangement: dict[str, Any], depth: int
) -> None:
    """Each counter can be had from the plans and events."""
    world = ran(block_manager_class, scheduler_class, workload, arrangement, depth=depth)
    counters, plans = world.control.counters, [s.plan for s in world.steps if s.plan is not None]
    assert counters.computed_tokens == sum(int(p.lengths.sum()) for p in plans)
    drawn = sum(len(p.draw_rows) for p in plans)
    taken = sum(s.num_output for output in world.outputs for s in output.request.sequences)
    beams = any(asked.params.beam_width for asked in workload)
    assert counters.generated_tokens <= drawn
    assert depth or counters.generated_tokens == drawn
    assert beams or counters.generated_tokens == taken
    assert counters.copies == sum(len(p.copies) for p in plans)
    assert [p.step for p in plans] == list(range(len(plans)))
    preempted = swapped = fresh = own = asked = 0
    for step in world.steps:
        gone = {e.sequence.request.request_id for e in of_kind(step, "preempt") if e.sequence is not None}
        preempted += len(gone)
        moved = {e.seq_id for e in step.events if isinstance(e, BlockEvent) and e.kind == "swap_out"}
        swapped += len(
            {
                e.sequence.request.request_id
                for e in of_kind(step, "preempt")
                if e.sequence is not None and e.seq_id in moved
            }
        )
        # Whoever returns from the host, or is forked again after a recompute, has found nothing in the cache.
        back = {e.seq_id for e in step.events if isinstance(e, BlockEvent) and e.kind in ("swap_in", "fork")}
        for event in of_kind(step, "admit"):
            if event.seq_id in back or event.sequence is None:
                continue
            seen = any(
                e.seq_id == event.seq_id
                for s in world.steps[: world.steps.index(step)]
                for e in of_kind(s, "preempt")
                if e.sequence is not None
            )
            if not seen:
                fresh += event.amount
                asked += len(event.sequence.request.prompt_token_ids)
            else:
                own += event.amount
    assert counters.preemptions == preempted
    assert counters.swaps == swapped
    assert counters.hit_tokens + counters.own_hit_tokens == fresh + own
    assert counters.hit_tokens >= fresh
    assert counters.queried_tokens >= asked
    if not preempted:
        assert (counters.hit_tokens, counters.own_hit_tokens, counters.queried_tokens) == (fresh, 0, asked)


@given(workload=workloads(), arrangement=tight)
def test_ends_are_told_with_what_was_drawn(
    block_manager_class: type, scheduler_class: type, workload: list[Asked], arrangement: dict[str, Any]
) -> None:
    """Submissions and ends: each sequence once, with its tokens and its reason."""
    world = ran(block_manager_class, scheduler_class, workload, arrangement)
    events = [e for s in world.steps for e in s.events if isinstance(e, SchedulerEvent)]
    ended = [e for e in events if e.kind in ("finish", "prune", "abort")]
    assert len({e.seq_id for e in ended}) == len(ended)
    for event in ended:
        assert event.sequence is not None
        assert event.kind == {"pruned": "prune"}.get(event.detail, "finish")
        assert event.amount <= event.sequence.request.params.max_tokens
        if event.detail == "length":
            assert event.amount == event.sequence.request.params.max_tokens
    for event in events:
        if event.kind == "submit" and event.sequence is not None:
            assert event.amount == event.sequence.request.num_prompt


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


@given(workload=workloads(), arrangement=tight, depth=st.sampled_from([0, 1, 3]))
def test_the_columns_agree_with_the_block_tables(
    block_manager_class: type, scheduler_class: type, workload: list[Asked], arrangement: dict[str, Any], depth: int
) -> None:
    """L10 for the scheduler: after every step each running sequence has the table that its promised room needs, and no more.

    What the scheduler counts beside its queues agrees with them too: a wrong count of groups would cost the fast path.
    """
    settings = {**arrangement, "limits": {**arrangement["limits"], "depth": depth}}
    blocks = 1 + most_blocks(workload, settings["block_size"]) + settings.pop("slack")
    world = World(block_manager_class, scheduler_class, num_blocks=blocks, **settings)
    step = world.step

    def watched() -> Step:
        done = step()
        control, batch = world.control, world.control.batch
        assert control.running_set.num_groups == sum(request.params.num_sequences > 1 for request in control.running)
        for line in world.control.sequences.values():
            if line.slot < 0:
                continue
            table = world.manager.table(line.seq_id)
            assert tuple(batch.tables[line.slot, : batch.table_len[line.slot]].tolist()) == table
            assert len(table) == -(-int(batch.num_reserved[line.slot]) // world.block_size)
            assert batch.num_published[line.slot] <= batch.num_computed[line.slot] <= batch.num_reserved[line.slot]
        return done

    world.step = watched  # type: ignore[method-assign]
    world.run(workload)
    world.assert_nothing_is_held()


# ---- limits


@pytest.mark.parametrize("policy", ["auto", "swap", "recompute"])
def test_the_cost_model_is_its_formula(policy: Any) -> None:
    config = EngineConfig(preemption=policy)
    cost = PreemptionCost(seconds_per_block=1.0, seconds_per_token=0.5, seconds_per_transfer=3.0, seconds_per_pass=2.0)
    for blocks in (1, 2, 5):
        for tokens in range(0, 40):
            swap = 2 * (blocks * 1.0 + 3.0) < tokens * 0.5 + 2.0
            assert wants_swap(config, cost, blocks, tokens) is (swap if policy == "auto" else policy == "swap")
    assert PreemptionCost(0.0, 0.0, 0.0, 0.0).swap_is_cheaper(1, 1) is False


@pytest.mark.parametrize("policy", ["auto", "swap", "recompute"])
def test_who_has_computed_nothing_has_nothing_to_swap(policy: Any) -> None:
    """Sent away before its first chunk, it waits for admission as before, and no swap is counted (found by the long profile)."""
    free = PreemptionCost(0.0, 0.0, 0.0, seconds_per_pass=1.0)
    assert wants_swap(EngineConfig(preemption=policy), free, 0, 0) is False


def test_the_default_costs_break_even_where_their_comments_say() -> None:
    """26 us a block and 20 us a transfer, both ways, against 4 us a token and 2 ms a pass."""
    cost = PreemptionCost()
    for tokens in (0, 16, 1000, 50_000):
        even = ((tokens * 4 + 2000) / 2 - 20) / 26
        assert cost.swap_is_cheaper(math.floor(even - 1e-6), tokens)
        assert not cost.swap_is_cheaper(math.ceil(even + 1e-6), tokens)


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


def test_many_slots_tables_and_removals() -> None:
    """Tables wider than the batch's first width; a queue that loses most of its members from the middle keeps its order."""
    world = World(BlockManager, num_blocks=300, block_size=1)
    outputs = world.run(
        [Asked((1,) * 30, SamplingParams(max_tokens=30, ignore_eos=True)), Asked((2,), SamplingParams(max_tokens=3))]
    )
    assert len(outputs[0].outputs[0].token_ids) == 30
    scheduler = scheduler_of(max_num_seqs=1)
    for i in range(200):
        scheduler.add(Request(i, (1, 2), SamplingParams(max_tokens=1)))
    for i in range(200):
        if i % 10:
            assert scheduler.abort(i)
    assert len(scheduler.waiting) == 20
    assert [r.request_id for r in scheduler.waiting] == list(range(0, 200, 10))
    scheduler.take_ended()
    order = []
    while scheduler.has_work:
        plan = scheduler.schedule()
        assert plan is not None
        order += [o.request_id for o in scheduler.commit(plan, Drawer().answer(plan))]
    assert order == list(range(0, 200, 10))


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


@given(seed=st.integers(0, 10**6), leave=st.sampled_from([0, 40, 90, 130]))
def test_a_queue_keeps_its_order_when_many_leave(seed: int, leave: int) -> None:
    """Ranks in no order, most members gone from the middle, and one that comes back under its number."""
    rng = np.random.default_rng(seed)
    queue = RequestQueue(lambda request: request.rank)
    requests = [Request(i, (1,), SamplingParams(priority=int(p))) for i, p in enumerate(rng.integers(-50, 50, 140))]
    for request in requests:
        queue.push(request)
    gone = [requests[i] for i in rng.permutation(140)[:leave]]
    for request in gone:
        queue.remove(request)
        assert request not in queue
    stay = sorted((r for r in requests if r not in gone), key=lambda r: (r.rank, r.request_id))
    assert len(queue) == len(stay)
    assert list(queue) == stay
    assert [queue.pop() for _ in stay] == stay
    assert queue.peek() is None
    queue.push(requests[3])
    assert queue.peek() is requests[3]


@pytest.mark.parametrize(
    ("params", "ahead"),
    [
        (SamplingParams(max_tokens=5), True),
        (SamplingParams(max_tokens=5, temperature=1.0), True),
        (SamplingParams(max_tokens=5, logprobs=1), True),
        (SamplingParams(max_tokens=5, repetition_penalty=1.2), False),
        (SamplingParams(max_tokens=5, repetition_penalty=1.2, logprobs=0), False),
        (SamplingParams(max_tokens=5, n=2, temperature=1.0), False),
        (SamplingParams(max_tokens=5, beam_width=2), False),
        (SamplingParams(max_tokens=1), False),
    ],
)
def test_who_may_run_ahead_of_its_last_draw(params: SamplingParams, ahead: bool) -> None:
    """A second step before the first is committed: not where the draw decides how to go on, nor past the last token."""
    scheduler, drawer = scheduler_of(depth=1), Drawer()
    scheduler.add(Request(0, (1, 2, 3), params))
    first = scheduler.schedule()
    second = scheduler.schedule()
    assert first is not None
    assert (second is not None) is ahead
    scheduler.commit(first, drawer.answer(first))
    if second is not None:
        assert second.token_ids.tolist() == [IN_FLIGHT]
        scheduler.commit(second, drawer.answer(second))
    run(scheduler, drawer)


@pytest.mark.parametrize("budget", [1, 3, 7, 64])
def test_a_block_is_published_by_the_step_that_fills_it(budget: int) -> None:
    """No later, and not before: what can be found is every full block of what is computed."""
    scheduler, drawer = scheduler_of(max_num_batched_tokens=budget), Drawer(budget)
    request = Request(0, tuple(range(11)), SamplingParams(max_tokens=14, ignore_eos=True))
    scheduler.add(request)
    [line] = request.sequences
    while not request.finished:
        plan = scheduler.schedule()
        assert plan is not None
        computed = int(plan.starts[0] + plan.lengths[0])
        scheduler.commit(plan, drawer.answer(plan))
        assert scheduler.manager.match_prefix([*line.token_ids, 0]) == computed // 4 * 4


def test_tokens_at_their_edges() -> None:
    """0 and 2**31 - 1 are tokens; their neighbours outside are refused."""
    scheduler = scheduler_of()
    scheduler.add(Request(0, (0, 2**31 - 1), SamplingParams(max_tokens=1)))
    for i, bad in enumerate((-1, 2**31), 1):
        with pytest.raises(RequestError, match=str(bad)):
            scheduler.add(Request(i, (0, bad), SamplingParams(max_tokens=1)))
    run(scheduler, Drawer())


def test_a_child_names_its_parent() -> None:
    """The first sequence of a request has none, -1; samples have the first one."""
    scheduler = scheduler_of()
    requests = [Request(i, (1, 2), SamplingParams(n=3, temperature=1.0, max_tokens=3)) for i in range(2)]
    for request in requests:
        scheduler.add(request)
    run(scheduler, Drawer())
    assert [[s.parent for s in request.sequences] for request in requests] == [[-1, 0, 0], [-1, 1, 1]]
    assert [[s.index for s in request.sequences] for request in requests] == [[0, 1, 2]] * 2
    assert sorted(s.seq_id for request in requests for s in request.sequences) == list(range(6))


@pytest.mark.parametrize("penalty", [0.5, 2.0])
def test_penalized_tokens_are_named_and_nobody_elses(penalty: float) -> None:
    """Each token once, in the order of the text, whatever the penalty; none is told where nobody asks for one."""
    scheduler, drawer = scheduler_of(), Drawer()
    scheduler.add(Request(0, (3, 1, 3), SamplingParams(max_tokens=2, repetition_penalty=penalty)))
    plan = scheduler.schedule()
    assert plan is not None
    assert plan.penalty_tokens == ((3, 1),)
    scheduler.add(Request(1, (7,), SamplingParams(max_tokens=2, temperature=1.0)))
    scheduler.commit(plan, drawer.answer(plan))
    run(scheduler, drawer)
    assert drawer.plans[1].penalty_tokens[1] == ()
    assert drawer.plans[-1].penalty_tokens == ()


def test_a_beams_score_at_its_shortest() -> None:
    """One token divides by one; none (a beam that was aborted) does too."""
    request = Request(0, (1, 2), SamplingParams(beam_width=2, length_penalty=3.0))
    for drawn, wanted in (([], -4.0), ([5], -4.0), ([5, 6], -0.5)):
        line = Sequence(0, request, [1, 2, *drawn])
        line.cumulative_logprob = -4.0
        assert beam_score(line) == wanted
