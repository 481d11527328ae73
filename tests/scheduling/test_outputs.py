"""What comes back: complete, as it was when it was asked for, and without a number that nobody asked for."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from minipaged.api import LLM
from minipaged.config import SamplingParams
from minipaged.errors import RequestError
from minipaged.execution.eager import TorchRunner
from minipaged.scheduling.plan import StepPlan
from minipaged.scheduling.request import Request
from tests.scheduling.drawer import Drawer, run, scheduler_of


def toy(**settings: Any) -> LLM:
    return LLM("toy", **{"num_blocks": 64, "block_size": 4, **settings})


@pytest.mark.parametrize("overlap", [0, 1])
def test_prompt_logprobs_of_a_request_that_was_sent_away_with_a_step_in_flight(overlap: int) -> None:
    """The step had computed them: they are noted, whoever sits in the slot by now."""
    crowd = [{"prompt_token_ids": [n, n + 1, n + 2]} for n in (3, 6, 9)]
    asked = {"prompt_token_ids": list(range(20, 29))}
    many, few = SamplingParams(max_tokens=12, ignore_eos=True), SamplingParams(max_tokens=1, prompt_logprobs=0)
    llm = toy(num_blocks=7, overlap=overlap, preemption="recompute", watermark=0.0, enable_prefix_caching=False)
    output = llm.generate([*crowd, asked], [many, many, many, few])[3]
    alone = toy().generate(asked, few)[0]
    assert output.prompt_logprobs is not None
    assert alone.prompt_logprobs is not None
    assert [entry and list(entry) for entry in output.prompt_logprobs] == [None, *([n] for n in range(21, 29))]
    for entry, expected in zip(output.prompt_logprobs[1:], alone.prompt_logprobs[1:], strict=True):
        assert entry is not None
        assert expected is not None
        assert {t: v.logprob for t, v in entry.items()} == pytest.approx(
            {t: v.logprob for t, v in expected.items()}, abs=1e-4
        )


def test_a_bad_text_beside_token_ids_is_refused_and_harms_nobody() -> None:
    llm = toy()
    llm.engine.trace.subscribe(lambda delta: None)
    with pytest.raises(RequestError, match="the text of a prompt must be a string, not 7"):
        llm.generate({"prompt_token_ids": [5], "prompt": 7})
    assert llm.generate("hello", SamplingParams(max_tokens=2, ignore_eos=True))[0].finished


def test_a_score_only_where_one_was_asked_for() -> None:
    """None is not 0, which would be certainty; a neighbour that asks changes nothing."""
    plain, logged = SamplingParams(max_tokens=3), SamplingParams(max_tokens=3, logprobs=0)
    best, beams = SamplingParams(max_tokens=3, best_of=2, temperature=1.0), SamplingParams(max_tokens=3, beam_width=2)
    outputs = toy().generate(["hello"] * 4, [plain, logged, best, beams])
    scores = [output.outputs[0].cumulative_logprob for output in outputs]
    assert scores[0] is None
    assert all(score is not None and score < 0 for score in scores[1:])


def test_an_answer_that_was_kept_never_changes() -> None:
    llm = toy()
    params = SamplingParams(max_tokens=6, logprobs=1, prompt_logprobs=0, ignore_eos=True)
    kept = [(output.outputs[0], output.prompt_logprobs) for output in llm.stream("hello", params)]
    for count, (answer, prompt) in enumerate(kept, 1):
        assert answer.logprobs is not None
        assert len(answer.token_ids) == len(answer.logprobs) == count
        assert prompt is not None
        assert len(prompt) == len(kept[-1][1] or ())


def test_prompt_logprobs_of_a_step_that_is_committed_after_its_request_was_sent_away() -> None:
    """The request has no slot any more, and whoever has it by then gets nothing of it."""
    scheduler, drawer = scheduler_of(preemption="recompute", depth=1), Drawer()
    request = Request(0, tuple(range(9)), SamplingParams(max_tokens=3, prompt_logprobs=0, ignore_eos=True))
    scheduler.add(request)
    plan = scheduler.schedule()
    assert plan is not None
    assert scheduler.running_set.preempt(request) is None
    scheduler.commit(plan, drawer.answer(plan))
    assert [entry and list(entry) for entry in request.prompt_logprobs] == [None, *([n] for n in range(1, 9))]
    run(scheduler, drawer)
    assert len(request.prompt_logprobs) == 9


@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"logprobs": 1},
        {"temperature": 1.0},
        {"temperature": 1.0, "top_p": 0.9, "top_k": 5},
        {"n": 2, "temperature": 1.0},
        {"beam_width": 2},
        {"repetition_penalty": 1.1},
    ],
    ids=repr,
)
def test_logits_that_are_no_numbers_end_their_request_with_a_word(
    monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any], overlap: int
) -> None:
    """From its fourth token on one request's logits are NaN: it ends, says why and holds nothing; its neighbour does not notice."""
    llm = toy(overlap=overlap)
    wanted = llm.generate("neighbour", SamplingParams(max_tokens=9, ignore_eos=True))[0].outputs[0].token_ids
    runner = cast("TorchRunner", llm.engine.runner)
    draw, rows = runner._draw, []

    def spoilt(plan: StepPlan, logits: torch.Tensor) -> Any:
        position = plan.starts[plan.draw_rows] + plan.lengths[plan.draw_rows]
        bad = torch.from_numpy((plan.seq_ids[plan.draw_rows] != neighbour[0]) & (position >= 8))
        rows.append(int(bad.sum()))
        return draw(plan, logits.masked_fill(bad[:, None], float("nan")))

    monkeypatch.setattr(runner, "_draw", spoilt)
    stream = llm.stream(
        ["neighbour", "12345"],
        [SamplingParams(max_tokens=9, ignore_eos=True), SamplingParams(max_tokens=9, ignore_eos=True, **asked)],
    )
    neighbour = [1]  # the first sequence after the one that was alone
    last = {output.request_id: output for output in stream}
    good, bad = (last[key] for key in sorted(last))
    assert any(rows)
    assert good.error is None
    assert good.outputs[0].token_ids == wanted
    assert bad.finished
    assert "no token can be drawn: the logits are not numbers" in (bad.error or "")
    assert {o.finish_reason for o in bad.outputs} == {"error"}
    assert {len(o.token_ids) for o in bad.outputs} == {3}
    assert llm.engine.scheduler.manager.usage().referenced == 0
    assert not llm.engine.has_work


