"""What a plan says of each draw, who may run ahead, and when a block is published."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipaged.config import SamplingParams
from minipaged.scheduling.plan import IN_FLIGHT, LogitAdjustments, StepPlan
from minipaged.scheduling.request import Request
from tests.scheduling.drawer import VOCAB, Drawer, run, scheduler_of, stream

PARAMS = [
    SamplingParams(temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, seed=3, max_tokens=7, ignore_eos=True),
    SamplingParams(max_tokens=5, repetition_penalty=1.3),
    SamplingParams(temperature=1.0, max_tokens=9, min_tokens=4, stop_token_ids=(2, 8)),
    SamplingParams(n=3, temperature=1.0, max_tokens=6, seed=11, logprobs=2),
    SamplingParams(max_tokens=4, logprobs=4, prompt_logprobs=3),
    SamplingParams(n=2, best_of=4, temperature=0.5, max_tokens=5),
    SamplingParams(max_tokens=8),
]


@given(
    chosen=st.lists(st.sampled_from(range(len(PARAMS))), min_size=1, max_size=5),
    budget=st.sampled_from([6, 16, 400]),
    seed=st.integers(0, 5),
    prompts=st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=19), min_size=5, max_size=5),
)
def test_plans_say_what_was_asked(chosen: list[int], budget: int, seed: int, prompts: list[list[int]]) -> None:
    """Each draw's sampling numbers, random number, forbidden and penalized tokens, and the log-probabilities wanted in all."""
    scheduler = scheduler_of(max_num_batched_tokens=budget, seed=seed)
    requests = [Request(i, tuple(prompts[i]), PARAMS[k], (5,)) for i, k in enumerate(chosen)]
    for request in requests:
        scheduler.add(request)

    def look(plan: StepPlan) -> None:
        batch = scheduler.batch
        lines = [scheduler.sequences[int(plan.seq_ids[row])] for row in plan.draw_rows]
        owners = {line.request.request_id: line.request for line in lines}
        tops = [-1] + [
            r.params.logprobs if r.params.logprobs is not None else 0 if r.params.best_of else -1
            for r in owners.values()
        ]
        at = 0
        for row, (start, length) in enumerate(zip(plan.starts.tolist(), plan.lengths.tolist(), strict=True)):
            line = scheduler.sequences[int(plan.seq_ids[row])]
            assert plan.token_ids[at : at + length].tolist() == line.token_ids[start : start + length]
            at += length
            table = scheduler.manager.table(line.seq_id)
            assert plan.tables[row].tolist() == [*table, *[0] * (plan.tables.shape[1] - len(table))]
        assert plan.top_logprobs == max(tops)
        queried = {q.row: q for q in plan.prompt_queries}
        for row, (start, length) in enumerate(zip(plan.starts.tolist(), plan.lengths.tolist(), strict=True)):
            request = scheduler.sequences[int(plan.seq_ids[row])].request
            targets = request.prompt_token_ids[start + 1 : start + length + 1]
            wants = request.params.prompt_logprobs is not None and targets
            assert (queried[row][1:] == (targets, 3)) if wants else row not in queried
        plain = all(
            p.greedy and p.repetition_penalty == 1 and not p.min_tokens and p.logprobs is None and p.num_sequences == 1
            for p in (line.request.params for line in lines)
        )
        assert (plan.sampling is None) is plain
        if plan.sampling is None:
            return
        for d, line in enumerate(lines):
            request, asked = line.request, line.request.params
            told = [float(column[d]) for column in plan.sampling[:4]]
            wanted = [asked.temperature, asked.top_p, asked.top_k, asked.min_p]
            assert told == pytest.approx(wanted, rel=1e-6)
            first = next(e for e, row in enumerate(plan.draw_rows.tolist()) if row == plan.draw_rows[d])
            own = asked.seed if asked.seed is not None else (seed * 0x9E3779B1 + request.arrival * 0x85EBCA77) % 2**63
            sample = line.index if request.forked else d - first
            assert float(plan.sampling.uniform[d]) == stream(own, sample, len(line.token_ids))
            early = line.num_output < asked.min_tokens
            adjusted = plan.adjustments[d] if plan.adjustments else None
            if not early and asked.repetition_penalty == 1:
                assert adjusted is None
            else:
                penalized = tuple(dict.fromkeys(line.token_ids)) if asked.repetition_penalty != 1 else ()
                assert adjusted == LogitAdjustments(
                    banned=(2, 5, 8) if early else (), seen=penalized, repetition=asked.repetition_penalty
                )
            assert batch.seed[line.slot] == own

    run(scheduler, Drawer(seed), look)
    for request in requests:
        for line in request.sequences:
            stop = (
                {5, *request.params.stop_token_ids}
                if not request.params.ignore_eos
                else set(request.params.stop_token_ids)
            )
            ends = [i for i, t in enumerate(line.output_token_ids, 1) if t in stop and i > request.params.min_tokens]
            assert line.num_output == min([*ends[:1], request.params.max_tokens])
            assert line.finish_reason == ("stop" if ends else "length")
            assert line.slot == -1


@pytest.mark.parametrize(
    ("params", "ahead"),
    [
        (SamplingParams(max_tokens=5), True),
        (SamplingParams(max_tokens=5, temperature=1.0), True),
        (SamplingParams(max_tokens=5, logprobs=1), True),
        (SamplingParams(max_tokens=5, repetition_penalty=1.2), False),
        (SamplingParams(max_tokens=5, repetition_penalty=1.2, logprobs=0), False),
        (SamplingParams(max_tokens=5, presence_penalty=0.1), False),
        (SamplingParams(max_tokens=5, frequency_penalty=0.1, temperature=1.0), False),
        (SamplingParams(max_tokens=5, logit_bias={3: 1.0}, allowed_token_ids=(3, 4)), True),
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
    assert plan.adjustments == (LogitAdjustments(seen=(3, 1), repetition=penalty),)
    scheduler.add(Request(1, (7,), SamplingParams(max_tokens=2, temperature=1.0)))
    scheduler.commit(plan, drawer.answer(plan))
    run(scheduler, drawer)
    assert drawer.plans[1].adjustments[1] is None
    assert drawer.plans[-1].adjustments == ()


def test_samples_wait_for_each_other_from_the_first_group_on() -> None:
    """L51: a budget of three, one of it spent on an earlier request: three samples draw all at once, when it has ended, or not at all."""
    scheduler, drawer = scheduler_of(max_num_batched_tokens=3), Drawer()
    scheduler.add(Request(0, (1,), SamplingParams(max_tokens=8, ignore_eos=True)))
    group = Request(1, (2,), SamplingParams(max_tokens=4, n=3, temperature=1.0, ignore_eos=True))
    scheduler.add(group)

    def look(plan: StepPlan) -> None:
        if group.forked:
            drawing = {s.seq_id for s in group.sequences} & set(plan.seq_ids[plan.draw_rows].tolist())
            assert len(drawing) in (0, 3)

    run(scheduler, drawer, look)
    assert [s.num_output for s in group.sequences] == [4, 4, 4]
