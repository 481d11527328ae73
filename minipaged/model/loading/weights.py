"""From a checkpoint on disk to the parameters of the network.

A checkpoint is a GGUF file or a Hugging Face folder. One rule holds for both: every slot of the model is filled by exactly one tensor
of the right shape, and every tensor has a slot. All names and shapes are checked before the first value is copied, and
values go straight into the parameters, so that no more than one tensor is held besides them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from minipaged.config import ModelConfig, Progress, RopeDivisors
from minipaged.errors import ModelError
from minipaged.model.linear import Packed
from minipaged.model.llama import Llama
from minipaged.model.loading.gguf_model import GGUFCheckpoint
from minipaged.model.loading.hf_folder import FolderCheckpoint
from minipaged.model.loading.quantized import QuantizedMatrix, stack

if TYPE_CHECKING:
    from minipaged.model.split import Part

StaysPacked = Callable[[QuantizedMatrix], bool]
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

    def read_packed(self, name: str) -> QuantizedMatrix | None:
        """A matrix's codes and scales, its rows in the order of `read`; None if it is not stored as such."""
        ...

    def packed_bits(self, name: str) -> float | None:
        """Bits that an element of such a matrix takes as it stays packed, scales included; None of other tensors."""
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
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    progress: Progress | None = None,
    stays_packed: StaysPacked | None = None,
    part: Part | None = None,
    streamed: tuple[int, ...] = (),
) -> Llama:
    """Build the network, or one rank's part of it, and fill it from the checkpoint. ModelError names a missing, unexpected or misshapen
    tensor.

    streamed: layers whose weights stay on the host; not where there is a part. stays_packed: which of the matrices that are stored as
    codes are kept so; the others, and all if it is None, become dense.
    """
    last = f"model.layers.{checkpoint.config.num_layers - 1}.input_layernorm.weight"
    if last not in checkpoint.shapes():  # asked first, since a damaged count of layers could be in the billions
        raise ModelError(
            f"{checkpoint.path}: {checkpoint.config.num_layers} layers are promised, but {last} is missing"
        )
    with torch.device("meta"):  # the rotary frequencies as well
        model = Llama(checkpoint.config, dtype=dtype, device="meta")
    check_shapes(checkpoint, {name: tuple(slot.shape) for name, slot in model.slots().items()})
    config = checkpoint.config
    weight_device = "meta" if stays_packed else None
    if part is None:
        model = Llama(config, dtype=dtype, device=device, weight_device=weight_device, streamed=streamed)
    else:
        model = part.build(config, dtype, device, weight_device)
    if stays_packed is not None:
        for linear, pieces in model.linears():
            matrix = _read_stacked(checkpoint, pieces, part)
            keep = matrix is not None and stays_packed(matrix)
            place = model.weight_device(linear, device)
            linear.format = Packed(matrix.packed(place)) if matrix is not None and keep else linear.dense_on(place)
    slots = model.slots() if part is None else part.slots(model, config)
    for done, (name, slot) in enumerate(slots.items()):
        if progress is not None:
            progress("loading weights", done, len(slots))
        values = work_in(config, name, checkpoint.read(name))
        slot.copy_(values if part is None else part.cut(config, name, values))
    if progress is not None:
        progress("loading weights", len(slots), len(slots))
    return model


def _read_stacked(checkpoint: Checkpoint, pieces: Iterable[str], part: Part | None) -> QuantizedMatrix | None:
    """The matrices that a Linear holds one below the other, or a rank's part of each, if all are stored as codes and none is changed on
    its way in; None also where a rank's columns do not end with a group."""
    config, matrices = checkpoint.config, []
    for piece in pieces:
        name = f"{piece}.weight" if part is None else part.whole_name(config, f"{piece}.weight")
        matrix = checkpoint.read_packed(name)
        if matrix is None:
            return None
        probe = torch.empty(matrix.codes.shape[0], 1)
        if work_in(config, name, probe) is not probe:
            return None
        cut = None if part is None else part.piece(config, name)
        if cut is not None:
            dim, first, count = cut
            if dim == 1 and (first % matrix.group or count % matrix.group):
                return None
            matrix = matrix.columns(first, count) if dim == 1 else matrix.rows(slice(first, first + count))
        matrices.append(matrix)
    return stack(matrices)


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


def work_in(config: ModelConfig, name: str, values: Tensor) -> Tensor:
    """A weight with what its family does around it worked in, so that the network and its kernels need not know of it.

    Granite's multipliers scale rows or norms. The dimensions of a head that turn are moved so that they pair up as the network turns
    them (i with i + head_dim / 2); queries and keys move alike, so their products stay. Whatever scales the scores scales the queries.
    """
    kind = name.rpartition(".")[0].rpartition(".")[2]
    match kind:
        case "embed_tokens":
            return _times(values, config.embedding_multiplier)
        case "norm":  # the last one: a head that is tied to the embedding carries its multiplier as well
            tied = config.embedding_multiplier if config.tie_embeddings else 1.0
            return _times(values, 1.0 / (config.logits_divisor * tied))
        case "o_proj" | "down_proj":
            return _times(values, config.residual_multiplier)
        case "q_proj" | "k_proj" | "q_norm" | "k_norm":
            paired = _pair_up(config, values)
            scaled = kind == ("q_norm" if config.qk_norm else "q_proj")
            return _scale_queries(config, int(name.split(".")[2]), paired) if scaled else paired
    return values


def _times(values: Tensor, factor: float) -> Tensor:
    return values if factor == 1.0 else values.float() * factor


def _pair_up(config: ModelConfig, values: Tensor) -> Tensor:
    """Rows of heads, [heads * head_dim, ...]: of each head the first halves of all pairs, then the second ones."""
    size, turning = config.head_dim, config.rotary_dim or config.head_dim
    if turning == size:
        return values
    first, middle = turning // 2, (size - turning) // 2
    cuts = (first, first, middle, middle)
    turned, partner, still, rest = values.view(-1, size, *values.shape[1:]).split_with_sizes(cuts, dim=1)
    return torch.cat((turned, still, partner, rest), dim=1).reshape(values.shape)


def _scale_queries(config: ModelConfig, layer: int, values: Tensor) -> Tensor:
    """Scaled by what the scores are to be multiplied with beyond 1 / sqrt(head_dim)."""
    scale = 1.0 if config.attention_multiplier is None else config.attention_multiplier * config.head_dim**0.5
    scaling = config.rope_scaling
    if not isinstance(scaling, RopeDivisors) or scaling.attention_factor == 1.0 or layer in config.unrotated_layers:
        return _times(values, scale)
    # queries and keys are both scaled as they turn, and only where they turn
    size, first = config.head_dim, (config.rotary_dim or config.head_dim) // 2
    factors = torch.full((2, size // 2), scale)
    factors[:, :first] *= scaling.attention_factor**2
    heads = values.float().view(-1, size, *values.shape[1:])
    return (heads * factors.view(1, size, *(1 for _ in values.shape[1:]))).reshape(values.shape)
