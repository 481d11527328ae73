"""A model kept as Hugging Face keeps it: a folder with config.json and safetensors, in one file or in shards.

Reads the safetensors files and their index; hf_config.py reads config.json, weights.py fills the network. Pickle checkpoints are refused:
opening one can run code.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minipaged.errors import ModelError
from minipaged.model.loading.hf_config import read_config, read_json
from minipaged.model.loading.hf_quantized import (
    PARTS,
    ZeroPoints,
    quantized_stem,
    read_matrix,
    shape_of,
    values_of,
)
from minipaged.model.loading.quantization_config import read_quantization
from minipaged.model.loading.quantized import QuantizedMatrix, can_pack

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATS = ("F64", "F32", "F16", "BF16")
HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
ROWS_AT_ONCE = 4096  # of the two, while they are compared


class FolderCheckpoint:
    """A folder opened as a model (weights.Checkpoint)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_config(path)
        self.quantization = read_quantization(read_json(path / CONFIG), path / CONFIG)
        self._zero_points = ZeroPoints(self.quantization, path) if self.quantization else None
        self._open: tuple[str, Any] | None = None  # the shard last read, held open
        self._files = self._find_tensors()
        self._pieces: dict[str, tuple[str, int, int]] = {}  # of fused tensors: stored name, first row, rows
        if self.config.tie_embeddings and self._has_own_head():
            self.config = replace(self.config, tie_embeddings=False)
        self._shapes = self._read_shapes()

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def read(self, name: str) -> Tensor:
        name, first, count = self._pieces.get(name, (name, 0, None))
        if name not in self._files:
            dequantized = values_of(*self._quantized(name))
            return dequantized if count is None else dequantized[first : first + count]
        file = self._files[name]
        if self._open is None or self._open[0] != file:
            self._open = (file, _open(self.path / file))
        try:
            if count is not None:
                piece: Tensor = self._open[1].get_slice(name)[first : first + count]
                return piece
            values: Tensor = self._open[1].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{self.path / file}: tensor {name} cannot be read: {_first_line(error)}") from None
        return values

    def read_packed(self, name: str) -> QuantizedMatrix | None:
        name, first, count = self._pieces.get(name, (name, 0, None))
        if name in self._files:
            return None
        matrix, order = self._quantized(name)
        if order is not None or not can_pack(matrix.codes.shape[1], matrix.group):
            return None
        return matrix if count is None else matrix.rows(slice(first, first + count))

    def packed_bits(self, name: str) -> float | None:
        stored = self._pieces.get(name, (name, 0, None))[0]
        if self.quantization is None or stored in self._files:
            return None
        return 4 + 32 / (self.quantization.group or self._shapes[name][1])

    def _quantized(self, name: str) -> tuple[QuantizedMatrix, Tensor | None]:
        """A matrix that is stored in parts, and the group of each input if those are not in order."""
        assert self._zero_points is not None
        stem = name.removesuffix(".weight")
        parts = {part: self.read(f"{stem}.{part}") for part in PARTS if f"{stem}.{part}" in self._files}
        return read_matrix(stem, parts, self._zero_points)

    def _has_own_head(self) -> bool:
        """Whether an lm_head is stored that differs from the embeddings, whatever tie_word_embeddings says."""
        if HEAD not in self._files or EMBEDDINGS not in self._files:
            return False
        head, embeddings = self._slice(HEAD), self._slice(EMBEDDINGS)
        rows: list[int] = head.get_shape()
        if rows != embeddings.get_shape() or head.get_dtype() != embeddings.get_dtype():
            return True
        starts = range(0, rows[0] if rows else 0, ROWS_AT_ONCE)
        return any(not torch.equal(head[i : i + ROWS_AT_ONCE], embeddings[i : i + ROWS_AT_ONCE]) for i in starts)

    def _slice(self, name: str) -> Any:
        """A stored tensor whose rows can be read in parts."""
        file = self.path / self._files[name]
        try:
            return _open(file).get_slice(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file}: tensor {name} is missing, though {INDEX} names it") from error

    def _find_tensors(self) -> dict[str, str]:
        """Which file holds which tensor."""
        index = self.path / INDEX
        if index.exists():
            return self._read_index(index)
        single = self.path / SINGLE
        files = [single] if single.exists() else sorted(self.path.glob("*.safetensors"))
        if not files:
            raise ModelError(self._why_nothing())
        found: dict[str, str] = {}
        for file in files:
            names = _open(file).keys()
            for name in names:
                if name in found:
                    raise ModelError(
                        f"{self.path}: tensor {name} is in both {found[name]} and {file.name}; {INDEX} is missing"
                    )
                found[name] = file.name
        return found

    def _read_index(self, index: Path) -> dict[str, str]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise ModelError(f"{index}: weight_map must name the file of each tensor")
        for file in sorted(set(weight_map.values())):
            if Path(file).name != file:
                raise ModelError(f"{index}: names {file!r:.80}, which is not a file of this folder")
            if not os.path.isfile(self.path / file):
                raise ModelError(f"{index}: names {file!r:.80}, which is not there; fetch it again")
        return weight_map

    def _read_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        parts: dict[str, dict[str, tuple[int, ...]]] = {}  # of matrices that are stored in parts
        for file in sorted(set(self._files.values())):
            tensors = _open(self.path / file)
            held = set(tensors.keys())
            for name in (name for name, place in self._files.items() if place == file):
                if name not in held:
                    raise ModelError(f"{self.path / file}: tensor {name} is missing, though {INDEX} names it")
                view = tensors.get_slice(name)
                stem = quantized_stem(name) if self.quantization is not None else None
                if stem is not None:
                    parts.setdefault(stem, {})[name.rpartition(".")[2]] = tuple(view.get_shape())
                    continue
                if view.get_dtype() not in FLOATS:
                    raise ModelError(
                        f"{self.path / file}: tensor {name} is stored as {view.get_dtype()}; {', '.join(FLOATS)} can be read"
                    )
                if not self._ignored(name):
                    shapes |= self._cut(name, tuple(view.get_shape()))
        for stem, of_parts in parts.items():
            assert self.quantization is not None
            whole = shape_of(stem, of_parts, self.quantization, self.path)
            shapes |= self._cut(f"{stem}.weight", whole)
            if f"{stem}.bias" in shapes and not self._has_bias(stem) and not bool(self.read(f"{stem}.bias").any()):
                del shapes[f"{stem}.bias"]  # GPTQ's writers give every matrix a bias, of zeros
        return shapes

    def _has_bias(self, stem: str) -> bool:
        """Whether the network adds a bias after that matrix."""
        config, last = self.config, stem.rpartition(".")[2]
        if last in ("q_proj", "k_proj", "v_proj", "qkv_proj"):
            return config.attention_bias
        return config.output_bias if last == "o_proj" else config.mlp_bias and last != "lm_head"

    def _cut(self, name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The tensors that a stored one holds, with their shapes: itself, or those that Phi-3 lays one below the other."""
        config = self.config
        query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        fused = {
            "qkv_proj": (("q_proj", query), ("k_proj", kv), ("v_proj", kv)),
            "gate_up_proj": (("gate_proj", config.intermediate_size), ("up_proj", config.intermediate_size)),
        }
        stem, _, kind = name.rpartition(".")
        place, _, last = stem.rpartition(".")
        if last not in fused:
            return {name: shape}
        rows = sum(count for _, count in fused[last])
        if not shape or shape[0] != rows:
            raise ModelError(
                f"{self.path}: tensor {name} has the shape {list(shape)}, but the config asks for {rows} rows"
            )
        cut, first = {}, 0
        for piece, count in fused[last]:
            whole = f"{place}.{piece}.{kind}"
            if whole in self._files:
                raise ModelError(f"{self.path}: tensor {whole} is stored by itself and inside {name}")
            self._pieces[whole] = (name, first, count)
            cut[whole] = (count, *shape[1:])
            first += count
        return cut

    def _ignored(self, name: str) -> bool:
        """Whether a tensor repeats what the config says: old rotary tables, and the second copy of tied embeddings."""
        return name.endswith("rotary_emb.inv_freq") or (self.config.tie_embeddings and name == HEAD)

    def _why_nothing(self) -> str:
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in self.path.glob(pattern))
        if not pickles:
            return f"{self.path}: holds no *.safetensors"
        return (
            f"{self.path}: holds its weights as a pickle only ({pickles[0]}), which can run code when opened; "
            "convert them to safetensors (transformers: save_pretrained) or fetch a safetensors copy"
        )


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: not a whole safetensors file ({_first_line(error)}); fetch it again") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
