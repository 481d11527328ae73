"""From a checkpoint on disk to the parameters of the network.

Knows two forms, GGUF files and Hugging Face folders, and one rule: every slot of the model is filled by exactly one tensor
of the right shape, and every tensor has a slot. All names and shapes are checked before the first value is copied, and
values go straight into the parameters, so that no more than one tensor is held besides them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from minipaged.config import ModelConfig, Progress
from minipaged.errors import ModelError
from minipaged.model.llama import Llama
from minipaged.model.loading.gguf_model import GGUFCheckpoint
from minipaged.model.loading.hf_folder import FolderCheckpoint

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class Checkpoint(Protocol):
    """A model on disk. Tensors are named as Hugging Face names them."""

    path: Path
    config: ModelConfig

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor that belongs to the network."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor's values, in whatever float type they are held."""
        ...


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a GGUF file or a Hugging Face folder and read its config; ModelError says what is wrong with it."""
    if path.is_dir():
        return FolderCheckpoint(path)
    if not path.exists():
        raise ModelError(f"{path}: no such file or folder")
    if path.suffix in PICKLES:
        raise ModelError(f"{path}: a pickle checkpoint, which can run code when opened; convert it to safetensors")
    if path.suffix == ".safetensors":
        raise ModelError(f"{path}: give the folder that holds it, with its config.json and tokenizer.json")
    return GGUFCheckpoint(path)


def load_model(
    checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device | str, progress: Progress | None = None
) -> Llama:
    """Build the network and fill it from the checkpoint. ModelError names a missing, unexpected or misshapen tensor."""
    last = f"model.layers.{checkpoint.config.num_layers - 1}.input_layernorm.weight"
    if last not in checkpoint.shapes():  # asked first, since a damaged count of layers could be in the billions
        raise ModelError(
            f"{checkpoint.path}: {checkpoint.config.num_layers} layers are promised, but {last} is missing"
        )
    model = Llama(checkpoint.config, dtype=dtype, device="meta")
    check_shapes(checkpoint, {name: tuple(slot.shape) for name, slot in model.slots().items()})
    model = Llama(checkpoint.config, dtype=dtype, device=device)
    slots = model.slots()
    for done, (name, slot) in enumerate(slots.items()):
        if progress is not None:
            progress("loading weights", done, len(slots))
        slot.copy_(checkpoint.read(name))
    if progress is not None:
        progress("loading weights", len(slots), len(slots))
    return model


def check_shapes(checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise unless the checkpoint holds exactly the expected tensors, each in its shape."""
    found = checkpoint.shapes()
    for name, shape in expected.items():
        if name not in found:
            raise ModelError(f"{checkpoint.path}: tensor {name} is missing; a shape of {list(shape)} was expected")
        if found[name] != shape:
            raise ModelError(
                f"{checkpoint.path}: tensor {name} has the shape {list(found[name])}, but the config asks for {list(shape)}"
            )
    for name in found:
        if name not in expected:
            raise ModelError(
                f"{checkpoint.path}: tensor {name} has no place in the network that the config describes; "
                "ignoring it would give wrong answers"
            )
