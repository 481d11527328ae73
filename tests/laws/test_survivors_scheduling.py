"""What the automatic mutation run found untested in scheduling: beams against a plain reference, plans, log-probabilities, counters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipaged.config import EngineConfig, SamplingParams
from minipaged.memory.block_manager import BlockManager
from minipaged.scheduling.beam import BeamSearch
from minipaged.scheduling.plan import PromptLogprobs, StepPlan, StepTokens
from minipaged.scheduling.request import Logprob, Request, beam_score
from minipaged.scheduling.scheduler import Scheduler
from minipaged.scheduling.streams import uniform

VOCAB = 12
MASK = 2**64 - 1


# ---- streams


def mixed(x: int) -> int:
    """SplitMix64's finalizer on whole numbers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def stream(seed: int, index: int, position: int) -> float:
    """The number of one draw, by the definition."""
    golden = 0x9E3779B97F4A7C15
    x = mixed((seed + golden) & MASK)
    x = mixed((x + golden * (index + 1)) & MASK)
    x = mixed((x + golden * (position + 1)) & MASK)
    return (x >> 11) / 2**53


@given(
    st.lists(st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 50), st.integers(0, 10**6)), min_size=1, max_size=9)
)
def test_streams_are_splitmix64(asked: list[tuple[int, int, int]]) -> None:
    seeds, indices, positions = (np.array(column, np.int64) for column in zip(*asked, strict=True))
    assert uniform(seeds, indices, positions).tolist() == [stream(*one) for one in asked]


# ---- beams


def plain_beam_step(
    finished: list[tuple[float, int]],
    improvable: bool,
    rows: list[list[tuple[int, float]]],
    search: BeamSearch,
    length: int,
) -> tuple[list[Any], list[Any], bool]:
    """(survivors, ended, at its end) by the rules in beam.py's head; rows: (token, cumulative score) of each beam."""
    flat = [(b, token, score) for b, row in enumerate(rows) for token, score in row]
    best = sorted(flat, key=lambda c: -c[2])[: max(2, 1 + len(search.stop_ids)) * search.width]
    last = length == search.max_tokens
    closed = [last or c[1] in search.stop_ids for c in best]
    survivors = [c for c, end in zip(best, closed, strict=True) if not end][: search.width]
    stopped = not improvable or (search.early_stopping and len(finished) == search.width)
    ended = [c for c, end in zip(best[: search.width], closed, strict=False) if end and not stopped]
    return survivors, ended, last


@given(
    data=st.data(),
    width=st.integers(1, 4),
    max_tokens=st.integers(1, 6),
    stop=st.frozensets(st.integers(0, VOCAB - 1), max_size=3),
    penalty=st.sampled_from([0.0, 1.0, 0.5, 2.0, -1.0]),
    early=st.booleans(),
)
def test_beams_follow_the_plain_rules(
    data: st.DataObject, width: int, max_tokens: int, stop: frozenset[int], penalty: float, early: bool
) -> None:
    """Survivors, ended hypotheses, dropped ones and the end, step by step, on made-up scores."""
    search = BeamSearch(width, max_tokens, stop, penalty, early)
    assert search.num_candidates == max(2, 1 + len(stop)) * width
    scores, kept, count, improvable = [0.0], [], 0, True
    finished: list[tuple[float, int]] = []
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    for length in range(1, max_tokens + 1):
        beams = len(scores)
        ids = np.array([rng.permutation(VOCAB) for _ in range(beams)], np.int32)
        logs = -np.sort(rng.random((beams, VOCAB)).astype(np.float32) * 4, axis=1)
        step = search.advance(scores, ids, logs, length - 1)
        totals = np.asarray(scores, np.float32)[:, None] + logs
        rows = [list(zip(ids[b].tolist(), totals[b].tolist(), strict=True)) for b in range(beams)]
        survivors, ended, last = plain_beam_step(finished, improvable, rows, search, length)
        assert [tuple(c) for c in step.survivors] == survivors
        assert [tuple(c) for _, c in step.ended] == ended
        assert [s for s, _ in step.ended] == pytest.approx([c[2] / length**penalty for c in ended], rel=1e-6)
        for score, _ in step.ended:
            finished.append((score, count))
            count += 1
        finished.sort(key=lambda entry: (-entry[0], entry[1]))
        kept, gone = finished[:width], finished[width:]
        assert step.dropped == tuple(number for _, number in gone)
        finished = kept
        if survivors and len(finished) == width:
            improvable = improvable and bool(
                np.float32(survivors[0][2] / length**penalty) > np.float32(finished[-1][0])
            )
        ends = last or not survivors or not improvable or (early and len(finished) == width)
        assert step.done is ends
        if ends:
            return
        scores = [c[2] for c in survivors]


# ---- plans


