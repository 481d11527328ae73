"""A model kept in a GGUF file: its config from the metadata, its tensors under Hugging Face's names.

It translates llama.cpp's names for Llama-style networks, and undoes the reordering of rows by llama.cpp's converter. gguf_file.py reads
the bytes, weights.py fills the network.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minipaged.config import ModelConfig, RopeDivisors, RopeScaling
from minipaged.errors import InputError, ModelError
from minipaged.model.loading import rope_scaling
from minipaged.model.loading.gguf_blocks import PACKABLE
from minipaged.model.loading.gguf_file import GGUFFile
from minipaged.model.loading.gguf_tokenizer import end_tokens, special_token
from minipaged.model.loading.keys import (
    ARCHITECTURE_KEYS,
    GENERAL_KEYS,
    GGUF_TOKENIZER_KEYS,
    check_keys,
)
from minipaged.model.loading.quantized import QuantizedMatrix, can_pack

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # `llama` also holds SmolLM2 and Mistral
ROPE_FACTORS = "rope_freqs.weight"
YARN_ADJUSTMENTS = {
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
}
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GGUFCheckpoint:
    """A GGUF file opened as a model (weights.Checkpoint)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = GGUFFile(path)
        self.architecture = str(self.file.metadata.get("general.architecture"))
        if self.architecture not in ARCHITECTURES:
            raise ModelError(
                f"{path}: general.architecture {self.architecture!r} is not supported; "
                f"{', '.join(ARCHITECTURES)} are (Llama, SmolLM2, Mistral, Qwen 2.5, Qwen 3)"
            )
        self.config = self._config()
        self._stored = {_hf_name(name): name for name in self.file.tensors if name != ROPE_FACTORS}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: self.file.tensors[stored].shape for name, stored in self._stored.items()}

    def read(self, name: str) -> Tensor:
        values = self.file.read(self._stored[name])
        if self.architecture != "llama":
            return values
        if ".q_proj." in name:
            return _undo_permutation(values, self.config.num_heads)
        if ".k_proj." in name:
            return _undo_permutation(values, self.config.num_kv_heads)
        return values

    def read_packed(self, name: str) -> QuantizedMatrix | None:
        stored = self._stored[name]
        info = self.file.tensors[stored]
        if self.packed_bits(name) is None:
            return None
        blocks = PACKABLE[info.type]
        matrix = blocks.read(self.file.read_blocks(stored))
        heads = {"q_proj": self.config.num_heads, "k_proj": self.config.num_kv_heads}.get(name.split(".")[-2])
        if self.architecture != "llama" or heads is None:
            return matrix
        return matrix.rows(_undo_permutation(torch.arange(info.shape[0]), heads))

    def packed_bits(self, name: str) -> float | None:
        info = self.file.tensors[self._stored[name]]
        blocks = PACKABLE.get(info.type)
        product = len(info.shape) == 2 and "embed_tokens" not in name
        return blocks.bits if blocks is not None and product and can_pack(info.shape[-1], blocks.group) else None

    def _config(self) -> ModelConfig:
        self._refuse_what_would_be_ignored()
        heads, hidden = self._whole("attention.head_count"), self._whole("embedding_length")
        head_dim = self._head_dim(hidden, heads)
        tensors = self.file.tensors
        try:
            return ModelConfig(
                name=str(self.file.metadata.get("general.name", self.path.stem)),
                vocab_size=tensors["token_embd.weight"].shape[0]
                if "token_embd.weight" in tensors
                else self._whole("vocab_size"),
                hidden_size=hidden,
                intermediate_size=self._whole("feed_forward_length"),
                num_layers=self._whole("block_count"),
                num_heads=heads,
                num_kv_heads=self._whole("attention.head_count_kv", heads),
                head_dim=head_dim,
                max_position=self._whole("context_length"),
                rms_norm_eps=self._real("attention.layer_norm_rms_epsilon"),
                rope_theta=self._real("rope.freq_base", 10000.0),
                rope_scaling=self._rope_scaling(head_dim),
                tie_embeddings="output.weight" not in tensors,
                attention_bias="blk.0.attn_q.bias" in tensors,
                output_bias="blk.0.attn_output.bias" in tensors,
                mlp_bias="blk.0.ffn_up.bias" in tensors,
                qk_norm="blk.0.attn_q_norm.weight" in tensors,
                eos_token_ids=end_tokens(self.file.metadata, self.path),
                bos_token_id=special_token(self.file.metadata, "bos"),
            )
        except ModelError:
            raise
        except InputError as error:
            raise ModelError(f"{self.path}: {error}") from None

    def _refuse_what_would_be_ignored(self) -> None:
        metadata, prefix = self.file.metadata, f"{self.architecture}."
        ours = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
        check_keys(ours, ARCHITECTURE_KEYS, self.path, prefix)
        check_keys(metadata, GENERAL_KEYS | GGUF_TOKENIZER_KEYS, self.path)
        parts = metadata.get("split.count", 1)
        if parts not in (0, 1):
            raise ModelError(
                f"{self.path}: one part of a file split in {parts}; join them first (llama-gguf-split --merge)"
            )

    def _head_dim(self, hidden: int, heads: int) -> int:
        head_dim = self._whole("attention.key_length", hidden // max(heads, 1))
        for key in ("rope.dimension_count", "attention.value_length"):
            if self._whole(key, head_dim) != head_dim:
                raise ModelError(
                    f"{self.path}: {self.architecture}.{key} differs from the head size {head_dim}; not supported"
                )
        return head_dim

    def _rope_scaling(self, head_dim: int) -> RopeScaling | RopeDivisors | None:
        """By llama.cpp's rules: a factor without a type is linear, and the old key of it counts where the new one is missing."""
        kind = self.file.metadata.get(f"{self.architecture}.rope.scaling.type", "linear")
        factor = self._real("rope.scaling.factor", self._real("rope.scale_linear", 1.0)) or 1.0
        scaled = factor != 1 and kind != "none"
        if kind not in ("none", "linear", "yarn"):
            raise ModelError(f"{self.path}: {self.architecture}.rope.scaling.type {kind!r:.60} is not supported")
        if ROPE_FACTORS in self.file.tensors:
            if scaled:
                raise ModelError(f"{self.path}: {ROPE_FACTORS} and a rope scaling factor of {factor:g} together")
            return self._llama_3_scaling(head_dim)
        if not scaled:
            return None
        if kind == "linear":
            return rope_scaling.linear(head_dim, factor)
        for key, default in YARN_ADJUSTMENTS.items():
            if self._real(key, default) != default:
                raise ModelError(f"{self.path}: {self.architecture}.{key} is not supported; {default:g} is")
        return rope_scaling.yarn(
            head_dim,
            self._real("rope.freq_base", 10000.0),
            factor,
            self._whole("rope.scaling.original_context_length", self._whole("context_length")),
            beta_fast=self._real("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=self._real("rope.scaling.yarn_beta_slow", 1.0),
        )

    def _llama_3_scaling(self, head_dim: int) -> RopeScaling:
        """Llama 3's scaling. GGUF keeps only the divisors that follow from it, so its numbers are found again and checked."""
        from minipaged.model.llama import rope_frequencies

        divisors = self.file.read(ROPE_FACTORS).float()
        scaling = RopeScaling(float(divisors.max()), 1.0, 4.0, 8192)
        theta = self._real("rope.freq_base", 10000.0)
        expected = rope_frequencies(head_dim, theta, None) / rope_frequencies(head_dim, theta, scaling)
        if divisors.shape != expected.shape or not torch.allclose(divisors, expected, rtol=1e-3):
            raise ModelError(f"{self.path}: {ROPE_FACTORS} is not Llama 3's rope scaling, the only one supported")
        return scaling

    def _whole(self, key: str, default: int | None = None) -> int:
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ModelError(f"{self.path}: metadata {self.architecture}.{key} must be a whole number, not {value!r}")
        return value

    def _real(self, key: str, default: float | None = None) -> float:
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ModelError(f"{self.path}: metadata {self.architecture}.{key} must be a number, not {value!r}")
        return float(value)

    def _value(self, key: str, default: Any) -> Any:
        value = self.file.metadata.get(f"{self.architecture}.{key}", default)
        if value is None:
            raise ModelError(f"{self.path}: metadata {self.architecture}.{key} is missing")
        return value


def _hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; a name that is not known stays as it is."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in NAMES:
        return name
    prefix = f"model.layers.{match[1]}." if match[1] else ""
    return f"{prefix}{NAMES[match[2]]}.{match[3]}"


def _undo_permutation(values: Tensor, num_heads: int) -> Tensor:
    """Rows of q and k from llama.cpp's order (pairs side by side) back to Hugging Face's (first halves, then second)."""
    rows = values.shape[0]
    return values.view(num_heads, rows // num_heads // 2, 2, *values.shape[1:]).transpose(1, 2).reshape(values.shape)
