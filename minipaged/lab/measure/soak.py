"""A long run of everything at once, without a model: forks, aborts, swaps, recomputes, priorities, a pool that is always too small. Nothing
may be lost, and memory may not grow.

Checked in every step: each admission finds all of its prompt that can be found (L65). Every ten-thousandth request fills the pool to its
last block, and is served; with one sample more it is refused (L68). At every step for a while and then at every 64th: reference
counts, tables, published blocks (L66), what groups hold (L67). At the end: nothing is held, and each prompt was hashed once (L68). A
hundredth as many requests go through a pool in which nothing is ever evicted: they compute the union of their prefixes and no more (L65).

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
from minipaged.errors import RequestError
from minipaged.lab.measure.soak_laws import SharingWitness
from minipaged.memory.block_manager import BlockManager
from minipaged.scheduling.plan import StepPlan, StepTokens
from minipaged.scheduling.request import Status
from minipaged.scheduling.scheduler import Scheduler

BLOCK, VOCAB = 16, 1000
EVERY_STEP, THEN_EVERY = 10_000, 64
BRIMFUL_EVERY = 10_000


@dataclass
class SoakReport:
    """What a soak saw. demand_*: blocks needed at full length over blocks of the pool; blocks_looked_up: published ones of running
    sequences, at all looks together; groups_looked_at: the same of groups; brimful: requests that fill the whole pool; union_*: requests
    in the pool that forgets nothing, and the tokens that they computed; memory_mib: resident size after a tenth of the requests, and
    at the end."""

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
    admissions: int
    admissions_with_hits: int
    lookups: int
    hashed_blocks: int
    blocks_looked_up: int
    groups_looked_at: int
    brimful: int
    union_requests: int
    union_tokens: int
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

    def num_blocks(self) -> int:
        """Nothing is stored."""
        return 0

    def launch(self, plan: StepPlan) -> Drawn:
        """Draw at once."""
        return Drawn(StepTokens(self._rng.integers(0, VOCAB, len(plan.draw_rows)).astype(np.int32)))


@dataclass(frozen=True)
class Drawn:
    """What a launched step drew."""

    drawn: StepTokens

    def tokens(self) -> StepTokens:
        """Known since the launch."""
        return self.drawn


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
    num_requests: int,
    *,
    seed: int = 0,
    max_num_seqs: int = 128,
    depth: int = 0,
    progress: Callable[[int], None] | None = None,
) -> SoakReport:
    """Run `num_requests` simulated requests through engine, scheduler and block manager, with `depth` steps in flight.

    progress: called with the number of submitted requests, now and then. RuntimeError, naming what was lost or which law was broken.
    """
    union_requests = -(-num_requests // 100)
    union_tokens = computes_the_union(union_requests, seed=seed, depth=depth)
    rng = np.random.default_rng(seed)
    num_blocks = 3 * max_num_seqs // 2  # a request needs four on average
    # A host pool that is full now and then: whoever must go then is recomputed.
    manager = BlockManager(num_blocks, BLOCK, num_host_blocks=num_blocks // 8)
    config = EngineConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=512,
        max_model_len=512,
        policy="priority",
        preemption="swap",
        depth=depth,
    )
    scheduler = Scheduler(config, manager, BLOCK)
    engine = Engine(scheduler, Dice(seed))
    stems = [rng.integers(0, VOCAB, 2 * BLOCK).tolist() for _ in range(32)]
    seen = Counter[str]()
    checks = submitted = steps = 0
    early_memory, started, alive = 0.0, time.perf_counter(), []
    demand = Demand()
    with SharingWitness(scheduler) as witness:
        while submitted < num_requests or engine.has_work:
            while submitted < num_requests and submitted - seen["ended"] < max_num_seqs + 64:
                if submitted % BRIMFUL_EVERY == BRIMFUL_EVERY // 2:
                    _submit_brimful(engine, rng, num_blocks - 1)
                    seen["brimful"] += 1
                else:
                    alive.append(_submit(engine, rng, stems, seen))
                submitted += 1
                if len(alive) > 1 and rng.random() < 0.22:
                    engine.abort(alive.pop(int(rng.integers(max(0, len(alive) - 200), len(alive)))))
                    seen["abort asked"] += 1
                if submitted % 1000 == 0:
                    alive = alive[-300:]
                    if progress is not None:
                        progress(submitted)
                if submitted == max(1, num_requests // 10):
                    early_memory = _resident_mib()
            for output in engine.step():
                if output.finished:
                    seen["ended"] += 1
                    seen["aborted"] += any(s.finish_reason == "abort" for s in output.request.sequences)
            steps += 1
            if steps <= EVERY_STEP or steps % THEN_EVERY == 0:
                check(scheduler)
                witness.look()
                checks += 1
                demand.look(scheduler)
        witness.end()
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
        admissions=witness.admissions,
        admissions_with_hits=witness.admissions_with_hits,
        lookups=witness.lookups,
        hashed_blocks=witness.hashed,
        blocks_looked_up=witness.block_looks,
        groups_looked_at=witness.group_looks,
        brimful=seen["brimful"],
        union_requests=union_requests,
        union_tokens=union_tokens,
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


def _submit_brimful(engine: Engine, rng: np.random.Generator, usable: int) -> None:
    """L68: samples of a long prompt that fill the pool to its last block are taken in; one sample more is refused."""
    shared = 20 + usable % 2
    samples = (usable - shared) // 2
    if samples < 1:
        raise RuntimeError(f"a pool of {usable} blocks is too small for a soak")
    prompt = rng.integers(0, VOCAB, shared * BLOCK).tolist()

    def asked(n: int) -> SamplingParams:
        return SamplingParams(n=n, temperature=1.0, max_tokens=2 * BLOCK, ignore_eos=True)

    try:
        engine.submit(prompt, asked(samples + 1))
    except RequestError:
        engine.submit(prompt, asked(samples))
    else:
        raise RuntimeError(f"L68: {samples + 1} samples were taken in, which need more than the pool's {usable} blocks")


def computes_the_union(num_requests: int, *, seed: int, depth: int) -> int:
    """L65, exactly: where nothing is evicted and nobody sent away, prompts and answers compute what the union of the prefixes needs.

    A third of the requests each with chunks of up to 24, 64 and 512 tokens. Returns the computed tokens; RuntimeError if they are others.
    """
    rng, total = np.random.default_rng(seed), 0
    stems = [rng.integers(0, VOCAB, 3 * BLOCK).tolist() for _ in range(32)]
    for budget in (24, 64, 512):
        count = -(-num_requests // 3)
        manager = BlockManager(32 * count + 2, BLOCK)
        config = EngineConfig(max_num_seqs=64, max_num_batched_tokens=budget, max_model_len=512, depth=depth)
        scheduler = Scheduler(config, manager, BLOCK)
        engine = Engine(scheduler, Dice(seed))
        known: set[tuple[int, ...]] = set()  # the full blocks' prefixes of the prompts so far
        expected = 0
        for _ in range(count):
            stem = stems[int(rng.integers(len(stems)))][: int(rng.integers(0, 3 * BLOCK + 1))]
            prompt = stem + rng.integers(0, VOCAB, int(rng.integers(1, 40))).tolist()
            samples, answer = int(rng.integers(1, 4)), int(rng.integers(1, 32))
            engine.submit(prompt, SamplingParams(n=samples, temperature=1.0, max_tokens=answer, ignore_eos=True))
            ends = range(BLOCK, len(prompt) + 1, BLOCK)
            # At least one token is left to compute, so that there is something to draw from.
            common = [end for end in ends if end < len(prompt) and tuple(prompt[:end]) in known]
            expected += len(prompt) - max(common, default=0) + samples * (answer - 1)
            known.update(tuple(prompt[:end]) for end in ends)
        while engine.has_work:
            engine.step()
        computed = scheduler.counters.computed_tokens
        if computed != expected or scheduler.counters.preemptions:
            raise RuntimeError(f"L65: {computed} tokens were computed; the union of the prefixes needs {expected}")
        total += computed
    return total


def _resident_mib() -> float:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
