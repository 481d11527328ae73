"""Names -> models that are ready to run.

It takes every form of a model's name, and loads the model from where that form says. The readers of files are imported when a
file is named: `toy` and `random:SHAPE` need none of them.
"""

from __future__ import annotations

import errno
import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from minipaged.config import DEFAULT_MODEL, ModelConfig, Progress, Weights, parse_offload
from minipaged.errors import InputError, ModelError
from minipaged.model.linear import Packed, int4_on_cpu
from minipaged.model.llama import Llama
from minipaged.model.loading.offload import choose_layers
from minipaged.model.loading.placement import ROOM_SHARE, check_room, choose_device, choose_dtype, free_bytes
from minipaged.model.loading.shapes import SHAPES, SIMULATED_ONLY, shape
from minipaged.model.loading.tokenizer import ByteTokenizer, IdTokenizer, Tokenizer

if TYPE_CHECKING:
    from minipaged.model.loading.weights import Checkpoint, StaysPacked
    from minipaged.model.split import Part

__all__ = ["DEFAULT_MODEL", "LoadedModel", "load", "shape"]

TOY_SEED, TOY_STD = 6, 0.16
TOY_ALPHABET = b"abcdefghijklmnopqrstuvwxyz "
NO_TOKENIZER = (None, "no_vocab", "none")  # as llama.cpp calls it
HUB_FILES = ("*.json", "*.safetensors", "*.jinja")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A network with its weights, or one rank's part of it, and the tokenizer that goes with it."""

    config: ModelConfig  # of the whole: model.config is the part's
    model: Llama
    tokenizer: Tokenizer


def load(
    name: str = DEFAULT_MODEL,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    weights: Weights = "auto",
    progress: Progress | None = None,
    seed: int = 0,
    part: Part | None = None,
    known: Callable[[ModelConfig], None] = lambda config: None,
    offload: str | float = "none",
) -> LoadedModel:
    """The model called `name`, on `device`, ready to run. known: called with its shape before the weights are drawn or read.

    `smollm2-135m` (fetched on first use), `toy`, a folder, a .gguf file, `hf:org/name`, or `random:SHAPE`, whose weights are drawn on
    the device from `seed`. weights: see choose_weights; of random:SHAPE, packed draws four-bit codes. part: what of it one rank is to
    hold. offload: which layers' weights stay in host memory, as LLM's offload_weights. ModelError says in a line what is wrong with a
    name or a file; InputError with the rest.
    """
    place = choose_device(device)
    precision = choose_dtype(dtype, place)
    if part is not None and parse_offload(offload) != 0.0:
        raise InputError(
            "offload_weights needs a model on one device: leave tensor_parallel and pipeline_parallel out, or it"
        )
    if name == "toy":
        if weights == "packed":
            raise InputError("toy has no packed weights: it is drawn in floats")
        known(shape("toy"))
        return _toy(precision, place, part, offload)
    if name.startswith("random:"):
        if name.removeprefix("random:").lower() in SIMULATED_ONLY:
            raise ModelError(f"{name}: this shape is known to the simulator only; its network is not of LLaMA's kind")
        config = shape(name)
        num_bytes = config.num_parameters() * precision.itemsize // (4 if weights == "packed" else 1)
        streamed, less = choose_layers(offload, config, num_bytes, precision, place)
        held = num_bytes - less if streamed else None
        check_weights(name, config if part is None else part.share(config), precision, place, num_bytes=held)
        if weights == "packed" and part is not None:
            raise InputError(f"{name} draws packed weights on one device only: leave weights or the ranks out")
        known(config)
        if part is not None:
            model = part.random(config, seed, precision, place)
        else:
            model = Llama.random(config, seed, precision, place, packed=weights == "packed", streamed=streamed)
        model.stream_layers(place)
        return LoadedModel(config, model.pack(), ByteTokenizer(config.vocab_size))
    return _from_disk(find(name, progress), precision, place, weights, progress, part, known, offload)


