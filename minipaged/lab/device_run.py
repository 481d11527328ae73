"""Runs the systems on this machine's device: one model, one KV pool, the same scheduler and kernels; only the block
manager differs.

Imports torch when it runs. What it leaves out, in the baselines' favour: rows that ended in a static batch are not
computed on, and a cache that grows by concatenation is not copied about. So the differences are those of memory and
of who may enter, nothing else.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from minipaged.config import CacheConfig, EngineConfig, SamplingParams, check_int
from minipaged.engine import Engine
from minipaged.errors import InputError
from minipaged.lab.figure_types import Say
from minipaged.lab.workloads import Draw, Workload
from minipaged.memory.block_manager import BlockManager
from minipaged.memory.contiguous import Ask, ContiguousBlockManager
from minipaged.memory.systems import RESERVING
from minipaged.scheduling.request import RequestOutput
from minipaged.scheduling.scheduler import Scheduler

BATCH_BUDGET = 16_384  # tokens a step for batches that nobody joins: they start together


@dataclass(frozen=True, slots=True)
class DeviceResult:
    """One system's run. Seconds of wall time; all requests were there from the start."""

    system: str
    requests: int
    refused: int
    tokens: int
    seconds: float
    mean_rows: float  # over time
    token_share: float  # of the pool that held token state, over time
    first_token: tuple[float, float]  # p50, p99
    per_token: tuple[float, float]  # p50, p99 of the mean gap between a request's tokens
    normalized_latency: float
    preemptions: int
    same_answers: float  # share of requests answered as under the first system, token for token

    @property
    def tokens_per_second(self) -> float:
        """Tokens of answers."""
        return self.tokens / self.seconds


def draws_of(load: Workload, vocab_size: int, *, seed: int = 0) -> list[Draw]:
    """Token ids for a workload's lengths, the common prefix the same in each; arrivals are left out."""
    rng = np.random.default_rng(seed)
    prefix = rng.integers(0, vocab_size, load.prefix).tolist()
    return [
        ([*prefix, *rng.integers(0, vocab_size, int(p) - load.prefix).tolist()], int(o))
        for p, o in zip(load.prompts, load.outputs, strict=True)
    ]


def run_systems(
    systems: Sequence[str],
    draws: Sequence[Draw],
    *,
    model: str,
    device: str = "auto",
    dtype: str = "auto",
    block_size: int = 16,
    num_blocks: int | None = None,
    max_num_seqs: int = 256,
    max_len: int = 2048,
    max_new: int = 1024,
    say: Say,
) -> list[DeviceResult]:
    """Serve the draws under every system in turn. `max_new`: what a client allows, for systems that cannot know the
    answer's length.

    Raises InputError for an unknown system or a model that cannot be loaded.
    """
    for system in systems:
        if system not in RESERVING and system != "vllm":
            raise InputError(f"unknown system {system!r}; known: {', '.join(RESERVING)}, vllm")
    check_int("max_num_seqs", max_num_seqs, 1)
    if not draws:
        raise InputError("no requests to run")
    bench = _Bench(model, device, dtype, block_size, num_blocks, max_num_seqs, max_len)
    results: list[DeviceResult] = []
    reference: list[list[int]] | None = None
    for i, system in enumerate(systems):
        engine = bench.engine(system, draws, max_new)
        result, answers = _serve(
            engine,
            system,
            draws,
            bench.slots,
            lambda n, i=i, s=system: say(s, i * len(draws) + n, len(systems) * len(draws)),
        )
        if reference is None:
            reference = answers
        same = sum(a == b for a, b in zip(answers, reference, strict=True)) / len(answers)
        results.append(replace(result, same_answers=same))
    return results


class _Bench:
    """A loaded model and a pool on the device, for engine after engine."""

    def __init__(
        self,
        model: str,
        device: str,
        dtype: str,
        block_size: int,
        num_blocks: int | None,
        max_num_seqs: int,
        max_len: int,
    ) -> None:
        from minipaged.assembly import assemble

        cache = CacheConfig(block_size=block_size, enable_prefix_caching=False)
        config = EngineConfig(max_num_seqs=max_num_seqs, preemption="recompute")
        self.parts = assemble(
            model, cache, config, device=device, dtype=dtype, num_blocks=num_blocks, max_model_len=max_len
        )
        self.config = replace(config, max_model_len=max_len)
        self.block_size, self.num_blocks, self.max_len = block_size, self.parts.cache.num_blocks, max_len
        self.slots = (self.num_blocks - 1) * block_size

    def engine(self, system: str, draws: Sequence[Draw], max_new: int) -> Engine:
        """An engine of that system around the loaded model and the one pool."""
        runner: Any = self.parts.engine.runner
        if system == "vllm":
            paged = BlockManager(self.num_blocks, self.block_size, prefix_caching=False)
            return Engine(Scheduler(self.config, paged, self.block_size), runner)
        manager = ContiguousBlockManager(self.num_blocks, self.block_size, system, max_len=self.max_len)
        joins = system not in ("webui", "static", "fastertransformer")
        config = self.config if joins else replace(self.config, max_num_batched_tokens=BATCH_BUDGET)
        scheduler = Scheduler(config, cast(BlockManager, manager), self.block_size)

        def ask(seq_id: int) -> Ask:
            length = draws[scheduler.sequences[seq_id].request.request_id][1]
            return Ask(max(max_new, length), length)

        manager.ask_of = ask
        return Engine(scheduler, runner)


def _serve(
    engine: Engine, system: str, draws: Sequence[Draw], slots: int, progress: Any
) -> tuple[DeviceResult, list[list[int]]]:
    outputs: list[RequestOutput] = []
    for prompt, length in draws:
        outputs.append(engine.ask(prompt, SamplingParams(max_tokens=length, ignore_eos=True)))
    count = len(draws)
    first, finish = np.full(count, math.nan), np.full(count, math.nan)
    batch = engine.scheduler.batch
    weighted_rows = weighted_tokens = 0.0
    done = 0
    start = before = time.perf_counter()
    while engine.has_work:
        changed = engine.step()
        now = time.perf_counter()
        running = engine.scheduler.order()
        weighted_rows += (now - before) * len(running)
        weighted_tokens += (now - before) * float(batch.computed[running].sum())
        before = now
        for output in changed:
            index = output.request_id
            if math.isnan(first[index]):
                first[index] = now - start
            if output.finished and math.isnan(finish[index]):
                finish[index] = now - start
                done += 1
        progress(done)
    took = before - start
    answers = [list(o.outputs[0].token_ids) if o.error is None else [] for o in outputs]
    lengths = np.array([length for _, length in draws])
    gaps = ((finish - first) / (lengths - 1))[(lengths > 1) & ~np.isnan(finish)]
    result = DeviceResult(
        system=system,
        requests=count,
        refused=sum(o.error is not None for o in outputs),
        tokens=sum(map(len, answers)),
        seconds=took,
        mean_rows=weighted_rows / took if took else 0.0,
        token_share=weighted_tokens / took / slots if took else 0.0,
        first_token=_two(first[~np.isnan(first)]),
        per_token=_two(gaps),
        normalized_latency=float(np.nanmean(finish / lengths)) if done else math.nan,
        preemptions=engine.scheduler.counters.preemptions,
        same_answers=1.0,
    )
    return result, answers


def _two(values: Any) -> tuple[float, float]:
    """p50 and p99; nan for nothing."""
    if not len(values):
        return math.nan, math.nan
    return float(np.percentile(values, 50)), float(np.percentile(values, 99))
