"""Beam search against a plain reference, and its scores at the edges."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipaged.config import SamplingParams
from minipaged.scheduling.beam import BeamSearch
from minipaged.scheduling.request import Logprob, Request, Sequence, beam_score
from tests.scheduling.drawer import VOCAB, Drawer, run, scheduler_of


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


def test_a_beams_score_at_its_shortest() -> None:
    """One token divides by one; none (a beam that was aborted) does too."""
    request = Request(0, (1, 2), SamplingParams(beam_width=2, length_penalty=3.0))
    for drawn, wanted in (([], -4.0), ([5], -4.0), ([5, 6], -0.5)):
        line = Sequence(0, request, [1, 2, *drawn])
        line.cumulative_logprob = -4.0
        assert beam_score(line) == wanted


def beam_search_with_two_ended(scores: list[float]) -> tuple[BeamSearch, Any]:
    """Width 2, no length penalty: two hypotheses have ended with scores -2 and -3; then beams with these scores go on. That step."""
    search = BeamSearch(2, 10, frozenset({0}), 0.0, False)
    ids = np.array([[0, 1, 2, 3]] * 2, np.int32)
    first = np.array([[-2.0, -2.5, -2.75, -9.0], [-3.0, -2.625, -2.875, -9.0]], np.float32)
    step = search.advance([0.0, 0.0], ids, first, 0)
    assert [score for score, _ in step.ended] == [-2.0]
    second = np.array([[-0.5, -0.375, -9.0, -9.0], [-9.0, -0.5, -9.0, -9.0]], np.float32)
    step = search.advance([-2.5, -2.625], ids, second, 1)
    assert [score for score, _ in step.ended] == [-3.0]
    assert not step.done
    third = np.array([[-50.0, 0.0, -9.0, -9.0], [-50.0, 0.0, -9.0, -9.0]], np.float32)
    return search, search.advance(scores, ids, third, 2)


@pytest.mark.parametrize(
    ("scores", "done"),
    [([-2.5, -4.0], False), ([-2.999, -3.5], False), ([-3.0, -3.5], True), ([-3.5, -4.0], True)],
)
def test_beams_go_on_while_the_best_can_still_enter(scores: list[float], done: bool) -> None:
    """The best survivor against the worst that ended; a tie cannot push it out."""
    _, step = beam_search_with_two_ended(scores)
    assert step.done is done