def choose_weights(weights: Weights, device: torch.device, dtype: torch.dtype) -> StaysPacked | None:
    """Which quantized matrices stay packed: all, none (None), or with `auto` those whose products are faster so.

    On a GPU that is all in sixteen bits; on a CPU those that torch's own kernel takes, which is faster in bfloat16 alone.
    """
    sixteen_bits = dtype.itemsize == 2
    if weights == "packed" or (weights == "auto" and device.type == "cuda" and sixteen_bits):
        return lambda matrix: True
    if weights == "auto" and device.type == "cpu" and dtype == torch.bfloat16:
        return lambda matrix: matrix.bits == 4 and int4_on_cpu(matrix.codes.shape[0], matrix.group)
    return None


def check_weights(
    name: str,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    fixed_dtype: bool = False,
    num_bytes: int | None = None,
) -> None:
    """Raise InputError, before a weight is drawn or read, if the weights do not fit on the device. The error says what would fit;
    another dtype is named only if the caller can choose one (`fixed_dtype` False). num_bytes: what they take, if not num_parameters
    in `dtype`.
    """

    def takes(other: ModelConfig, kind: torch.dtype) -> int:
        return other.num_parameters() * kind.itemsize

    room, ways = ROOM_SHARE * free_bytes(device), []
    if not fixed_dtype and takes(config, torch.bfloat16) <= room:
        ways.append(f"dtype bfloat16 takes {takes(config, torch.bfloat16) / 2**30:,.1f}")
    smaller = [other for known, other in SHAPES.items() if known not in SIMULATED_ONLY and takes(other, dtype) <= room]
    if name.startswith("random:") and smaller:
        largest = max(smaller, key=lambda other: takes(other, dtype))
        ways.append(f"the largest shape that fits is random:{largest.name}, {takes(largest, dtype) / 2**30:,.1f}")
    kind = str(dtype).removeprefix("torch.")
    check_room(
        f"{name} in {kind}", num_bytes or takes(config, dtype), device, "; ".join(ways) or "take a smaller model"
    )


def weight_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """What a checkpoint's weights take if those that are stored as codes stay so."""
    bits = {name: checkpoint.packed_bits(name) or 8 * dtype.itemsize for name in checkpoint.shapes()}
    return round(sum(math.prod(shape) * bits[name] for name, shape in checkpoint.shapes().items()) / 8)


def find(name: str, progress: Progress | None = None) -> Path:
    """The file or folder that `name` stands for, fetched first if it must be."""
    from minipaged.model.loading.pull import SOURCES, cached_path, is_cached, pull

    if name in SOURCES:
        return cached_path(name) if is_cached(name) else pull(name, progress)
    if name.startswith("hf:"):
        return _from_hub(name.removeprefix("hf:"))
    path = Path(name).expanduser()
    if name and path.exists():
        return path
    if os.sep in name or name.startswith("~") or path.suffix == ".gguf":
        raise ModelError(
            f"{name}: there is no such file or folder; give a folder (config.json, *.safetensors), a .gguf file, "
            f"hf:org/name, or a name: {', '.join((*SOURCES, 'toy'))}"
        )
    raise ModelError(
        f"no model is called {name!r}; there are {', '.join((*SOURCES, 'toy'))}, a folder (config.json, *.safetensors), "
        f"a .gguf file, hf:org/name, and random:SHAPE with SHAPE one of "
        f"{', '.join(known for known in SHAPES if known not in SIMULATED_ONLY)}"
    )


def _from_disk(
    path: Path,
    dtype: torch.dtype,
    device: torch.device,
    weights: Weights,
    progress: Progress | None,
    part: Part | None,
    known: Callable[[ModelConfig], None],
    offload: str | float,
) -> LoadedModel:
    from minipaged.model.loading.weights import load_model, open_checkpoint

    checkpoint = open_checkpoint(path)
    config = checkpoint.config
    tokenizer = tokenizer_of(checkpoint)
    if tokenizer.vocab_size > config.vocab_size:
        raise ModelError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the network only {config.vocab_size}; they do not belong together"
        )
    if not config.eos_token_ids:  # the config names no end; without the tokenizer's, an answer would never stop
        config = replace(config, eos_token_ids=tokenizer.eos_token_ids)
    stays_packed = choose_weights(weights, device, dtype)
    num_bytes = None
    if stays_packed is not None:
        num_bytes = weight_bytes(checkpoint, dtype) // (1 if part is None else part.ranks * part.stages)
    streamed: tuple[int, ...] = ()
    if parse_offload(offload) != 0.0:
        whole = num_bytes or config.num_parameters() * dtype.itemsize
        streamed, less = choose_layers(offload, config, whole, dtype, device)
        num_bytes = whole - less if streamed else num_bytes
    check_weights(str(path), config if part is None else part.share(config), dtype, device, num_bytes=num_bytes)
    known(config)
    model = load_model(
        checkpoint,
        dtype=dtype,
        device=device,
        progress=progress,
        stays_packed=stays_packed,
        part=part,
        streamed=streamed,
    )
    if weights == "packed" and not any(isinstance(linear.format, Packed) for linear, _ in model.linears()):
        raise ModelError(f"{path}: holds no weights that can stay packed; `minipaged quantize` makes a folder of such")
    model.stream_layers(device)
    return LoadedModel(config, model.pack(), tokenizer)


