"""A runner without weights: it answers every plan at once and counts, on a clock of its own, how long a GPU would
have taken.

It does what a plan says and needs no torch. Tokens are arbitrary but a function of (step,
slot) alone, so a rerun is equal; how long an output becomes is scripted by the requests (`max_tokens` with
`ignore_eos`).
"""

from __future__ import annotations

import numpy as np

from minipaged.config import ModelConfig, check_int
from minipaged.lab.simulation.hardware import GPU
from minipaged.lab.simulation.roofline import FEMTO, Roofline, roofline
from minipaged.scheduling.plan import IntArray, PromptLogprobs, PromptQuery, StepPlan, StepTokens

_MIX = np.uint64(0x9E3779B97F4A7C15)  # splitmix64's odd constant: spreads (step, slot) over the vocabulary


class Done:
    """A step that was over as soon as it was launched."""

    __slots__ = ("_tokens", "elapsed_fs")

    def __init__(self, tokens: StepTokens, elapsed_fs: int) -> None:
        self._tokens = tokens
        self.elapsed_fs = elapsed_fs

    def tokens(self) -> StepTokens:
        """What the step drew."""
        return self._tokens


class SimulatedRunner:
    """Executes plans on a virtual clock. `now` is the clock in seconds; `skip_to` lets it stand idle until an
    arrival.
    """

    def __init__(
        self,
        config: ModelConfig,
        gpu: GPU,
        *,
        num_blocks: int,
        block_size: int = 16,
        tp: int = 1,
        dtype: str = "bfloat16",
        kv_dtype: str | None = None,
        efficiency: float = 1.0,
        overhead_seconds: float = 0.0,
        clock: Roofline | None = None,
    ) -> None:
        """`clock` takes the place of the roofline that the other settings would make."""
        self._num_blocks = check_int("num_blocks", num_blocks, 2)
        self._block_size = check_int("block_size", block_size, 1)
        self._vocab_size = config.vocab_size
        self.clock: Roofline = clock or roofline(
            config, gpu, tp=tp, dtype=dtype, kv_dtype=kv_dtype, efficiency=efficiency, overhead_seconds=overhead_seconds
        )
        self.now_fs = 0

    @property
    def now(self) -> float:
        """Seconds since the start on the virtual clock."""
        return self.now_fs / FEMTO

    def skip_to(self, seconds: float) -> None:
        """Move the clock forward to `seconds`; a moment already past changes nothing."""
        self.now_fs = max(self.now_fs, round(seconds * FEMTO))

    def num_blocks(self) -> int:
        """Blocks in the pool, the null block included."""
        return self._num_blocks

    def launch(self, plan: StepPlan) -> Done:
        """Advance the clock by the plan's roofline time and script its tokens."""
        elapsed = self.plan_fs(plan)
        self.now_fs += elapsed
        drawn = self._draw(plan.step, plan.draw_slots)
        for d, adjustments in enumerate(plan.adjustments):
            while adjustments is not None and int(drawn[d]) in adjustments.banned:
                drawn[d] = (drawn[d] + 1) % self._vocab_size
        if plan.top_logprobs < 0 and not plan.prompt_queries:
            return Done(StepTokens(drawn), elapsed)
        return Done(self._with_logprobs(plan, drawn), elapsed)

    def plan_fs(self, plan: StepPlan) -> int:
        """Femtoseconds that the plan takes: swaps, copies, then one forward pass."""
        clock, tokens, rows = self.clock, len(plan.token_ids), len(plan.starts)
        starts = int(plan.starts.sum(dtype=np.int64))
        moved = len(plan.copies) * clock.copy_fs + (len(plan.swap_outs) + len(plan.swap_ins)) * clock.swap_fs
        elapsed = moved * self._block_size
        if rows == 0:
            return elapsed
        context = starts + tokens
        if tokens == rows:  # decodes only
            pairs = context
        else:
            lengths = plan.lengths.astype(np.int64)
            pairs = int(lengths @ plan.starts) + int((lengths * (lengths + 1)).sum()) // 2
        return elapsed + clock.step(tokens, len(plan.draw_rows), context, pairs)

    def _draw(self, step: int, slots: IntArray) -> IntArray:
        mixed = (slots.astype(np.uint64) + np.uint64((step * 1_000_003) % 2**63)) * _MIX
        return ((mixed >> np.uint64(33)) % np.uint64(self._vocab_size)).astype(np.int32)

    def _with_logprobs(self, plan: StepPlan, drawn: IntArray) -> StepTokens:
        """The k best of draw d are the drawn token and those that follow it, an even step apart: enough to steer
        beams the same way twice.
        """
        k = max(plan.top_logprobs, 0)
        spread = (drawn.astype(np.int64)[:, None] % 7 + 1) * 0.05
        ranks = np.arange(max(k, 1), dtype=np.int64)
        values = (-1.0 - spread * (ranks + 1)).astype(np.float32)
        ids = ((drawn.astype(np.int64)[:, None] + ranks) % self._vocab_size).astype(np.int32)
        prompt = {query.row: self._prompt_logprobs(int(plan.starts[query.row]), query) for query in plan.prompt_queries}
        return StepTokens(
            drawn,
            logprobs=values[:, 0],
            ranks=np.ones(len(drawn), np.int32),
            top_ids=ids[:, :k],
            top_logprobs=values[:, :k],
            prompt_logprobs=prompt or None,
        )

    def _prompt_logprobs(self, start: int, query: PromptQuery) -> PromptLogprobs:
        """Every target is the likeliest token of its place; those that follow it in the vocabulary come next."""
        n, k = len(query.targets), query.top
        targets = np.array(query.targets, np.int64)
        ids = ((targets[:, None] + np.arange(k)) % self._vocab_size).astype(np.int32)
        values = np.broadcast_to(-1.0 - 0.1 * np.arange(k, dtype=np.float32), (n, k)).copy()
        return PromptLogprobs(start, np.full(n, -1.0, np.float32), np.ones(n, np.int32), ids, values)
