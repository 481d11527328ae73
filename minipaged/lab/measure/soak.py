"""A long run of everything at once, without a model: forks, aborts, swaps, priorities, a pool that is always too small. What must hold is
checked at every step for a while and then at every 64th; nothing may be lost, and memory may not grow.

How oversubscribed the pool is: the blocks that are held (a shared one once) and those that the same sequences still need to reach their
full length, over the blocks there are. Of the running sequences this can be 2 only while they are young, since a full pool ends their
growth; "admitted" adds those that are swapped out, "alive" those that wait as well: all that the pool is asked to serve at that moment.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np

from minipaged.config import EngineConfig, SamplingParams
from minipaged.engine import Engine
from minipaged.memory.block_manager import BlockManager
from minipaged.scheduling.plan import StepPlan, StepTokens
from minipaged.scheduling.request import Status
from minipaged.scheduling.scheduler import Scheduler

BLOCK, VOCAB = 16, 1000
EVERY_STEP, THEN_EVERY = 10_000, 64


@dataclass
class SoakReport:
    """What a soak saw. demand_*: blocks needed at full length over blocks of the pool; memory_mib: resident size after a tenth of the
    requests, and at the end."""

    requests: int
    steps: int
    tokens: int
    mean_output: float
    demand_running_peak: float
    demand_running_mean: float
    demand_admitted_mean: float
    demand_alive_mean: float
    forked: int
    aborted: int
    swaps: int
    preemptions: int
    prioritized: int
    copies: int
    hit_tokens: int
    checks: int
    memory_mib: tuple[float, float]
    seconds: float

    def rows(self) -> list[tuple[str, object]]:
        """Name and value, for a table."""
        return list(asdict(self).items())


class Dice:
    """A runner that draws tokens at random and computes nothing."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._tokens = StepTokens(np.zeros(0, np.int32))

    def num_blocks(self) -> int:
        """Nothing is stored."""
        return 0

    def launch(self, plan: StepPlan) -> Dice:
        """Draw at once."""
        self._tokens = StepTokens(self._rng.integers(0, VOCAB, len(plan.draw_rows)).astype(np.int32))
        return self

    def tokens(self) -> StepTokens:
        """What was drawn."""
        return self._tokens


