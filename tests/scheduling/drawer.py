"""For tests of the scheduler without a model: plans answered with made-up tokens, and random streams by their definition."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from minipaged.config import EngineConfig
from minipaged.memory.block_manager import BlockManager
from minipaged.scheduling.plan import PromptLogprobs, StepPlan, StepTokens
from minipaged.scheduling.scheduler import Scheduler

VOCAB = 12


MASK = 2**64 - 1


def mixed(x: int) -> int:
    """SplitMix64's finalizer on whole numbers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def stream(seed: int, index: int, position: int) -> float:
    """The number of one draw, by the definition."""
    golden = 0x9E3779B97F4A7C15
    x = mixed((seed + golden) & MASK)
    x = mixed((x + golden * (index + 1)) & MASK)
    x = mixed((x + golden * (position + 1)) & MASK)
    return (x >> 11) / 2**53


class Drawer:
    """Answers plans with made-up but different numbers, and keeps what it said."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.plans: list[StepPlan] = []
        self.said: list[StepTokens] = []

    def answer(self, plan: StepPlan) -> StepTokens:
        """One step's draws."""
        n, k = len(plan.draw_rows), max(0, plan.top_logprobs)
        ids = self.rng.integers(0, VOCAB, n).astype(np.int32)
        tops = np.array([self.rng.permutation(VOCAB)[:k] for _ in range(n)], np.int32).reshape(n, k)
        values = -np.sort(self.rng.random((n, k)).astype(np.float32) * 3, axis=1)
        prompts = {}
        for query in plan.prompt_queries:
            m, top = len(query.targets), query.top
            prompts[query.row] = PromptLogprobs(
                int(plan.starts[query.row]),
                -self.rng.random(m).astype(np.float32),
                self.rng.integers(50, 60, m).astype(np.int32),
                np.array([self.rng.permutation(VOCAB)[:top] + 100 for _ in range(m)], np.int32).reshape(m, top),
                -self.rng.random((m, top)).astype(np.float32),
            )
        said = StepTokens(
            ids,
            -self.rng.random(n).astype(np.float32),
            self.rng.integers(20, 30, n).astype(np.int32),
            tops,
            values,
            prompts,
        )
        self.plans.append(plan)
        self.said.append(said)
        return said


def scheduler_of(num_blocks: int = 400, **limits: Any) -> Scheduler:
    """A roomy scheduler with blocks of 4."""
    return Scheduler(
        EngineConfig(**{"max_model_len": 200, **limits}), BlockManager(num_blocks, 4, num_host_blocks=50), 4
    )


def run(scheduler: Scheduler, drawer: Drawer, look: Callable[[StepPlan], None] = lambda plan: None) -> None:
    """Steps until nothing is left."""
    for _ in range(400):
        if not scheduler.has_work:
            return
        plan = scheduler.schedule()
        assert plan is not None
        look(plan)
        scheduler.commit(plan, drawer.answer(plan))
    raise AssertionError("it does not end")


def drawn(drawer: Drawer, sequence: int) -> Iterator[tuple[int, int, StepTokens]]:
    """(draw, token, said) of each draw of a sequence that never forked."""
    for plan, said in zip(drawer.plans, drawer.said, strict=True):
        for d, row in enumerate(plan.draw_rows.tolist()):
            if int(plan.seq_ids[row]) == sequence:
                yield d, int(said.token_ids[d]), said
