"""Every defect of a Hugging Face folder is one line that names the file or field and what would work."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minipaged.errors import ModelError
from minipaged.model.loading.hf_config import read_config
from minipaged.model.loading.weights import load_model, open_checkpoint
from tests.model.tiny import CONFIGS, LLAMA_3_ROPE, save_folder

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound folder, to be spoilt."""
    save_folder(CONFIGS["gqa"], tmp_path)
    return tmp_path


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A sound folder whose weights are in several files."""
    save_folder(CONFIGS["gqa"], tmp_path, max_shard_size="20KB")
    return tmp_path


def load(path: Path) -> None:
    load_model(open_checkpoint(path), dtype=torch.float32, device="cpu")


def refused(path: Path, *words: str) -> None:
    """Loading `path` raises a ModelError of one line that holds all `words`."""
    with pytest.raises(ModelError) as caught:
        load(path)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def edit_config(folder: Path, **fields: Any) -> None:
    """Change fields of config.json, which then speaks alone; None removes one."""
    (folder / "generation_config.json").unlink(missing_ok=True)
    path = folder / "config.json"
    values = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_a_sound_folder_loads(folder: Path) -> None:
    load(folder)


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    refused(folder, "config.json", "no such file")


@pytest.mark.parametrize(
    "text", [b"", b"{", b"not json", b"\xff\xfe\x00", b"[" * 100_000], ids=["empty", "cut", "words", "binary", "deep"]
)
def test_config_that_is_not_json(folder: Path, text: bytes) -> None:
    (folder / "config.json").write_bytes(text)
    refused(folder, "config.json", "not JSON")


def test_config_that_is_no_object(folder: Path) -> None:
    (folder / "config.json").write_text("[1, 2]")
    refused(folder, "config.json", "object", "list")


@pytest.mark.parametrize(
    "field",
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "rms_norm_eps",
    ],
)
def test_config_that_lacks_a_field(folder: Path, field: str) -> None:
    edit_config(folder, **{field: None})
    refused(folder, "config.json", field, "missing")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"hidden_size": "48"}, ("hidden_size", "whole number", "'48'")),
        ({"hidden_size": 48.0}, ("hidden_size", "whole number")),
        ({"num_hidden_layers": 0}, ("num_hidden_layers", "at least 1", "0")),
        ({"num_attention_heads": True}, ("num_attention_heads", "whole number")),
        ({"num_key_value_heads": 4}, ("num_kv_heads", "multiple", "6")),
        ({"rms_norm_eps": -1}, ("rms_norm_eps", "above 0")),
        ({"tie_word_embeddings": "no"}, ("tie_word_embeddings", "true or false")),
        ({"head_dim": 7}, ("head_dim", "even", "7")),
        ({"eos_token_id": "end"}, ("eos_token_id", "token id")),
        (
            {"model_type": "gpt2"},
            ("model_type 'gpt2'", "llama, mistral, qwen2, qwen3, granite, smollm3, seed_oss, phi3"),
        ),
        ({"model_type": None}, ("model_type", "llama, mistral, qwen2, qwen3, granite")),
        ({"hidden_act": "gelu"}, ("hidden_act 'gelu'", "silu")),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, ("bitsandbytes", "awq and gptq", "GGUF")),
        ({"rope_parameters": {"rope_type": "proportional", "factor": 4}}, ("'proportional'", "yarn", "llama3")),
        ({"rope_parameters": {"rope_type": "yarn"}}, ("factor", "missing")),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4, "beta_slow": 64}}, ("YaRN", "beta_fast (32)")),
        (
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1, 2]}},
            ("rope scaling has 2 divisors for 4",),
        ),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": "2"}}, ("factor", "'2'")),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, ("no_rope_layers", "each of 2 layers")),
        ({"model_type": "granite", "residual_multiplier": 0}, ("residual_multiplier", "above 0")),
        ({"model_type": "phi3", "sliding_window": 0}, ("sliding_window", "at least 1", "0")),
        ({"model_type": "phi3", "partial_rotary_factor": 0.4}, ("rotary_dim", "even")),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8}}, ("llama3", "low_freq_factor")),
        ({"rope_parameters": LLAMA_3_ROPE | {"high_freq_factor": 1.0}}, ("high_freq_factor", "low_freq_factor")),
        ({"rope_parameters": [1]}, ("rope_parameters", "object")),
        ({"model_type": "mistral", "sliding_window": "256"}, ("sliding_window", "whole number", "'256'")),
        ({"model_type": "mistral", "num_key_value_heads": None}, ("num_key_value_heads", "missing")),
        ({"model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"]}, ("sliding",)),
        ({"model_type": "llama", "use_sliding_window": True}, ("use_sliding_window", "llama does not have")),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 2}, ("layer_types", "use_sliding_window")),
        (
            {"model_type": "qwen2", "layer_types": ["full_attention"], "use_sliding_window": True},
            ("layer_types", "2 layers"),
        ),
        ({"model_type": "qwen2", "layer_types": ["chunked_attention"] * 2}, ("layer_types", "'chunked_attention'")),
        ({"model_type": "qwen3", "use_sliding_window": True, "max_window_layers": -1}, ("max_window_layers", "-1")),
    ],
)
def test_config_with_a_field_that_cannot_be(folder: Path, fields: dict[str, Any], words: tuple[str, ...]) -> None:
    edit_config(folder, **fields)
    refused(folder, "config.json", *words)


def test_old_spelling_of_rope(folder: Path) -> None:
    """transformers 4: rope_theta and rope_scaling beside the other fields."""
    scaling = {key: value for key, value in LLAMA_3_ROPE.items() if key != "rope_theta"}
    edit_config(folder, rope_parameters=None, rope_theta=20000.0, rope_scaling=scaling)
    config = read_config(folder)
    assert config.rope_theta == 20000.0
    assert config.rope_scaling is not None
    assert config.rope_scaling.original_max_position == 64


def test_generation_config_has_the_last_word_on_the_end(folder: Path) -> None:
    edit_config(folder, eos_token_id=[2, 3])
    assert read_config(folder).eos_token_ids == (2, 3)
    (folder / "generation_config.json").write_text('{"eos_token_id": [4, 5]}')
    assert read_config(folder).eos_token_ids == (4, 5)


def test_truncated_safetensors(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for length in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(folder, "model.safetensors", "not a whole safetensors file")


def test_safetensors_with_a_garbled_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:8] + b"!" * 2000)
    refused(folder, "model.safetensors", "not a whole safetensors file")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickle_checkpoints_are_refused_unopened(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)
    refused(folder, name, "pickle", "safetensors")
    refused(folder / name, name, "pickle", "safetensors")


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(folder, "no *.safetensors")


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere", "no such file or folder")


def test_a_safetensors_file_by_itself(folder: Path) -> None:
    refused(folder / "model.safetensors", "folder", "config.json")


def test_a_missing_tensor(folder: Path) -> None:
    def remove(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.1.mlp.up_proj.weight"]

    edit_tensors(folder, remove)
    refused(folder, "model.layers.1.mlp.up_proj.weight", "missing", "[80, 48]")


def test_a_tensor_of_another_shape(folder: Path) -> None:
    def cut(tensors: dict[str, torch.Tensor]) -> None:
        name = "model.layers.0.self_attn.q_proj.weight"
        tensors[name] = tensors[name][:-2].contiguous()

    edit_tensors(folder, cut)
    refused(folder, "model.layers.0.self_attn.q_proj.weight", "[46, 48]", "[48, 48]")


def test_a_tensor_that_nothing_would_use(folder: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(48)

    edit_tensors(folder, add)
    refused(folder, "model.layers.0.self_attn.q_proj.bias", "no place")


def test_old_rotary_tables_and_a_second_copy_of_tied_embeddings_are_fine(tmp_path: Path) -> None:
    save_folder(CONFIGS["tied"], tmp_path)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(6)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit_tensors(tmp_path, add)
    load(tmp_path)


def test_a_tensor_of_whole_numbers(folder: Path) -> None:
    def round_off(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)

    edit_tensors(folder, round_off)
    refused(folder, "model.norm.weight", "I8", "BF16")


def test_a_missing_shard(shards: Path) -> None:
    gone = sorted(shards.glob("model-*.safetensors"))[1]
    gone.unlink()
    refused(shards, INDEX, gone.name)


def test_a_truncated_shard(shards: Path) -> None:
    cut = sorted(shards.glob("model-*.safetensors"))[1]
    cut.write_bytes(cut.read_bytes()[:-10])
    refused(shards, cut.name, "not a whole safetensors file")


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ("{", ("not JSON",)),
        ("{}", ("weight_map",)),
        ('{"weight_map": {"a": 1}}', ("weight_map",)),
        ('{"weight_map": {"a": "../elsewhere.safetensors"}}', ("not a file of this folder",)),
    ],
)
def test_a_spoilt_index(shards: Path, index: str, words: tuple[str, ...]) -> None:
    (shards / INDEX).write_text(index)
    refused(shards, INDEX, *words)


def test_an_index_that_names_what_its_shard_lacks(shards: Path) -> None:
    path = shards / INDEX
    values = json.loads(path.read_text())
    files = sorted(set(values["weight_map"].values()))
    wrong = next(file for file in files if file != values["weight_map"]["model.norm.weight"])
    values["weight_map"]["model.norm.weight"] = wrong
    path.write_text(json.dumps(values))
    refused(shards, wrong, "model.norm.weight", "missing")


def test_shards_without_their_index(shards: Path) -> None:
    (shards / INDEX).unlink()
    load(shards)
    first, second = sorted(shards.glob("model-*.safetensors"))[:2]
    second.write_bytes(first.read_bytes())
    refused(shards, "both", first.name, second.name)


def test_a_head_of_its_own_is_used_though_the_config_ties_it(tmp_path: Path) -> None:
    reference = save_folder(CONFIGS["tied"], tmp_path)
    head = torch.randn(reference.lm_head.weight.shape, generator=torch.Generator().manual_seed(3))
    edit_tensors(tmp_path, lambda tensors: tensors.update({"lm_head.weight": head}))
    checkpoint = open_checkpoint(tmp_path)
    assert not checkpoint.config.tie_embeddings
    model = load_model(checkpoint, dtype=torch.float32, device="cpu")
    assert torch.equal(model.slots()["lm_head.weight"], head)
    assert not torch.equal(model.slots()["model.embed_tokens.weight"], head)


def test_a_tied_head_of_another_shape_is_refused(tmp_path: Path) -> None:
    save_folder(CONFIGS["tied"], tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(5, 48)}))
    refused(tmp_path, "lm_head.weight", "[5, 48]", "[97, 48]")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"head_dim": 10**9}, ("head_dim", "8192")),
        ({"head_dim": 8192, "num_attention_heads": 16384, "num_key_value_heads": 16384}, ("q_proj", "[48, 48]")),
        ({"hidden_size": 2**20}, ("embed_tokens", "[97, 48]")),
        ({"vocab_size": 10**30}, ("vocab_size", "67108864")),
        ({"num_hidden_layers": 10**9}, ("num_layers", "16384")),
        ({"num_hidden_layers": 16384}, ("16384 layers", "missing")),
        ({"max_position_embeddings": 10**30}, ("max_position",)),
        ({"rms_norm_eps": 10**400}, ("rms_norm_eps", "above 0")),
        ({"rope_parameters": LLAMA_3_ROPE | {"original_max_position_embeddings": 10**30}}, ("original_max_position",)),
        ({"rope_parameters": LLAMA_3_ROPE | {"factor": 10**30}}, ("factor", "1e+06")),
        ({"rope_parameters": LLAMA_3_ROPE | {"factor": 10**400}}, ("factor", "above 0")),
        ({"rope_parameters": {"rope_theta": 10**30}}, ("rope_theta", "1e+15")),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, ("partial_rotary_factor 0.5",)),
        ({"architectures": ["LlamaForSequenceClassification"]}, ("LlamaForSequenceClassification", "ForCausalLM")),
        ({"is_causal": False}, ("is_causal", "later tokens")),
        ({"layer_types": "full"}, ("layer_types", "list")),
        ({"eos_token_id": 10**30}, ("eos_token_id",)),
    ],
)
def test_sizes_and_factors_beyond_reason_are_refused_at_once(
    folder: Path, fields: dict[str, Any], words: tuple[str, ...]
) -> None:
    edit_config(folder, **fields)
    start = time.perf_counter()
    refused(folder, *words)
    assert time.perf_counter() - start < 2, "refused before anything of that size is made"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "mixtral", "num_local_experts": 8}, ("'mixtral'", "a mixture of experts")),
        ({"model_type": "deepseek_v3", "kv_lora_rank": 512}, ("latent attention",)),
        ({"model_type": "gemma2", "final_logit_softcapping": 30.0, "hidden_act": "gelu"}, ("capped", "'gelu'")),
        ({"model_type": "gpt_neox", "layer_norm_eps": 1e-5, "rotary_pct": 0.25}, ("LayerNorm", "a part of each head")),
        ({"model_type": "new"}, ("does not tell",)),
        ({"model_type": ["llama"]}, ("model_type ['llama']",)),
    ],
)
def test_another_family_is_refused_with_what_it_needs(
    folder: Path, fields: dict[str, Any], words: tuple[str, ...]
) -> None:
    edit_config(folder, **fields)
    refused(folder, "llama, mistral", *words)
