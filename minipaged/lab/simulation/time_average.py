"""Averages over time: what the pool held, and how many requests ran.

The sums are whole numbers (femtoseconds times slots). So they are exact, and do not depend on how the time was cut into
pieces: one jump over k steps adds the same as k steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from minipaged.memory.types import PoolBreakdown


class Sample(NamedTuple):
    """The pool at one moment."""

    seconds: float
    requests: int
    rows: int
    pool: PoolBreakdown


@dataclass(slots=True)
class TimeAverage:
    """Sums over a span of time. `weight` is its length in femtoseconds; every other field is a quantity times femtoseconds."""

    weight: int = 0
    requests: int = 0
    rows: int = 0
    pool: list[int] = field(default_factory=lambda: [0] * len(PoolBreakdown._fields))
    blocks: int = 0
    saved: int = 0

    def add(self, weight: int, requests: int, rows: int, pool: PoolBreakdown, blocks: tuple[int, int]) -> None:
        """`weight` femtoseconds of one state."""
        self.weight += weight
        self.requests += weight * requests
        self.rows += weight * rows
        sums = self.pool
        for i, slots in enumerate(pool):
            sums[i] += weight * slots
        self.blocks += weight * blocks[0]
        self.saved += weight * blocks[1]

    def merged(self, other: TimeAverage) -> TimeAverage:
        """Both spans together."""
        return TimeAverage(
            self.weight + other.weight,
            self.requests + other.requests,
            self.rows + other.rows,
            [a + b for a, b in zip(self.pool, other.pool, strict=True)],
            self.blocks + other.blocks,
            self.saved + other.saved,
        )

    @property
    def mean_requests(self) -> float:
        """Requests that ran, on average over the span."""
        return self.requests / self.weight if self.weight else 0.0

    @property
    def mean_rows(self) -> float:
        """Sequences that ran, on average over the span."""
        return self.rows / self.weight if self.weight else 0.0

    def shares(self) -> dict[str, float]:
        """The shares of the pool breakdown, on average over the span; they sum to 1."""
        whole = sum(self.pool)
        return {name: n / whole if whole else 0.0 for name, n in zip(PoolBreakdown._fields, self.pool, strict=True)}

    @property
    def saving(self) -> float:
        """Blocks saved by sharing over the blocks needed without it (paper, section 6.3)."""
        needed = self.blocks + self.saved
        return self.saved / needed if needed else 0.0


@dataclass(slots=True)
class TimeAverages:
    """Three spans of a run: the warm-up (until `warm` requests are done), then the time while requests wait, and the rest."""

    warm: int
    start: TimeAverage = field(default_factory=TimeAverage)
    busy: TimeAverage = field(default_factory=TimeAverage)
    calm: TimeAverage = field(default_factory=TimeAverage)

    def span(self, done: int, waiting: bool) -> TimeAverage:
        """The span that this moment belongs to."""
        if done < self.warm:
            return self.start
        return self.busy if waiting else self.calm

    @property
    def steady(self) -> TimeAverage:
        """The time while requests waited, if they ever did; else all the time after the warm-up."""
        return self.busy if self.busy.weight else self.calm

    @property
    def whole(self) -> TimeAverage:
        """From the first arrival to the last finish."""
        return self.start.merged(self.busy).merged(self.calm)
