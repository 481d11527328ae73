"""What a scheduler notes down: its events and its counters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from minipaged.scheduling.request import Sequence


class SchedulerEvent(NamedTuple):
    """A thing that happened to a request: submit admit preempt prune finish refuse abort. `amount` is tokens; `detail` a word."""

    kind: str
    seq_id: int
    amount: int
    detail: str
    sequence: Sequence | None


@dataclass
class Counters:
    """What happened since the start."""

    copies: int = 0
    hit_tokens: int = 0
    queried_tokens: int = 0
    own_hit_tokens: int = 0  # a resumed request's hits on blocks it left behind; not in hit_tokens
    preemptions: int = 0
    swaps: int = 0
    generated_tokens: int = 0  # draws that were taken in; one for a sequence that has ended meanwhile is not
    computed_tokens: int = 0