@dataclass
class Demand:
    """What the sequences will need, in pools, over the steps that were looked at."""

    looks: int = 0
    peak: float = 0.0
    running: float = 0.0
    admitted: float = 0.0
    alive: float = 0.0

    def look(self, scheduler: Scheduler) -> None:
        """Add this moment."""
        manager, usage = scheduler.manager, scheduler.manager.usage()
        running = swapped = waiting = 0
        for sequence in scheduler.sequences.values():
            request = sequence.request
            full = -(-(request.num_prompt + request.params.max_tokens) // BLOCK)
            if sequence.status is Status.RUNNING:
                running += max(0, full - len(manager.table(sequence.seq_id)))
            elif sequence.status is Status.SWAPPED:
                swapped += full
            else:
                waiting += full * request.params.num_sequences
        pool = usage.total - usage.null
        self.looks += 1
        self.peak = max(self.peak, (usage.referenced + running) / pool)
        self.running += (usage.referenced + running) / pool
        self.admitted += (usage.referenced + running + swapped) / pool
        self.alive += (usage.referenced + running + swapped + waiting) / pool


def check(scheduler: Scheduler) -> None:
    """What can be read off the tables: every reference counted, every block somewhere, none twice. RuntimeError if not."""
    manager = scheduler.manager
    held: Counter[int] = Counter()
    host: Counter[int] = Counter()
    for sequence in scheduler.sequences.values():
        if sequence.status is Status.RUNNING:
            table = manager.table(sequence.seq_id)
            held.update(table)
            if len(table) * BLOCK < sequence.num_computed:
                raise RuntimeError(f"{sequence} has computed more than its table holds")
        elif sequence.status is Status.SWAPPED:
            host.update(set(manager.host_table(sequence.seq_id)))
    usage = manager.usage()
    wrong = [block for block, count in held.items() if manager.ref_count(block) != count]
    if wrong:
        raise RuntimeError(f"reference counts of blocks {wrong[:5]} differ from the tables")
    if len(held) != usage.referenced or usage.free + usage.referenced + usage.null != usage.total:
        raise RuntimeError(f"{len(held)} blocks are in tables, the pool says {usage}")
    if len(host) != usage.host_total - usage.host_free:
        raise RuntimeError(f"{len(host)} host blocks are in tables, the pool says {usage}")


def soak(
    num_requests: int, *, seed: int = 0, max_num_seqs: int = 128, progress: Callable[[int], None] | None = None
) -> SoakReport:
    """Run `num_requests` simulated requests through engine, scheduler and block manager."""
    rng = np.random.default_rng(seed)
    num_blocks = 3 * max_num_seqs // 2  # a request needs four on average
    manager = BlockManager(num_blocks, BLOCK, num_host_blocks=num_blocks)
    config = EngineConfig(
        max_num_seqs=max_num_seqs, max_num_batched_tokens=512, max_model_len=512, policy="priority", preemption="swap"
    )
    scheduler = Scheduler(config, manager, BLOCK)
    engine = Engine(scheduler, Dice(seed))
    stems = [rng.integers(0, VOCAB, 2 * BLOCK).tolist() for _ in range(32)]
    seen = Counter[str]()
    checks = submitted = steps = 0
    early_memory, started, alive = 0.0, time.perf_counter(), []
    demand = Demand()
    while submitted < num_requests or engine.has_work:
        while submitted < num_requests and submitted - seen["ended"] < max_num_seqs + 64:
            alive.append(_submit(engine, rng, stems, seen))
            submitted += 1
            if len(alive) > 1 and rng.random() < 0.22:
                engine.abort(alive.pop(int(rng.integers(max(0, len(alive) - 200), len(alive)))))
                seen["abort asked"] += 1
            if submitted % 1000 == 0:
                alive = alive[-300:]
                if progress is not None:
                    progress(1000)
            if submitted == max(1, num_requests // 10):
                early_memory = _resident_mib()
        for output in engine.step():
            if output.finished:
                seen["ended"] += 1
                seen["aborted"] += any(s.finish_reason == "abort" for s in output.request.sequences)
        steps += 1
        if steps <= EVERY_STEP or steps % THEN_EVERY == 0:
            check(scheduler)
            checks += 1
            demand.look(scheduler)
    usage = manager.usage()
    if usage.referenced or usage.host_free != usage.host_total or seen["ended"] != num_requests:
        raise RuntimeError(f"something was lost: {usage}, {seen['ended']} of {num_requests} requests ended")
    counters = scheduler.counters
    return SoakReport(
        requests=num_requests,
        steps=steps,
        tokens=counters.generated_tokens,
        mean_output=counters.generated_tokens / num_requests,
        demand_running_peak=demand.peak,
        demand_running_mean=demand.running / demand.looks,
        demand_admitted_mean=demand.admitted / demand.looks,
        demand_alive_mean=demand.alive / demand.looks,
        forked=seen["forked"],
        aborted=seen["aborted"],
        swaps=counters.swaps,
        preemptions=counters.preemptions,
        prioritized=seen["prioritized"],
        copies=counters.copies,
        hit_tokens=counters.hit_tokens,
        checks=checks,
        memory_mib=(early_memory, _resident_mib()),
        seconds=time.perf_counter() - started,
    )


def _submit(engine: Engine, rng: np.random.Generator, stems: list[list[int]], seen: Counter[str]) -> int:
    """One request: a third with a common beginning, a tenth with several samples, a fifth more or less urgent than the rest."""
    prompt = rng.integers(0, VOCAB, int(rng.integers(2, 20))).tolist()
    if rng.random() < 0.33:
        prompt = stems[int(rng.integers(len(stems)))] + prompt[:8]
    several = int(rng.integers(2, 4)) if rng.random() < 0.1 else 1
    priority = int(rng.integers(-2, 3)) if rng.random() < 0.2 else 0
    seen["forked"] += several > 1
    seen["prioritized"] += priority != 0
    params = SamplingParams(
        n=several,
        temperature=1.0 if several > 1 else 0.0,
        max_tokens=int(rng.integers(8, 88)),
        ignore_eos=True,
        priority=priority,
    )
    return engine.submit(prompt, params)


def _resident_mib() -> float:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
