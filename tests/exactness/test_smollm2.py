"""The default model, float32 on the CPU: whatever the schedule and the memory do, the text is that of transformers' generate."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from minipaged.config import SamplingParams
from minipaged.model.loading import zoo
from minipaged.model.loading.pull import cached_path
from minipaged.model.loading.zoo import LoadedModel
from tests.exactness.comparing import Answer, assert_equal, assert_pool_is_empty, engine_on, reference_answer, run

PROMPTS = [
    "The cache is split into pages, so",
    "Once upon a time, in a library that never closed,",
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "A short list of prime numbers: 2, 3, 5,",
    "Dear neighbour, about the noise last night:",
    "Water boils at 100 degrees because",
    "To be, or not to be, that is the question:",
]
MAX_TOKENS = 64
GREEDY = SamplingParams(max_tokens=MAX_TOKENS)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return zoo.load("smollm2-135m", device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def prompts(loaded: LoadedModel) -> list[list[int]]:
    return [loaded.tokenizer.encode(text) for text in PROMPTS]


@pytest.fixture(scope="module")
def answers(loaded: LoadedModel, prompts: list[list[int]]) -> list[Answer]:
    from transformers import AutoModelForCausalLM

    path = cached_path("smollm2-135m")
    model: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    return [reference_answer(model, prompt, MAX_TOKENS, loaded.config.eos_token_ids) for prompt in prompts]


@pytest.mark.parametrize("block_size", [1, 4, 16, 64])
def test_batch_equals_transformers(
    loaded: LoadedModel, prompts: list[list[int]], answers: list[Answer], block_size: int
) -> None:
    engine = engine_on(loaded, blocks=1200 // block_size + 20, block_size=block_size)
    cut = assert_equal(run(engine, prompts, GREEDY), answers)
    print(f"block size {block_size}: {cut} of {len(answers)} comparisons cut short by the margin")
    assert_pool_is_empty(engine)


def test_a_pool_that_runs_dry_changes_nothing(
    loaded: LoadedModel, prompts: list[list[int]], answers: list[Answer]
) -> None:
    engine = engine_on(loaded, blocks=60, block_size=4, preemption="recompute")
    assert_equal(run(engine, prompts, GREEDY), answers)
    assert engine.scheduler.counters.preemptions > 0
    assert_pool_is_empty(engine)


def test_swapping_changes_nothing(loaded: LoadedModel, prompts: list[list[int]], answers: list[Answer]) -> None:
    engine = engine_on(loaded, blocks=60, block_size=4, preemption="swap", num_host_blocks=200)
    assert_equal(run(engine, prompts, GREEDY), answers)
    assert engine.scheduler.counters.swaps > 0
    assert_pool_is_empty(engine)


def test_chunked_prompts_change_nothing(loaded: LoadedModel, prompts: list[list[int]], answers: list[Answer]) -> None:
    engine = engine_on(loaded, max_num_batched_tokens=7)
    assert_equal(run(engine, prompts, GREEDY), answers)


@pytest.mark.parametrize("caching", [True, False])
def test_the_prefix_cache_changes_nothing(
    loaded: LoadedModel, prompts: list[list[int]], answers: list[Answer], caching: bool
) -> None:
    engine = engine_on(loaded, block_size=4, enable_prefix_caching=caching)
    run(engine, prompts, SamplingParams(max_tokens=8))
    assert_equal(run(engine, prompts, GREEDY), answers)
    assert (engine.scheduler.counters.hit_tokens > 0) is caching


def test_seeded_samples_differ_and_repeat(loaded: LoadedModel, prompts: list[list[int]]) -> None:
    params = SamplingParams(n=4, temperature=0.9, top_p=0.95, seed=11, max_tokens=24)
    runs = []
    for _ in range(2):
        engine = engine_on(loaded)
        runs.append([o.token_ids for out in run(engine, prompts[:2], params) for o in out.outputs])
        assert engine.scheduler.counters.copies > 0
        assert_pool_is_empty(engine)
    assert runs[0] == runs[1]
    assert len({tuple(tokens) for tokens in runs[0][:4]}) == 4


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_L55_sixteen_requests_under_every_schedule(loaded: LoadedModel) -> None:
    """The same 16 requests alone, batched, chunked, preempted by recompute and by swap, with the cache on and off: identical text."""
    texts = [
        f"{beginning} {ending}" for beginning in PROMPTS[:4] for ending in ("First,", "Then", "However,", "In the end,")
    ]
    prompts = [loaded.tokenizer.encode(text) for text in texts]
    asked = [
        SamplingParams(max_tokens=32) if i % 2 else SamplingParams(max_tokens=32, temperature=0.8, top_p=0.9, seed=i)
        for i in range(len(prompts))
    ]

    def drawn(**arrangement: Any) -> list[list[int]]:
        engine = engine_on(loaded, **arrangement)
        outputs = [engine.ask(prompt, params) for prompt, params in zip(prompts, asked, strict=True)]
        while engine.has_work:
            engine.step()
        assert_pool_is_empty(engine)
        if arrangement.get("blocks", 400) < 100:
            assert engine.scheduler.counters.preemptions > 0
        return [output.outputs[0].token_ids for output in outputs]

    alone = []
    for prompt, params in zip(prompts, asked, strict=True):
        alone.append(run(engine_on(loaded), [prompt], params)[0].outputs[0].token_ids)
    assert drawn() == alone
    assert drawn(max_num_batched_tokens=7) == alone
    assert drawn(blocks=60, block_size=4, preemption="recompute") == alone
    assert drawn(blocks=60, block_size=4, preemption="swap", num_host_blocks=300) == alone
    assert drawn(blocks=24, block_size=4, max_num_batched_tokens=16) == alone
    assert drawn(enable_prefix_caching=False) == alone
    assert drawn(max_num_seqs=3, block_size=1, blocks=600) == alone
    assert drawn(depth=1) == alone
