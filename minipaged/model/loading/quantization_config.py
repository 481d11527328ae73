"""`quantization_config` of a Hugging Face folder: which layout its packed matrices have. What is not one of the two known is refused.

Sources: AutoAWQ (awq/models/_config.py), GPTQModel (quantization/config.py), transformers' AwqConfig and GPTQConfig. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from minipaged.errors import ModelError

GROUPS = (32, 64, 128)


@dataclass(frozen=True, slots=True)
class Quantization:
    """How matrices are packed. group: inputs that share a scale, None for all of a row; symmetric: all zero points are the middle code."""

    method: Literal["awq", "gptq"]
    group: int | None
    symmetric: bool
    zeros_less_one: bool = False  # what the config says of GPTQ's zero points: version 1 stores each less one


def read_quantization(values: dict[str, Any], path: Path) -> Quantization | None:
    """The quantization that a config.json names, or None. ModelError for any that the loader does not know, by its name."""
    given = values.get("quantization_config")
    if not given:
        return None
    if not isinstance(given, dict):
        raise ModelError(f"{path}: quantization_config must be an object, not {given!r:.60}")
    method = given.get("quant_method")
    if method not in ("awq", "gptq"):
        raise ModelError(
            f"{path}: quantization_config quant_method {method!r:.60} is not supported; awq and gptq are, of four bits, and GGUF files"
        )
    bits = given.get("bits", given.get("w_bit"))
    if bits != 4:
        raise ModelError(f"{path}: quantization_config bits {bits!r:.60} is not supported; 4 is")
    group = given.get("group_size", given.get("q_group_size"))
    if group not in (*GROUPS, -1):
        raise ModelError(
            f"{path}: quantization_config group_size {group!r:.60} is not supported; {', '.join(map(str, GROUPS))} and -1 are"
        )
    size = None if group == -1 else group
    return _awq(given, size, path) if method == "awq" else _gptq(given, size, path)


def _awq(given: dict[str, Any], group: int | None, path: Path) -> Quantization:
    _refuse(given, path, "version", "gemm", (None, "gemm", "GEMM"))
    return Quantization("awq", group, not given.get("zero_point", True))


def _gptq(given: dict[str, Any], group: int | None, path: Path) -> Quantization:
    layout = given.get("checkpoint_format") or "gptq"
    _refuse(given, path, "checkpoint_format", "gptq, gptq_v2", (None, "", "gptq", "gptq_v2"))
    _refuse(given, path, "is_marlin_format", "false", (None, False))
    _refuse(given, path, "pack_dtype", "int32", (None, "int32"))
    _refuse(given, path, "dynamic", "none", (None, {}))
    return Quantization("gptq", group, bool(given.get("sym", True)), layout == "gptq")


def _refuse(given: dict[str, Any], path: Path, name: str, known: str, allowed: tuple[Any, ...]) -> None:
    if given.get(name) not in allowed:
        raise ModelError(
            f"{path}: quantization_config {name} {given[name]!r:.60} is not supported for {given['quant_method']}; {known} is"
        )
