"""The fused forward is the plain forward: same numbers up to rounding, on every shape of attention (torch twins here, Triton on a GPU)."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from minipaged.config import ModelConfig
from minipaged.kernels.attention import paged_prefill
from minipaged.kernels.cache import write_kv
from minipaged.model.fused import angle_table, fused_forward, fused_logits, rope_write
from minipaged.model.llama import Layer, Llama

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


@pytest.mark.parametrize("flags", [{}, {"qk_norm": True}, {"attention_bias": True}, {"tie_embeddings": True}], ids=str)
def test_fused_equals_plain(flags: dict[str, bool]) -> None:
    config = dataclasses.replace(BASE, **flags)
    model = Llama.random(config, 1, torch.float32, "cpu", std=0.2)
    tokens = torch.randint(0, 97, (12,), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(12)
    shape = (2, 16, config.num_kv_heads, config.head_dim)
    starts, lengths = torch.tensor([0, 12], dtype=torch.int32), torch.tensor([12], dtype=torch.int32)
    tables, scale = torch.tensor([[1]], dtype=torch.int32), config.head_dim**-0.5

    def caches() -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(torch.zeros(shape), torch.zeros(shape)) for _ in range(config.num_layers)]

    plain, fused = caches(), caches()

    def attend_plain(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        write_kv(key, value, *plain[layer], positions + 16)
        return paged_prefill(query, *plain[layer], tables, lengths, starts, 12, scale)

    angles = angle_table(model, 64)

    def attend_fused(layer: Layer, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        cache = fused[layer.index]
        rope_write(layer, query, key, value, (positions, angles, *cache, positions + 16))
        return paged_prefill(query, *cache, tables, lengths, starts, 12, scale)

    with torch.inference_mode():
        expected = model.logits(model(tokens, positions, attend_plain))
        found = fused_logits(model, fused_forward(model, model.embedding[tokens], attend_fused))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-4)
    for (key, value), (other_key, other_value) in zip(plain, fused, strict=True):
        torch.testing.assert_close(other_key, key, atol=2e-5, rtol=2e-4)
        torch.testing.assert_close(other_value, value, atol=2e-5, rtol=2e-4)
