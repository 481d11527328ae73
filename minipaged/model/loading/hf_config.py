"""config.json of a Hugging Face folder -> ModelConfig.

Reads each field as the model families of llama.py mean it, in the spellings of transformers 4 and 5. A field that
would change the arithmetic and is not supported is refused, never skipped. A new family is a row of FAMILIES, its flags in
`read_config` and the fields of its config.json in keys.py, CONFIG_KEYS. Its tensors bear Llama's names; those that a file stores as one
(Phi-3's) are cut in hf_folder.py, factors of its own are worked into weights by weights.py, `work_in`. Imports no torch.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from minipaged.config import MAX_SIZES, ModelConfig, RopeDivisors, RopeScaling
from minipaged.errors import InputError, ModelError
from minipaged.model.loading import rope_scaling
from minipaged.model.loading.keys import CONFIG_KEYS, GENERATION_KEYS, ROPE_KEYS, check_keys
from minipaged.model.loading.quantization_config import read_quantization

LOG = logging.getLogger("minipaged")


@dataclass(frozen=True, slots=True)
class Family:
    """What a family is where its config.json says nothing, and which of the optional parts it has at all."""

    kv_heads: bool = True  # num_key_value_heads may be missing: as many as heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    theta: float = 10000.0
    tied: bool = False
    biases: bool | None = None  # attention_bias is read, and this if it is missing; None: it is not read
    mlp_bias: bool = False  # mlp_bias is read
    # Which layers have a sliding window: all, or, if layer_types does not say it, those from max_window_layers on or those without rope.
    windows: Literal["in all layers", "from a layer on", "where no rope is"] | None = None
    window: int | None = None  # sliding_window if it is missing


FAMILIES = {
    "llama": Family(biases=False, mlp_bias=True),
    "mistral": Family(kv_heads=False, windows="in all layers", window=4096),
    "qwen2": Family(kv_heads=False, windows="from a layer on", window=4096),
    "qwen3": Family(kv_heads=False, head_dim=128, biases=False, windows="from a layer on", window=4096),
    "granite": Family(biases=False, mlp_bias=True),
    "smollm3": Family(kv_heads=False, theta=2e6, tied=True, biases=False, mlp_bias=True, windows="where no rope is"),
    "seed_oss": Family(kv_heads=False, head_dim=128, biases=True, mlp_bias=True),
    "phi3": Family(windows="in all layers"),
}
# `dynamic` changes nothing up to max_position_embeddings, which is the context here.
PLAIN_ROPE = (None, "default", "dynamic")


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
    name = fields.values.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ModelError(
            f"{fields.path}: model_type {name!r:.60} is not supported; {', '.join(FAMILIES)} are"
            + _what_differs(fields.values)
        )
    family = FAMILIES[name]
    _refuse_what_would_be_ignored(fields, name)
    read_quantization(fields.values, fields.path)  # one that is not known is refused before any weight is fetched
    hidden, heads = fields.whole("hidden_size"), fields.whole("num_attention_heads")
    bias = False if family.biases is None else fields.flag("attention_bias", family.biases)
    try:
        config = ModelConfig(
            name=folder.resolve().name,
            vocab_size=fields.whole("vocab_size"),
            hidden_size=hidden,
            intermediate_size=fields.whole("intermediate_size"),
            num_layers=fields.whole("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=fields.whole("num_key_value_heads", heads if family.kv_heads else None),
            head_dim=_head_dim(fields, family, hidden, heads),
            max_position=fields.whole("max_position_embeddings"),
            rms_norm_eps=fields.real("rms_norm_eps"),
            tie_embeddings=fields.flag("tie_word_embeddings", family.tied),
            attention_bias=bias or name == "qwen2",
            output_bias=fields.flag("attention_out_bias") if name == "seed_oss" else bias,
            mlp_bias=fields.flag("mlp_bias") if family.mlp_bias else False,
            qk_norm=name == "qwen3",
            eos_token_ids=_eos_token_ids(fields, folder),
            bos_token_id=_first(fields.tokens("bos_token_id")),
        )
        if name == "granite":
            config = _with_multipliers(fields, config)
        if name == "smollm3":
            config = replace(config, unrotated_layers=_unrotated_layers(fields, config.num_layers))
        config = _with_window(fields, name, config)
        return _with_rope(fields, name, config)
    except ModelError:
        raise
    except InputError as error:
        raise ModelError(f"{fields.path}: {error}") from None


class _Fields:
    """The fields of config.json, each checked as it is asked for."""

    def __init__(self, path: Path, values: dict[str, Any] | None = None, inside: str = "") -> None:
        self.path = path
        self.inside = inside  # what the fields belong to, if not to the whole file
        self.values = read_json(path) if values is None else values

    def get(self, name: str, default: Any = None) -> Any:
        value = self.values.get(name)
        value = default if value is None else value
        if value is None:
            raise ModelError(f"{self.path}: {self.inside}the field {name} is missing")
        return value

    def whole(self, name: str, default: int | None = None) -> int:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ModelError(
                f"{self.path}: {self.inside}{name} must be a whole number of at least 1, not {value!r:.60}"
            )
        return value

    def real(self, name: str, default: float | None = None) -> float:
        return self.check_real(name, self.get(name, default))

    def check_real(self, name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e300:
            raise ModelError(f"{self.path}: {self.inside}{name} must be a number above 0, not {value!r:.60}")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise ModelError(f"{self.path}: {self.inside}{name} must be true or false, not {value!r:.60}")
        return value

    def tokens(self, name: str) -> tuple[int, ...]:
        value = self.values.get(name)
        tokens = [] if value is None else value if isinstance(value, list) else [value]
        if any(isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < 2**31 for token in tokens):
            raise ModelError(
                f"{self.path}: {self.inside}{name} must be a token id or a list of them, not {value!r:.60}"
            )
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
    layer_types = values.get("layer_types")
    if layer_types is not None and not isinstance(layer_types, list):
        raise ModelError(f"{path}: layer_types must be a list, not {layer_types!r:.60}")
    others = sorted({str(kind) for kind in layer_types or ()} - {"full_attention", "sliding_attention"})
    if others:
        raise ModelError(
            f"{path}: layer_types names {others[0][:60]!r}, which is not supported; full_attention and sliding_attention are"
        )
    if values.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ModelError(f"{path}: hidden_act {values['hidden_act']!r:.60} is not supported; silu is")


def _head_dim(fields: _Fields, family: Family, hidden: int, heads: int) -> int:
    if fields.values.get("head_dim") is not None:
        return fields.whole("head_dim")
    if family.head_dim is not None:
        return family.head_dim
    if hidden % heads:
        raise ModelError(
            f"{fields.path}: head_dim is missing, and hidden_size {hidden} is not a multiple of {heads} heads"
        )
    return hidden // heads


def _with_multipliers(fields: _Fields, config: ModelConfig) -> ModelConfig:
    return replace(
        config,
        embedding_multiplier=fields.real("embedding_multiplier", 1.0),
        residual_multiplier=fields.real("residual_multiplier", 1.0),
        attention_multiplier=fields.real("attention_multiplier", 1.0),
        logits_divisor=fields.real("logits_scaling", 1.0),
    )


def _unrotated_layers(fields: _Fields, num_layers: int) -> tuple[int, ...]:
    """`no_rope_layers` holds 1 for each layer with rope; without it, every fourth has none (`no_rope_layer_interval`)."""
    marks = fields.values.get("no_rope_layers")
    if marks is None:
        interval = fields.whole("no_rope_layer_interval", 4)
        return tuple(range(interval - 1, min(num_layers, MAX_SIZES["num_layers"]), interval))
    if not isinstance(marks, list) or len(marks) != num_layers or any(mark not in (0, 1) for mark in marks):
        raise ModelError(f"{fields.path}: no_rope_layers must give 1 or 0 for each of {num_layers} layers")
    return tuple(layer for layer, mark in enumerate(marks) if not mark)


def _with_window(fields: _Fields, name: str, config: ModelConfig) -> ModelConfig:
    """The sliding window, and the layers that see everything. A window that holds the whole context is none."""
    family, types = FAMILIES[name], fields.values.get("layer_types")
    asked = family.windows == "in all layers" or fields.flag("use_sliding_window")
    if asked and family.windows is None:
        raise ModelError(f"{fields.path}: use_sliding_window asks for sliding windows, which {name} does not have")
    if "sliding_attention" in (types or ()) and (family.windows is None or not asked):
        raise ModelError(f"{fields.path}: layer_types names 'sliding_attention', but use_sliding_window is not true")
    given = fields.values.get("sliding_window", family.window)
    if not asked or given is None:
        return config
    window, full = fields.whole("sliding_window", given), _full_layers(fields, family, config)
    if window >= config.max_position or len(full) == config.num_layers:
        return config
    return replace(config, sliding_window=window, full_layers=full)


def _full_layers(fields: _Fields, family: Family, config: ModelConfig) -> tuple[int, ...]:
    """Layers without a window where others have one."""
    layers, types = range(config.num_layers), fields.values.get("layer_types")
    if family.windows == "in all layers":
        return ()
    if types is not None:
        if len(types) != config.num_layers:
            raise ModelError(f"{fields.path}: layer_types must name a type for each of {config.num_layers} layers")
        return tuple(layer for layer in layers if types[layer] == "full_attention")
    if family.windows == "where no rope is":
        return tuple(layer for layer in layers if layer not in config.unrotated_layers)
    first = fields.values.get("max_window_layers", 28)
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        raise ModelError(f"{fields.path}: max_window_layers must be a whole number of at least 0, not {first!r:.60}")
    return tuple(layers[:first])


def _with_rope(fields: _Fields, family: str, config: ModelConfig) -> ModelConfig:
    """Theta, the part of a head that turns, and scaling: from `rope_parameters` (transformers 5) or `rope_scaling` and the fields
    beside it (4)."""
    name = "rope_parameters" if fields.values.get("rope_parameters") else "rope_scaling"
    given = fields.table(name)
    check_keys(given, ROPE_KEYS, fields.path, f"{name}.")
    kind = given.get("rope_type", given.get("type"))
    if family == "phi3" and kind in ("su", "yarn"):
        kind = "longrope"  # as transformers has it
    rope = _Fields(fields.path, {"rope_theta": fields.values.get("rope_theta")} | given, f"rope scaling {kind!s:.40}: ")
    theta = rope.real("rope_theta", FAMILIES[family].theta)
    part = given.get("partial_rotary_factor", fields.values.get("partial_rotary_factor"))
    if part not in (None, 1) and family != "phi3":
        raise ModelError(f"{fields.path}: partial_rotary_factor {part!r:.60} is not supported; 1 is")
    turning = (
        config.head_dim if part is None else int(config.head_dim * fields.check_real("partial_rotary_factor", part))
    )
    config = replace(config, rope_theta=theta, rotary_dim=None if turning == config.head_dim else turning)
    if kind in PLAIN_ROPE:
        return config
    if kind == "longrope":
        if family == "phi3":  # which has a default for the field beside the parameters, so theirs never counts
            original = int(fields.real("original_max_position_embeddings", 4096.0))
        else:
            original = _original_context(rope, fields, config.max_position)
        if original < config.max_position:
            words = "%s: the context is %d of %d tokens, those for which longrope's short factors hold"
            LOG.warning(words, fields.path, original, config.max_position)
        scaling = _longrope(rope, config.max_position, original)
        return replace(config, rope_scaling=scaling, max_position=min(config.max_position, original))
    return replace(config, rope_scaling=_scaling(rope, fields, kind, config))


def _scaling(rope: _Fields, fields: _Fields, kind: Any, config: ModelConfig) -> RopeScaling | RopeDivisors:
    turning = config.rotary_dim or config.head_dim
    if kind == "llama3":
        factor, low, high = (rope.real(key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
        return RopeScaling(factor, low, high, _original_context(rope, fields, None))
    if kind == "linear":
        return rope_scaling.linear(turning, rope.real("factor"))
    if kind == "yarn":
        return _yarn(rope, turning, config.rope_theta, _original_context(rope, fields, config.max_position))
    raise ModelError(
        f"{fields.path}: rope scaling of type {kind!r:.60} is not supported; "
        "default, linear, dynamic, yarn, longrope and llama3 are"
    )


def _original_context(rope: _Fields, fields: _Fields, default: int | None) -> int:
    """original_max_position_embeddings: if it stands beside the rope's parameters too, that one counts, as in transformers."""
    name = "original_max_position_embeddings"
    return int(fields.real(name) if fields.values.get(name) is not None else rope.real(name, default))


