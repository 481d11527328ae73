"""How a run went, step by step: a few figures of each step for the trends pane, read from the source little by little."""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt

from minipaged.errors import TraceError
from minipaged.trace.events import StepDelta
from minipaged.trace.sources import Source

MOST_ROWS = 8192  # kept; a longer trace is read with gaps
A_FRAME_SECONDS = 0.002  # that a frame spends on reading
FIGURES = ("running", "waiting", "speed", "hits", "waste")


class Trends:
    """Rows of FIGURES: sequences running and waiting, tokens a second, share of prompt tokens found cached, share of slots wasted."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.every = 1  # steps from one row to the next
        self._rows: npt.NDArray[np.float32] = np.zeros((MOST_ROWS, len(FIGURES)), np.float32)
        self._count = 0
        self._damaged = False

    def follow(self, *, seconds: float = A_FRAME_SECONDS) -> None:
        """Catch up with the source, for about so many seconds."""
        deadline = time.monotonic() + seconds
        while self.behind and time.monotonic() < deadline:
            try:
                delta = self.source.delta(self._count * self.every)
            except TraceError:
                self._damaged = True
                return
            self._rows[self._count] = figures(delta)
            self._count += 1
            if self._count == MOST_ROWS:  # every second row goes
                self._rows[: MOST_ROWS // 2] = self._rows[::2].copy()
                self._count, self.every = MOST_ROWS // 2, 2 * self.every

    @property
    def behind(self) -> bool:
        """Whether there are steps that were not read yet."""
        return not self._damaged and self._count * self.every < len(self.source)

    def upto(self, position: int) -> npt.NDArray[np.float32]:
        """The rows of the first `position` steps, as far as they were read: [rows, figures]."""
        return self._rows[: min(self._count, -(-position // self.every))]


def figures(delta: StepDelta) -> tuple[float, ...]:
    """One row."""
    stats, queues = delta.stats, delta.queues
    slots = stats.token_slots + stats.tail_slots
    return (
        len(queues.running),
        max(len(queues.waiting), stats.num_waiting) + len(queues.swapped),
        1e9 * stats.num_drawn / stats.elapsed_ns if stats.elapsed_ns else 0.0,
        stats.hit_tokens / stats.queried_tokens if stats.queried_tokens else 0.0,
        stats.tail_slots / slots if slots else 0.0,
    )
