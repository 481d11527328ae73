"""A model's shape in the words of Hugging Face's config.json, so that other engines can draw the same network."""

from __future__ import annotations

from typing import Any

from minipaged.config import ModelConfig, RopeDivisors
from minipaged.errors import InputError


def hub_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json of `config`; reading it back gives the same shape. InputError if no family of the hub has these flags."""
    family, architecture = _family(config)
    scaling = config.rope_scaling
    if isinstance(scaling, RopeDivisors):
        raise InputError(f"{config.name}: its rope scaling cannot be written as a config")
    return {
        "architectures": [architecture],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids) or None,
        **({} if family == "qwen2" else {"attention_bias": config.attention_bias}),
        **({"mlp_bias": config.mlp_bias} if family == "llama" else {}),
        **(
            {}
            if scaling is None
            else {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": scaling.factor,
                    "low_freq_factor": scaling.low_freq_factor,
                    "high_freq_factor": scaling.high_freq_factor,
                    "original_max_position_embeddings": scaling.original_max_position,
                }
            }
        ),
    }


def _family(config: ModelConfig) -> tuple[str, str]:
    plain = ModelConfig.__dataclass_fields__
    multipliers = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_divisor")
    for name in ("rotary_dim", "unrotated_layers", "sliding_window", *multipliers):
        if getattr(config, name) != plain[name].default:
            raise InputError(f"{config.name}: {name} cannot be written as a config")
    if config.qk_norm and not config.mlp_bias:
        return "qwen3", "Qwen3ForCausalLM"
    if config.attention_bias and not config.output_bias and not config.mlp_bias:
        return "qwen2", "Qwen2ForCausalLM"
    if config.attention_bias == config.output_bias and not config.qk_norm:
        return "llama", "LlamaForCausalLM"
    raise InputError(f"{config.name}: no family of the hub has this network's biases and norms together")
