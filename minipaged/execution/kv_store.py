"""The tensors that hold keys and values, and the three ways blocks move among them. Knows bytes; knows nothing of sequences.

A store is a named list of per-block tensors: copy and swap act on all of them alike, so the scales of quantized KV would travel too.
"""

from __future__ import annotations

import torch

from minipaged.config import ModelConfig
from minipaged.kernels.cache import copy_blocks
from minipaged.scheduling.plan import Pairs


class KVStore:
    """Keys and values of every layer, on the device and, for swapping, on the host.

    Layout of each tensor: [num_blocks, block_size, num_kv_heads, head_dim].
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        *,
        num_host_blocks: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.device = torch.device(device)
        shape = (num_blocks, block_size, config.num_kv_heads, config.head_dim)
        names = [f"{kind}.{layer}" for layer in range(config.num_layers) for kind in ("key", "value")]
        self.tensors = {name: torch.zeros(shape, dtype=dtype, device=self.device) for name in names}
        self.layers = [(self.tensors[f"key.{i}"], self.tensors[f"value.{i}"]) for i in range(config.num_layers)]
        pinned = self.device.type == "cuda"
        host_shape = (num_host_blocks, *shape[1:])
        self.host = {
            name: torch.zeros(host_shape, dtype=dtype, pin_memory=pinned) for name in (names if num_host_blocks else ())
        }

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers, keys and values."""
        return sum(t[0].numel() * t.element_size() for t in self.tensors.values())

    def copy(self, pairs: Pairs) -> None:
        """Copy blocks on the device, (source, destination)."""
        if pairs:
            copy_blocks(list(self.tensors.values()), torch.tensor(pairs, dtype=torch.int64))

    def swap_out(self, pairs: Pairs) -> None:
        """Copy blocks to the host, (device, host)."""
        if pairs:
            self._move(self.tensors, self.host, pairs)

    def swap_in(self, pairs: Pairs) -> None:
        """Copy blocks to the device, (host, device)."""
        if pairs:
            self._move(self.host, self.tensors, pairs)

    @staticmethod
    def _move(sources: dict[str, torch.Tensor], targets: dict[str, torch.Tensor], pairs: Pairs) -> None:
        for name, source in sources.items():
            target = targets[name]
            for i, j in pairs:
                target[j].copy_(source[i], non_blocking=True)

    def poison(self, blocks: list[int]) -> None:
        """Fill blocks with NaN: whoever reads them before writing them shows it."""
        if blocks:
            index = torch.tensor(blocks, dtype=torch.int64, device=self.device)
            for tensor in self.tensors.values():
                tensor.index_fill_(0, index, float("nan"))
