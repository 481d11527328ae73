"""GGUF: every tensor type against the gguf package, families against transformers, and files that are damaged or not ours."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from minipaged.errors import ModelError, RequestError
from minipaged.model.llama import rope_frequencies
from minipaged.model.loading import zoo
from minipaged.model.loading.gguf_file import GGUFFile
from minipaged.model.loading.weights import load_model, open_checkpoint
from tests.model.tiny import CONFIGS, YARN_ROPE, dense_logits, drawn_tokens, make_model, reference_logits
from tests.model.tiny_gguf import byte_letters, write_gguf

LINEAR_ROPE = {"rope_type": "linear", "factor": 4.0}
YARN = {
    "llama.rope.scaling.type": "yarn",
    "llama.rope.scaling.factor": 4.0,
    "llama.rope.scaling.original_context_length": 64,
}
QUANTIZED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16")
DEQUANTIZED_ONLY = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")


def load(path: Path) -> Any:
    return load_model(open_checkpoint(path), dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def sound() -> Any:
    return make_model(CONFIGS["gqa"])


@pytest.fixture(scope="module")
def whole(sound: Any, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a sound file."""
    path = tmp_path_factory.mktemp("gguf") / "sound.gguf"
    write_gguf(path, sound)
    return path.read_bytes()


def refused(path: Path, *words: str) -> None:
    with pytest.raises(ModelError) as caught:
        load(path)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("name", ["F32", "F16", *QUANTIZED, *DEQUANTIZED_ONLY])
