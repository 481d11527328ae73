"""Which sequences have just been admitted, preempted or swapped: their letters stay marked long enough to be seen. Time is passed in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from minipaged.trace.events import StepDelta, beside_appends

MOVES = frozenset({"preempt", "swap_out", "swap_in", "admit", "rejoin"})
MOVE_SECONDS = 0.7  # that a letter which went to another queue stays marked


def moves_in(delta: StepDelta | None) -> Mapping[int, str]:
    """Sequence -> the kind of event that moved it in this step."""
    events = beside_appends(delta.events) if delta is not None else ()
    return {event.sequence: event.kind for event in events if event.kind in MOVES}


class RecentMoves:
    """Those of the last MOVE_SECONDS, while steps pass by."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[str, float]] = {}  # sequence -> what moved it, and when that was seen

    def follow(self, applied: Iterable[StepDelta], now: float) -> bool:
        """Note what these steps moved; True when a mark has stood long enough and goes. now: seconds."""
        for delta in applied:
            self._seen.update({sequence: (kind, now) for sequence, kind in moves_in(delta).items()})
        gone = [sequence for sequence, (_, since) in self._seen.items() if now - since > MOVE_SECONDS]
        for sequence in gone:
            del self._seen[sequence]
        return bool(gone)

    def forget(self) -> None:
        """Mark nobody any more."""
        self._seen.clear()

    @property
    def kinds(self) -> Mapping[int, str]:
        """Sequence -> what moved it."""
        return {sequence: kind for sequence, (kind, _) in self._seen.items()}