class Drawer:
    """Answers plans with made-up but different numbers, and keeps what it said."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.plans: list[StepPlan] = []
        self.said: list[StepTokens] = []

    def answer(self, plan: StepPlan) -> StepTokens:
        """One step's draws."""
        n, k = len(plan.draw_rows), max(0, plan.top_logprobs)
        ids = self.rng.integers(0, VOCAB, n).astype(np.int32)
        tops = np.array([self.rng.permutation(VOCAB)[:k] for _ in range(n)], np.int32).reshape(n, k)
        values = -np.sort(self.rng.random((n, k)).astype(np.float32) * 3, axis=1)
        prompts = {}
        for query in plan.prompt_queries:
            m, top = len(query.targets), query.top
            prompts[query.row] = PromptLogprobs(
                int(plan.starts[query.row]),
                -self.rng.random(m).astype(np.float32),
                self.rng.integers(50, 60, m).astype(np.int32),
                np.array([self.rng.permutation(VOCAB)[:top] + 100 for _ in range(m)], np.int32).reshape(m, top),
                -self.rng.random((m, top)).astype(np.float32),
            )
        said = StepTokens(
            ids,
            -self.rng.random(n).astype(np.float32),
            self.rng.integers(20, 30, n).astype(np.int32),
            tops,
            values,
            prompts,
        )
        self.plans.append(plan)
        self.said.append(said)
        return said


def scheduler_of(num_blocks: int = 400, **limits: Any) -> Scheduler:
    """A roomy scheduler with blocks of 4."""
    return Scheduler(
        EngineConfig(**{"max_model_len": 200, **limits}), BlockManager(num_blocks, 4, num_host_blocks=50), 4
    )


def run(scheduler: Scheduler, drawer: Drawer, look: Callable[[StepPlan], None] = lambda plan: None) -> None:
    """Steps until nothing is left."""
    for _ in range(400):
        if not scheduler.has_work:
            return
        plan = scheduler.schedule()
        assert plan is not None
        look(plan)
        scheduler.commit(plan, drawer.answer(plan))
    raise AssertionError("it does not end")


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
            told = [float(column[d]) for column in plan.sampling[:5]]
            wanted = [asked.temperature, asked.top_p, asked.top_k, asked.min_p, asked.repetition_penalty]
            assert told == pytest.approx(wanted, rel=1e-6)
            first = next(e for e, row in enumerate(plan.draw_rows.tolist()) if row == plan.draw_rows[d])
            own = asked.seed if asked.seed is not None else (seed * 0x9E3779B1 + request.arrival * 0x85EBCA77) % 2**63
            sample = line.index if request.forked else d - first
            assert float(plan.sampling.uniform[d]) == stream(own, sample, len(line.token_ids))
            early = line.num_output < asked.min_tokens
            assert (plan.banned_tokens[d] if plan.banned_tokens else ()) == ((2, 5, 8) if early else ())
            penalized = tuple(dict.fromkeys(line.token_ids)) if asked.repetition_penalty != 1 else ()
            assert (plan.penalty_tokens[d] if plan.penalty_tokens else ()) == penalized
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


# ---- log-probabilities


def drawn(drawer: Drawer, sequence: int) -> Iterator[tuple[int, int, StepTokens]]:
    """(draw, token, said) of each draw of a sequence that never forked."""
    for plan, said in zip(drawer.plans, drawer.said, strict=True):
        for d, row in enumerate(plan.draw_rows.tolist()):
            if int(plan.seq_ids[row]) == sequence:
                yield d, int(said.token_ids[d]), said


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


@pytest.mark.parametrize("logged", [None, 0, 2])
@pytest.mark.parametrize("width", [1, 2, 3])
def test_beams_carry_their_scores_and_logprobs(width: int, logged: int | None) -> None:
    scheduler, drawer = scheduler_of(), Drawer(width)
    params = SamplingParams(
        beam_width=width, n=width, max_tokens=6, logprobs=logged, length_penalty=1.5, stop_token_ids=(3,)
    )
    request = Request(1, (1, 2, 3, 4, 5), params)
    scheduler.add(request)
    run(scheduler, drawer)
    answers = request.output.outputs
    assert 1 <= len(answers) <= width
    by_score = [a.cumulative_logprob / max(1, len(a.token_ids)) ** 1.5 for a in answers]
    assert by_score == sorted(by_score, reverse=True)
    for line in request.sequences:
        assert line.finish_reason != "pruned"
        assert beam_score(line) == pytest.approx(line.cumulative_logprob / line.num_output**1.5)
    for answer in answers:
        assert answer.finish_reason == ("stop" if answer.token_ids[-1] == 3 else "length")
        if logged is None:
            assert answer.logprobs is None
            continue
        assert answer.logprobs is not None
        assert len(answer.logprobs) == len(answer.token_ids)
        total = sum(entry[token].logprob for entry, token in zip(answer.logprobs, answer.token_ids, strict=True))
        assert total == pytest.approx(answer.cumulative_logprob, rel=1e-5)
        said_rows = [
            (s.top_ids[d].tolist(), s.top_logprobs[d].tolist())
            for s in drawer.said
            if s.top_ids is not None and s.top_logprobs is not None
            for d in range(len(s.top_ids))
        ]
        for entry, token in zip(answer.logprobs, answer.token_ids, strict=True):
            assert any(
                entry == {ids[i]: Logprob(values[i], i + 1) for i in {ids.index(token), *range(logged)}}
                for ids, values in said_rows
                if token in ids
            )
