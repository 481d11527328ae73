"""Models that bring sliding windows: the text of transformers, past the window, and blocks that go back where every layer has one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from minipaged.config import SamplingParams
from tests.exactness.comparing import assert_equal, assert_pool_is_empty, engine_on, load_tiny, reference_answer, run
from tests.model import tiny
from tests.model.tiny import heads, save_folder

SIZES = tiny.SIZES | {"vocab_size": 300}

QWEN = {**SIZES, **heads(4, 2), "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 12}
CONFIGS: dict[str, tuple[Any, bool]] = {  # the model, and whether every layer has a window
    "mistral": (transformers.MistralConfig(**SIZES, **heads(4, 2), sliding_window=12), True),
    "phi 3": (transformers.Phi3Config(**SIZES, **heads(4, 2), sliding_window=9), True),
    "qwen 2, all layers": (transformers.Qwen2Config(**QWEN, max_window_layers=0), True),
    "qwen 2, from a layer on": (transformers.Qwen2Config(**QWEN, max_window_layers=2), False),
    "qwen 2, by list": (
        transformers.Qwen2Config(**QWEN, layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
        False,
    ),
    "qwen 3": (transformers.Qwen3Config(**QWEN, head_dim=24, max_window_layers=1), False),
    "smollm 3": (
        transformers.SmolLM3Config(
            **(SIZES | heads(4, 2) | {"num_hidden_layers": 4}), use_sliding_window=True, sliding_window=10
        ),
        False,
    ),
}
MAX_TOKENS = 40
GREEDY = SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_L71_the_text_past_the_window_is_that_of_transformers(name: str, tmp_path: Path) -> None:
    config, windowed = CONFIGS[name]
    model = save_folder(config, tmp_path)
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(3, 97, (n,), generator=generator).tolist() for n in (1, 5, 11, 30, 41)]
    answers = [reference_answer(model, prompt, MAX_TOKENS) for prompt in prompts]
    loaded = load_tiny(tmp_path)
    for arrangement in (
        {"block_size": 4, "max_num_batched_tokens": 7},
        {"block_size": 4, "blocks": 40, "preemption": "swap", "num_host_blocks": 64, "max_num_batched_tokens": 20},
        {"block_size": 16},
    ):
        engine = engine_on(loaded, **arrangement)
        assert (engine.scheduler.manager.retention.window is not None) is windowed
        held = 0
        assert_equal(run(engine, prompts, GREEDY), answers)
        assert_pool_is_empty(engine)
        output = engine.ask(prompts[-1], GREEDY)
        while engine.has_work:
            engine.step()
            held = max(held, engine.scheduler.manager.usage().referenced)
        assert len(output.outputs[0].token_ids) == MAX_TOKENS
        whole = -(-(len(prompts[-1]) + MAX_TOKENS - 1) // arrangement["block_size"])
        assert (held < whole) is windowed
