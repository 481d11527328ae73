"""What each technique contributes, alone and together, measured on the device it runs on: attention, layout, heads, block size,
preemption, batching.

The network, the kernels and the engine are this project's own; what is called contiguous is consecutive blocks read by the
same kernels, so that a comparison changes one thing. Steps are timed without a scheduler (step_bench.py), batches come from
runs of the real engine (device_run.py), and the last section joins the two.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from minipaged.baselines.systems import PAGED
from minipaged.config import CacheConfig, EngineConfig, ModelConfig, Progress, SamplingParams
from minipaged.engine import Engine
from minipaged.lab.measure.attention_variants import (
    DECODES,
    Cells,
    Decode,
    one_pass,
    paged,
    split,
    torch_dense,
    written_out,
)
from minipaged.lab.measure.device_run import Bench, DeviceResult, serve
from minipaged.lab.measure.rows import SECTIONS, too_few_steps
from minipaged.lab.measure.step_bench import SlotPool, decode_step, prefill_step, time_of
from minipaged.lab.simulation.workloads import TimedRequest, engine_requests, make_workload
from minipaged.model.llama import Llama

BLOCK = 16
CONSECUTIVE, SHUFFLED = "consecutive blocks, the engine's kernel", "shuffled blocks, the engine's kernel"


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large everything is. The serving part has the proportions of the paper's server: the pool holds 7.7 contexts."""

    rows: int  # of the steps that are timed
    context: int
    lone: int  # context of a row that is alone
    prompt: int
    pool: int  # slots of the serving part
    max_len: int
    max_new: int
    seconds: float  # limit of each serving run
    requests: list[TimedRequest] = field(repr=False)


