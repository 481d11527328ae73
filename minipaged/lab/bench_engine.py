"""`minipaged bench engine`: output tokens per second of the whole engine on the workloads that every contender runs.

Token ids in and out, random weights, lengths as drawn; a warm-up run first, then the median of the repeats. Host gap: wall time of a step
less the time the GPU was busy, measured over plain decode steps of a full batch.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from minipaged.config import SamplingParams, check_int
from minipaged.errors import InputError
from minipaged.lab.workloads import Draw, engine_draws
from minipaged.llm import LLM


@dataclass(frozen=True)
class EngineRow:
    """One contender on one workload."""

    contender: str
    model: str
    workload: str
    output_tokens: int
    seconds: float
    tokens_per_second: float


def requests_of(workload: str) -> tuple[list[Draw], float]:
    """(prompt token ids, output length) of each request, and the temperature. InputError for an unknown name."""
    name, _, number = workload.partition(":")
    if name == "batch" and number.isdigit():
        return engine_draws(f"b{check_int('batch', int(number), 1, 4096)}"), 0.0
    if workload not in ("nano", "sharegpt"):
        raise InputError(f"workload must be nano, sharegpt or batch:N, not {workload!r}")
    return engine_draws(workload), 0.6 if workload == "nano" else 0.0


def make_llm(model: str, **settings: Any) -> LLM:
    """The engine as the benchmark runs it: contexts up to 2,048 tokens, no prefix cache, as many sequences as the peers may run."""
    chosen = {
        "max_model_len": 2048,
        "enable_prefix_caching": False,
        "max_num_seqs": 256,
        "max_num_batched_tokens": 8192,
    }
    return LLM(model, **{**chosen, **settings})


def run(llm: LLM, asked: list[Draw], temperature: float) -> tuple[int, float]:
    """Output tokens and seconds of one pass."""
    params = [SamplingParams(temperature=temperature, max_tokens=n, ignore_eos=True) for _, n in asked]
    started = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt, _ in asked], params)
    seconds = time.perf_counter() - started
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    if tokens != sum(n for _, n in asked):
        raise RuntimeError(f"{tokens} tokens were generated instead of {sum(n for _, n in asked)}")
    return tokens, seconds


def measure(llm: LLM, model: str, workload: str, *, repeats: int = 3, contender: str = "minipaged") -> EngineRow:
    """The median of `repeats` passes after a warm one."""
    asked, temperature = requests_of(workload)
    run(llm, asked, temperature)
    passes = [run(llm, asked, temperature) for _ in range(repeats)]
    seconds = statistics.median(s for _, s in passes)
    return EngineRow(contender, model, workload, passes[0][0], seconds, passes[0][0] / seconds)


def host_gap_us(llm: LLM, batch: int, steps: int = 60) -> tuple[float, float]:
    """(median wall time of a step, the part of it during which the GPU was idle), microseconds, at `batch` running decodes."""
    engine = llm.engine
    for prompt, _ in engine_draws(f"b{batch}"):
        engine.submit(prompt, SamplingParams(max_tokens=steps + 64, ignore_eos=True))
    for _ in range(40):
        engine.step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        started = time.perf_counter()
        for _ in range(steps):
            engine.step()
        torch.cuda.synchronize()
        wall = (time.perf_counter() - started) / steps * 1e6
    busy = sum(event.self_device_time_total for event in profile.key_averages()) / steps
    while engine.has_work:
        engine.step()
    return wall, max(0.0, wall - busy)
