"""A block's past: the events that name it, read from the last LOOK_BACK steps of the trace and kept up to date as the position moves on."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from minipaged.errors import TraceError
from minipaged.trace.events import Event
from minipaged.trace.player import Player
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
        self._holders: set[int] = set()  # sequences whose tables name the block, after `_high`

    def of(self, source: Source, block: int, position: int) -> list[Past]:
        """Events of the block up to `position`, oldest first, as far back as was read."""
        if block != self._block or not self._low <= position <= self._high + CATCH_UP:
            self._block, self._events = block, []
            self._low = self._high = max(0, min(position, len(source)) - LOOK_BACK)
            self._holders = {sequence for sequence, _ in Player(source, self._low).snapshot.owners(block)}
        while self._high < position:
            try:
                delta = source.delta(self._high)
            except TraceError:
                break
            self._high += 1
            for event in delta.events:
                if concerns(event, block, self._holders):
                    self._events.append(Past(self._high, delta.step, event))
                    _follow(event, block, self._holders)
        return [past for past in self._events if past.position <= position]


def concerns(event: Event, block: int, holders: Collection[int]) -> bool:
    """Whether the event is about this device block. A fork is, if the parent is one of those whose tables name the block."""
    if event.kind == "fork" and event.block < 0:
        return event.other in holders
    return event.block == block or (event.kind == "copy" and event.other == block)


def _follow(event: Event, block: int, holders: set[int]) -> None:
    """Who holds the block after an event that is about it."""
    if event.kind in ("alloc", "cache_hit", "fork", "swap_in") or (event.kind == "copy" and event.other == block):
        holders.add(event.sequence)
    elif event.kind in ("free", "release", "swap_out", "copy"):
        holders.discard(event.sequence)
