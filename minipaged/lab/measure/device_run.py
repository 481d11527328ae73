"""Runs the systems on this machine's device: one model, one KV pool, the same scheduler and kernels; only the block
manager differs.

Imports torch when it runs. What it leaves out, in the baselines' favour: rows that ended in a static batch are not
computed on, and a cache that grows by concatenation is not copied about. So the differences are those of memory and
of who may enter, nothing else.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from minipaged.baselines.contiguous import Ask, contiguous_scheduler
from minipaged.baselines.systems import PAGED, SYSTEMS, todays_name
from minipaged.config import CacheConfig, EngineConfig, Progress, SamplingParams, check_int, check_real
from minipaged.engine import Engine
from minipaged.errors import InputError
from minipaged.lab.measure.rows import too_few_steps
from minipaged.lab.simulation.trace_files import load_workload
from minipaged.lab.simulation.workloads import TimedRequest, Workload, engine_requests
from minipaged.memory.block_manager import BlockManager
from minipaged.model.loading.shapes import SHAPES
from minipaged.scheduling.request import RequestOutput
from minipaged.scheduling.scheduler import Scheduler

STEP_BUDGET = 8_192  # tokens a step where requests join and leave
CPU_STEP_BUDGET = 256  # the same on a CPU, where a step of 8,192 takes longer than most time limits
WARM_DRAWS = 12  # of every system, before anything is timed
WHOLE_BATCHES = ("static", "fastertransformer")  # all rows start together, and nobody joins
Fits = Callable[[TimedRequest], bool]
SMALL_VOCABULARY = 250  # ids that every model has
LAST_BATCH = 3  # a batch that nobody joins is let end, until the time limit has passed so often
BATCH_BUDGET = 16_384  # tokens a step for batches that nobody joins: they start together


@dataclass(frozen=True, slots=True)
class DeviceResult:
    """One system's run. Seconds of wall time; all requests were there from the start. With a time limit, a request that
    was not reached counts as infinitely late in the percentiles.
    """

    system: str
    pool: int  # slots
    requests: int
    finished: int
    refused: int
    tokens: int
    seconds: float
    mean_rows: float  # over time
    token_share: float  # of the pool that held token state, over time
    first_token: tuple[float, float]  # p50, p99
    per_token: tuple[float, float]  # p50, p99 of the mean gap between a request's tokens
    normalized_latency: float  # seconds a token, mean over the finished
    preemptions: int
    same_answers: float  # share of the finished that were answered as under the first system, token for token
    note: str = ""
    steps: int | None = None  # of the engine; None where nobody counted, as in transformers

    @property
    def too_few_steps(self) -> bool:
        """Whether it was stopped before its speed says anything: it must not be ranked."""
        return too_few_steps(self.steps, self.note)

    @property
    def tokens_per_second(self) -> float:
        """Tokens of answers."""
        return self.tokens / self.seconds if self.seconds else math.nan


def requests_of(load: Workload, vocab_size: int, *, seed: int = 0) -> list[TimedRequest]:
    """Token ids for a workload's lengths, the common prefix the same in each; arrivals are left out."""
    rng = np.random.default_rng(seed)
    prefix = rng.integers(0, vocab_size, load.prefix).tolist()
    return [
        ([*prefix, *rng.integers(0, vocab_size, int(p) - load.prefix).tolist()], int(o))
        for p, o in zip(load.prompts, load.outputs, strict=True)
    ]


def requests_for(trace: str, model: str, *, count: int, seed: int = 0) -> list[TimedRequest]:
    """The first `count` requests that `trace` names: the fixed ones of the benchmarks, else a workload's lengths with random ids.

    Ids are folded into the vocabulary of a known shape. InputError for an unknown trace.
    """
    fixed = trace in ("nano", "sharegpt") or (trace[:1] == "b" and trace[1:].isdecimal())
    config = SHAPES.get(model.removeprefix("random:"))
    vocabulary = SMALL_VOCABULARY if config is None else config.vocab_size
    if not fixed:
        return requests_of(load_workload(trace, rate=math.inf, count=count, seed=seed), vocabulary, seed=seed)
    drawn = engine_requests(trace)[: check_int("requests", count, 1)]
    return [([token % vocabulary for token in prompt], length) for prompt, length in drawn]


