"""Runs this project's own engine over a workload: the real scheduler and block manager, on the simulated runner's clock.

The memory is `paged` or that of a system that reserves ahead. The outcome has the form of the event loop's, so that the two
can be compared: the event loop is the short account of what happens here in full.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from minipaged.baselines.contiguous import contiguous_scheduler
from minipaged.baselines.systems import PAGED
from minipaged.config import EngineConfig, SamplingParams
from minipaged.engine import Engine
from minipaged.lab.simulation.event_loop import Outcome
from minipaged.lab.simulation.roofline import FEMTO
from minipaged.lab.simulation.servers import Server
from minipaged.lab.simulation.simulated_runner import SimulatedRunner
from minipaged.lab.simulation.time_average import Sample, TimeAverages
from minipaged.lab.simulation.workloads import FloatColumn, Workload
from minipaged.memory.block_manager import BlockManager
from minipaged.memory.types import PoolBreakdown
from minipaged.scheduling.request import RequestOutput
from minipaged.scheduling.scheduler import Scheduler
from minipaged.trace.events import Stats, StepDelta


def run_engine(
    load: Workload,
    server: Server,
    *,
    system: str = PAGED,
    block_size: int = 16,
    max_rows: int = 256,
    token_budget: int = 2048,
    prefix_caching: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Outcome:
    """Serve the whole workload. Prompts are random tokens behind the workload's common prefix. `system`: whose memory."""
    run = _EngineRun(load, server, system, block_size, max_rows, token_budget, prefix_caching or load.prefix > 0)
    return run.run(progress)


class _EngineRun:
    def __init__(
        self,
        load: Workload,
        server: Server,
        system: str,
        block_size: int,
        max_rows: int,
        budget: int,
        prefix_caching: bool,
    ) -> None:
        self.load, self.server = load, server
        num_blocks = server.pool // block_size + 1
        config = EngineConfig(
            max_num_seqs=max(max_rows, load.samples),
            max_num_batched_tokens=budget,
            max_model_len=server.max_len,
            preemption="recompute",
        )
        if system == PAGED:
            manager = BlockManager(num_blocks, block_size, prefix_caching=prefix_caching)
            self.scheduler = Scheduler(config, manager, block_size)
        else:
            self.scheduler, _ = contiguous_scheduler(system, config, num_blocks, block_size, max_new=load.max_new)
        self.runner = SimulatedRunner(
            server.model, server.gpu, num_blocks=num_blocks, block_size=block_size, clock=server.clock
        )
        self.engine = Engine(self.scheduler, self.runner, clock=lambda: self.runner.now_fs // 10**6)
        self.engine.trace.subscribe(self._hear)
        self.stats = Stats()
        self.averages = TimeAverages(warm=min(len(load) // 10, 2000))

    def _hear(self, delta: StepDelta) -> None:
        self.stats = delta.stats

    def _params(self, index: int) -> SamplingParams:
        length = int(self.load.outputs[index])
        if self.load.beams:
            return SamplingParams(max_tokens=length, ignore_eos=True, beam_width=self.load.samples, n=1)
        return SamplingParams(max_tokens=length, ignore_eos=True, n=self.load.samples, temperature=1.0)

    def _prompt(self, index: int, rng: np.random.Generator) -> list[int]:
        own = rng.integers(0, self.server.model.vocab_size, int(self.load.prompts[index]) - self.load.prefix)
        return [*range(self.load.prefix), *own.tolist()]

    def run(self, progress: Callable[[int, int], None] | None) -> Outcome:
        """All requests, from time 0 to the last finish."""
        load, runner, engine, count = self.load, self.runner, self.engine, len(self.load)
        arrivals = [round(t * FEMTO) for t in load.arrivals.tolist()]
        rng = np.random.default_rng(0)
        first, finish = np.full(count, math.nan), np.full(count, math.nan)
        index_of: dict[int, int] = {}
        head = done = refused = steps = 0
        samples: list[Sample] = []
        while done < count:
            while head < count and arrivals[head] <= runner.now_fs:
                output = engine.ask(self._prompt(head, rng), self._params(head))
                if output.error is None:
                    index_of[output.request_id] = head
                else:
                    refused += 1
                    done += 1
                head += 1
            if not engine.has_work:
                if head < count:
                    runner.skip_to(float(load.arrivals[head]))
                continue
            before = runner.now_fs
            outputs = engine.step()
            steps += runner.now_fs > before
            self._account(done, runner.now_fs - before)
            for output in outputs:
                done += self._note(output, index_of[output.request_id], first, finish)
            if outputs and progress is not None:
                progress(done, count)
            if len(samples) * count < done * 400:
                samples.append(Sample(runner.now, self._running(), self._rows(), self._breakdown()))
        preemptions = self.scheduler.counters.preemptions
        return Outcome(first, finish, refused, preemptions, steps, runner.now, self.averages, tuple(samples))

    def _note(self, output: RequestOutput, index: int, first: FloatColumn, finish: FloatColumn) -> bool:
        now = self.runner.now
        if math.isnan(first[index]) and output.request.sequences[0].num_output:
            first[index] = now
        if output.finished and math.isnan(finish[index]):
            finish[index] = now
            return True
        return False

    def _running(self) -> int:
        return len(self.scheduler.running)

    def _rows(self) -> int:
        return sum(len(request.alive) for request in self.scheduler.running)

    def _breakdown(self) -> PoolBreakdown:
        stats, pool = self.stats, self.server.pool
        rest = pool - stats.token_slots - stats.tail_slots
        waiting = len(self.scheduler.waiting) > 0
        return PoolBreakdown(stats.token_slots, 0, stats.tail_slots, rest if waiting else 0, 0, 0 if waiting else rest)

    def _account(self, done: int, elapsed: int) -> None:
        waiting = len(self.scheduler.waiting) > 0
        used = self.stats.total_blocks - 1 - self.stats.free_blocks
        self.averages.span(done, waiting).add(
            elapsed, self._running(), self._rows(), self._breakdown(), (used, self.stats.shared_saved_blocks)
        )
