"""The disk below the host's blocks: what a prompt finds there is read into host memory, and new full blocks are written behind."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256

import torch
from torch import Tensor

from minipaged.config import CacheConfig, ModelConfig, describe
from minipaged.execution.disk_store import Blocks, DiskStore
from minipaged.execution.paged_kv import PagedKV
from minipaged.memory.block_manager import BlockManager
from minipaged.memory.blocks import PrefixHit
from minipaged.model.llama import Llama

BATCH = 32  # new blocks that are copied together; fewer once nothing runs
BATCH_BYTES = 64 * 2**20  # or so many bytes of them
HASHING_THREADS = 8
HASHED_BYTES = (
    64 * 2**20
)  # of a weight at a time: so much of the host's memory for each thread, where the weight is on a GPU


class DiskTier:
    """Blocks of `kv`, as `manager` knows them, kept in `store`."""

    def __init__(self, store: DiskStore, manager: BlockManager, kv: PagedKV) -> None:
        self.store, self._manager, self._kv = store, manager, kv
        self._block_bytes = sum(tensor[0].numel() * tensor.element_size() for tensor in kv.host.values())
        # A small pool hands its blocks out again before there are many new ones.
        self._batch = max(1, min(BATCH, BATCH_BYTES // self._block_bytes, kv.num_blocks // 8))
        self._new: list[tuple[bytes, int]] = []
        manager.note_published()

    def bring(self, hit: PrefixHit) -> int:
        """Read into host memory what the disk has of a prompt behind what the other tiers hold. Returns the number of blocks.

        The first miss ends it, and so does a host that is full."""
        waited, count = False, 0
        for key in self._manager.missing(hit):
            content = self.store.read(key, self._block_bytes) if key in self.store else None
            home = self._manager.receive(key) if content is not None else None
            if content is None or home is None:
                break
            if not waited and self._kv.device.type == "cuda":  # a step in flight may still read this memory
                torch.cuda.current_stream(self._kv.device).synchronize()
            waited = True
            self._put(home, content)
            count += 1
        return count

    def _put(self, home: int, content: bytes) -> None:
        data, start = torch.frombuffer(bytearray(content), dtype=torch.uint8), 0
        for tensor in self._kv.host.values():
            row = tensor[home]
            end = start + row.numel() * row.element_size()
            row.copy_(data[start:end].view(row.dtype).view(row.shape))
            start = end

    def save(self, *, idle: bool) -> None:
        """Let full blocks be written that steps launched so far have filled; idle: also if they are few.

        Until the disk has room for them they are only named, not copied: those that leave the pool meanwhile are dropped."""
        self._new += self._manager.take_published()
        if not self._new or (len(self._new) < self._batch and not idle):
            return
        num_bytes = self._batch * self._block_bytes
        if not self.store.has_room(num_bytes) and len(self._new) <= self._kv.num_blocks:
            return
        held = [pair for pair in dict.fromkeys(self._new) if self._manager.holds(*pair) and pair[0] not in self.store]
        still = {key for key, _ in held}
        self.store.drop(sum(key not in still and key not in self.store for key in {key for key, _ in self._new}))
        while held and self.store.has_room(num_bytes):
            some, held = held[: self._batch], held[self._batch :]
            copies = self._copied([key for key, _ in some], [block for _, block in some])
            self.store.write_behind(copies, len(some), len(some) * self._block_bytes)
        self._new = held

    def _copied(self, keys: list[bytes], blocks: list[int]) -> Blocks:
        """Copies of device blocks as they are once all launched steps are done; made on the device's own time."""
        at = torch.tensor(blocks, dtype=torch.int64).to(self._kv.device)
        rows: list[Tensor] = []
        for tensor in self._kv.tensors.values():
            chosen = tensor.view(torch.uint8).index_select(0, at)
            if chosen.is_cuda:
                chosen = torch.empty(chosen.shape, dtype=torch.uint8, pin_memory=True).copy_(chosen, non_blocking=True)
            rows.append(chosen)
        done: torch.cuda.Event | None = None
        if self._kv.device.type == "cuda":
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()

        def contents() -> Iterator[tuple[bytes, bytes]]:
            if done is not None:
                done.synchronize()
            for i, key in enumerate(keys):
                yield key, b"".join(row[i].numpy().tobytes() for row in rows)

        return contents

    def close(self) -> None:
        """Write what is left, and end the thread. Nothing is kept afterwards."""
        self.save(idle=True)
        while self._new:  # more than may wait at once
            self.store.flush()
            self.save(idle=True)
        self.store.close()


def fingerprint(model: Llama, config: ModelConfig, cache: CacheConfig, dtype: str, retention: str) -> bytes:
    """SHA-256 over all that a block's content depends on beside its tokens: the model's shape (its rope included) and every byte of its
    weights, dtypes, the block's size, the retention policy, and the kind of device. Weights are hashed by several threads at once."""
    settings = {
        "model": describe(config),
        "dtype": dtype,
        "kept": cache.kv_dtype(dtype),
        "block_size": cache.block_size,
        "retention": retention,
        "device": model.norm.weight.device.type,
    }
    weights: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if model.stream is not None:  # these are on the device in turn
        parts = tuple(f"layers.{i}." for i in model.streamed)
        weights = {name: weight for name, weight in weights.items() if not name.startswith(parts)}
        weights |= {f"streamed.{i}": model.stream.content(i) for i in model.streamed}
    digest = sha256(json.dumps(settings, sort_keys=True, default=repr).encode())
    with ThreadPoolExecutor(min(HASHING_THREADS, os.cpu_count() or 1)) as threads:
        for part in threads.map(_digest, *zip(*sorted(weights.items()), strict=True)):
            digest.update(part)
    return digest.digest()


def _digest(name: str, parameter: Tensor) -> bytes:
    weight = parameter.detach()
    digest = sha256(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
    if not weight.is_meta:
        data = (weight.to_dense() if weight.is_mkldnn else weight).contiguous().flatten().view(torch.uint8)
        for start in range(0, len(data), HASHED_BYTES):
            digest.update(data[start : start + HASHED_BYTES].cpu().numpy().data)
    return digest.digest()