def run_systems(
    systems: Sequence[str],
    requests: Sequence[TimedRequest],
    *,
    model: str,
    device: str = "auto",
    dtype: str = "auto",
    block_size: int = 16,
    pools: Sequence[int | None] = (None,),
    max_num_seqs: int = 256,
    max_len: int = 2048,
    max_new: int = 1024,
    seconds: float | None = None,
    progress: Progress,
    done: Callable[[DeviceResult], None] = lambda result: None,
) -> list[DeviceResult]:
    """Serve the requests under every system in turn, in every pool (slots; None: all that the device holds).

    `max_new`: what a client allows, for systems that cannot know the answer's length. `seconds`: a system that is not
    through by then is stopped; a batch that nobody joins is let end first. `done` hears each result at once.
    Raises InputError for an unknown system, a model that cannot be loaded, or a pool that the device cannot hold.
    """
    systems = [todays_name(system) for system in systems]
    for system in systems:
        if system not in SYSTEMS:
            raise InputError(f"unknown system {system!r}; known: {', '.join(SYSTEMS)}")
    check_int("max_num_seqs", max_num_seqs, 1)
    if seconds is not None:
        check_real("seconds", seconds, 0.0, open_low=True)
    for pool in pools:
        if pool is not None:
            check_int("slots", pool, block_size)
    if not requests or not pools:
        raise InputError("no requests to run")
    for prompt, length in requests:
        if len(prompt) + length > max_len:
            raise InputError(
                f"a prompt of {len(prompt)} and an answer of {length} exceed the context of {max_len} tokens"
            )
    bench = Bench(model, device, dtype, block_size, pools, max_num_seqs, max_len, progress)
    bench.warm_up(requests, systems, progress)
    results: list[DeviceResult] = []
    references: dict[int | None, list[list[int]]] = {}
    # webui has one row in any pool, so it runs once.
    runs = [(pool, s) for pool in pools for s in systems if s != "webui" or pool == pools[0]]
    for i, (pool, system) in enumerate(runs):

        def tell(share: float, i: int = i, system: str = system) -> None:
            at_once = ": the whole batch's prompts, in one step" if system in WHOLE_BATCHES and not share else ""
            progress(system + at_once, round(1000 * (i + share)), 1000 * len(runs))

        engine, slots, fits = bench.engine(system, requests, max_new, pool)
        result, answers = serve(engine, system, requests, slots, seconds, tell, fits=fits)
        first = references.setdefault(pool, answers)
        both = [
            (a, b)
            for (a, b), (_, n) in zip(zip(answers, first, strict=True), requests, strict=True)
            if len(a) == len(b) == n
        ]
        same = sum(a == b for a, b in both) / len(both) if both else math.nan
        results.append(replace(result, same_answers=same))
        done(results[-1])
    return results


