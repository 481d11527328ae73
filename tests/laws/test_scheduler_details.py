"""Laws of a scheduler in detail: counters and ends, columns that agree with block tables, victims' draws, copies, salts, samples."""

from __future__ import annotations

from itertools import product
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from minipaged.config import SamplingParams
from minipaged.memory.types import BlockEvent
from minipaged.scheduling.running_set import SchedulerEvent
from tests.laws.test_scheduler_laws import most_blocks, of_kind, ran, tight, workloads
from tests.laws.token_world import Asked, Step, World


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
        for event in of_kind(step, "admit", "rejoin"):
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
def test_ends_are_reported_with_what_was_drawn(
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


@given(workload=workloads(groups=False, most=5), arrangement=tight)
def test_a_draw_for_whoever_was_sent_away_changes_no_neighbour(
    block_manager_class: type, scheduler_class: type, workload: list[Asked], arrangement: dict[str, Any]
) -> None:
    """L55 with two seats, both taken, and a step in flight: what is drawn for a victim goes to the victim alone."""
    plain = [
        Asked(a.prompt, SamplingParams(max_tokens=a.params.max_tokens + 6, ignore_eos=True), a.arrives)
        for a in workload
    ]
    calm = ran(block_manager_class, scheduler_class, plain, {})
    settings = {**arrangement, "limits": {**arrangement["limits"], "max_num_seqs": 2}}
    tense = ran(block_manager_class, scheduler_class, plain, settings, depth=1, max_num_seqs=2)
    assert tense.texts(tense.outputs) == calm.texts(calm.outputs)


def test_a_group_that_runs_dry_takes_its_copies_back(block_manager_class: type, scheduler_class: type) -> None:
    """L45, L14: three samples part beside a long request in pools of every size: some run dry between one sample's copy and the next's."""
    dry = 0
    for size, prompt, host in product(range(9, 13), range(13, 26), (0, 40)):
        world = World(block_manager_class, scheduler_class, num_blocks=1 + size, num_host_blocks=host)
        long = Asked(tuple(range(prompt)), SamplingParams(max_tokens=33 - prompt, ignore_eos=True))
        params = SamplingParams(n=3, temperature=1.0, seed=1, max_tokens=6, ignore_eos=True)
        outputs = world.run([long, Asked((30, 31, 32, 33, 34, 35), params, arrives=1)])
        assert [len(answer.token_ids) for answer in outputs[1].outputs] == [6, 6, 6]
        dry += any(step.dry for step in world.steps)
        world.assert_nothing_is_held()
    assert dry > 20


def test_L25_a_salt_and_L27_prompt_logprobs_at_admission(block_manager_class: type, scheduler_class: type) -> None:
    """What a request finds: nothing under another salt, nothing if it needs its prompt's log-probabilities, else all that is there."""
    world = World(block_manager_class, scheduler_class)
    prompt = tuple(range(12))
    found = []
    for salt, logprobs in (("a", None), ("b", None), ("a", None), (None, None), ("a", 1), (None, 1), (None, None)):
        params = SamplingParams(max_tokens=2, cache_salt=salt, prompt_logprobs=logprobs)
        [output] = world.run([Asked(prompt, params)])
        found.append(output.request.sequences[0].num_cached)
    assert found == [0, 0, 8, 0, 0, 0, 8]


def test_L25_L27_filled_without_being_read(block_manager_class: type, scheduler_class: type) -> None:
    """L27: a request that does not read the cache fills it, under its own salt."""
    world = World(block_manager_class, scheduler_class)
    for salt, logprobs, expected in (("a", 0, 0), ("a", None, 8), (None, None, 0)):
        params = SamplingParams(max_tokens=2, cache_salt=salt, prompt_logprobs=logprobs)
        [output] = world.run([Asked(tuple(range(12)), params)])
        assert output.request.sequences[0].num_cached == expected


def test_samples_differ_and_reruns_do_not(block_manager_class: type, scheduler_class: type) -> None:
    """Each sample has a stream of its own, the same in every run; another seed has others."""
    texts = []
    for seed in (1, 1, 2):
        world = World(block_manager_class, scheduler_class)
        params = SamplingParams(n=4, temperature=1.0, seed=seed, max_tokens=12, ignore_eos=True)
        [output] = world.run([Asked((1, 2, 3), params)])
        texts.append([tuple(answer.token_ids) for answer in output.outputs])
        for step in world.steps:
            if step.plan is not None and step.plan.sampling is not None:
                assert len(set(step.plan.sampling.uniform.tolist())) == len(step.plan.draw_rows) == 4
    assert texts[0] == texts[1]
    assert len({*texts[0], *texts[2]}) == 8
