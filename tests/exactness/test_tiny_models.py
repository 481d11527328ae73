"""Randomly initialised tiny Llamas against transformers, over the shapes of attention and the ways memory can be arranged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from minipaged.config import SamplingParams
from minipaged.model.loading.zoo import LoadedModel
from tests.exactness.comparing import (
    Answer,
    assert_equal,
    assert_pool_is_empty,
    engine_on,
    load_tiny,
    reference_answer,
    run,
)

SHAPES: dict[str, dict[str, Any]] = {
    "mha": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "gqa": {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 96},
    "mqa": {"num_attention_heads": 4, "num_key_value_heads": 1},
    "tied": {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "llama3-rope": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
}
MAX_TOKENS = 24
GREEDY = SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True)


def tiny_llama(folder: Path, overrides: dict[str, Any]) -> Any:
    """A random Llama, saved to `folder`, and transformers' model of it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
    }
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **overrides})).eval()
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module", params=SHAPES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny_llama(folder, SHAPES[request.param])
    loaded = load_tiny(folder)
    generator = torch.Generator().manual_seed(5)
    lengths = [1, 3, 9, 17, 30, 41]
    prompts = [torch.randint(0, 131, (n,), generator=generator).tolist() for n in lengths]
    return loaded, prompts, [reference_answer(model, prompt, MAX_TOKENS) for prompt in prompts]


@pytest.mark.parametrize(
    "arrangement",
    [
        {"block_size": 1, "blocks": 500},
        {"block_size": 4, "blocks": 30, "preemption": "recompute"},
        {"block_size": 4, "blocks": 30, "preemption": "swap", "num_host_blocks": 64},
        {"block_size": 16, "max_num_batched_tokens": 7},
        {"block_size": 64, "enable_prefix_caching": False, "max_num_seqs": 3},
    ],
    ids=["blocks-of-1", "recompute", "swap", "chunks-of-7", "blocks-of-64"],
)
def test_equals_transformers(
    case: tuple[LoadedModel, list[list[int]], list[Answer]], arrangement: dict[str, Any]
) -> None:
    loaded, prompts, answers = case
    engine = engine_on(loaded, **arrangement)
    assert_equal(run(engine, prompts, GREEDY), answers)
    assert_pool_is_empty(engine)
    if arrangement.get("blocks") == 30:
        assert engine.scheduler.counters.preemptions > 0
