"""The network against transformers, family by family, on tiny random models loaded from folders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from minipaged.config import ModelConfig, RopeScaling
from minipaged.model.llama import Llama, rope_frequencies
from minipaged.model.loading.shapes import shape
from minipaged.model.loading.weights import load_model, open_checkpoint
from tests.model.tiny import (
    CONFIGS,
    dense_attention,
    dense_logits,
    drawn_tokens,
    make_model,
    reference_logits,
    save_folder,
)

CPU = {"dtype": torch.float32, "device": "cpu"}


@pytest.mark.parametrize("family", CONFIGS)
def test_logits_equal_transformers(family: str, tmp_path: Path) -> None:
    reference = save_folder(CONFIGS[family], tmp_path)
    model = load_model(open_checkpoint(tmp_path), **CPU)
    tokens = drawn_tokens(100, 97)
    expected = reference_logits(reference, tokens)
    assert expected.std() > 0.5
    torch.testing.assert_close(dense_logits(model, tokens), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dense_logits(model.pack(), tokens), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gqa", "qwen 3", "llama 3 rope"])
def test_bfloat16_is_as_near_to_float32_as_transformers_is(family: str, tmp_path: Path) -> None:
    reference = save_folder(CONFIGS[family], tmp_path)
    tokens = drawn_tokens(40, 97)
    exact = reference_logits(reference, tokens)
    theirs = reference_logits(reference.to(torch.bfloat16), tokens)
    ours = dense_logits(load_model(open_checkpoint(tmp_path), dtype=torch.bfloat16, device="cpu"), tokens)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours[0], theirs[0], rtol=0.02, atol=0.02)  # one token: attention cannot round
    assert (ours - exact).abs().mean() < 1.2 * (theirs - exact).abs().mean()


def test_shards_and_half_precision_files(tmp_path: Path) -> None:
    make_model(CONFIGS["gqa"]).half().save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = drawn_tokens(30, 97)
    model = load_model(open_checkpoint(tmp_path), **CPU)
    torch.testing.assert_close(dense_logits(model, tokens), reference_logits(reference, tokens), rtol=1e-4, atol=1e-4)


def test_a_token_does_not_see_the_ones_after_it_and_the_step_may_be_cut() -> None:
    """The model keeps nothing between calls: with keys and values kept by the caller, one token at a time is the same."""
    config = shape("toy")
    model = Llama.random(config, 3, torch.float32, "cpu", 0.16)
    tokens = drawn_tokens(20, config.vocab_size)
    kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def attention(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        before = kept.get(layer)
        kept[layer] = (key, value) if before is None else (torch.cat((before[0], key)), torch.cat((before[1], value)))
        group = query.shape[1] // key.shape[1]
        keys, values = (x.repeat_interleave(group, dim=1) for x in kept[layer])
        scores = torch.einsum("qhd,khd->hqk", query, keys) / query.shape[-1] ** 0.5
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)

    rows = [model.logits(model(torch.tensor([t]), torch.tensor([i]), attention)) for i, t in enumerate(tokens)]
    torch.testing.assert_close(torch.cat(rows), dense_logits(model, tokens), rtol=1e-4, atol=1e-4)


def test_positions_are_taken_as_given() -> None:
    """Rotary positions are relative: shifting all of them changes nothing, shifting one token does."""
    config = shape("toy")
    model = Llama.random(config, 3, torch.float32, "cpu", 0.16)
    tokens = torch.tensor(drawn_tokens(12, config.vocab_size))
    plain = model(tokens, torch.arange(12), dense_attention)
    torch.testing.assert_close(model(tokens, torch.arange(12) + 300, dense_attention), plain, rtol=1e-3, atol=1e-3)
    moved = torch.arange(12)
    moved[-1] += 5
    assert (model(tokens, moved, dense_attention)[-1] - plain[-1]).abs().max() > 1e-2


def test_random_models_are_equal_on_a_rerun_and_differ_by_seed() -> None:
    config = shape("toy")
    first, again, other = (Llama.random(config, seed, torch.float32, "cpu") for seed in (1, 1, 2))
    tokens = drawn_tokens(8, config.vocab_size)
    assert torch.equal(dense_logits(first, tokens), dense_logits(again, tokens))
    assert not torch.equal(dense_logits(first, tokens), dense_logits(other, tokens))


def test_a_random_model_has_as_many_parameters_as_its_shape_says() -> None:
    for name in ("toy", "smollm2-135m", "qwen3-0.6b"):
        config = shape(name)
        model = Llama(config, dtype=torch.float32, device="meta")
        counted = sum(parameter.numel() for parameter in model.parameters())
        norms = 2 * config.head_dim * config.num_layers if config.qk_norm else 0
        assert counted == config.num_parameters() + norms


def test_llama_3_scaling_keeps_short_wavelengths_and_stretches_long_ones() -> None:
    plain = rope_frequencies(128, 500000.0, None)
    scaled = rope_frequencies(128, 500000.0, RopeScaling(8.0, 1.0, 4.0, 8192))
    assert torch.equal(scaled[:20], plain[:20])
    torch.testing.assert_close(scaled[-10:], plain[-10:] / 8)
    assert bool((scaled <= plain).all())


def test_slots_cover_every_parameter_exactly_once() -> None:
    config = ModelConfig(
        "all", 50, 16, 24, 2, 4, 2, 8, 64, attention_bias=True, output_bias=True, mlp_bias=True, qk_norm=True
    )
    model = Llama(config, dtype=torch.float32, device="cpu")
    for parameter in model.parameters():
        parameter.zero_()
    for slot in model.slots().values():
        slot += 1
    assert all(bool((parameter == 1).all()) for parameter in model.parameters())
