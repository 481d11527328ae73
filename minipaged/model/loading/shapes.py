"""The published shapes of known models, by name.

Numbers only, and no torch, so that the simulator can run any of these without weights. Sources: the config.json
that each model was published with; OPT: Zhang et al. 2022, table 1; Falcon: Almazrouei et al. 2023, table 16.
"""

from __future__ import annotations

from minipaged.config import ModelConfig, RopeScaling
from minipaged.errors import ModelError

LLAMA_31 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192)
LLAMA_32 = RopeScaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192)
BYTE_VOCABULARY = 257  # the 256 bytes and an end


def _llama(
    name: str,
    vocab: int,
    hidden: int,
    inner: int,
    layers: int,
    heads: int,
    kv_heads: int,
    context: int,
    **flags: object,
) -> ModelConfig:
    head_dim = flags.pop("head_dim", hidden // heads)
    return ModelConfig(name, vocab, hidden, inner, layers, heads, kv_heads, head_dim, context, **flags)  # type: ignore[arg-type]


def _qwen25(
    name: str, vocab: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, **flags: object
) -> ModelConfig:
    shared = {"rms_norm_eps": 1e-6, "rope_theta": 1e6, "attention_bias": True, "eos_token_ids": (151645, 151643)}
    return _llama(name, vocab, hidden, inner, layers, heads, kv_heads, 32768, **shared, **flags)


def _qwen3(name: str, hidden: int, inner: int, layers: int, heads: int, **flags: object) -> ModelConfig:
    shared = {
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "qk_norm": True,
        "head_dim": 128,
        "eos_token_ids": (151645, 151643),
    }
    return _llama(name, 151936, hidden, inner, layers, heads, 8, 40960, **shared, **flags)


def _ungated(name: str, vocab: int, hidden: int, layers: int, heads: int, kv_heads: int) -> ModelConfig:
    """OPT and Falcon: an MLP of two matrices of 4 * hidden, written as three of 8/3 * hidden, so that its weights and
    multiplications count right to within one part in a thousand. Not a LLaMA-style network: for the simulator only."""
    return _llama(name, vocab, hidden, round(hidden * 8 / 3), layers, heads, kv_heads, 2048, tie_embeddings=True)


_L1 = {"rms_norm_eps": 1e-6, "eos_token_ids": (2,), "bos_token_id": 1}
_L2 = {"rms_norm_eps": 1e-5, "eos_token_ids": (2,), "bos_token_id": 1}
_L3 = {"rms_norm_eps": 1e-5, "rope_theta": 5e5, "eos_token_ids": (128001, 128009), "bos_token_id": 128000}
_SMOL = {"rms_norm_eps": 1e-5, "tie_embeddings": True, "eos_token_ids": (2,), "bos_token_id": 1}

_TABLE = (
    _llama("toy", BYTE_VOCABULARY, 64, 128, 2, 4, 2, 2048, eos_token_ids=(256,)),
    _llama("smollm2-135m", 49152, 576, 1536, 30, 9, 3, 8192, rope_theta=1e5, **_SMOL),
    _llama("smollm2-360m", 49152, 960, 2560, 32, 15, 5, 8192, rope_theta=1e5, **_SMOL),
    _llama("smollm2-1.7b", 49152, 2048, 8192, 24, 32, 32, 8192, rope_theta=1.3e5, **_SMOL),
    _llama("tinyllama-1.1b", 32000, 2048, 5632, 22, 32, 4, 2048, **_L2),
    _llama("llama-7b", 32000, 4096, 11008, 32, 32, 32, 2048, **_L1),
    _llama("llama-13b", 32000, 5120, 13824, 40, 40, 40, 2048, **_L1),
    _llama("llama-33b", 32000, 6656, 17920, 60, 52, 52, 2048, **_L1),
    _llama("llama-65b", 32000, 8192, 22016, 80, 64, 64, 2048, **_L1),
    _llama("llama-2-7b", 32000, 4096, 11008, 32, 32, 32, 4096, **_L2),
    _llama("llama-2-13b", 32000, 5120, 13824, 40, 40, 40, 4096, **_L2),
    _llama("llama-70b", 32000, 8192, 28672, 80, 64, 8, 4096, **_L2),
    _llama("llama-3-8b", 128256, 4096, 14336, 32, 32, 8, 8192, **_L3),
    _llama("llama-3-70b", 128256, 8192, 28672, 80, 64, 8, 8192, **_L3),
    _llama("llama-3.1-8b", 128256, 4096, 14336, 32, 32, 8, 131072, rope_scaling=LLAMA_31, **_L3),
    _llama("llama-3.1-70b", 128256, 8192, 28672, 80, 64, 8, 131072, rope_scaling=LLAMA_31, **_L3),
    _llama("llama-3.2-1b", 128256, 2048, 8192, 16, 32, 8, 131072, rope_scaling=LLAMA_32, tie_embeddings=True, **_L3),
    _llama("llama-3.2-3b", 128256, 3072, 8192, 28, 24, 8, 131072, rope_scaling=LLAMA_32, tie_embeddings=True, **_L3),
    _llama("mistral-7b", 32768, 4096, 14336, 32, 32, 8, 32768, rope_theta=1e6, **_L2),
    _qwen25("qwen2.5-0.5b", 151936, 896, 4864, 24, 14, 2, tie_embeddings=True),
    _qwen25("qwen2.5-1.5b", 151936, 1536, 8960, 28, 12, 2, tie_embeddings=True),
    _qwen25("qwen2.5-7b", 152064, 3584, 18944, 28, 28, 4),
    _qwen25("qwen2.5-14b", 152064, 5120, 13824, 48, 40, 8),
    _qwen25("qwen2.5-32b", 152064, 5120, 27648, 64, 40, 8),
    _qwen25("qwen2.5-72b", 152064, 8192, 29568, 80, 64, 8),
    _qwen3("qwen3-0.6b", 1024, 3072, 28, 16, tie_embeddings=True),
    _qwen3("qwen3-1.7b", 2048, 6144, 28, 16, tie_embeddings=True),
    _qwen3("qwen3-4b", 2560, 9728, 36, 32, tie_embeddings=True),
    _qwen3("qwen3-8b", 4096, 12288, 36, 32),
    _qwen3("qwen3-14b", 5120, 17408, 40, 40),
    _qwen3("qwen3-32b", 5120, 25600, 64, 64),
    _ungated("opt-125m", 50272, 768, 12, 12, 12),
    _ungated("opt-1.3b", 50272, 2048, 24, 32, 32),
    _ungated("opt-6.7b", 50272, 4096, 32, 32, 32),
    _ungated("opt-13b", 50272, 5120, 40, 40, 40),
    _ungated("opt-30b", 50272, 7168, 48, 56, 56),
    _ungated("opt-66b", 50272, 9216, 64, 72, 72),
    _ungated("opt-175b", 50272, 12288, 96, 96, 96),
    _ungated("falcon-40b", 65024, 8192, 60, 128, 8),
)
SHAPES = {config.name: config for config in _TABLE}
SIMULATED_ONLY = frozenset(name for name in SHAPES if name.startswith(("opt-", "falcon-")))


def shape(name: str) -> ModelConfig:
    """The published shape called `name`; a leading `random:` is allowed. ModelError lists the names there are."""
    config = SHAPES.get(name.removeprefix("random:").lower())
    if config is None:
        raise ModelError(f"no shape is called {name!r}; known are {', '.join(SHAPES)}")
    return config