def test_values_equal_the_gguf_package(name: str, tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType[name]
    values = np.random.default_rng(0).normal(size=(6, 512)).astype(np.float32)
    if name in DEQUANTIZED_ONLY:  # the package cannot write these; any bytes are a value (some halves are not numbers)
        shape = gguf.quant_shape_to_byte_shape(values.shape, kind)
        stored = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    else:
        stored = gguf.quantize(values, kind)
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
    writer.add_tensor("x", stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(stored, kind)
        found = GGUFFile(tmp_path / "one.gguf").read("x")
    assert found.shape == (6, 512)
    np.testing.assert_array_equal(found.float().numpy(), expected)


@pytest.mark.parametrize(
    ("family", "architecture"),
    [
        ("mha", "llama"),
        ("gqa", "llama"),
        ("mqa", "llama"),
        ("tied", "llama"),
        ("wide heads", "llama"),
        ("biased", "llama"),
        ("qwen 2.5", "qwen2"),
        ("qwen 3", "qwen3"),
    ],
)
def test_logits_equal_transformers(family: str, architecture: str, tmp_path: Path) -> None:
    reference = make_model(CONFIGS[family])
    write_gguf(tmp_path / "tiny.gguf", reference, architecture)
    tokens = drawn_tokens(60, 97)
    expected = reference_logits(reference, tokens)
    torch.testing.assert_close(dense_logits(load(tmp_path / "tiny.gguf"), tokens), expected, rtol=1e-4, atol=1e-4)


def test_llama_3_rope_is_found_again_from_its_divisors(tmp_path: Path) -> None:
    """GGUF keeps no scaling parameters, only what each frequency is divided by; original context 8192 is all there is."""
    scaled = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    parameters = scaled | {"original_max_position_embeddings": 8192}
    config = type(CONFIGS["wide heads"])(**(CONFIGS["wide heads"].to_dict() | {"rope_parameters": parameters}))
    reference = make_model(config)
    divisors = rope_frequencies(32, 5e5, None) / reference.model.rotary_emb.inv_freq
    write_gguf(tmp_path / "tiny.gguf", reference, tensors={"rope_freqs.weight": divisors.numpy()})
    tokens = drawn_tokens(100, 97)
    model = load(tmp_path / "tiny.gguf")
    assert model.config.rope_scaling.factor == 32.0
    torch.testing.assert_close(dense_logits(model, tokens), reference_logits(reference, tokens), rtol=1e-4, atol=1e-4)
    write_gguf(tmp_path / "odd.gguf", reference, tensors={"rope_freqs.weight": divisors.numpy() ** 2})
    refused(tmp_path / "odd.gguf", "rope_freqs.weight", "Llama 3")


def test_the_zoo_takes_a_file(sound: Any, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", sound)
    loaded = zoo.load(str(tmp_path / "tiny.gguf"), device="cpu")
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("AB!")) == "AB!"
    assert loaded.config.eos_token_ids == loaded.tokenizer.eos_token_ids == (2,)


def test_a_cut_file_is_called_truncated_wherever_it_is_cut(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    lengths = sorted({*range(4, 1200, 7), *range(1200, len(whole), len(whole) // 60), len(whole) - 1})
    for length in lengths:
        path.write_bytes(whole[:length])
        refused(path, "cut.gguf", "truncated")


@pytest.mark.parametrize("start", [b"", b"GG", b"PK\x03\x04 a zip file", b"<html>not found</html>"])
def test_files_that_are_no_gguf(start: bytes, tmp_path: Path) -> None:
    (tmp_path / "other.gguf").write_bytes(start)
    refused(tmp_path / "other.gguf", "not a GGUF file")


def outcome(path: Path) -> str:
    """`loaded`, or the ModelError's text; nothing else may happen."""
    try:
        load(path)
    except ModelError as error:
        return str(error)
    return "loaded"


def test_garbled_bytes_end_in_a_model_error_or_a_model(whole: bytes, tmp_path: Path) -> None:
    """No struct, Unicode, memory or torch error gets out, whatever byte before the weights is changed."""
    path = tmp_path / "garbled.gguf"
    path.write_bytes(whole)
    end = min(info.offset for info in GGUFFile(path).tensors.values())
    rng = random.Random(0)
    seen: list[str] = []
    for _ in range(600):
        spoilt = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            spoilt[rng.randrange(4, end)] = rng.choice((0, 1, 10, 127, 128, 255, rng.randrange(256)))
        path.write_bytes(spoilt)
        seen.append(outcome(path))
    assert not [message for message in seen if "\n" in message]
    assert 100 < sum(message != "loaded" for message in seen) < 600


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"drop": ("llama.block_count",)}, ("llama.block_count", "missing")),
        ({"drop": ("llama.attention.layer_norm_rms_epsilon",)}, ("layer_norm_rms_epsilon", "missing")),
        ({"metadata": {"llama.block_count": "two"}}, ("llama.block_count", "whole number", "'two'")),
        ({"metadata": {"llama.block_count": 3}}, ("model.layers.2", "missing")),
        ({"metadata": {"llama.block_count": 4_000_000_000}}, ("num_layers", "4000000000")),
        ({"metadata": {"llama.feed_forward_length": 81}}, ("mlp.gate_proj", "[80, 48]", "[81, 48]")),
        ({"metadata": {"llama.attention.head_count": 0}}, ("num_heads", "from 1 to")),
        ({"metadata": {"llama.expert_count": 8}}, ("llama.expert_count", "experts")),
        ({"metadata": {"llama.attention.sliding_window": 4096}}, ("sliding_window", "not supported")),
        ({"metadata": {"llama.rope.dimension_count": 4}}, ("rope.dimension_count", "not supported")),
        ({"drop": ("blk.1.ffn_up.weight",)}, ("model.layers.1.mlp.up_proj.weight", "missing")),
        ({"tensors": {"blk.0.attn_q.extra": np.zeros(4, np.float32)}}, ("blk.0.attn_q.extra", "no place")),
        ({"metadata": {"general.alignment": 12}}, ("general.alignment", "power of two")),
    ],
)
def test_sound_files_that_do_not_fit(
    sound: Any, options: dict[str, Any], words: tuple[str, ...], tmp_path: Path
) -> None:
    write_gguf(tmp_path / "odd.gguf", sound, **options)
    refused(tmp_path / "odd.gguf", "odd.gguf", *words)


def test_another_architecture(sound: Any, tmp_path: Path) -> None:
    write_gguf(tmp_path / "odd.gguf", sound, "gemma2")
    refused(tmp_path / "odd.gguf", "'gemma2'", "llama, qwen2, qwen3")


def test_another_version_and_byte_order(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(whole[:4] + (1).to_bytes(4, "little") + whole[8:])
    refused(path, "version 1", "2, 3")
    path.write_bytes(whole[:4] + (3).to_bytes(4, "big") + whole[8:])
    refused(path, "big-endian")


def test_the_reader_leaves_the_file_as_it_is(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "sound.gguf"
    path.write_bytes(whole)
    values = GGUFFile(path).read("output_norm.weight")
    values += 1
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("metadata", "rope"),
    [
        ({"llama.rope.scale_linear": 4.0}, LINEAR_ROPE),
        ({"llama.rope.scaling.factor": 4.0, "llama.rope.scale_linear": 9.0}, LINEAR_ROPE),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, LINEAR_ROPE),
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, {"rope_type": "default"}),
        (YARN, YARN_ROPE),
        (YARN | {"llama.rope.scaling.yarn_beta_fast": 8.0}, YARN_ROPE | {"beta_fast": 8.0}),
    ],
)
def test_rope_scaling_by_metadata(metadata: dict[str, Any], rope: dict[str, Any], tmp_path: Path) -> None:
    """A file by llama.cpp's keys computes what transformers does by its own for the same stretch."""
    values = CONFIGS["gqa"].to_dict() | {"head_dim": 16, "rope_parameters": rope | {"rope_theta": 10000.0}}
    reference = make_model(type(CONFIGS["gqa"])(**values))
    write_gguf(tmp_path / "tiny.gguf", reference, metadata=metadata)
    tokens = drawn_tokens(100, 97)
    expected = reference_logits(reference, tokens)
    torch.testing.assert_close(dense_logits(load(tmp_path / "tiny.gguf"), tokens), expected, rtol=1e-4, atol=1e-4)


def end_tokens_of(path: Path) -> tuple[int, ...]:
    return open_checkpoint(path).config.eos_token_ids


def test_ends_are_found_by_key_and_by_text(sound: Any, tmp_path: Path) -> None:
    """As in llama.cpp: a file need not name its end-of-turn token."""
    path = tmp_path / "ends.gguf"
    letters = byte_letters()[:90]
    for texts, ends in {
        ("<|eot_id|>",): (2, 90),
        ("<|end_of_text|>", "<|eom_id|>"): (2, 90, 91),
        ("<|start_header_id|>",): (2,),
    }.items():
        kinds = [1] * 90 + [3] * len(texts)
        metadata = {"tokenizer.ggml.tokens": [*letters, *texts], "tokenizer.ggml.token_type": kinds}
        write_gguf(path, sound, metadata=metadata, drop=("tokenizer.ggml.merges",))
        assert end_tokens_of(path) == ends
    write_gguf(path, sound, metadata={"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.fim_sep_token_id": 6})
    assert end_tokens_of(path) == (2, 5, 6)
    write_gguf(path, sound, metadata={"tokenizer.ggml.eot_token_id": 500})
    refused(path, "eot_token_id 500", "97 tokens")


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"llama.rope.scaling.type": "longrope"}, ("longrope",)),
        ({"llama.rope.scale_linear": -4.0}, ("divisor", "above 0")),
        (YARN | {"llama.rope.scaling.attn_factor": 0.5}, ("rope.scaling.attn_factor",)),
        (YARN | {"llama.rope.scaling.yarn_beta_slow": 90.0}, ("beta_fast (32)", "beta_slow (90)")),
        ({"split.count": 3, "split.no": 0}, ("split in 3", "llama-gguf-split")),
        ({"llama.attention.causal": False}, ("attention.causal", "later tokens")),
        ({"llama.logit_scale": 0.5}, ("llama.logit_scale 0.5",)),
        ({"llama.attention.clamp_kqv": 8.0}, ("attention.clamp_kqv",)),
        ({"llama.use_parallel_residual": True}, ("use_parallel_residual",)),
        ({"general.type": "adapter"}, ("general.type 'adapter'",)),
        ({"tokenizer.ggml.remove_extra_whitespaces": True}, ("remove_extra_whitespaces",)),
    ],
)
def test_metadata_that_would_change_the_numbers_is_refused(
    sound: Any, metadata: dict[str, Any], words: tuple[str, ...], tmp_path: Path
) -> None:
    write_gguf(tmp_path / "odd.gguf", sound, metadata=metadata)
    refused(tmp_path / "odd.gguf", *words)


def test_metadata_that_asks_for_nothing_is_fine(sound: Any, tmp_path: Path) -> None:
    harmless = {
        "llama.rope.scale_linear": 1.0, "llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 8.0,
        "split.count": 1, "llama.attention.causal": True, "llama.expert_count": 0, "general.type": "model",
        "llama.rope.scaling.finetuned": True, "llama.tensor_data_layout": "Meta AI original pth",
    }  # fmt: skip
    write_gguf(tmp_path / "fine.gguf", sound, metadata=harmless)
    assert open_checkpoint(tmp_path / "fine.gguf").config.rope_scaling is None


def test_a_file_without_a_tokenizer_runs_on_token_ids(sound: Any, tmp_path: Path) -> None:
    path = tmp_path / "ids.gguf"
    write_gguf(path, sound, metadata={"tokenizer.ggml.model": "no_vocab"}, drop=("tokenizer.ggml.tokens",))
    tokenizer = zoo.load(str(path), device="cpu").tokenizer
    assert tokenizer.vocab_size == 97
    with pytest.raises(RequestError, match=r"ids\.gguf: holds no tokenizer; give the prompt as token ids"):
        tokenizer.encode("hello")