def test_a_request_whose_every_token_is_forbidden_ends_with_a_word() -> None:
    output = toy().generate("x", SamplingParams(allowed_token_ids=(5,), stop_token_ids=(5,), min_tokens=2))[0]
    assert "every token is forbidden" in (output.error or "")


@pytest.mark.parametrize("overlap", [0, 1])
def test_samples_go_on_like_requests_of_their_own_and_are_told_of_once_a_step(overlap: int) -> None:
    """Their draws are array operations then; the request still changes once, whatever its samples drew."""
    engine = toy(overlap=overlap).engine
    looked_at = []
    several = engine.ask("one", SamplingParams(n=3, temperature=1.0, max_tokens=9, ignore_eos=True, seed=1))
    alone = engine.ask("two", SamplingParams(max_tokens=9, ignore_eos=True))
    stopping = engine.ask("three", SamplingParams(n=2, temperature=1.0, max_tokens=9, ignore_eos=True, stop=("\n\n",)))
    while engine.has_work:
        changed = [output.request_id for output in engine.step()]
        assert len(changed) == len(set(changed))
        batch = engine.scheduler.batch
        looked_at.append(
            tuple(
                any(batch.needs_slow_path[s.slot] for s in output.request.sequences if s.slot >= 0)
                for output in (several, alone, stopping)
            )
        )
    assert looked_at[5] == (False, False, True)
    assert [len(o.token_ids) for output in (several, alone) for o in output.outputs] == [9] * 4


@pytest.mark.parametrize("overlap", [0, 1])
def test_samples_that_all_end_in_one_step_are_told_of_once(overlap: int) -> None:
    """Also those of the last request that has samples: after them no group is left."""
    engine = toy(overlap=overlap).engine
    output = engine.ask("one", SamplingParams(n=3, temperature=1.0, max_tokens=5, ignore_eos=True, seed=1))
    told = []
    while engine.has_work:
        told += [output.finished for output in engine.step()]
    assert output.finished
    assert told.count(True) == 1
