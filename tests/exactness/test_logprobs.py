"""Log-probabilities of drawn and of prompt tokens equal transformers' log-softmax; stop conditions and penalties do what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from minipaged.config import SamplingParams
from minipaged.model.loading.zoo import LoadedModel
from tests.exactness.comparing import engine_on, load_tiny, run
from tests.exactness.test_tiny_models import SHAPES, tiny_llama

PROMPT = [3, 50, 7, 120, 9, 44, 81, 2, 66, 13, 5]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, LoadedModel]:
    folder: Path = tmp_path_factory.mktemp("logprobs")
    model = tiny_llama(folder, SHAPES["gqa"])
    return model, load_tiny(folder)


def log_softmax(model: Any, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)


@pytest.mark.parametrize("budget", [3, 500])
def test_prompt_logprobs(tiny: tuple[Any, LoadedModel], budget: int) -> None:
    model, loaded = tiny
    engine = engine_on(loaded, block_size=4, max_num_batched_tokens=budget)
    params = SamplingParams(max_tokens=2, prompt_logprobs=3, ignore_eos=True)
    expected = log_softmax(model, PROMPT)
    for attempt in range(2):  # the second finds the prompt in the cache, and must not read it (L27)
        output = run(engine, [PROMPT], params)[0]
        found = output.prompt_logprobs
        assert found is not None
        assert len(found) == len(PROMPT), attempt
        assert found[0] is None
        for i in range(1, len(PROMPT)):
            entry = found[i]
            assert entry is not None
            best = expected[i - 1].topk(3)
            assert entry[PROMPT[i]].logprob == pytest.approx(float(expected[i - 1, PROMPT[i]]), abs=1e-4)
            assert entry[PROMPT[i]].rank == int((expected[i - 1] > expected[i - 1, PROMPT[i]]).sum()) + 1
            for value, token in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                assert entry[token].logprob == pytest.approx(value, abs=1e-4)
    assert engine.scheduler.counters.hit_tokens == 0


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(logprobs=2, max_tokens=6, ignore_eos=True),
        SamplingParams(logprobs=0, n=3, temperature=1.0, seed=1, max_tokens=6, ignore_eos=True),
    ],
)
def test_logprobs_of_drawn_tokens(tiny: tuple[Any, LoadedModel], params: SamplingParams) -> None:
    model, loaded = tiny
    for answer in run(engine_on(loaded, block_size=4), [PROMPT], params)[0].outputs:
        expected = log_softmax(model, PROMPT + answer.token_ids)
        assert answer.logprobs is not None
        assert len(answer.logprobs) == len(answer.token_ids)
        total = 0.0
        for i, (token, entry) in enumerate(zip(answer.token_ids, answer.logprobs, strict=True)):
            row = expected[len(PROMPT) - 1 + i]
            total += float(row[token])
            assert entry[token].logprob == pytest.approx(float(row[token]), abs=1e-4)
            assert len(entry) in (params.logprobs, (params.logprobs or 0) + 1)
        assert answer.cumulative_logprob == pytest.approx(total, abs=1e-3)


def test_best_of_returns_the_most_likely_samples(tiny: tuple[Any, LoadedModel]) -> None:
    _, loaded = tiny
    common: dict[str, Any] = {"temperature": 1.0, "seed": 4, "max_tokens": 6, "ignore_eos": True, "logprobs": 0}
    every = run(engine_on(loaded), [PROMPT], SamplingParams(n=5, **common))[0].outputs
    best = run(engine_on(loaded), [PROMPT], SamplingParams(n=2, best_of=5, **common))[0].outputs
    ranked = sorted(every, key=lambda o: -o.cumulative_logprob)
    assert [o.token_ids for o in best] == [o.token_ids for o in ranked[:2]]


def test_repetition_penalty_equals_transformers(tiny: tuple[Any, LoadedModel]) -> None:
    model, loaded = tiny
    done = model.generate(
        torch.tensor([PROMPT]),
        do_sample=False,
        max_new_tokens=12,
        repetition_penalty=1.3,
        eos_token_id=None,
        pad_token_id=0,
    )
    params = SamplingParams(repetition_penalty=1.3, max_tokens=12, ignore_eos=True)
    for depth in (0, 1):
        output = run(engine_on(loaded, depth=depth), [PROMPT], params)[0]
        assert output.outputs[0].token_ids == done[0, len(PROMPT) :].tolist()


def test_min_tokens_and_stop_ids(tiny: tuple[Any, LoadedModel]) -> None:
    _, loaded = tiny
    free = run(engine_on(loaded), [PROMPT], SamplingParams(max_tokens=10, ignore_eos=True))[0].outputs[0].token_ids
    stop = free[3]
    at = free.index(stop)
    ended = run(engine_on(loaded), [PROMPT], SamplingParams(max_tokens=10, stop_token_ids=(stop,)))[0].outputs[0]
    assert ended.token_ids == free[: at + 1]
    assert ended.finish_reason == "stop"
    later = run(engine_on(loaded), [PROMPT], SamplingParams(max_tokens=10, min_tokens=8, stop_token_ids=(stop,)))[0]
    assert stop not in later.outputs[0].token_ids[:8]
    assert len(later.outputs[0].token_ids) >= 8


def transformers_says(model: Any, *processors: Any, count: int = 30) -> list[int]:
    """Greedy tokens under these processors of transformers."""
    done = model.generate(
        torch.tensor([PROMPT]),
        do_sample=False,
        max_new_tokens=count,
        logits_processor=LogitsProcessorList(processors),
        eos_token_id=None,
        pad_token_id=0,
    )
    tokens: list[int] = done[0, len(PROMPT) :].tolist()
    return tokens


def openai_penalties(presence: float, frequency: float) -> Any:
    """The formula of the OpenAI API: logit - count * frequency - (count > 0) * presence, counts over the answer alone."""

    def process(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        counts = torch.bincount(ids[0, len(PROMPT) :], minlength=scores.shape[-1])
        return scores - counts * frequency - (counts > 0) * presence

    return process


@pytest.mark.parametrize("depth", [0, 1])
def test_changed_logits_equal_transformers(tiny: tuple[Any, LoadedModel], depth: int) -> None:
    """Penalties, a bias and allowed tokens, alone and side by side in one batch."""
    model, loaded = tiny
    free = transformers_says(model)
    allowed = sorted({*free[:2], 3, 5, 8, 13, 21})
    bias = {free[0]: -5.0, free[1]: 2.5, 7: 1.0}
    wanted = [
        free,
        transformers_says(model, openai_penalties(1.5, 0.0)),
        transformers_says(model, openai_penalties(0.0, -0.5)),
        transformers_says(model, SequenceBiasLogitsProcessor({(t,): b for t, b in bias.items()})),
        transformers_says(model, PrefixConstrainedLogitsProcessor(lambda row, ids: allowed, 1)),
        transformers_says(model, RepetitionPenaltyLogitsProcessor(1.3), openai_penalties(0.7, 0.4)),
    ]
    asked = [
        SamplingParams(max_tokens=30, ignore_eos=True, **changed)
        for changed in (
            {},
            {"presence_penalty": 1.5},
            {"frequency_penalty": -0.5},
            {"logit_bias": bias},
            {"allowed_token_ids": allowed},
            {"repetition_penalty": 1.3, "presence_penalty": 0.7, "frequency_penalty": 0.4},
        )
    ]
    engine = engine_on(loaded, depth=depth)
    outputs = [engine.ask(PROMPT, params) for params in asked]
    while engine.has_work:
        engine.step()
    for output, tokens in zip(outputs, wanted, strict=True):
        assert output.outputs[0].token_ids == tokens
    assert len({tuple(tokens) for tokens in wanted}) == len(wanted), "each changes something"
