"""A block's past: the events that name it, read from the last LOOK_BACK steps of the trace and kept up to date as the position moves on."""

from __future__ import annotations

from typing import NamedTuple

from minipaged.errors import TraceError
from minipaged.trace.records import TIER_DEVICE, Event, StepDelta
from minipaged.trace.sources import Source

LOOK_BACK = 400  # deltas read when a block is first looked at
CATCH_UP = 1000  # deltas read to keep up before starting anew


class Past(NamedTuple):
    """An event and where it happened."""

    position: int  # after the delta that tells it
    step: int
    event: Event


class History:
    """The events of one block at a time."""

    def __init__(self) -> None:
        self._block = -1
        self._low = self._high = 0  # positions read: (low, high]
        self._events: list[Past] = []

    def of(self, source: Source, block: int, position: int) -> list[Past]:
        """Events of the block up to `position`, oldest first, as far back as was read."""
        if block != self._block or not self._low <= position <= self._high + CATCH_UP:
            self._block, self._events = block, []
            self._low = self._high = max(0, position - LOOK_BACK)
        while self._high < position:
            try:
                delta = source.delta(self._high)
            except TraceError:
                break
            self._high += 1
            self._events += [
                Past(self._high, delta.step, event) for event in delta.events if concerns(event, block, delta)
            ]
        return [past for past in self._events if past.position <= position]


def concerns(event: Event, block: int, delta: StepDelta) -> bool:
    """Whether the event, of this delta, is about this device block. A fork is, if the child's table names the block."""
    if event.kind == "fork" and event.block < 0:
        return any(
            block in patch.ids
            for patch in delta.tables
            if patch.sequence == event.sequence and patch.tier == TIER_DEVICE
        )
    return event.block == block or (event.kind == "copy" and event.other == block)