def sizes_for(device: torch.device, seconds: float) -> Sizes:
    """The paper's proportions on a GPU, an eighth of them on a CPU."""
    if device.type == "cuda":
        return Sizes(32, 1024, 2048, 2048, 15_728, 2048, 1024, seconds, engine_requests("sharegpt"))
    load = make_workload("sharegpt", rate=math.inf, count=64)
    short = [
        ([(7 * i + k) % 250 for k in range(max(1, int(p) // 8))], max(2, min(int(o), 1024) // 8))
        for i, (p, o) in enumerate(zip(load.prompts, load.outputs, strict=True))
    ]
    return Sizes(8, 512, 2048, 512, 1_966, 256, 128, seconds, short)


@dataclass(frozen=True, slots=True)
class Measure:
    """One number. `seconds`: of a step or an operator, or of a whole run."""

    section: str
    name: str
    seconds: float
    tokens_per_second: float = math.nan
    ratio: float = math.nan  # against the first of its group, larger is better
    note: str = ""


@dataclass(slots=True)
class Ablation:
    """All that was measured, in order."""

    model: str
    device: str
    sizes: Sizes
    measures: list[Measure] = field(default_factory=list)
    runs: dict[str, DeviceResult] = field(default_factory=dict)

    def of(self, section: str) -> list[Measure]:
        """One section's."""
        return [m for m in self.measures if m.section == section]


def ablate(
    model: str,
    *,
    device: str = "auto",
    seconds: float = 8.0,
    progress: Progress,
    done: Callable[[Ablation], None] = lambda ablation: None,
) -> Ablation:
    """Measure every section; `done` hears after each. Raises InputError for a model that cannot be loaded or cut into other heads."""
    from minipaged.model.loading.placement import choose_device

    place = choose_device(device)
    sizes = sizes_for(place, seconds)
    work = _Work(model, device, sizes, progress, done)
    work.run()
    return work.found


class _Work:
    """The loaded model and what the sections share."""

    def __init__(
        self, model: str, device: str, sizes: Sizes, progress: Progress, done: Callable[[Ablation], None]
    ) -> None:
        self.progress, self.done, self.sizes = progress, done, sizes
        self.steps = 0
        self._tell("loading")
        self.bench: Bench | None = Bench(model, device, "auto", BLOCK, (sizes.pool,), 256, sizes.max_len)
        parts = self.bench.parts
        runner: Any = parts.engine.runner
        self.parts, self.model = parts, runner.model
        self.config: ModelConfig = parts.model_config
        self.device, self.dtype = parts.device, getattr(torch, parts.dtype)
        self.found = Ablation(self.config.name, str(self.device), sizes)
        self.rows_of: dict[str, float] = {}

    def _tell(self, what: str) -> None:
        self._report(what, 0.0)
        self.steps += 1

    def _report(self, what: str, share: float) -> None:
        """`what` is the section after those that are done; this share of it is done as well."""
        self.progress(what, round(1000 * (self.steps + share)), 1000 * (len(SECTIONS) + 1))

    def _add(
        self,
        section: str,
        name: str,
        seconds: float,
        *,
        rows: float = math.nan,
        first: float = math.nan,
        note: str = "",
    ) -> None:
        """`rows` tokens in `seconds`; `first`: tokens a second, or 1 / seconds, that the ratio is against."""
        speed = rows / seconds
        mine = 1 / seconds if math.isnan(speed) else speed
        self.found.measures.append(Measure(section, name, seconds, speed, mine / first, note))

    @torch.inference_mode()
    def run(self) -> None:
        """All sections; those that serve come first, so that their pool can be given back."""
        self._tell("batching")
        self.batching()
        self._tell("preemption")
        self.preemption()
        self.bench = None
        self.parts.engine.runner = None  # type: ignore[assignment]
        self._forget()
        large = max(
            self.sizes.rows * self.sizes.context,
            self.sizes.lone,
            math.ceil(self.rows_of[PAGED]) * self._mean_context(),
        )
        self.pool = self._pool(self.config, len(self.model.layers), large)
        for section in (self.attention, self.prefill, self.layout, self.block_size, self.together, self.ladder):
            self._tell(section.__name__.replace("_", " "))
            section()
            self.done(self.found)
        self._tell("heads")
        self.heads()
        self.found.measures.sort(key=lambda m: list(SECTIONS).index(m.section))
        self.done(self.found)

    def _pool(self, config: ModelConfig, layers: int, slots: int) -> SlotPool:
        return SlotPool(config, layers, -(-slots // 256) * 256 + 256, self.dtype, self.device)

    def _forget(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _step(self, attend: Decode, rows: int, context: int, **how: Any) -> float:
        return time_of(decode_step(self.model, self.pool, rows, context, attend, **how), self.device)

    def _mean_context(self) -> int:
        """Tokens that a running row holds on average: the prompt and half of the answer."""
        requests = self.sizes.requests
        weight = sum(n for _, n in requests)  # a row counts for as long as it runs
        return round(sum(n * (len(p) + n / 2) for p, n in requests) / weight)

    # ---- steps

    def attention(self) -> None:
        """The operator of one layer, and the whole step, in each way of writing it."""
        sizes, config = self.sizes, self.config
        for rows, context in ((1, sizes.lone), (sizes.rows, sizes.context)):
            tables = self.pool.tables(rows, context, BLOCK, shuffled=False)
            layers = [self.pool.cells(i, rows, context, BLOCK, tables) for i in range(config.num_layers)]
            query = torch.randn(rows, config.num_heads, config.head_dim, dtype=self.dtype, device=self.device)
            first = whole = math.nan
            for name, attend in DECODES.items():
                # over all layers, so that no cache of the device holds the keys
                alone = time_of(partial(_attend_all, attend, query, layers), self.device) / len(layers)
                first = 1 / alone if math.isnan(first) else first
                self._add("attention", f"{rows} x {context}, one layer: {name}", alone, first=first)
            for name, attend in DECODES.items():
                step = self._step(attend, rows, context)
                whole = rows / step if math.isnan(whole) else whole
                self._add("attention", f"{rows} x {context}, whole step: {name}", step, rows=rows, first=whole)

    def prefill(self) -> None:
        """A prompt's step, and so the time to the first token."""
        length, first = self.sizes.prompt, math.nan
        for name, fused in (("written out", False), ("one pass", True)):
            step = time_of(prefill_step(self.model, self.pool, length, fused=fused), self.device)
            first = length / step if math.isnan(first) else first
            self._add("prefill", f"prompt of {length}: {name}", step, rows=length, first=first)

    def layout(self) -> None:
        """Where the blocks lie, under one kernel; and torch's kernel over no blocks at all."""
        sizes, config = self.sizes, self.config
        ways: tuple[tuple[str, Decode, bool], ...] = (
            ("dense tensors, torch's kernel", torch_dense, False),
            (CONSECUTIVE, paged, False),
            (SHUFFLED, paged, True),
        )
        query = torch.randn(sizes.rows, config.num_heads, config.head_dim, dtype=self.dtype, device=self.device)
        first = math.nan
        for name, attend, shuffled in ways:
            tables = self.pool.tables(sizes.rows, sizes.context, BLOCK, shuffled=shuffled)
            layers = [self.pool.cells(i, sizes.rows, sizes.context, BLOCK, tables) for i in range(config.num_layers)]
            alone = time_of(partial(_attend_all, attend, query, layers), self.device) / len(layers)
            first = 1 / alone if math.isnan(first) else first
            gathers = attend is paged and self.device.type == "cpu"
            note = "on a CPU torch gathers the blocks before attention reads them" if gathers else ""
            self._add("layout", f"{sizes.rows} x {sizes.context}, one layer: {name}", alone, first=first, note=note)
        first = math.nan
        for name, attend, shuffled in ways:
            step = self._step(attend, sizes.rows, sizes.context, shuffled=shuffled)
            first = sizes.rows / step if math.isnan(first) else first
            self._add(
                "layout", f"{sizes.rows} x {sizes.context}, whole step: {name}", step, rows=sizes.rows, first=first
            )

    def block_size(self) -> None:
        """The kernel's side of the block size; the last block's empty half is memory's side."""
        sizes, mean = self.sizes, self._mean_context()
        step = {
            size: self._step(paged, sizes.rows, sizes.context, shuffled=True, block_size=size)
            for size in (1, 8, 16, 32, 64, 128, 256)
        }
        for size, took in step.items():
            held = mean + (size - 1) / 2
            note = f"{sizes.pool / held:.1f} rows of {mean} tokens fit the pool, {50 * (size - 1) / held:.1f} % of it empty"
            self._add(
                "block size", f"blocks of {size}", took, rows=sizes.rows, first=sizes.rows / step[BLOCK], note=note
            )

    def heads(self) -> None:
        """The same shape with fewer heads of keys and values; random weights, since no model was published in all three."""
        sizes, config, first = self.sizes, self.config, math.nan
        middle = [
            ("GQA", config.num_heads // n) for n in (4, 3, 2) if config.num_heads % n == 0 and config.num_heads > n
        ]
        for name, kv_heads in (("MHA", config.num_heads), *middle[:1], ("MQA", 1)):
            shape = replace(config, num_kv_heads=kv_heads, name=f"{config.name}, {kv_heads} KV heads")
            self.model = self.pool = None  # type: ignore[assignment]  # two sets of weights need not fit
            self._forget()
            self.model = Llama.random(shape, 0, self.dtype, self.device).pack()
            self.pool = self._pool(shape, len(self.model.layers), sizes.rows * sizes.context)
            step = self._step(split, sizes.rows, sizes.context)
            first = sizes.rows / step if math.isnan(first) else first
            size = shape.kv_bytes_per_token(self.parts.dtype)
            most = size * config.num_heads // kv_heads
            note = f"{size:,} bytes a token: {most / size:.0f}x the rows in the same memory"
            self._add("heads", f"{name}, {kv_heads} KV heads", step, rows=sizes.rows, first=first, note=note)

    # ---- serving

    BATCHING = (
        ("webui", "one at a time"),
        ("static", "static batches"),
        ("orca-max", "continuous, contiguous"),
        (PAGED, "continuous, paged"),
    )

    def batching(self) -> None:
        """The engine itself, in the pool that binds."""
        assert self.bench is not None
        sizes, first = self.sizes, math.nan
        self.bench.warm_up(sizes.requests, [system for system, _ in self.BATCHING])
        for i, (system, name) in enumerate(self.BATCHING):

            def tell(share: float, i: int = i) -> None:
                self._report("batching", (i + share) / len(self.BATCHING) - 1)

            engine, slots, fits = self.bench.engine(system, sizes.requests, sizes.max_new, sizes.pool)
            result, _ = serve(engine, system, sizes.requests, slots, sizes.seconds, tell, fits=fits)
            self.found.runs[system] = result
            self.rows_of[system] = result.mean_rows
            if i == 0 and not result.too_few_steps:
                first = result.tokens_per_second
            note = f"{result.mean_rows:.1f} rows, {100 * result.token_share:.0f} % of the pool used" + (
                f", {result.note}" if result.note else ""
            )
            self._add("batching", name, result.seconds, rows=result.tokens, first=first, note=note)
            if result.too_few_steps:  # no speed and no factor: the note says why
                self.found.measures[-1] = Measure("batching", name, result.seconds, note=note)

    def preemption(self) -> None:
        """Requests that together outgrow the pool: the victim's keys and values are computed again, or wait in host memory."""
        from minipaged.assembly import build_engine
        from minipaged.model.loading.zoo import LoadedModel

        on_gpu = self.device.type == "cuda"
        rows, prompt, output = (16, 256, 256) if on_gpu else (5, 40, 56)
        requests = [([(31 * i + k) % 250 for k in range(prompt)], output) for i in range(rows)]
        demand = rows * (prompt + output)
        loaded = LoadedModel(self.config, self.model, self.parts.tokenizer)
        for size in (BLOCK, 4 * BLOCK):
            blocks = round(0.6 * demand) // size + 1
            first = math.nan
            for kind in ("recompute", "swap"):
                cache = CacheConfig(size, blocks, -(-demand // size), enable_prefix_caching=False)
                config = EngineConfig(
                    max_num_seqs=rows, max_model_len=prompt + output, preemption=kind, depth=int(on_gpu),
                )  # fmt: skip
                engine = build_engine(loaded, cache, config, device=self.device, dtype=self.parts.dtype)
                # On a GPU the first of two passes captures graphs.
                took, tokens, count, steps = self._answer(engine, requests, passes=2 if on_gpu else 1)
                name = f"{kind}, blocks of {size}"
                stopped = "" if tokens == rows * output else f"stopped after {took:.0f} s"
                if too_few_steps(steps, stopped):
                    note = f"{stopped}, {steps} step{'s'[: steps != 1]}: too few to say how fast it is; give --seconds more"
                    self.found.measures.append(Measure("preemption", name, took, note=note))
                else:
                    if kind == "recompute":
                        first = tokens / took
                    note = f"{count} preemptions, {rows} requests in a pool for {0.6 * rows:.1f}"
                    note += f", {stopped}" if stopped else ""
                    self._add("preemption", name, took, rows=tokens, first=first, note=note)
                del engine
                self._forget()

    def _answer(self, engine: Engine, requests: list[TimedRequest], *, passes: int) -> tuple[float, int, int, int]:
        """Seconds, tokens, preemptions and steps of the last pass over the requests; it alone is stopped at the time limit, since those
        before it compile and capture.
        """
        took, tokens, count, steps = math.nan, 0, 0, 0
        for limit in (*[math.inf] * (passes - 1), self.sizes.seconds):
            before, start = engine.scheduler.counters.preemptions, time.perf_counter()
            outputs = [engine.ask(prompt, SamplingParams(max_tokens=n, ignore_eos=True)) for prompt, n in requests]
            steps = 0
            while engine.has_work and time.perf_counter() - start < limit:
                engine.step()
                steps += 1
            engine.drain()
            took, count = time.perf_counter() - start, engine.scheduler.counters.preemptions - before
            tokens = sum(len(answer.token_ids) for output in outputs for answer in output.outputs)
            for output in outputs:
                engine.abort(output.request_id)
            while engine.has_work:
                engine.step()
        return took, tokens, count, steps

    # ---- both

    def _rows(self, system: str) -> int:
        return max(1, round(self.rows_of[system]))

    def together(self) -> None:
        """Do the factors multiply? Attention's factor and the batch's, alone and together, at the batches that were measured."""
        context = self._mean_context()
        small, large = self._rows("orca-max"), self._rows(PAGED)
        speed = {
            (name, rows): rows / self._step(attend, rows, context)
            for name, attend in (("written out", written_out), ("one pass, split", split))
            for rows in (small, large)
        }
        base = speed["written out", small]
        rows_named = ((small, "contiguous"), (large, "paged"))
        for rows, memory in rows_named:
            for name in ("written out", "one pass, split"):
                seconds = rows / speed[name, rows]
                self._add("together", f"{name}, {memory} ({rows} rows of {context})", seconds, rows=rows, first=base)
        product = speed["one pass, split", small] / base * (speed["written out", large] / base)
        both = speed["one pass, split", large] / base
        self.found.measures.append(
            Measure(
                "together",
                "the product of the two factors alone",
                math.nan,
                math.nan,
                product,
                f"measured together: {both:.2f}x",
            )
        )

    def ladder(self) -> None:
        """One thing after the other, each at the batch it was measured to have; prompts left out."""
        context = self._mean_context()
        one, static = self._rows("webui"), self._rows("static")
        orca, ours = self._rows("orca-max"), self._rows(PAGED)
        rungs: tuple[tuple[str, int, Decode], ...] = (
            ("one at a time, attention written out", one, written_out),
            ("+ attention in one pass", one, one_pass),
            ("+ split over parts", one, split),
            ("+ static batches", static, split),
            ("+ continuous batching", orca, split),
            ("+ paging", ours, split),
        )
        first = math.nan
        for name, rows, attend in rungs:
            step = self._step(attend, rows, context)
            first = rows / step if math.isnan(first) else first
            self._add("ladder", name, step, rows=rows, first=first, note=f"{rows} rows of {context}")


def _attend_all(attend: Decode, query: torch.Tensor, layers: list[Cells]) -> None:
    for cells in layers:
        attend(query, cells, query.shape[-1] ** -0.5)
