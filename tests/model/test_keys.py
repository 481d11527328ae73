"""The tables of keys are complete, and their words are true: what is read is seen, what is refused is refused by name."""

from __future__ import annotations

import inspect
import json
import logging
import re
from pathlib import Path
from typing import Any

import gguf
import pytest
import transformers

from minipaged.errors import ModelError
from minipaged.model.loading import keys
from minipaged.model.loading.hf_config import FAMILIES, read_config
from tests.model.tiny import CONFIGS, make_model, reference_logits

CLASS_LEVEL = {  # attributes of the config classes that no config.json holds
    *("base_config_key", "sub_configs_defaults", "attribute_map", "base_model_tp_plan", "base_model_fsdp_plan"),
    *("base_model_pp_plan", "base_model_ep_plan", "_auto_class", "extra_files", "extra_config_files"),
}
GGUF_CLASSES = {  # of gguf.Keys: those that belong to decoders of text
    "General": keys.GENERAL_KEYS,
    "Split": keys.GENERAL_KEYS,
    "Tokenizer": keys.GGUF_TOKENIZER_KEYS,
    "LLM": keys.ARCHITECTURE_KEYS,
    "Attention": keys.ARCHITECTURE_KEYS,
    "Rope": keys.ARCHITECTURE_KEYS,
}
OTHER_CLASSES = {  # of other architectures, which are refused by name, and of files that hold no model
    *("SSM", "KDA", "WKV", "PosNet", "ConvNext", "Classifier", "ShortConv", "Adapter", "IMatrix", "Clip", "ClipVision"),
    *("ClipAudio", "Diffusion", "xIELU"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_of_the_config_classes_is_in_the_table(family: str) -> None:
    config = transformers.AutoConfig.for_model(family)
    fields = {*config.to_dict(), *getattr(type(config), "__dataclass_fields__", {})} - CLASS_LEVEL
    assert len(fields) > 25
    assert sorted(fields - set(keys.CONFIG_KEYS)) == []


def test_every_field_of_the_generation_config_is_in_the_table() -> None:
    assert sorted(set(vars(transformers.GenerationConfig())) - set(keys.GENERATION_KEYS)) == []


def test_every_rope_parameter_that_transformers_reads_is_in_the_table() -> None:
    source = inspect.getsource(transformers.modeling_rope_utils)
    found = set(re.findall(r"""rope_parameters(?:_dict)?(?:\.get\(|\[)["'](\w+)["']""", source))
    assert {"factor", "beta_fast", "truncate", "short_factor"} < found
    assert sorted(found - set(keys.ROPE_KEYS)) == []


ARGUMENTS = {  # of transformers' calls, and keys of tokenizer.json itself: no tokenizer_config.json has them
    *("_commit_hash", "_from_auto", "_from_pipeline", "_json_padding", "_json_truncation", "_spm_precompiled_charsmap"),
    *("gguf_file", "local_files_only", "proxies", "subfolder", "tokenizer", "tokenizer_object", "type", "normalizers"),
}


def test_every_key_of_a_tokenizer_config_that_transformers_reads_is_in_the_table() -> None:
    """Whatever its tokenizers take out of the file, or out of the keywords that they make of it."""
    base, fast = transformers.PreTrainedTokenizerBase, transformers.PreTrainedTokenizerFast
    loaders = (base.__init__, base.from_pretrained, base._from_pretrained, fast.__init__, fast.convert_to_native_format)
    source = "".join(inspect.getsource(loader) for loader in loaders)
    holder = r"(?:init_kwargs|kwargs|tokenizer_config|init_configuration|config)"
    found = set(re.findall(holder + r"""(?:\.(?:pop|get|setdefault)\(|\[)\s*["'](\w+)["']""", source))
    found |= set(re.findall(r"""["'](\w+)["'] in """ + holder, source)) | set(base.SPECIAL_TOKENS_ATTRIBUTES)
    for tokenizer in (transformers.LlamaTokenizerFast, transformers.Qwen2TokenizerFast, transformers.GPT2TokenizerFast):
        found |= set(inspect.signature(tokenizer.__init__).parameters) - {"self", "args", "kwargs"}
    assert {
        "bos_token",
        "added_tokens_decoder",
        "split_special_tokens",
        "fix_mistral_regex",
        "add_prefix_space",
    } < found
    assert sorted(found - ARGUMENTS - set(keys.TOKENIZER_KEYS)) == []
    assert found >= ARGUMENTS, "nothing is excused that transformers does not read"


def gguf_keys() -> dict[str, list[str]]:
    found = {}
    for name, group in vars(gguf.Keys).items():
        if isinstance(group, type):
            found[name] = [value for key, value in vars(group).items() if key.isupper() and isinstance(value, str)]
    return found


def test_every_key_that_the_gguf_package_names_is_in_a_table() -> None:
    found = gguf_keys()
    assert set(found) == {*GGUF_CLASSES, *OTHER_CLASSES}, "a class of keys that nobody has looked at"
    for name, table in GGUF_CLASSES.items():
        assert found[name]
        for key in found[name]:
            note = key.startswith("general.") and key.split(".")[1] in keys.GENERAL_NOTES
            assert note or key.removeprefix("{arch}.") in table, key


def folder_with(tmp_path: Path, **fields: Any) -> Path:
    values = {name: value for name, value in CONFIGS["gqa"].to_dict().items() if value is not None} | fields
    (tmp_path / "config.json").write_text(json.dumps(values, default=str))
    return tmp_path


OTHER_VALUE = {  # a value that each key may have and that differs from the tiny model's
    "model_type": "qwen3", "architectures": ["LlamaForSequenceClassification"], "rope_parameters": {"rope_theta": 5.0},
    "rope_scaling": {"type": "linear", "factor": 2.0}, "partial_rotary_factor": 0.5, "tie_word_embeddings": True,
    "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu", "bos_token_id": 7, "eos_token_id": [7],
    "rms_norm_eps": 0.5, "num_key_value_heads": 3, "num_attention_heads": 12, "sliding_window": 64,
    "use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"], "no_rope_layers": [0, 1],
    "no_rope_layer_interval": 2, "attention_out_bias": True, "original_max_position_embeddings": 33, "max_window_layers": 1,
}  # fmt: skip
YARN = {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}
QWEN_WINDOW = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}
BESIDE = {  # what must stand beside a key, so that its family reads it
    **{key: {"model_type": "smollm3"} for key in ("no_rope_layers", "no_rope_layer_interval")},
    **{key: {"model_type": "granite"} for key in ("embedding_multiplier", "residual_multiplier", "attention_multiplier")},
    "logits_scaling": {"model_type": "granite"}, "original_max_position_embeddings": YARN,
    "rope_scaling": {"rope_parameters": None}, "rope_theta": {"rope_parameters": None}, "sliding_window": {"model_type": "mistral"},
    "use_sliding_window": QWEN_WINDOW | {"use_sliding_window": False}, "max_window_layers": QWEN_WINDOW,
    "layer_types": QWEN_WINDOW, "attention_out_bias": {"model_type": "seed_oss"},
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name, key in keys.CONFIG_KEYS.items() if key.fate == "read"])
def test_a_key_that_is_read_changes_the_config_or_is_refused_by_name(name: str, tmp_path: Path) -> None:
    beside = BESIDE.get(name, {})
    before, words = read_config(folder_with(tmp_path, **beside)), ""
    try:
        after = read_config(folder_with(tmp_path, **(beside | {name: OTHER_VALUE.get(name, 96)})))
    except ModelError as error:
        after, words = None, str(error)
    assert after != before
    assert after is not None or name in words


