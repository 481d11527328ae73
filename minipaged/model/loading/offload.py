"""How many layers stay in host memory: as the user says, or as many as the device has no room for."""

from __future__ import annotations

import math
import warnings

import torch

from minipaged.config import ModelConfig, parse_offload
from minipaged.model.loading.placement import ROOM_SHARE, check_room, free_bytes
from minipaged.model.streaming import link_bytes_per_second, spread

RESIDENT_SHARE = 0.8  # of the device's free memory, for weights that stay there and the two buffers; the rest is for the pool and steps


def choose_layers(
    wish: str | float, config: ModelConfig, num_bytes: int, dtype: torch.dtype, device: torch.device
) -> tuple[tuple[int, ...], int]:
    """The layers whose weights stay on the host, and the bytes of all layers' weights that the device holds less for it. InputError if the
    host has no room. num_bytes: of all weights. Says what speed is to be expected."""
    size = parse_offload(wish)
    tables = config.vocab_size * config.hidden_size * (1 if config.tie_embeddings else 2) * dtype.itemsize
    layer_bytes = max(1, (num_bytes - tables) // config.num_layers)
    if size is None:
        free = free_bytes(device)
        if device.type == "cpu" or num_bytes <= ROOM_SHARE * free:
            return (), 0
        size = (num_bytes + 2 * layer_bytes - RESIDENT_SHARE * free) / 1e9
    count = min(config.num_layers, math.ceil(size * 1e9 / layer_bytes))
    if not count:
        return (), 0
    moved = count * layer_bytes
    if device.type == "cuda":
        check_room(f"{count} layers' weights in host memory", moved, torch.device("cpu"), "take a smaller model")
    link = link_bytes_per_second(device)
    warnings.warn(
        f"{count} of {config.num_layers} layers of {config.name} ({moved / 1e9:,.1f} GB) stay in host memory, copied in each step at "
        f"{link / 1e9:,.1f} GB/s as measured: at most {link / moved:,.2f} steps a second, so a token a step for each sequence",
        stacklevel=2,
    )
    return spread(count, config.num_layers), moved - min(count, 2) * layer_bytes
