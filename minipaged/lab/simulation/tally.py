"""Averages over time of what a pool held and of how many requests ran.

Knows durations and numbers; knows nothing of systems. Sums are whole numbers (femtoseconds times slots), so that
they do not depend on how the time was cut into pieces.
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
    bands: PoolBreakdown


@dataclass(slots=True)
class Account:
    """Sums over a span of time; every field but `weight` is a quantity times femtoseconds."""

    weight: int = 0
    requests: int = 0
    rows: int = 0
    bands: list[int] = field(default_factory=lambda: [0] * len(PoolBreakdown._fields))
    blocks: int = 0
    saved: int = 0

    def add(self, weight: int, requests: int, rows: int, bands: PoolBreakdown, blocks: tuple[int, int]) -> None:
        """`weight` femtoseconds of one state."""
        self.weight += weight
        self.requests += weight * requests
        self.rows += weight * rows
        sums = self.bands
        for i, slots in enumerate(bands):
            sums[i] += weight * slots
        self.blocks += weight * blocks[0]
        self.saved += weight * blocks[1]

    def merged(self, other: Account) -> Account:
        """Both spans together."""
        return Account(
            self.weight + other.weight,
            self.requests + other.requests,
            self.rows + other.rows,
            [a + b for a, b in zip(self.bands, other.bands, strict=True)],
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
        """Each band's share of the pool, on average over the span; they sum to 1."""
        whole = sum(self.bands)
        return {name: n / whole if whole else 0.0 for name, n in zip(PoolBreakdown._fields, self.bands, strict=True)}

    @property
    def saving(self) -> float:
        """Blocks saved by sharing over the blocks needed without it (paper, section 6.3)."""
        needed = self.blocks + self.saved
        return self.saved / needed if needed else 0.0


@dataclass(slots=True)
class Tally:
    """Three spans: the warm-up (until `warm` requests are done), then the time with somebody waiting, and without."""

    warm: int
    start: Account = field(default_factory=Account)
    busy: Account = field(default_factory=Account)
    calm: Account = field(default_factory=Account)

    def span(self, done: int, waiting: bool) -> Account:
        """The account that this moment belongs to."""
        if done < self.warm:
            return self.start
        return self.busy if waiting else self.calm

    @property
    def steady(self) -> Account:
        """Saturated time where there was any, else all after the warm-up."""
        return self.busy if self.busy.weight else self.calm

    @property
    def whole(self) -> Account:
        """From the first arrival to the last finish."""
        return self.start.merged(self.busy).merged(self.calm)
