"""Puts a model, a KV pool, a scheduler and an engine together. No other module of the engine imports all of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from minipaged.config import CacheConfig, EngineConfig, ModelConfig, Progress, Weights
from minipaged.engine import Engine
from minipaged.errors import InputError
from minipaged.execution.eager import TorchRunner
from minipaged.execution.paged_kv import PagedKV
from minipaged.kernels.dispatch import use_triton
from minipaged.kernels.launch_table import gpu_of
from minipaged.memory.block_manager import BlockManager
from minipaged.memory.retention import KEEP_ALL, Retention
from minipaged.model.loading import zoo
from minipaged.model.loading.placement import ROOM_SHARE, choose_device, choose_dtype, free_bytes
from minipaged.model.loading.tokenizer import Tokenizer
from minipaged.model.loading.zoo import LoadedModel
from minipaged.scheduling.plan import Runner
from minipaged.scheduling.scheduler import Scheduler

if TYPE_CHECKING:
    from minipaged.execution.collectives import Pipe
    from minipaged.execution.compile_ahead import CompileAhead, Compiled
    from minipaged.execution.ranks import Ranks

CPU_POOL_BYTES = 512 * 2**20  # of a machine without a GPU: room for a few hundred blocks, which a screen can show
FLOAT8_CAPABILITY = (8, 9)  # below it Triton has no conversion to float8
MOST_DISK_BLOCKS = 1024  # of host memory, by way of which blocks come from the disk where nobody says how many
GPU_POOL_SHARE = 0.9  # of the memory that is free once the weights are loaded
CAPTURE_SECONDS = 2.0  # at start; graphs that are not captured by then are when their shape comes for the second time


@dataclass(frozen=True, slots=True)
class Parts:
    """An engine and what it was made of."""

    engine: Engine
    tokenizer: Tokenizer
    model_config: ModelConfig
    cache: CacheConfig
    device: torch.device
    dtype: str
    ranks: Ranks | None = None  # that share the model
    compiled: tuple[Compiled, ...] = ()  # kernels that this start had to compile


def choose_num_blocks(
    config: ModelConfig,
    block_size: int,
    dtype: str,
    device: torch.device,
    step_bytes: int = 0,
    gpu_share: float = GPU_POOL_SHARE,
    *,
    heavy_hitters: bool = False,
) -> int:
    """How many blocks of keys and values kept as `dtype` fit: `gpu_share` of a GPU's free memory less `step_bytes`, which the largest
    step takes, or a fixed share of a host's. Null block included. heavy_hitters: with their marks. InputError if not even two fit."""
    block_bytes = config.kv_bytes_per_token(dtype, heavy_hitters=heavy_hitters) * block_size
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        budget = int(free * gpu_share) - step_bytes
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        budget = min(CPU_POOL_BYTES, memory // 4, int(ROOM_SHARE * free_bytes(device)))
    num_blocks = budget // block_bytes
    if num_blocks < 2:
        raise InputError(
            f"one block of {block_size} tokens takes {block_bytes:,} bytes and {max(0, budget):,} are left for the pool"
            + (
                f" beside {step_bytes:,} that the largest step takes: lower max_num_batched_tokens or"
                if step_bytes
                else ": lower"
            )
            + f" block_size (now {block_size}), or free memory"
        )
    return num_blocks


def check_pool(config: ModelConfig, cache: CacheConfig, dtype: str, device: torch.device) -> None:
    """Raise InputError, before anything is allocated, if the device's blocks or the host's do not fit beside what is there already.

    On a CPU both lie in the same memory. The error says what the blocks take and how many would fit.
    """
    host = torch.device("cpu")
    marked = retention_of(config, cache).heavy > 0
    block_bytes = config.kv_bytes_per_token(cache.kv_dtype(dtype), heavy_hitters=marked) * cache.block_size
    pools = (
        ("a pool", "num_blocks", cache.num_blocks, device),
        ("a host pool", "num_host_blocks", cache.num_host_blocks, host),
    )
    host_bytes = 0  # of the host's memory: what the pools before this one take
    for pool, name, count, place in pools:
        room = int(ROOM_SHARE * free_bytes(place)) - (host_bytes if place == host else 0)
        if count * block_bytes > room:
            raise InputError(
                f"{pool} of {count:,} blocks of {cache.block_size} tokens takes {count * block_bytes / 2**30:,.1f} GiB, and "
                f"{place} has {max(0, room) / 2**30:,.1f} GiB left for it: lower {name} to at most {max(0, room) // block_bytes:,}"
            )
        host_bytes += count * block_bytes if place == host else 0


def check_kv_dtype(cache: CacheConfig, device: torch.device) -> None:
    """Raise InputError where the device's kernels cannot write what the cache is to keep."""
    if cache.kv_cache_dtype == "fp8" and device.type == "cuda" and use_triton(torch.empty(0, device=device)):
        found = gpu_of(device).capability
        if found < FLOAT8_CAPABILITY:
            raise InputError(
                f"kv_cache_dtype fp8 needs a GPU of compute capability {'.'.join(map(str, FLOAT8_CAPABILITY))}, as Ada and Hopper "
                f"have; {device} has {'.'.join(map(str, found))}: use int8"
            )


def assemble(
    model: str,
    cache: CacheConfig,
    config: EngineConfig,
    *,
    device: str = "auto",
    dtype: str = "auto",
    weights: Weights = "auto",
    num_blocks: int | None = None,
    max_model_len: int | None = None,
    progress: Progress | None = None,
    overlap: int | None = None,
    graphs: bool = True,
    gpu_share: float = GPU_POOL_SHARE,
    warm_up: bool = True,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    arguments: Mapping[str, Any] | None = None,
    manager_class: type | None = None,
    offload: str | float = "none",
) -> Parts:
    """Load the model and build an engine around it.

    Replaced: cache.num_blocks by what fits if `num_blocks` is None, config.max_model_len by the model's context if `max_model_len` is
    None, config.depth by `overlap`, or by 1 on a GPU and 0 on a CPU if that is None. warm_up: on one GPU, compile all kernels while
    the weights are loaded, and capture graphs, so that nothing waits for that later. tensor_parallel: ranks that share the model;
    arguments: of the LLM that each of the others makes, if this process is to start them; manager_class: the user's block manager;
    offload: of the weights, as LLM's offload_weights. In a process that is one of the others this serves until rank 0 ends, and ends
    the process (SystemExit).
    """
    if cache.disk_cache is not None and (tensor_parallel * pipeline_parallel > 1 or manager_class is not None):
        raise InputError(
            "disk_cache needs a model on one device and minipaged's own block manager: leave tensor_parallel, "
            "pipeline_parallel and block_manager out, or disk_cache"
        )
    chosen = choose_device(device)
    precision = choose_dtype(dtype, chosen)
    kind = str(precision).removeprefix("torch.")
    ranks = None
    if tensor_parallel * pipeline_parallel > 1:
        from minipaged.execution.ranks import start_ranks

        ranks = start_ranks(tensor_parallel * pipeline_parallel, chosen, arguments or {}, stages=pipeline_parallel)
        chosen = ranks.device
    with nullcontext() if ranks is None else ranks.failing_together():
        try:
            on_triton = use_triton(torch.empty(0, device=chosen))
        except ValueError as error:  # what MINIPAGED_KERNELS asks for cannot be
            raise InputError(str(error)) from None
        check_kv_dtype(cache, chosen)
        captures = graphs and on_triton and chosen.type == "cuda"
        warm_up = warm_up and captures and ranks is None and os.environ.get("MINIPAGED_WARM_UP") != "0"
        compiling: CompileAhead | None = None

        def known(shape: ModelConfig) -> None:
            nonlocal compiling
            # What windows and sinks launch the registry does not know yet: these kernels are compiled when they are first used.
            if warm_up and shape.sliding_window is None and cache.retention in (None, "all"):
                memory = int(gpu_share * free_bytes(chosen)) if num_blocks is None else None
                limits = replace(config, max_model_len=max_model_len or shape.max_position)
                compiling = _compile_ahead(shape, limits, cache, kind, chosen, memory)

        part = None if ranks is None else ranks.part
        try:
            loaded = zoo.load(
                model,
                device=chosen,
                dtype=precision,
                weights=weights,
                offload=offload,
                progress=progress,
                part=part,
                known=known,
            )
            compiled = tuple(compiling.wait(progress)) if compiling is not None else ()
        except BaseException:
            if compiling is not None:
                compiling.stop()
            raise
        pipe = None if ranks is None else ranks.connect(loaded.model, loaded.config)
        shape, held = loaded.config, loaded.model.config  # of the whole model, and of what is here
        retention = retention_of(shape, cache, tensor_parallel)
        streams = retention.sinks > 0  # behind sinks no position within the cache is beyond the context
        if max_model_len is not None and max_model_len > shape.max_position and not streams:
            raise InputError(
                f"max_model_len must be at most {shape.max_position}, the context of {shape.name}, not {max_model_len}"
            )
        if pipeline_parallel > 1:  # a step in each stage
            depth = pipeline_parallel - 1 + (overlap or 0)
        else:
            depth = overlap if overlap is not None else int(chosen.type == "cuda")
        config = replace(
            config,
            max_model_len=max_model_len or shape.max_position,
            depth=depth,
            pipeline_parallel=pipeline_parallel,
        )
        if num_blocks is None:
            step = _step_bytes(loaded, cache, config, chosen, kind, graphs, pipe) if chosen.type == "cuda" else 0
            num_blocks = choose_num_blocks(
                held,
                cache.block_size,
                cache.kv_dtype(kind),
                chosen,
                step,
                gpu_share,
                heavy_hitters=retention.heavy > 0,
            )
        if ranks is not None:
            num_blocks = ranks.least(num_blocks)  # the same block ids everywhere: the smallest pool is everybody's
        cache = replace(cache, num_blocks=num_blocks)
        if cache.disk_cache is not None and not cache.num_host_blocks:  # what is read comes by way of the host
            cache = replace(cache, num_host_blocks=min(MOST_DISK_BLOCKS, -(-config.max_model_len // cache.block_size)))
        check_pool(held, cache, kind, chosen)
        runner = build_runner(loaded, cache, config, device=chosen, dtype=kind, graphs=graphs)
        runner.pipe = pipe
        if warm_up:
            capturing: Any = runner
            capturing.capture_ahead(CAPTURE_SECONDS, progress)
    driven = runner if ranks is None else ranks.drive(runner)
    engine = assemble_engine(loaded, cache, config, driven, dtype=kind, manager_class=manager_class)
    if cache.disk_cache is not None:
        connect_disk(engine, loaded, cache, runner.kv, dtype=kind)
    if ranks is not None:
        engine.about |= {"tensor_parallel": tensor_parallel, "pipeline_parallel": pipeline_parallel}
    return Parts(engine, loaded.tokenizer, shape, cache, chosen, kind, ranks, compiled)


def _compile_ahead(
    shape: ModelConfig, config: EngineConfig, cache: CacheConfig, dtype: str, device: torch.device, memory: int | None
) -> CompileAhead | None:
    """The start of compiling what this engine needs; None where the GPU is not NVIDIA's."""
    from minipaged.execution.compile_ahead import CompileAhead, deployment_of

    gpu = gpu_of(device)
    return None if gpu.capability == (0, 0) else CompileAhead(deployment_of(shape, config, cache, dtype, gpu, memory))


def connect_disk(engine: Engine, loaded: LoadedModel, cache: CacheConfig, kv: PagedKV, *, dtype: str) -> None:
    """Let the engine keep full blocks in the folder that the cache names. InputError if it cannot be used."""
    from minipaged.execution.disk_store import DiskStore
    from minipaged.execution.disk_tier import DiskTier, fingerprint

    name = fingerprint(loaded.model, loaded.config, cache, dtype, str(retention_of(loaded.config, cache)))
    store = DiskStore(cache.disk_cache or "", int(cache.disk_gb * 1e9), name)
    engine.scheduler.disk = DiskTier(store, engine.scheduler.manager, kv)


def build_engine(
    loaded: LoadedModel,
    cache: CacheConfig,
    config: EngineConfig,
    *,
    device: torch.device,
    dtype: str,
    graphs: bool = True,
) -> Engine:
    """An engine with a KV pool of its own around a model that is loaded already. graphs: replay CUDA graphs where steps can be captured."""
    runner = build_runner(loaded, cache, config, device=device, dtype=dtype, graphs=graphs)
    return assemble_engine(loaded, cache, config, runner, dtype=dtype)


def assemble_engine(
    loaded: LoadedModel,
    cache: CacheConfig,
    config: EngineConfig,
    runner: Runner,
    *,
    dtype: str,
    manager_class: type | None = None,
) -> Engine:
    """An engine over a runner that has its KV pool. manager_class: the user's, in place of BlockManager."""
    # A user's manager need not know of a cache on the host.
    make: Callable[..., BlockManager] = partial(BlockManager, host_cache=cache.num_host_blocks > 0)
    if manager_class is not None:
        from minipaged.memory.own_manager import own_manager

        make = partial(own_manager, manager_class)
    retention = retention_of(loaded.config, cache)
    manager = make(
        cache.num_blocks,
        cache.block_size,
        num_host_blocks=cache.num_host_blocks,
        prefix_caching=cache.enable_prefix_caching,
        watermark=cache.watermark,
        retention=retention,
    )
    scheduler = Scheduler(config, manager, cache.block_size)
    about = {
        "model": loaded.config.name,
        "kv_cache_dtype": cache.kv_dtype(dtype),
        "kv_bytes_per_token": loaded.config.kv_bytes_per_token(
            cache.kv_dtype(dtype), heavy_hitters=retention.heavy > 0
        ),
        "watermark": cache.watermark,
        "num_host_blocks": cache.num_host_blocks,
        "retention": str(retention),
    }
    return Engine(
        scheduler,
        runner,
        codec=loaded.tokenizer,
        eos_token_ids=loaded.config.eos_token_ids,
        vocab_size=loaded.config.vocab_size,
        about=about,
    )


def build_runner(
    loaded: LoadedModel,
    cache: CacheConfig,
    config: EngineConfig,
    *,
    device: torch.device,
    dtype: str,
    graphs: bool = True,
) -> TorchRunner:
    """A runner with a KV pool of its own."""
    retention = retention_of(loaded.config, cache)
    kv = PagedKV(
        loaded.model.config,
        cache.num_blocks,
        cache.block_size,
        num_host_blocks=cache.num_host_blocks,
        dtype=getattr(torch, dtype),
        kept_as=cache.kv_dtype(dtype),
        device=device,
        retention=retention,
    )
    if graphs and can_capture(kv.keys[0]):
        from minipaged.execution.graphs import GraphRunner

        # No table is longer than what a sequence holds, however long it is.
        width = retention.most_blocks(config.max_model_len, cache.block_size, config.max_num_batched_tokens)
        return GraphRunner(
            loaded.model, kv, config.max_num_seqs, config.max_model_len, table_width=width, depth=config.depth
        )
    return TorchRunner(loaded.model, kv, config.max_num_seqs)


def retention_of(config: ModelConfig, cache: CacheConfig, tensor_parallel: int = 1) -> Retention:
    """The policy of a cache over this model. Blocks behind the model's own windows are released if every layer has one.

    InputError for a text that names no policy, one that keeps less than a block or more than the context, sinks and heavy hitters where the
    model has windows of its own, and heavy hitters where ranks share a KV head.
    """
    if cache.retention is None:
        return KEEP_ALL if config.full_layers else Retention(config.sliding_window)
    retention = Retention.parse(cache.retention)
    if retention.window is not None and retention.window < cache.block_size:
        raise InputError(
            f"retention {retention} has a window of less than a block ({cache.block_size} tokens): "
            f"widen it to at least {cache.block_size}, or lower block_size"
        )
    if retention.heavy and retention.budget < cache.block_size:
        raise InputError(
            f"retention {retention} keeps less than a block ({cache.block_size} tokens): "
            f"raise it to at least {cache.block_size}, or lower block_size"
        )
    if retention.heavy and tensor_parallel > config.num_kv_heads:
        raise InputError(
            f"retention {retention} chooses tokens for each KV head, and {tensor_parallel} ranks would share the {config.num_kv_heads} of "
            f"{config.name}, each with some of the queries: take at most {config.num_kv_heads} ranks"
        )
    if (retention.sinks or retention.heavy) and config.sliding_window is not None:
        raise InputError(
            f"retention {retention} needs a model that sees all of its context, and {config.name} has a window of its own, "
            f"of {config.sliding_window} tokens: leave retention out"
        )
    if retention.sinks and retention.window is not None and retention.sinks + retention.window > config.max_position:
        raise InputError(
            f"retention {retention} keeps more than the {config.max_position} tokens of {config.name}'s context: "
            f"shorten the window to at most {config.max_position - retention.sinks}"
        )
    return retention


def can_capture(cache: torch.Tensor) -> bool:
    """Whether steps over this cache can be captured: on a GPU, unless the torch twins run there, which read lengths on the host."""
    return cache.is_cuda and use_triton(cache)


def _step_bytes(
    loaded: LoadedModel,
    cache: CacheConfig,
    config: EngineConfig,
    device: torch.device,
    dtype: str,
    graphs: bool,
    pipe: Pipe | None,
) -> int:
    """What the largest step takes beside the weights and the pool, measured on a pool of two blocks that is gone afterwards."""
    from minipaged.execution.largest_step import peak_bytes

    tiny = replace(cache, num_blocks=2, num_host_blocks=0)
    runner = build_runner(loaded, tiny, config, device=device, dtype=dtype, graphs=graphs)
    runner.pipe = pipe
    return peak_bytes(runner, config)
