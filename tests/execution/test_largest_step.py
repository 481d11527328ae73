"""The pool leaves room for the largest step: the plan that is measured, the size that follows, and a GPU at full load."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch

from minipaged.api import LLM
from minipaged.assembly import build_runner, can_capture, choose_num_blocks
from minipaged.config import CacheConfig, EngineConfig, SamplingParams
from minipaged.errors import InputError
from minipaged.execution import eager
from minipaged.execution.largest_step import largest_step
from minipaged.kernels import dispatch
from minipaged.kernels.sampling import truncate
from minipaged.model.loading import zoo
from minipaged.model.loading.shapes import shape

GIB = 2**30


@pytest.mark.parametrize(
    ("sequences", "tokens", "context", "expected"),
    [
        (256, 8192, 2048, (256, 8192, 32)),
        (300, 64, 2048, (64, 64, 1)),
        (3, 1000, 50, (3, 150, 50)),
        (3, 10, 50, (3, 10, 4)),
    ],
)
def test_the_largest_step_is_as_large_as_the_limits_allow(
    sequences: int, tokens: int, context: int, expected: tuple[int, int, int]
) -> None:
    plan = largest_step(EngineConfig(max_num_seqs=sequences, max_num_batched_tokens=tokens, max_model_len=context))
    rows, computed, longest = expected
    assert (len(plan.draw_rows), plan.num_tokens, plan.lengths.max()) == expected
    assert plan.lengths.sum() == computed
    assert not plan.tables.any()
    assert plan.tables.shape == (rows, longest)


@pytest.mark.parametrize("block_size", [1, 16])
def test_it_runs_over_a_pool_of_two_blocks(block_size: int) -> None:
    config = EngineConfig(max_num_seqs=5, max_num_batched_tokens=33, max_model_len=20)
    cache = CacheConfig(num_blocks=2, block_size=block_size)
    loaded = zoo.load("toy", device="cpu", dtype=torch.float32)
    runner = build_runner(loaded, cache, config, device=torch.device("cpu"), dtype="float32")
    drawn = runner.launch(largest_step(config)).tokens()
    assert drawn.token_ids.shape == (5,)
    assert drawn.logprobs is not None
    assert np.isfinite(drawn.logprobs).all()


def test_the_pool_is_what_the_step_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * GIB, 80 * GIB))
    config, device = shape("llama-7b"), torch.device("cuda")
    block = 2 * 32 * 32 * 128 * 2 * 16
    assert choose_num_blocks(config, 16, "bfloat16", device) == 9 * GIB // block
    assert choose_num_blocks(config, 16, "bfloat16", device, 3 * GIB) == 6 * GIB // block
    with pytest.raises(
        InputError, match=r"beside 9,663,676,416 that the largest step takes: lower max_num_batched_tokens"
    ):
        choose_num_blocks(config, 16, "bfloat16", device, 9 * GIB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (GIB // 100, 80 * GIB))
    with pytest.raises(InputError, match=r"left for the pool: lower block_size \(now 16\), or free memory"):
        choose_num_blocks(config, 16, "bfloat16", device)


@pytest.mark.parametrize(
    ("on_gpu", "installed", "choice", "captured"),
    [
        (True, True, "", True),
        (True, True, "triton", True),
        (True, True, "torch", False),
        (True, False, "", False),
        (False, True, "", False),
        (False, True, "triton", False),
    ],
)
def test_graphs_hold_triton_kernels_only(
    on_gpu: bool, installed: bool, choice: str, captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twins read lengths on the host, which a capture refuses: on a GPU without Triton the engine launches kernel by kernel."""
    monkeypatch.setattr(dispatch, "triton_installed", lambda: installed)
    monkeypatch.setattr(dispatch, "triton_interpreted", lambda: True)
    monkeypatch.setattr(dispatch, "_warn_of_missing_triton", lambda: None)
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, choice)
    cache = cast(torch.Tensor, SimpleNamespace(is_cuda=on_gpu, is_meta=False, device="cuda:0" if on_gpu else "cpu"))
    assert can_capture(cache) is captured


def test_parts_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Truncated draws and prompt log-probabilities are computed some rows at a time: how many changes nothing."""
    answers = []
    for rows in (1, 3, 1000):
        monkeypatch.setattr(truncate, "SORTED_ROWS", rows)
        monkeypatch.setattr(eager, "PROMPT_ROWS", rows)
        llm = LLM("toy", device="cpu", num_blocks=60, block_size=4)
        outputs = llm.generate(
            [{"prompt_token_ids": [97 + i] * (3 + i)} for i in range(7)],
            SamplingParams(
                max_tokens=5, temperature=0.9, top_p=0.8, top_k=9, seed=1, prompt_logprobs=2, ignore_eos=True
            ),
        )
        answers.append(
            [
                (o.outputs[0].token_ids, [None if e is None else sorted(e) for e in o.prompt_logprobs or []])
                for o in outputs
            ]
        )
    assert answers[0] == answers[1] == answers[2]
    assert len(answers[0][6][1]) == 9


@pytest.fixture
def small_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU of which 14 GiB are free: torch's allocator refuses more, and says so. Other processes may use the rest meanwhile."""
    gc.collect()
    torch.cuda.empty_cache()
    total, limit = torch.cuda.mem_get_info()[1], 14 * GIB
    torch.cuda.set_per_process_memory_fraction(limit / total)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (limit - torch.cuda.memory_reserved(), limit))
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.gpu
@pytest.mark.usefixtures("small_gpu")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_small_gpu_at_full_load_never_runs_out_of_memory() -> None:
    """Requests want more blocks than the pool has, in steps of 8,192 tokens, with every kind of draw over a vocabulary of 151,936,
    log-probabilities of whole prompts, and a graph for every bucket."""
    llm = LLM(
        "random:qwen3-0.6b",
        max_num_batched_tokens=8192,
        max_num_seqs=256,
        max_model_len=4096,
        enable_prefix_caching=False,
    )
    blocks = llm.engine.runner.num_blocks()
    generator = torch.Generator().manual_seed(0)
    prompts, asked = [], []
    for i in range(300):
        length = 2000 if i % 60 == 0 else 400
        prompts.append({"prompt_token_ids": torch.randint(5, 9000, (length,), generator=generator).tolist()})
        kind = [{}, {"temperature": 0.8}, {"temperature": 0.8, "top_p": 0.9, "top_k": 50}, {"logprobs": 5}][i % 4]
        extra = {"prompt_logprobs": 3} if i % 60 == 0 else {}
        asked.append(SamplingParams(max_tokens=40 + i % 60, ignore_eos=True, **kind, **extra))  # type: ignore[arg-type]
    wanted = sum(
        -(-(len(p["prompt_token_ids"]) + a.max_tokens) // 16) for p, a in zip(prompts[:256], asked, strict=False)
    )
    assert wanted > blocks, "the load must be larger than the pool"
    outputs = llm.generate(prompts, asked)
    assert all(len(o.outputs[0].token_ids) == a.max_tokens for o, a in zip(outputs, asked, strict=True))
    assert llm.engine.scheduler.counters.preemptions > 0
    plain = llm.generate(prompts[:200], [SamplingParams(max_tokens=1 + i, ignore_eos=True) for i in range(200)])
    assert [len(o.outputs[0].token_ids) for o in plain] == [1 + i for i in range(200)]
    assert torch.cuda.max_memory_reserved() <= 14 * GIB