def tokenizer_of(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer beside the weights, or one that takes token ids only where there is none."""
    from minipaged.model.loading.gguf_model import GGUFCheckpoint
    from minipaged.model.loading.subword_tokenizer import folder_tokenizer, gguf_tokenizer

    path, config = checkpoint.path, checkpoint.config
    if isinstance(checkpoint, GGUFCheckpoint):
        metadata = checkpoint.file.metadata
        if metadata.get("tokenizer.ggml.model") not in NO_TOKENIZER:
            return gguf_tokenizer(metadata, path, config.eos_token_ids)
        return IdTokenizer(config.vocab_size, f"{path}: holds no tokenizer", config.eos_token_ids)
    if (path / "tokenizer.json").exists():
        return folder_tokenizer(path, config.eos_token_ids)
    why = f"{path}: holds no tokenizer.json (transformers' save_pretrained writes it)"
    return IdTokenizer(config.vocab_size, why, config.eos_token_ids)


def _toy(dtype: torch.dtype, device: torch.device, part: Part | None, offload: str | float) -> LoadedModel:
    """Two layers with weights large enough that each token depends on all before it: one wrong key or value anywhere changes
    the text. It can say small letters and spaces only. Drawn on the CPU, so that it is the same everywhere."""
    config = shape("toy")
    model = Llama.random(config, TOY_SEED, torch.float32, "cpu", TOY_STD)
    said = torch.tensor(list(TOY_ALPHABET))
    scores = model.slots()["lm_head.weight"]
    scores[said] *= 2
    silent = torch.ones(config.vocab_size, dtype=torch.bool)
    silent[said] = False
    scores[silent] = 0
    streamed, _ = choose_layers(offload, config, config.num_parameters() * dtype.itemsize, dtype, device)
    placed = (
        Llama(config, dtype=dtype, device=device, streamed=streamed)
        if part is None
        else part.build(config, dtype, device)
    )
    slots = placed.slots() if part is None else part.slots(placed, config)
    whole = model.slots()
    for name, slot in slots.items():
        slot.copy_(whole[name] if part is None else part.cut(config, name, whole[name]))
    placed.stream_layers(device)
    return LoadedModel(config, placed.pack(), ByteTokenizer(config.vocab_size))


@contextmanager
def quiet_logger(name: str) -> Iterator[None]:
    """What another package logs below an error stays off the user's terminal: what matters of it is in the error that it raises."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _from_hub(repository: str) -> Path:
    """A snapshot in huggingface_hub's own cache: configs, safetensors and tokenizer, no pickles.

    config.json comes first and alone, so that a family we cannot run is refused before its weights are fetched.
    """
    from minipaged.model.loading.hf_config import read_config

    try:
        from huggingface_hub import hf_hub_download, snapshot_download
    except ImportError:
        raise ModelError(f"hf:{repository} needs the package huggingface_hub: pip install huggingface_hub") from None
    try:
        with quiet_logger("huggingface_hub"):
            read_config(Path(hf_hub_download(repository, "config.json")).parent)
            return Path(snapshot_download(repository, allow_patterns=list(HUB_FILES)))
    except ModelError:
        raise
    except Exception as error:  # the hub's client raises its own, requests' and httpx's errors
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise ModelError(f"hf:{repository} could not be kept: no space left on the disk") from None
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise ModelError(
            f"hf:{repository} could not be fetched: {reason}; give a folder or a .gguf file instead"
        ) from None