class Bench:
    """A loaded model and a pool on the device, for engine after engine."""

    def __init__(
        self,
        model: str,
        device: str,
        dtype: str,
        block_size: int,
        pools: Sequence[int | None],
        max_num_seqs: int,
        max_len: int,
        progress: Progress | None = None,
    ) -> None:
        from minipaged.assembly import assemble
        from minipaged.model.loading.placement import choose_device

        cache = CacheConfig(block_size=block_size, enable_prefix_caching=False)
        budget = STEP_BUDGET if choose_device(device).type == "cuda" else max(CPU_STEP_BUDGET, max_num_seqs)
        config = EngineConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=budget, preemption="recompute")
        sizes = [pool // block_size + 1 for pool in pools if pool is not None]
        self.parts = assemble(
            model,
            cache,
            config,
            device=device,
            dtype=dtype,
            num_blocks=None if None in pools else max(sizes),
            max_model_len=max_len,
            progress=progress,
        )
        held = self.parts.cache.num_blocks
        if sizes and max(sizes) > held:
            raise InputError(
                f"a pool of {max(sizes) * block_size:,} slots was asked for; this device holds {held * block_size:,}"
            )
        self.config = replace(config, max_model_len=max_len, depth=self.parts.engine.depth)
        self.block_size, self.num_blocks, self.max_len = block_size, held, max_len

    def warm_up(
        self, requests: Sequence[TimedRequest], systems: Sequence[str], progress: Progress = lambda *what: None
    ) -> None:
        """Compile and capture what the runs will need: on a GPU the batch shrinks from its full size to one, row by row; then each system
        takes its own way from prompts to rows, for a few tokens.
        """
        few: list[TimedRequest] = []
        most, room = (
            (self.config.max_num_seqs, self.num_blocks) if self.parts.device.type == "cuda" else (2, self.num_blocks)
        )
        for prompt, _ in requests[:most]:
            length = min(2 + len(few), self.max_len - len(prompt))
            room -= -(-(len(prompt) + length) // self.block_size) + 1
            if few and room < 0:
                break
            few.append((prompt, max(1, length)))
        progress("warming up", 0, 1 + len(systems))
        self._run_through(PAGED, few)
        for i, system in enumerate(systems, 1):
            progress("warming up", i, 1 + len(systems))
            self._run_through(system, few[:WARM_DRAWS])

    def _run_through(self, system: str, requests: Sequence[TimedRequest]) -> None:
        engine, _, fits = self.engine(system, requests, 0, None)
        for prompt, length in filter(fits, requests):
            engine.ask(prompt, SamplingParams(max_tokens=length, ignore_eos=True))
        while engine.has_work:
            engine.step()

    def engine(
        self, system: str, requests: Sequence[TimedRequest], max_new: int, pool: int | None
    ) -> tuple[Engine, int, Fits]:
        """An engine of that system around the loaded model and a pool of that many slots; also the slots it has, and which
        requests an empty pool would hold.
        """
        runner: Any = self.parts.engine.runner
        num_blocks = self.num_blocks if pool is None else pool // self.block_size + 1
        slots = (num_blocks - 1) * self.block_size
        if system == PAGED:
            paged = BlockManager(num_blocks, self.block_size, prefix_caching=False)
            return Engine(Scheduler(self.config, paged, self.block_size), runner), slots, lambda request: True
        joins = system != "webui" and system not in WHOLE_BATCHES
        config = self.config if joins else replace(self.config, max_num_batched_tokens=BATCH_BUDGET)
        scheduler, manager = contiguous_scheduler(system, config, num_blocks, self.block_size, max_new=max_new)

        def fits(request: TimedRequest) -> bool:
            return manager.fits(len(request[0]), Ask(max(max_new, request[1]), request[1]))

        return Engine(scheduler, runner), slots, fits


def serve(
    engine: Engine,
    system: str,
    requests: Sequence[TimedRequest],
    slots: int,
    seconds: float | None,
    progress: Callable[[float], None],
    *,
    fits: Fits = lambda request: True,
) -> tuple[DeviceResult, list[list[int]]]:
    """Answer the requests; those that do not fit are refused, as are those that the engine refuses.

    `progress` is called before the first step and after each with the share that is done: of all tokens to compute, prompts
    included, or of the time limit, whichever is more.
    """
    served = [i for i, request in enumerate(requests) if fits(request)]
    outputs: list[RequestOutput] = []
    for i in served:
        prompt, length = requests[i]
        outputs.append(engine.ask(prompt, SamplingParams(max_tokens=length, ignore_eos=True)))
    count = len(requests)
    first, finish = np.full(count, math.nan), np.full(count, math.nan)
    batch = engine.scheduler.batch
    weighted_rows = weighted_tokens = 0.0
    done = steps = 0
    work, ended, share = sum(len(prompt) + length for prompt, length in map(requests.__getitem__, served)), 0, 0.0
    progress(0.0)
    start = before = time.perf_counter()
    while engine.has_work:
        in_batch = system in WHOLE_BATCHES and len(engine.scheduler.order()) > 0
        if seconds is not None and before - start > seconds * (LAST_BATCH if in_batch else 1):
            break
        changed = engine.step()
        now = time.perf_counter()
        steps += 1
        running = engine.scheduler.order()
        computed = int(batch.num_computed[running].sum())
        weighted_rows += (now - before) * len(running)
        weighted_tokens += (now - before) * computed
        before = now
        for output in changed:
            index = served[output.request_id]
            if math.isnan(first[index]) and output.outputs[0].token_ids:
                first[index] = now - start
            if output.finished and math.isnan(finish[index]):
                finish[index] = now - start
                done += 1
                ended += len(requests[index][0]) + requests[index][1]
        share = max(share, (ended + computed) / work, (now - start) / seconds if seconds else 0.0)
        progress(min(1.0, share))
    took = before - start
    cut_short = engine.has_work
    engine.drain()
    answers: list[list[int]] = [[] for _ in requests]
    for i, output in zip(served, outputs, strict=True):
        answers[i] = list(output.outputs[0].token_ids) if output.error is None and output.outputs else []
    written = np.array([len(answer) for answer in answers])
    last = np.where(np.isnan(finish), took, finish)
    spaced = (written > 1) & ~np.isnan(first)
    gaps = (last - first)[spaced] / (written[spaced] - 1)
    refused = count - len(served) + sum(o.error is not None for o in outputs)
    whole = finish / np.array([length for _, length in requests])
    result = DeviceResult(
        system=system,
        pool=slots,
        requests=count,
        finished=done,
        refused=refused,
        tokens=int(written.sum()),
        seconds=took,
        mean_rows=weighted_rows / took if took else 0.0,
        token_share=weighted_tokens / took / slots if took else 0.0,
        first_token=percentiles(first, served=count - refused),
        per_token=percentiles(gaps, served=len(gaps)),
        normalized_latency=float(np.nanmean(whole)) if done else math.nan,
        preemptions=engine.scheduler.counters.preemptions,
        same_answers=1.0,
        note=f"stopped after {took:.0f} s" if cut_short else f"{refused} never fit" if refused else "",
        steps=steps,
    )
    if result.too_few_steps:
        words = f"{result.note}, {steps} step{'s'[: steps != 1]}: too few to say how fast it is; give --seconds more"
        result = replace(result, note=words)
    return result, answers


def percentiles(values: Any, *, served: int) -> tuple[float, float]:
    """p50 and p99 of `served` values, of which those that are nan, or missing, are infinitely late; nan for nothing."""
    if not served:
        return math.nan, math.nan
    known = np.asarray(values)[~np.isnan(values)]
    late = np.sort(np.concatenate([known, np.full(max(0, served - len(known)), np.inf)]))
    return float(late[(served - 1) // 2]), float(late[min(served - 1, math.ceil(0.99 * served) - 1)])
