"""The GGUF container: metadata and named tensors in one file.

Reads versions 2 and 3 of the GGUF specification, and turns a stored tensor into float32. weights.py checks which tensors a model needs.
Every length is checked against the file before it is used, so a damaged file ends in one ModelError and nothing else.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minipaged.errors import ModelError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4
# Value types of the metadata: struct code by type number; 8 is a string, 9 an array.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
# Tensor types read here directly, by ggml's number; every other one goes through the gguf package.
F32, F16, Q4_0, Q4_1, Q8_0, BF16 = 0, 1, 2, 3, 8, 30


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies. `shape` is in torch's order, rows first; GGUF stores it reversed."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int  # from the start of the file, in bytes
    num_bytes: int


class GGUFFile:
    """An open GGUF file: `metadata` as plain values, `tensors` by name, and `read` for the values."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bytes = _map(path)
        cursor = _Cursor(self._bytes, path)
        num_tensors = _read_header(cursor)
        self.metadata = _read_metadata(cursor)
        self.tensors = self._read_tensor_table(cursor, num_tensors)

    def _read_tensor_table(self, cursor: _Cursor, num_tensors: int) -> dict[str, TensorInfo]:
        rows: list[tuple[str, tuple[int, ...], int, int]] = []
        for _ in range(num_tensors):
            cursor.where = "the table of tensors"
            name = cursor.name()
            cursor.where = f"the entry of tensor {name}"
            num_dimensions = cursor.scalar("I")
            if not 1 <= num_dimensions <= MAX_DIMENSIONS:
                raise ModelError(f"{self.path}: tensor {name} claims {num_dimensions} dimensions; the file is damaged")
            shape = tuple(reversed([cursor.scalar("Q") for _ in range(num_dimensions)]))
            rows.append((name, shape, cursor.scalar("I"), cursor.scalar("Q")))
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ModelError(f"{self.path}: general.alignment must be a power of two, not {alignment!r}")
        start = -(-cursor.position // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for name, shape, kind, offset in rows:
            if name in tensors:
                raise ModelError(f"{self.path}: tensor {name} appears twice; the file is damaged")
            tensors[name] = TensorInfo(name, shape, kind, start + offset, self._num_bytes(name, shape, kind))
        self._check_ends(tensors)
        return tensors

    def _num_bytes(self, name: str, shape: tuple[int, ...], kind: int) -> int:
        block, size, _ = self._quantization(name, kind)
        if shape[-1] % block:
            raise ModelError(f"{self.path}: rows of tensor {name} hold {shape[-1]} values, not a multiple of {block}")
        return math.prod(shape) // block * size

    def _quantization(self, name: str, kind: int) -> tuple[int, int, Any]:
        """Values a block, bytes a block, and the gguf package's own type."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            known = GGMLQuantizationType(kind)
        except ValueError:
            raise ModelError(f"{self.path}: tensor {name} has type {kind}, which no known GGUF version has") from None
        block, size = GGML_QUANT_SIZES[known]
        return block, size, known

    def _check_ends(self, tensors: dict[str, TensorInfo]) -> None:
        size = len(self._bytes)
        for info in tensors.values():
            if info.offset + info.num_bytes > size:
                raise ModelError(
                    f"{self.path}: truncated: tensor {info.name} ends at byte {info.offset + info.num_bytes}, "
                    f"the file at byte {size}; fetch the file again"
                )

    def read(self, name: str) -> Tensor:
        """The tensor's values, dequantized to float32 (F16 and BF16 stay as they are), in torch's order of dimensions.

        The result may share the mapped file's memory: copy it, do not write to it.
        """
        info = self.tensors[name]
        data = torch.frombuffer(self._bytes, dtype=torch.uint8, offset=info.offset, count=info.num_bytes)
        plain = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}.get(info.type)
        if plain is not None:
            return data.view(plain).view(info.shape)
        if info.type in _FAST:
            return _FAST[info.type](data).view(info.shape)
        return self._read_by_package(info, data)

    def read_blocks(self, name: str) -> Tensor:
        """A matrix as it is stored, uint8 [rows, blocks of a row, bytes of a block]; it may share the mapped file's memory."""
        info = self.tensors[name]
        block, size, _ = self._quantization(info.name, info.type)
        data = torch.frombuffer(self._bytes, dtype=torch.uint8, offset=info.offset, count=info.num_bytes)
        return data.view(*info.shape[:-1], info.shape[-1] // block, size)

    def _read_by_package(self, info: TensorInfo, data: Tensor) -> Tensor:
        from gguf.quants import dequantize

        _, size, known = self._quantization(info.name, info.type)
        try:
            values = dequantize(data.numpy().reshape(-1, size), known)
        except NotImplementedError:
            raise ModelError(
                f"{self.path}: tensor {info.name} has type {known.name}, which the gguf package cannot dequantize; "
                "use a file quantized as F16, BF16, Q8_0, Q6_K, Q5_K, Q4_K, Q4_1 or Q4_0"
            ) from None
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).view(info.shape)


def _map(path: Path) -> mmap.mmap:
    """The file's bytes, mapped copy-on-write: torch wants a writable buffer, the file stays untouched."""
    try:
        with path.open("rb") as file:
            if file.read(4) != MAGIC:
                raise ModelError(f"{path}: not a GGUF file: it does not begin with the letters GGUF")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error


class _Cursor:
    """Reads little-endian values one after another, and says where it was when the file ends too soon."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path = data, path
        self.position = len(MAGIC)
        self.where = "the header"

    def take(self, num_bytes: int) -> bytes:
        end = self.position + num_bytes
        if end > len(self.data):
            raise ModelError(
                f"{self.path}: truncated: the file ends at byte {len(self.data)}, inside {self.where}; fetch the file again"
            )
        start, self.position = self.position, end
        return self.data[start:end]

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        raw = self.take(self.scalar("Q"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise ModelError(f"{self.path}: {self.where} holds text that is not UTF-8; the file is damaged") from None

    def name(self) -> str:
        text = self.string()
        if not text.isprintable():
            raise ModelError(f"{self.path}: {self.where} holds the name {text!r:.80}; the file is damaged")
        return text

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.scalar(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            return self.array()
        raise ModelError(f"{self.path}: {self.where} has the unknown value type {kind}; the file is damaged")

    def array(self) -> list[Any]:
        kind, length = self.scalar("I"), self.scalar("Q")
        if kind in SCALARS:
            code = SCALARS[kind]
            raw = self.take(length * struct.calcsize("<" + code))
            return list(struct.unpack(f"<{length}{code}", raw))
        if kind != STRING:
            raise ModelError(f"{self.path}: {self.where} is an array of value type {kind}, which cannot be read")
        return [self.string() for _ in range(length)]


def _read_header(cursor: _Cursor) -> int:
    """Check the version; return the number of tensors and leave the cursor before the number of metadata pairs."""
    version = cursor.scalar("I")
    if version & 0xFFFF == 0:
        raise ModelError(f"{cursor.path}: a big-endian GGUF file; only little-endian ones can be read")
    if version not in VERSIONS:
        raise ModelError(f"{cursor.path}: GGUF version {version}; versions {', '.join(map(str, VERSIONS))} can be read")
    num_tensors: int = cursor.scalar("Q")
    return num_tensors


def _read_metadata(cursor: _Cursor) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(cursor.scalar("Q")):
        cursor.where = "the metadata"
        key = cursor.name()
        cursor.where = f"metadata {key}"
        if key in metadata:
            raise ModelError(f"{cursor.path}: metadata {key} appears twice; the file is damaged")
        metadata[key] = cursor.value(cursor.scalar("I"))
    return metadata


def _blocks(data: Tensor, num_bytes: int, header: int) -> tuple[Tensor, Tensor]:
    """Split rows of `num_bytes` into their float16 header, widened to float32, and the packed values."""
    rows = data.view(-1, num_bytes)
    return rows[:, :header].contiguous().view(torch.float16).float(), rows[:, header:]


def _nibbles(packed: Tensor) -> Tensor:
    """The low halves of 16 bytes, then the high halves, as float32."""
    return torch.cat((packed & 15, packed >> 4), dim=-1).float()


def _read_q4_0(data: Tensor) -> Tensor:
    """32 values in 18 bytes: scale * (nibble - 8)."""
    scale, packed = _blocks(data, 18, 2)
    return _nibbles(packed).sub_(8).mul_(scale)


def _read_q4_1(data: Tensor) -> Tensor:
    """32 values in 20 bytes: scale * nibble + minimum."""
    head, packed = _blocks(data, 20, 4)
    return _nibbles(packed).mul_(head[:, :1]).add_(head[:, 1:])


def _read_q8_0(data: Tensor) -> Tensor:
    """32 values in 34 bytes: scale * signed byte."""
    scale, packed = _blocks(data, 34, 2)
    return packed.view(torch.int8).float().mul_(scale)


_FAST = {Q4_0: _read_q4_0, Q4_1: _read_q4_1, Q8_0: _read_q8_0}