def _yarn(rope: _Fields, turning: int, theta: float, original: int) -> RopeDivisors:
    factor = rope.real("factor")
    attention = None if rope.values.get("attention_factor") is None else rope.real("attention_factor")
    if attention is None and rope.values.get("mscale") and rope.values.get("mscale_all_dim"):
        above, below = (rope_scaling.yarn_scale(factor, rope.real(name)) for name in ("mscale", "mscale_all_dim"))
        attention = above / below
    fast, slow = rope.real("beta_fast", 32.0), rope.real("beta_slow", 1.0)
    truncate = rope.flag("truncate", True)
    return rope_scaling.yarn(
        turning,
        theta,
        factor,
        original,
        beta_fast=fast,
        beta_slow=slow,
        attention_factor=attention,
        truncate=truncate,
    )


def _longrope(rope: _Fields, context: int, original: int) -> RopeDivisors:
    """LongRoPE (Ding et al., 2024) up to the original context; beyond it, transformers turns what is cached already otherwise."""
    short = rope.get("short_factor")
    if not isinstance(short, list):
        raise ModelError(f"{rope.path}: short_factor must be a list of numbers, not {short!r:.60}")
    divisors = tuple(rope.check_real("short_factor", value) for value in short)
    factor = rope.real("factor", context / original)
    attention = None if rope.values.get("attention_factor") is None else rope.real("attention_factor")
    if attention is None:
        attention = 1.0 if factor <= 1 or original <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return RopeDivisors(divisors, attention)


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
