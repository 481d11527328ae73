"""The highest request rate that a system sustains: where its normalized latency passes a limit."""

from __future__ import annotations

from collections.abc import Callable

from minipaged.lab.simulation.servers import Server
from minipaged.lab.simulation.simulate import Result, simulate
from minipaged.lab.simulation.workloads import Workload

LATENCY_LIMIT = 0.5  # seconds a token: where the curves of the paper's Fig. 12 have turned upward
TRACE_SECONDS = 1200.0  # of arrivals at each rate tried
MIN_REQUESTS, MAX_REQUESTS = 300, 20_000

Make = Callable[[float, int], Workload]  # (rate, requests) -> traffic


def run_at(system: str, make: Make, server: Server, rate: float, *, block_size: int = 16) -> Result:
    """One run at `rate`, long enough that a queue which grows is seen to grow."""
    count = min(MAX_REQUESTS, max(MIN_REQUESTS, round(rate * TRACE_SECONDS)))
    return simulate(system, make(rate, count), server, block_size=block_size)


def sustainable_rate(
    system: str,
    make: Make,
    server: Server,
    *,
    limit: float = LATENCY_LIMIT,
    block_size: int = 16,
    precision: float = 0.02,
) -> float:
    """Requests a second at which normalized latency reaches `limit`, to `precision`; 0 if even an empty server is
    slower.
    """

    def sustains(rate: float) -> bool:
        result = run_at(system, make, server, rate, block_size=block_size)
        return result.outcome.refused == 0 and result.normalized_latency <= limit

    high = 0.05
    if not sustains(high):
        return 0.0
    while sustains(high * 2):
        high *= 2
    low, high = high, high * 2
    while high / low > 1 + precision:
        middle = (low * high) ** 0.5
        if sustains(middle):
            low = middle
        else:
            high = middle
    return low
