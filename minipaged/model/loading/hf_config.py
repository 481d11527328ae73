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
from minipaged.model.loading.keys import CONFIG_KEYS, GENERATION_KEYS, ROPE_KEYS, check_keys

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
PLAIN_ROPE = (None, "default")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ModelError if it is missing or is none."""
    try:
        raw = path.read_bytes()
        value = json.loads(raw)
        if b"\\ud" in raw.lower():  # half of a surrogate pair is no text that a tokenizer or a screen could take
            json.dumps(value, ensure_ascii=False).encode()
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
    if not isinstance(family, str) or family not in FAMILIES:
        raise ModelError(
            f"{fields.path}: model_type {family!r:.60} is not supported; {', '.join(FAMILIES)} are"
            + _what_differs(fields.values)
        )
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
            raise ModelError(f"{self.path}: {name} must be a whole number of at least 1, not {value!r:.60}")
        return value

    def real(self, name: str) -> float:
        return self.check_real(name, self.get(name))

    def check_real(self, name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e300:
            raise ModelError(f"{self.path}: {name} must be a number above 0, not {value!r:.60}")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.get(name, False)
        if not isinstance(value, bool):
            raise ModelError(f"{self.path}: {name} must be true or false, not {value!r:.60}")
        return value

    def tokens(self, name: str) -> tuple[int, ...]:
        value = self.values.get(name)
        tokens = [] if value is None else value if isinstance(value, list) else [value]
        if any(isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < 2**31 for token in tokens):
            raise ModelError(f"{self.path}: {name} must be a token id or a list of them, not {value!r:.60}")
        return tuple(tokens)

    def table(self, name: str) -> dict[str, Any]:
        value = self.values.get(name)
        if value is not None and not isinstance(value, dict):
            raise ModelError(f"{self.path}: {name} must be an object, not {value!r:.60}")
        return value or {}


# What networks of other families are made of, by the keys of config.json that give it away.
OTHER_NETWORKS = {
    "a mixture of experts": ("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok"),
    "latent attention (MLA)": ("kv_lora_rank", "q_lora_rank"),
    "state-space or linear-attention layers": ("state_size", "ssm_cfg", "mamba_d_state", "linear_num_key_heads"),
    "an encoder beside the decoder": ("vision_config", "audio_config", "encoder_layers", "text_config"),
    "sliding-window attention": ("sliding_window",),
    "capped scores or logits": ("attn_logit_softcapping", "final_logit_softcapping"),
    "learned positions": ("n_positions",),
    "ALiBi positions": ("alibi",),
    "LayerNorm instead of RMSNorm": ("layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "norm_epsilon"),
    "rope on a part of each head": ("rotary_pct", "rotary_dim"),
}


def _what_differs(values: dict[str, Any]) -> str:
    """What a network of an unknown family needs that ours has not, as far as its config tells."""
    found = [what for what, names in OTHER_NETWORKS.items() if any(values.get(name) for name in names)]
    activation = values.get("hidden_act", values.get("hidden_activation", values.get("activation_function", "silu")))
    if activation not in ("silu", "swish", None):
        found.append(f"the activation {activation!r:.40}")
    return f". It needs {', '.join(found)}" if found else ". Its config does not tell what differs"


def _refuse_what_would_be_ignored(fields: _Fields, family: str) -> None:
    values, path = fields.values, fields.path
    check_keys(values, CONFIG_KEYS, path)
    check_keys(values, GENERATION_KEYS, path)
    architectures = values.get("architectures") or []
    if not isinstance(architectures, list) or not all(str(name).endswith("ForCausalLM") for name in architectures):
        raise ModelError(f"{path}: architectures {architectures!r:.80} is not supported; ...ForCausalLM is")
    if family == "mistral" and values.get("sliding_window") is not None:
        raise ModelError(
            f"{path}: sliding_window {values['sliding_window']!r:.40} is not supported yet; "
            "models with sliding_window null work (Mistral 7B v0.2 and later)"
        )
    layer_types = values.get("layer_types")
    if layer_types is not None and not isinstance(layer_types, list):
        raise ModelError(f"{path}: layer_types must be a list, not {layer_types!r:.60}")
    others = sorted({str(kind) for kind in layer_types or ()} - {"full_attention"})
    if others:
        raise ModelError(
            f"{path}: layer_types names {others[0][:60]!r} (sliding windows ...), which is not supported yet"
        )
    if layer_types is None and values.get("use_sliding_window"):
        raise ModelError(f"{path}: use_sliding_window asks for sliding-window attention, which is not supported yet")
    if values.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ModelError(f"{path}: hidden_act {values['hidden_act']!r:.60} is not supported; silu is")


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
    name = "rope_parameters" if fields.values.get("rope_parameters") else "rope_scaling"
    parameters = fields.table(name)
    check_keys(parameters, ROPE_KEYS, fields.path, f"{name}.")
    for place in (parameters, fields.values):
        if place.get("partial_rotary_factor") not in (None, 1):
            found = place["partial_rotary_factor"]
            raise ModelError(f"{fields.path}: partial_rotary_factor {found!r:.60} is not supported; 1 is")
    theta = fields.check_real("rope_theta", parameters.get("rope_theta", fields.values.get("rope_theta", 10000.0)))
    kind = parameters.get("rope_type", parameters.get("type"))
    if kind in PLAIN_ROPE:
        return theta, None
    if kind != "llama3":
        raise ModelError(f"{fields.path}: rope scaling of type {kind!r:.60} is not supported; default and llama3 are")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    missing = [name for name in names if name not in parameters]
    if missing:
        raise ModelError(f"{fields.path}: rope scaling llama3 lacks {missing[0]}")
    factor, low, high, original = (fields.check_real(name, parameters[name]) for name in names)
    try:
        return theta, RopeScaling(factor, low, high, int(original))
    except InputError as error:
        raise ModelError(f"{fields.path}: rope scaling llama3: {error}") from None


def _eos_token_ids(fields: _Fields, folder: Path) -> tuple[int, ...]:
    """Where generation ends: generation_config.json has the last word, as in transformers."""
    generation = folder / "generation_config.json"
    if generation.exists():
        says = _Fields(generation)
        check_keys(says.values, GENERATION_KEYS, generation)
        tokens = says.tokens("eos_token_id")
        if tokens:
            return tokens
    return fields.tokens("eos_token_id")


def _first(tokens: tuple[int, ...]) -> int | None:
    return tokens[0] if tokens else None
