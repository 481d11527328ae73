"""Tiny models of each family, made by transformers, and the dense attention that stands in for the pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional

from minipaged.model.llama import Llama

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,  # large, so that a mistake anywhere is seen in the logits
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}


def heads(num_heads: int, num_kv_heads: int) -> dict[str, int]:
    return {"num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads}


def llama(**fields: Any) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(**(SIZES | heads(4, 2) | fields))


CONFIGS: dict[str, transformers.PretrainedConfig] = {
    "mha": llama(**heads(4, 4)),
    "gqa": llama(**heads(6, 2)),
    "mqa": llama(**heads(4, 1)),
    "tied": llama(tie_word_embeddings=True),
    "wide heads": llama(head_dim=32),
    "biased": llama(attention_bias=True, mlp_bias=True),
    "llama 3 rope": llama(rope_parameters=LLAMA_3_ROPE),
    "theta": llama(rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, rms_norm_eps=1e-3),
    "mistral": transformers.MistralConfig(**SIZES, **heads(4, 2), sliding_window=None),
    "qwen 2.5": transformers.Qwen2Config(**SIZES, **heads(4, 2)),
    "qwen 2.5 tied": transformers.Qwen2Config(**SIZES, **heads(4, 2), tie_word_embeddings=True),
    "qwen 3": transformers.Qwen3Config(**SIZES, **heads(4, 2), head_dim=24),
    "granite": transformers.GraniteConfig(
        **SIZES,
        **heads(4, 2),
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        attention_multiplier=0.4,
        logits_scaling=3.0,
        tie_word_embeddings=True,
    ),
    "granite untied, biased": transformers.GraniteConfig(
        **SIZES,
        **heads(4, 2),
        embedding_multiplier=6.0,
        residual_multiplier=0.5,
        attention_multiplier=0.2,
        logits_scaling=1.5,
        attention_bias=True,
        mlp_bias=True,
    ),
    "smollm 3": transformers.SmolLM3Config(
        **(SIZES | heads(4, 2) | {"num_hidden_layers": 5}), tie_word_embeddings=True
    ),
    "smollm 3 by list": transformers.SmolLM3Config(
        **(SIZES | heads(4, 2)), no_rope_layers=[0, 1], rope_parameters=YARN_ROPE, tie_word_embeddings=False
    ),
    "seed-oss": transformers.SeedOssConfig(**SIZES, **heads(4, 2), head_dim=16),
    "seed-oss, other biases": transformers.SeedOssConfig(
        **SIZES, **heads(4, 2), head_dim=12, attention_bias=False, attention_out_bias=True, mlp_bias=True
    ),
    "phi 3": transformers.Phi3Config(**SIZES, **heads(4, 2)),
    "phi 4 mini": transformers.Phi3Config(
        **SIZES,
        **heads(2, 1),
        tie_word_embeddings=True,
        original_max_position_embeddings=256,
        sliding_window=1024,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0 + 0.2 * i for i in range(9)],
            "long_factor": [2.0 + i for i in range(9)],
        },
    ),
    "linear rope": llama(rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
    "dynamic rope": llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}),
    "yarn": llama(rope_parameters=YARN_ROPE, attention_bias=True),
    "yarn, every number": llama(
        head_dim=32,
        rope_parameters=YARN_ROPE | {"beta_fast": 8.0, "beta_slow": 2.0, "truncate": False, "attention_factor": 1.3},
    ),
    "yarn by mscale": llama(rope_parameters=YARN_ROPE | {"mscale": 0.7, "mscale_all_dim": 0.3}),
    "qwen 3 yarn": transformers.Qwen3Config(**SIZES, **heads(4, 2), head_dim=24, rope_parameters=YARN_ROPE),
    "qwen 3 biased": transformers.Qwen3Config(**SIZES, **heads(4, 2), head_dim=24, attention_bias=True),
}


def make_model(config: transformers.PretrainedConfig) -> Any:
    """A model of `config` with random weights; norms and biases too, which transformers would leave at one and zero."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
    return model


def save_folder(config: transformers.PretrainedConfig, folder: Path, **options: Any) -> Any:
    """Save such a model to `folder` as transformers does, and return it."""
    model = make_model(config)
    model.save_pretrained(folder, **options)
    return model


def dense_attention(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention over one sequence that is all there: [T, H, D], [T, KH, D] twice -> [T, H, D]."""
    group = query.shape[1] // key.shape[1]
    wide = (query, key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1))
    return functional.scaled_dot_product_attention(*(x.transpose(0, 1) for x in wide), is_causal=True).transpose(0, 1)


def dense_logits(model: Llama, token_ids: list[int]) -> Tensor:
    """Logits of every position of one prompt, float32 [T, vocab]."""
    with torch.inference_mode():
        return model.logits(model(torch.tensor(token_ids), torch.arange(len(token_ids)), dense_attention))


def reference_logits(model: Any, token_ids: list[int]) -> Tensor:
    """The same by transformers."""
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([token_ids])).logits[0]
    return logits.float()


def drawn_tokens(count: int, vocab_size: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, (count,), generator=generator).tolist()
