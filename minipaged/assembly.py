"""Puts a model, a KV pool, a scheduler and an engine together. The one place that knows them all."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from minipaged.config import DTYPE_BYTES, CacheConfig, EngineConfig, ModelConfig
from minipaged.engine import Engine
from minipaged.errors import InputError
from minipaged.execution.kv_store import KVStore
from minipaged.execution.torch_runner import TorchRunner
from minipaged.memory.block_manager import BlockManager
from minipaged.model import zoo
from minipaged.model.tokenizer import Tokenizer
from minipaged.scheduling.scheduler import Scheduler

CPU_POOL_BYTES = 512 * 2**20  # of a machine without a GPU: room for a few hundred blocks, which a screen can show
GPU_POOL_SHARE = 0.9  # of the memory that is free once the weights are loaded


@dataclass(frozen=True, slots=True)
class Parts:
    """An engine and what it was made of."""

    engine: Engine
    tokenizer: Tokenizer | None
    model_config: ModelConfig
    cache: CacheConfig
    device: torch.device
    dtype: str


def choose_device(device: str) -> torch.device:
    """The device of that name; auto takes a GPU where there is one. InputError for one that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise InputError(f"device must be auto, cpu, cuda or cuda:N, not {device!r}") from None
    if chosen.type not in ("cpu", "cuda"):
        raise InputError(f"device must be auto, cpu, cuda or cuda:N, not {device!r}")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {device!r}: torch sees no GPU here; cpu works (minipaged doctor says more)")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {device!r}: this machine has {torch.cuda.device_count()} GPU(s), counted from cuda:0")
    return chosen


def choose_dtype(dtype: str, device: torch.device) -> str:
    """The dtype of that name; auto is bfloat16 on a GPU and float32 on a CPU."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if device.type == "cuda" else "float32"


def choose_num_blocks(config: ModelConfig, block_size: int, dtype: str, device: torch.device) -> int:
    """How many blocks fit: nine tenths of a GPU's free memory, or a fixed share of a host's. Null block included."""
    block_bytes = config.kv_bytes_per_token(dtype) * block_size
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        budget = int(free * GPU_POOL_SHARE)
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        budget = min(CPU_POOL_BYTES, memory // 4)
    num_blocks = budget // block_bytes
    if num_blocks < 2:
        raise InputError(
            f"one block of {block_size} tokens takes {block_bytes:,} bytes and {budget:,} are free: "
            f"lower block_size (now {block_size}) or free memory"
        )
    return num_blocks


def assemble(
    model: str,
    cache: CacheConfig,
    config: EngineConfig,
    *,
    device: str = "auto",
    dtype: str = "auto",
    num_blocks: int | None = None,
    max_model_len: int | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> Parts:
    """Load the model and build an engine around it. cache.num_blocks is replaced by what fits if `num_blocks` is None."""
    chosen = choose_device(device)
    kind = choose_dtype(dtype, chosen)
    loaded = zoo.load(model, device=chosen, dtype=getattr(torch, kind), progress=progress)
    shape = loaded.config
    if kind not in DTYPE_BYTES:
        raise InputError(f"dtype must be one of {', '.join(DTYPE_BYTES)}, not {dtype!r}")
    if max_model_len is not None and max_model_len > shape.max_position:
        raise InputError(
            f"max_model_len must be at most {shape.max_position}, the context of {shape.name}, not {max_model_len}"
        )
    cache = replace(cache, num_blocks=num_blocks or choose_num_blocks(shape, cache.block_size, kind, chosen))
    config = replace(config, max_model_len=max_model_len or shape.max_position)
    store = KVStore(
        shape,
        cache.num_blocks,
        cache.block_size,
        num_host_blocks=cache.num_host_blocks,
        dtype=getattr(torch, kind),
        device=chosen,
    )
    manager = BlockManager(
        cache.num_blocks,
        cache.block_size,
        num_host_blocks=cache.num_host_blocks,
        prefix_caching=cache.enable_prefix_caching,
        watermark=cache.watermark,
    )
    scheduler = Scheduler(config, manager, cache.block_size)
    runner = TorchRunner(loaded.model, store, config.max_num_seqs)
    engine = Engine(scheduler, runner, codec=loaded.tokenizer, eos_token_ids=shape.eos_token_ids)
    return Parts(engine, loaded.tokenizer, shape, cache, chosen, kind)
