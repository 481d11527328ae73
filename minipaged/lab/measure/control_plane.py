"""What the control plane costs: schedule and commit at many running decodes, the block manager's primitives, and the trace. No model,
no device.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from minipaged.config import EngineConfig, SamplingParams
from minipaged.lab.measure.trace_cost import measure_trace
from minipaged.memory.block_manager import BlockManager
from minipaged.scheduling.plan import StepTokens
from minipaged.scheduling.request import Request
from minipaged.scheduling.scheduler import Scheduler

PROMPT, OUTPUT, BLOCK = 128, 400, 16


class Measured(NamedTuple):
    """One row of the table. goal: what it must not exceed, in the same unit; None where the row is for comparison."""

    what: str
    value: float
    unit: str
    goal: float | None


def decode_step_ms(num_seqs: int, num_blocks: int, stretches: int = 7, samples: int = 1) -> float:
    """Milliseconds of schedule + commit a step: the mean over three blocks' worth of decode steps, in which every sequence fills and
    takes three, in the quietest of a few such stretches, since others on the machine only ever add to it. samples: of each request.
    """
    config = EngineConfig(max_num_seqs=num_seqs, max_num_batched_tokens=max(2048, num_seqs), max_model_len=2048)
    scheduler = Scheduler(config, BlockManager(num_blocks, BLOCK), BLOCK)
    rng = np.random.default_rng(0)
    temperature = 0.8 if samples > 1 else 0.0
    params = SamplingParams(n=samples, temperature=temperature, max_tokens=OUTPUT, ignore_eos=True)
    for i in range(num_seqs // samples):
        # prompts of many lengths, so that block boundaries are spread over the steps
        prompt = rng.integers(0, 30000, PROMPT + int(rng.integers(0, BLOCK))).tolist()
        scheduler.add(Request(i, tuple(prompt), params))

    def step() -> float:
        started = time.perf_counter()
        plan = scheduler.schedule()
        spent = time.perf_counter() - started
        if plan is None:
            raise RuntimeError("the benchmark ran out of work")
        drawn = StepTokens(rng.integers(0, 30000, len(plan.draw_rows)).astype(np.int32))
        started = time.perf_counter()
        scheduler.commit(plan, drawn)
        scheduler.take_events()
        return spent + time.perf_counter() - started

    while len(scheduler.waiting) or any(len(s.token_ids) == s.request.num_prompt for s in scheduler.sequences.values()):
        step()
    return 1e3 * min(statistics.fmean(step() for _ in range(3 * BLOCK)) for _ in range(stretches))


def per_call_us(work: Callable[[], object], repeats: int) -> float:
    """Microseconds a call: the median of `repeats` calls."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return 1e6 * statistics.median(times)


def prefix_match_us(num_tokens: int = 8192) -> float:
    """Microseconds to find a cached prefix of `num_tokens` tokens."""
    manager = BlockManager(num_tokens // BLOCK + 8, BLOCK)
    tokens = np.random.default_rng(1).integers(0, 30000, num_tokens).tolist()
    manager.allocate(0, tokens)
    manager.mark_computed(0, tokens)
    manager.free(0)
    manager.begin_step()
    found = manager.match_prefix(tokens)
    if found != (num_tokens - 1) // BLOCK * BLOCK:
        raise RuntimeError(f"{found} of {num_tokens} tokens were found")
    return per_call_us(lambda: manager.match_prefix(tokens), 30)


def allocate_and_free_us(num_blocks: int, pool: int) -> float:
    """Microseconds a block to allocate and free a sequence of `num_blocks` blocks in a pool of `pool`."""
    manager = BlockManager(pool, BLOCK, prefix_caching=False)
    tokens = [1] * (num_blocks * BLOCK)

    def work() -> None:
        manager.allocate(0, tokens)
        manager.free(0)
        manager.begin_step()
        manager.take_events()

    return per_call_us(work, 50) / num_blocks


def measure() -> list[Measured]:
    """Every row of `minipaged bench control-plane`."""
    small, large = 256 * 40, 1_000_000
    rows = [
        Measured("schedule + commit, 256 decodes", decode_step_ms(256, small), "ms a step", 0.25),
        Measured("schedule + commit, 1,024 decodes", decode_step_ms(1024, 1024 * 40), "ms a step", 1.0),
        Measured("schedule + commit, 28 times 4 samples", decode_step_ms(112, 112 * 40, samples=4), "ms a step", 0.3),
        Measured("the same 256, pool of 10,000 blocks", decode_step_ms(256, 10_000), "ms a step", None),
        Measured("the same 256, pool of 1,000,000 blocks", decode_step_ms(256, large), "ms a step", None),
        Measured("prefix match of 8,192 tokens", prefix_match_us() / 1e3, "ms", 1.0),
    ]
    for blocks in (8, 64, 512):
        for pool in (10_000, large):
            name = f"allocate + free, {blocks} blocks of {pool:,}"
            rows.append(Measured(name, allocate_and_free_us(blocks, pool), "us a block", None))
    trace = measure_trace()
    rows += [
        Measured("an engine's step, 256 decodes, nobody listening", trace.alone, "ms of processor", None),
        Measured("a listener of the trace adds", trace.heard - trace.alone, "ms of processor", 1.0),
        Measured("saying what it hears to a screen adds", trace.sent - trace.heard, "ms of processor", 1.0),
        Measured("recording what it hears adds", trace.recorded - trace.heard, "ms of processor", 1.0),
    ]
    return rows
