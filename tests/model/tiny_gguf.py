"""Tiny GGUF files, written by the gguf package from models that transformers made, as llama.cpp's converter would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import transformers

from minipaged.model.loading.gguf_model import NAMES

STORED = {name: stored for stored, name in NAMES.items()}


def byte_letters() -> list[str]:
    """GPT-2's 256 letters in the order of their bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of q and k (`LlamaModel.permute` in convert_hf_to_gguf.py)."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def stored_name(name: str) -> str:
    """`model.layers.3.self_attn.q_proj.weight` -> `blk.3.attn_q.weight`."""
    stem, _, kind = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, layer, rest = stem.split(".", 3)
        return f"blk.{layer}.{STORED[rest]}.{kind}"
    return f"{STORED[stem]}.{kind}"


def write_gguf(
    path: Path,
    model: Any,
    architecture: str = "llama",
    *,
    metadata: dict[str, Any] | None = None,
    drop: tuple[str, ...] = (),
    tensors: dict[str, np.ndarray] | None = None,
) -> None:
    """Write `model` to `path` in float32. `metadata` and `tensors` add or replace; `drop` names keys and tensors to leave out."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (describe(model.config, architecture) | (metadata or {})).items():
        if key not in drop:
            add_value(writer, key, value)
    for name, values in (stored_tensors(model, architecture) | (tensors or {})).items():
        if name not in drop:
            writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def describe(config: transformers.PretrainedConfig, architecture: str) -> dict[str, Any]:
    """The metadata that goes with a model, and a tokenizer of bytes (as many as the vocabulary has room for)."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        f"{architecture}.block_count": config.num_hidden_layers,
        f"{architecture}.context_length": config.max_position_embeddings,
        f"{architecture}.embedding_length": config.hidden_size,
        f"{architecture}.feed_forward_length": config.intermediate_size,
        f"{architecture}.attention.head_count": config.num_attention_heads,
        f"{architecture}.attention.head_count_kv": config.num_key_value_heads,
        f"{architecture}.attention.key_length": head_dim,
        f"{architecture}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{architecture}.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        f"{architecture}.rope.dimension_count": head_dim,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [*byte_letters()[: config.vocab_size - 1], "AB"],
        "tokenizer.ggml.token_type": [1] * min(257, config.vocab_size),
        "tokenizer.ggml.merges": ["A B"],
        "tokenizer.ggml.eos_token_id": 2,
    }


def stored_tensors(model: Any, architecture: str) -> dict[str, np.ndarray]:
    config = model.config
    stored: dict[str, np.ndarray] = {}
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = parameter.numpy()
        if architecture == "llama" and ".q_proj." in name:
            values = permute(values, config.num_attention_heads)
        if architecture == "llama" and ".k_proj." in name:
            values = permute(values, config.num_key_value_heads)
        stored[stored_name(name)] = values
    return stored
