"""config.json of a Hugging Face folder -> ModelConfig.

Knows what each field means for the families that llama.py can run, in the spellings of transformers 4 and 5. A field that
would change the arithmetic and is not supported is refused, never skipped. Imports no torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minipaged.config import ModelConfig, RopeScaling
from minipaged.errors import InputError, ModelError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
PLAIN_ROPE = (None, "default")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ModelError if it is missing or is none."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; a Hugging Face folder holds it") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: must hold a JSON object, not {type(value).__name__}")
    return value


def read_config(folder: Path) -> ModelConfig:
    """The shape of the network in `folder`. ModelError names the field that is missing, wrong or not supported."""
    fields = _Fields(folder / "config.json")
    family = fields.values.get("model_type")
    if family not in FAMILIES:
        raise ModelError(f"{fields.path}: model_type {family!r} is not supported; {', '.join(FAMILIES)} are")
    _refuse_what_would_be_ignored(fields, family)
    hidden, heads = fields.whole("hidden_size"), fields.whole("num_attention_heads")
    bias = fields.flag("attention_bias") if family in ("llama", "qwen3") else False
    theta, scaling = _rope(fields)
    try:
        return ModelConfig(
            name=folder.resolve().name,
            vocab_size=fields.whole("vocab_size"),
            hidden_size=hidden,
            intermediate_size=fields.whole("intermediate_size"),
            num_layers=fields.whole("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=fields.whole("num_key_value_heads", heads if family == "llama" else None),
            head_dim=_head_dim(fields, family, hidden, heads),
            max_position=fields.whole("max_position_embeddings"),
            rms_norm_eps=fields.real("rms_norm_eps"),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_embeddings=fields.flag("tie_word_embeddings"),
            attention_bias=bias or family == "qwen2",
            output_bias=bias,
            mlp_bias=fields.flag("mlp_bias") if family == "llama" else False,
            qk_norm=family == "qwen3",
            eos_token_ids=_eos_token_ids(fields, folder),
            bos_token_id=_first(fields.tokens("bos_token_id")),
        )
    except ModelError:
        raise
    except InputError as error:
        raise ModelError(f"{fields.path}: {error}") from None


class _Fields:
    """The fields of config.json, each checked as it is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values = read_json(path)

    def get(self, name: str, default: Any = None) -> Any:
        value = self.values.get(name)
        value = default if value is None else value
        if value is None:
            raise ModelError(f"{self.path}: the field {name} is missing")
        return value

    def whole(self, name: str, default: int | None = None) -> int:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ModelError(f"{self.path}: {name} must be a whole number of at least 1, not {value!r}")
        return value

    def real(self, name: str) -> float:
        return self.check_real(name, self.get(name))

    def check_real(self, name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise ModelError(f"{self.path}: {name} must be a number above 0, not {value!r}")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.get(name, False)
        if not isinstance(value, bool):
            raise ModelError(f"{self.path}: {name} must be true or false, not {value!r}")
        return value

    def tokens(self, name: str) -> tuple[int, ...]:
        value = self.values.get(name)
        tokens = [] if value is None else value if isinstance(value, list) else [value]
        if any(isinstance(token, bool) or not isinstance(token, int) or token < 0 for token in tokens):
            raise ModelError(f"{self.path}: {name} must be a token id or a list of them, not {value!r}")
        return tuple(tokens)

    def table(self, name: str) -> dict[str, Any]:
        value = self.values.get(name)
        if value is not None and not isinstance(value, dict):
            raise ModelError(f"{self.path}: {name} must be an object, not {value!r}")
        return value or {}


def _refuse_what_would_be_ignored(fields: _Fields, family: str) -> None:
    values, path = fields.values, fields.path
    if family == "mistral" and values.get("sliding_window") is not None:
        raise ModelError(
            f"{path}: sliding_window {values['sliding_window']} is not supported yet; "
            "models with sliding_window null work (Mistral 7B v0.2 and later)"
        )
    layer_types = values.get("layer_types")
    sliding = "sliding_attention" in layer_types if isinstance(layer_types, list) else values.get("use_sliding_window")
    if sliding:
        raise ModelError(f"{path}: sliding-window attention in some layers is not supported yet")
    if values.get("quantization_config"):
        raise ModelError(f"{path}: quantization_config is not supported; use the float weights, or a GGUF file")
    if values.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ModelError(f"{path}: hidden_act {values['hidden_act']!r} is not supported; silu is")
    if values.get("partial_rotary_factor", 1) != 1:
        raise ModelError(f"{path}: partial_rotary_factor {values['partial_rotary_factor']!r} is not supported; 1 is")


def _head_dim(fields: _Fields, family: str, hidden: int, heads: int) -> int:
    if fields.values.get("head_dim") is not None:
        return fields.whole("head_dim")
    if family == "qwen3":
        return 128
    if hidden % heads:
        raise ModelError(
            f"{fields.path}: head_dim is missing, and hidden_size {hidden} is not a multiple of {heads} heads"
        )
    return hidden // heads


def _rope(fields: _Fields) -> tuple[float, RopeScaling | None]:
    """Theta and scaling from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4)."""
    parameters = fields.table("rope_parameters") or fields.table("rope_scaling")
    theta = parameters.get("rope_theta", fields.values.get("rope_theta", 10000.0))
    kind = parameters.get("rope_type", parameters.get("type"))
    if kind in PLAIN_ROPE:
        return fields.check_real("rope_theta", theta), None
    if kind != "llama3":
        raise ModelError(f"{fields.path}: rope scaling of type {kind!r} is not supported; default and llama3 are")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    missing = [name for name in names if name not in parameters]
    if missing:
        raise ModelError(f"{fields.path}: rope scaling llama3 lacks {missing[0]}")
    factor, low, high, original = (fields.check_real(name, parameters[name]) for name in names)
    if high <= low:
        raise ModelError(f"{fields.path}: high_freq_factor ({high:g}) must be above low_freq_factor ({low:g})")
    return fields.check_real("rope_theta", theta), RopeScaling(factor, low, high, int(original))


def _eos_token_ids(fields: _Fields, folder: Path) -> tuple[int, ...]:
    """Where generation ends: generation_config.json has the last word, as in transformers."""
    generation = folder / "generation_config.json"
    if generation.exists():
        tokens = _Fields(generation).tokens("eos_token_id")
        if tokens:
            return tokens
    return fields.tokens("eos_token_id")


def _first(tokens: tuple[int, ...]) -> int | None:
    return tokens[0] if tokens else None
