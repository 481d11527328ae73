"""A live run for somebody who has seen none: it goes slowly at first, and stops for a moment where the guide has something to say.

A stop ends by itself, or with space; any other key that moves takes over. Once the guide has said everything, the tour is over.
"""

from __future__ import annotations

import math

from minipaged.trace.events import StepDelta
from minipaged.trace.snapshot import Snapshot
from minipaged.tui.playback import Mode, Playback, Script
from minipaged.tui.scripted.guide import Guide

SLOWLY = 8.0  # steps a second, until the guide has said all
STOP_SECONDS = 7.0  # that a stop lasts
AFTER_SECONDS = 4.0  # of it that are left when a window closes


class Tour(Script):
    """While the engine is followed it limits the pace; a stop is SCRIPTED."""

    pace = SLOWLY
    yields = True
    word = "TOUR"

    def __init__(self) -> None:
        self.guide = Guide()
        self.stop_ends = math.inf  # when the last stop ends
        self._now = 0.0

    def stop_at(self, delta: StepDelta, snapshot: Snapshot, now: float) -> str:
        """Stop where the guide has something to say."""
        words = self.guide.words(delta, snapshot)
        self.over = self.guide.over
        if words:
            self._now, self.stop_ends = now, now + STOP_SECONDS
        return words

    def look_away(self, now: float) -> None:
        """A stop waits for whoever reads something else."""
        self.stop_ends = max(self.stop_ends, now + AFTER_SECONDS)

    def tick(self, playback: Playback, now: float) -> str | None:
        """Go on once the stop has been long enough."""
        self._now = now
        return self.run(playback) if now >= self.stop_ends else None

    def run(self, playback: Playback) -> str:
        """Go on."""
        playback.resume()
        playback.let_script_go()
        playback.refresh()
        return ""

    def speed_words(self, mode: Mode) -> str:
        """The speed in words."""
        if mode is not Mode.SCRIPTED:
            return "slowly at first"
        return f"goes on in {max(1, math.ceil(self.stop_ends - self._now))} s"
