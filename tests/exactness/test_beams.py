"""Beam search against transformers' beam search, and against itself under every arrangement of memory (L19)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from minipaged.config import SamplingParams
from minipaged.model.loading import zoo
from minipaged.model.loading.pull import cached_path
from minipaged.model.loading.zoo import LoadedModel
from tests.exactness.comparing import assert_pool_is_empty, engine_on, load_tiny, run
from tests.exactness.test_tiny_models import SHAPES, tiny_llama

EOS = 7


def reference_beams(
    model: Any, prompt: list[int], width: int, max_tokens: int, *, penalty: float, early: bool, eos: int | None
) -> tuple[list[list[int]], list[float]]:
    """transformers' beams, best first, each cut after its end-of-sequence token, and their scores."""
    done = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        do_sample=False,
        num_beams=width,
        num_return_sequences=width,
        max_new_tokens=max_tokens,
        length_penalty=penalty,
        early_stopping=early,
        repetition_penalty=1.0,
        eos_token_id=eos,
        pad_token_id=0 if eos is None else eos,
        output_scores=True,
        return_dict_in_generate=True,
    )
    rows = done.sequences[:, len(prompt) :].tolist()
    beams = [row[: row.index(eos) + 1] if eos in row else row for row in rows]
    return beams, done.sequences_scores.tolist()


def assert_beams(output: Any, beams: list[list[int]], scores: list[float], penalty: float) -> None:
    """Equal beams in equal order, except that beams whose scores differ by less than the margin may change places."""
    found = [(o.token_ids, o.cumulative_logprob / len(o.token_ids) ** penalty) for o in output.outputs]
    assert len(found) == len(beams)
    for (tokens, score), expected, its_score in zip(found, beams, scores, strict=True):
        assert score == pytest.approx(its_score, abs=2e-3)
        close = [b for b, s in zip(beams, scores, strict=True) if abs(s - its_score) < 1e-3]
        assert tokens in close, f"{tokens} instead of {expected}"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, LoadedModel]:
    folder: Path = tmp_path_factory.mktemp("beams")
    model = tiny_llama(folder, {**SHAPES["gqa"], "initializer_range": 0.15})
    return model, load_tiny(folder)


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("early", [False, True])
def test_tiny_model(tiny: tuple[Any, LoadedModel], width: int, penalty: float, early: bool) -> None:
    model, loaded = tiny
    generator = torch.Generator().manual_seed(width)
    for length in (2, 5, 11):
        prompt = torch.randint(0, 131, (length,), generator=generator).tolist()
        # a common token as the end, so that hypotheses end early
        beams, scores = reference_beams(model, prompt, width, 12, penalty=penalty, early=early, eos=EOS)
        params = SamplingParams(
            beam_width=width,
            n=width,
            max_tokens=12,
            length_penalty=penalty,
            early_stopping=early,
            stop_token_ids=(EOS,),
        )
        engine = engine_on(loaded, block_size=4)
        assert_beams(run(engine, [prompt], params)[0], beams, scores, penalty)
        assert_pool_is_empty(engine)


@pytest.mark.parametrize(
    "arrangement",
    [
        {"block_size": 1, "blocks": 300},
        {"block_size": 4, "blocks": 30, "preemption": "recompute"},
        {"block_size": 4, "blocks": 30, "preemption": "swap", "num_host_blocks": 100},
        {"block_size": 4, "enable_prefix_caching": False},
    ],
    ids=["no-sharing-within-blocks", "recompute", "swap", "no-cache"],
)
def test_L19_beams_do_not_depend_on_memory(tiny: tuple[Any, LoadedModel], arrangement: dict[str, Any]) -> None:
    """Beam output is the same with sharing on, with sharing off, and after preemption."""
    _, loaded = tiny
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(0, 131, (n,), generator=generator).tolist() for n in (6, 13, 20)]
    params = SamplingParams(beam_width=3, n=3, max_tokens=16, ignore_eos=True)
    alone = [run(engine_on(loaded, block_size=16), [prompt], params)[0] for prompt in prompts]
    engine = engine_on(loaded, **arrangement)
    together = run(engine, prompts, params)
    assert [[o.token_ids for o in out.outputs] for out in together] == [
        [o.token_ids for o in out.outputs] for out in alone
    ]
    if arrangement.get("blocks") == 30:
        assert engine.scheduler.counters.preemptions > 0
    assert_pool_is_empty(engine)


SMOLLM2_PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a library that never closed,",
    "Water boils at 100 degrees because",
    "def fibonacci(n):\n    ",
    "A short list of prime numbers: 2, 3, 5,",
]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_smollm2_beams_equal_transformers() -> None:
    from transformers import AutoModelForCausalLM

    loaded = zoo.load("smollm2-135m", device="cpu", dtype=torch.float32)
    path = cached_path("smollm2-135m")
    model: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    eos = loaded.config.eos_token_ids[0]
    for text in SMOLLM2_PROMPTS:
        prompt = loaded.tokenizer.encode(text)
        for width in (2, 4):
            beams, scores = reference_beams(model, prompt, width, 24, penalty=1.0, early=False, eos=eos)
            params = SamplingParams(beam_width=width, n=width, max_tokens=24)
            engine = engine_on(loaded)
            assert_beams(run(engine, [prompt], params)[0], beams, scores, 1.0)
            assert_pool_is_empty(engine)
