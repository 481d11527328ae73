"""Choices that a scheduler makes, each a small function or value: the order of service, and how a victim leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from minipaged.config import EngineConfig, check_real
from minipaged.scheduling.request import Request

Rank = tuple[int, int]


def rank_of(policy: str) -> Callable[[Request], Rank]:
    """The order of service: under fcfs the arrival alone, under priority the smaller number first, then the arrival."""
    if policy == "priority":
        return lambda request: request.rank
    return lambda request: (0, request.arrival)


def may_join(batching: str, request: Request, running: Sequence[Request]) -> bool:
    """Whether a request may start beside those that run.

    continuous: always (Orca's iteration-level batching); static: until one of them has drawn a token, so a batch stays as it was
    put together; one: only if there are none. Whoever has drawn a token was let in before and may always come back.
    """
    if batching == "continuous" or any(sequence.num_output for sequence in request.sequences):
        return True
    if batching == "one":
        return not running
    return not any(sequence.num_output for other in running for sequence in other.sequences)


@dataclass(frozen=True, slots=True)
class PreemptionCost:
    """What it costs to bring a victim back.

    A swap moves each of its blocks twice over the host link: 2 * blocks * seconds_per_block, plus a fixed cost a transfer. A recompute runs
    its tokens through the model again: tokens * seconds_per_token, plus a fixed cost a pass; tokens whose blocks are in the prefix cache
    (and stay there) would be free, but no one can promise that they stay, so they count. Both sides of the trade-off are in the paper's
    section 4.5 and figure 19: swapping suffers from small blocks (many small transfers), recomputing does not.
    """

    seconds_per_block: float = 2.6e-5  # 16 tokens * 30 KiB over 20 GB/s, and a few microseconds for the call
    seconds_per_token: float = 4.0e-6
    seconds_per_transfer: float = 2.0e-5
    seconds_per_pass: float = 2.0e-3

    def __post_init__(self) -> None:
        for name in ("seconds_per_block", "seconds_per_token", "seconds_per_transfer", "seconds_per_pass"):
            check_real(name, getattr(self, name), 0.0)

    def swap_is_cheaper(self, num_blocks: int, num_tokens: int) -> bool:
        """Whether moving `num_blocks` distinct blocks out and in beats recomputing `num_tokens`."""
        swap = 2 * (num_blocks * self.seconds_per_block + self.seconds_per_transfer)
        return swap < num_tokens * self.seconds_per_token + self.seconds_per_pass


def wants_swap(config: EngineConfig, cost: PreemptionCost, num_blocks: int, num_tokens: int) -> bool:
    """Whether a victim of this size leaves by swap (True) or by recompute (False). One that has computed nothing has nothing to move."""
    if not num_blocks:
        return False
    if config.preemption == "auto":
        return cost.swap_is_cheaper(num_blocks, num_tokens)
    return config.preemption == "swap"
