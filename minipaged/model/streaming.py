"""Layers whose weights stay in host memory: each is copied into one of two buffers on the device while the layer before it computes.

FlexGen's weight offload (Sheng et al. 2023) for one device. The buffers do not move, so a CUDA graph can hold the copies: they run on a
stream of their own, which begins and ends with the step. A layer's weights are one piece of host memory, so they travel in one copy. On a
CPU the same is done with plain copies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

ALIGNMENT = 256  # bytes: where a weight may begin in a buffer


class LayerStream:
    """The weights of some layers, which are on the host now; afterwards their parameters are places in the two buffers.

    layers: all of the network, in the order in which they run; streamed: the numbers of those, ascending; device: where they run.
    """

    def __init__(self, layers: Sequence[nn.Module], streamed: Sequence[int], device: torch.device) -> None:
        self.place = {index: place for place, index in enumerate(streamed)}  # layer -> its turn
        self.device = device
        on_gpu = device.type == "cuda"
        sizes = [sum(map(_aligned, layers[index].parameters())) for index in streamed]
        self._buffers = [torch.zeros(max(sizes), dtype=torch.uint8, device=device) for _ in range(2)]
        self._host: list[Tensor] = []
        for (index, place), size in zip(self.place.items(), sizes, strict=True):
            host = torch.zeros(size, dtype=torch.uint8, pin_memory=on_gpu)
            _move(layers[index], host, self._buffers[place % 2])
            self._host.append(host)
        self.num_bytes = sum(sizes)  # a step moves
        if on_gpu:
            self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._arrived = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]

    def begin(self) -> None:
        """A step begins: whatever ran before has done with the buffers once this stream is here. The first two layers set out."""
        if self.device.type == "cuda":
            self._side.wait_stream(torch.cuda.current_stream(self.device))
        for place in range(min(2, len(self._host))):
            self._send(place)

    def before(self, index: int) -> None:
        """The layer is about to run: its weights are there."""
        place = self.place.get(index)
        if place is not None and self.device.type == "cuda":
            torch.cuda.current_stream(self.device).wait_event(self._arrived[place % 2])

    def after(self, index: int) -> None:
        """The layer has run: its buffer takes the weights of the next layer but one of those streamed."""
        place = self.place.get(index)
        if place is None or place + 2 >= len(self._host):
            return
        if self.device.type == "cuda":
            self._side.wait_stream(torch.cuda.current_stream(self.device))
        self._send(place + 2)

    def end(self) -> None:
        """The step ends: a graph that is captured must have joined every stream that it uses."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).wait_stream(self._side)

    def _send(self, place: int) -> None:
        host, buffer = self._host[place], self._buffers[place % 2]
        if self.device.type != "cuda":
            buffer[: len(host)].copy_(host)
            return
        with torch.cuda.stream(self._side):
            buffer[: len(host)].copy_(host, non_blocking=True)
            self._arrived[place % 2].record(self._side)

    def content(self, index: int) -> Tensor:
        """A layer's weights on the host, one behind the other, as bytes."""
        return self._host[self.place[index]]


def spread(count: int, num_layers: int) -> tuple[int, ...]:
    """So many layers, evenly among all: the resident ones between them give the copies time."""
    return tuple(i for i in range(num_layers) if (i + 1) * count // num_layers > i * count // num_layers)


def link_bytes_per_second(device: torch.device, num_bytes: int = 64 * 2**20) -> float:
    """What the device takes from (page-locked) host memory, measured."""
    import time

    host = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty_like(host, device=device)
    best = math.inf
    for _ in range(4):
        start = time.perf_counter()
        target.copy_(host, non_blocking=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return num_bytes / best


def _aligned(parameter: Tensor) -> int:
    return -(-parameter.numel() * parameter.element_size() // ALIGNMENT) * ALIGNMENT


def _move(layer: nn.Module, host: Tensor, buffer: Tensor) -> None:
    """Put the layer's weights into `host`, one behind the other, and let its parameters be the same places in `buffer`."""
    start = 0
    for module in layer.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            values = parameter.detach().contiguous()
            end = start + values.numel() * values.element_size()
            host[start:end].view(values.dtype).view(values.shape).copy_(values)
            place = buffer[start:end].view(values.dtype).view(values.shape)
            setattr(module, name, nn.Parameter(place, requires_grad=False))
            start += _aligned(values)