@pytest.mark.parametrize("name", [name for name, key in keys.CONFIG_KEYS.items() if key.fate == "refused"])
def test_a_key_that_is_refused_is_named(name: str, tmp_path: Path) -> None:
    for harmless in keys.CONFIG_KEYS[name].harmless:
        read_config(folder_with(tmp_path, **{name: harmless}))
    with pytest.raises(ModelError, match=name) as caught:
        read_config(folder_with(tmp_path, **{name: False if name == "is_causal" else {"bits": 4}}))
    assert "\n" not in str(caught.value)


NO_EFFECT = {
    "output_hidden_states": True, "output_attentions": True, "return_dict": False,
    "use_cache": False, "attention_dropout": 0.5, "initializer_range": 0.9, "pad_token_id": 3, "pretraining_tp": 2,
    "chunk_size_feed_forward": 8,
}  # fmt: skip


@pytest.mark.parametrize("name", NO_EFFECT)
def test_what_is_said_to_have_no_effect_has_none_in_transformers(name: str) -> None:
    assert keys.CONFIG_KEYS[name].fate == "no effect"
    reference = make_model(CONFIGS["gqa"])
    changed = transformers.LlamaConfig(**(CONFIGS["gqa"].to_dict() | {name: NO_EFFECT[name]}))
    other = transformers.AutoModelForCausalLM.from_config(changed, attn_implementation="eager").eval()
    other.load_state_dict(reference.state_dict())
    other.config.return_dict = True
    tokens = [5, 4, 9, 3, 77]
    assert reference_logits(reference, tokens).equal(reference_logits(other, tokens))


def test_generation_rules_that_are_not_applied_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = folder_with(tmp_path)
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1, "eos_token_id": 2}
    (folder / "generation_config.json").write_text(json.dumps(sampling | {"bad_words_ids": None, "stop_strings": []}))
    with caplog.at_level(logging.WARNING, "minipaged"):
        read_config(folder)
        assert caplog.records == []
        (folder / "generation_config.json").write_text(json.dumps({"suppress_tokens": [1, 2], "guidance_scale": 1}))
        read_config(folder)
    assert [record.message.count("\n") for record in caplog.records] == [0]
    assert "generation_config.json: suppress_tokens [1, 2] is not applied" in caplog.text


def test_each_reason_is_given() -> None:
    tables = [value for value in vars(keys).values() if isinstance(value, dict) and value]
    checked = [key for table in tables for key in table.values() if isinstance(key, keys.Key)]
    assert len(checked) > 250
    assert all(key.why or key.fate == "read" for key in checked)
