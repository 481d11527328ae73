"""Keys and queries that are rotated while they are written, as in graphs, equal those rotated before, up to rounding."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from minipaged.config import ModelConfig
from minipaged.execution.paged_kv import PagedKV
from minipaged.execution.step_inputs import inputs_of
from minipaged.model.llama import Layer, Llama, angle_table
from minipaged.model.loading import rope_scaling
from tests.execution.plans import plan_of

BASE = ModelConfig(
    name="tiny",
    vocab_size=97,
    hidden_size=64,
    intermediate_size=80,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position=64,
)


FLAGS: tuple[dict[str, Any], ...] = (
    *({}, {"qk_norm": True}, {"attention_bias": True}, {"tie_embeddings": True}),
    *({"unrotated_layers": (0, 2)}, {"rotary_dim": 12}, {"rope_scaling": rope_scaling.yarn(16, 1e4, 4.0, 32)}),
)


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_rotated_while_written_equals_rotated_before(flags: dict[str, Any]) -> None:
    config = dataclasses.replace(BASE, **flags)
    model = Llama.random(config, 1, torch.float32, "cpu", std=0.2)
    tokens = torch.randint(0, 97, (12,), generator=torch.Generator().manual_seed(0))
    inputs = inputs_of(plan_of([(0, 12)], block_size=16, tables=[[1]]), 16, torch.device("cpu"))
    before, during = PagedKV(config, 2, 16), PagedKV(config, 2, 16)

    def plain(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        before.write(layer, key, value, inputs)
        return before.attend(layer, query, inputs)

    angles = angle_table(model.frequencies, 64)

    def raw(layer: Layer, heads: torch.Tensor) -> torch.Tensor:
        return during.attend(layer.index, during.rope_write(layer, heads, inputs, angles), inputs)

    with torch.inference_mode():
        expected = model.logits(model(tokens, inputs.positions, plain))
        found = model.head(model.run_layers(model.embedding[tokens], raw), norm=model.norm)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-4)
    for name, tensor in before.tensors.items():
        torch.testing.assert_close(during.tensors[name], tensor, atol=2e-5, rtol=2e-4)
        assert tensor[1, :12].any()
