"""A place in a trace, and the state there: play, step, seek.

Time is passed in, so that a player is as deterministic as its source.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from minipaged.errors import TraceError
from minipaged.trace.events import StepDelta
from minipaged.trace.snapshot import Snapshot

if TYPE_CHECKING:
    from minipaged.trace.sources import Source

SPEEDS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, math.inf)  # steps a second; inf: as fast as they come
STRIDE = 32  # positions between the states kept after a seek, so that stepping back is cheap
KEPT = 16


class Player:
    """Walks a source. `snapshot` is the state at `position`; `delta` is what led there (None at the start).

    The snapshot is the player's own and changes in place; copy it to keep it.
    """

    def __init__(self, source: Source, cursor: int = 0, speed: float = math.inf) -> None:
        self.source = source
        self.speed = speed
        self.position, self.snapshot = source.keyframe(0)
        self.delta: StepDelta | None = None
        self._changed: set[int] = set()
        self._kept: dict[int, Snapshot] = {}
        self._due = 0.0
        self._last_tick: float | None = None
        if cursor:
            self.seek(cursor)

    @property
    def behind(self) -> int:
        """Deltas between here and the newest."""
        return len(self.source) - self.position

    def advance(self, count: int = 1) -> list[StepDelta]:
        """Go up to `count` deltas forward; returns those applied, fewer at the end or at damage."""
        applied: list[StepDelta] = []
        while len(applied) < count and self.position < len(self.source):
            if self.position in getattr(self.source, "jumps", ()):  # what lies between was never received
                self.position, self.snapshot = self.source.keyframe(self.position)
                self._changed.update(range(len(self.snapshot.device)))
            try:
                delta, shadows = self.source.delta(self.position), self.source.shadows(self.position)
            except TraceError:
                break  # the source has ended itself there, and says why
            self.snapshot.apply(delta)
            if self.snapshot.misfit and not self._accepts_misfit():
                break
            for shadow in shadows:
                self.snapshot.apply_shadow(shadow)
            self.delta = delta
            self.position += 1
            applied.append(delta)
            self._changed.update(self.snapshot.changed)
        return applied

    def take_changed(self) -> npt.NDArray[np.int32]:
        """The device blocks that have changed since this was last asked, in order."""
        found = np.array(sorted(self._changed), np.int32)
        self._changed.clear()
        return found

    def _accepts_misfit(self) -> bool:
        """The delta that was just folded does not fit the state. A live source goes on nevertheless; another ends before that delta."""
        here, reason = self.position, self.snapshot.misfit
        self.snapshot.misfit = ""
        self.source.end_at(here, reason)
        if len(self.source) > here:
            return True
        self._kept = {position: kept for position, kept in self._kept.items() if position <= here}
        self.position, self.snapshot = self.source.keyframe(here)
        self.advance(here - self.position)
        return False

    def tick(self, now: float) -> list[StepDelta]:
        """Go forward as far as the speed allows at time `now` (seconds, any origin)."""
        if math.isinf(self.speed):
            return self.advance(self.behind)
        passed = 0.0 if self._last_tick is None else max(0.0, now - self._last_tick)
        self._last_tick = now
        self._due = min(self._due + passed * self.speed, max(1.0, self.speed))
        whole = int(self._due)
        self._due -= whole
        return self.advance(whole)

    def rest(self) -> None:
        """Forget the clock: the next tick starts from its own time."""
        self._last_tick, self._due = None, 0.0

    def seek(self, position: int) -> None:
        """Go to `position`, clamped to what there is, through the nearest state known before it."""
        target = max(0, min(position, len(self.source)))
        if target == self.position:
            return
        if not self.position <= target <= self.position + STRIDE:
            self._load_before(target)
        while self.position < target:
            here = self.position
            stride = min(target - here, STRIDE - here % STRIDE)
            self.advance(stride)
            if self.position < here + stride:  # at the damage
                break
            if self.position % STRIDE == 0 and self.position < target:
                self._keep()
        if self.position == 0:
            self.delta = None

    def _load_before(self, target: int) -> None:
        """Put the latest known state strictly before `target` in place (strictly: so that the last delta is known too)."""
        before = max(0, target - 1)
        position, snapshot = self.source.keyframe(before)
        near = [kept for kept in self._kept if position <= kept <= before]
        if near:
            position = max(near)
            snapshot = self._kept[position].copy()
        if position <= self.position < target:
            return  # walking on from here is the shorter way
        self.position, self.snapshot, self.delta = position, snapshot, None

    def _keep(self) -> None:
        if self.position not in self._kept:
            if len(self._kept) >= KEPT:
                self._kept.pop(next(iter(self._kept)))
            self._kept[self.position] = self.snapshot.copy()
