"""The network against transformers, family by family, on tiny random models loaded from folders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from minipaged import LLM, SamplingParams
from minipaged.config import ModelConfig, RopeDivisors, RopeScaling
from minipaged.errors import InputError, ModelError
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


@pytest.mark.parametrize(
    "family",
    [
        "granite",
        "smollm 3",
        "smollm 3 by list",
        "seed-oss",
        "phi 3",
        "phi 4 mini",
        "linear rope",
        "yarn",
        "qwen 3 yarn",
    ],
)
def test_greedy_tokens_through_the_engine_equal_transformers(family: str, tmp_path: Path) -> None:
    reference = save_folder(CONFIGS[family], tmp_path)
    prompt = drawn_tokens(40, 97)
    expected = list(prompt)
    for _ in range(24):
        expected.append(int(reference_logits(reference, expected)[-1].argmax()))
    llm = LLM(str(tmp_path), device="cpu", dtype="float32", block_size=4, num_blocks=64)
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    assert list(llm.generate({"prompt_token_ids": prompt}, params)[0].outputs[0].token_ids) == expected[40:]


def test_dimensions_that_do_not_turn_have_the_frequency_zero() -> None:
    frequencies = rope_frequencies(16, 10000.0, None, rotary_dim=12)
    torch.testing.assert_close(frequencies[:6], rope_frequencies(12, 10000.0, None))
    assert frequencies[6:].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"rotary_dim": 7}, "rotary_dim must be even"),
        ({"rotary_dim": 20}, "rotary_dim must be from 2 to 16"),
        ({"unrotated_layers": (2,)}, "unrotated_layers must be from 0 to 1"),
        ({"rope_scaling": RopeDivisors((2.0,))}, "1 divisors for 8 frequencies"),
        ({"residual_multiplier": 0.0}, "residual_multiplier must be above 0"),
    ],
)
def test_shapes_that_cannot_be(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(InputError, match=word):
        replace(shape("toy"), **changes)


def test_a_context_cut_to_longropes_short_factors_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_folder(CONFIGS["phi 4 mini"], tmp_path)
    assert open_checkpoint(tmp_path).config.max_position == 256
    assert "the context is 256 of 512 tokens" in caplog.text


def test_fused_weights_of_another_size_are_refused(tmp_path: Path) -> None:
    save_folder(CONFIGS["phi 3"], tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.self_attn.qkv_proj.weight"
    save_file(tensors | {name: tensors[name][:-1].contiguous()}, path)
    with pytest.raises(ModelError, match=rf"{name} has the shape \[95, 48\], but the config asks for 96 rows"):
        open_checkpoint(tmp_path)
    save_file(tensors | {"model.layers.0.self_attn.q_proj.weight": torch.zeros(48, 48)}, path)
    with pytest.raises(ModelError, match=r"q_proj\.weight is stored by itself and inside"):
        open_checkpoint(tmp_path)
