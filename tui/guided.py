"""A live run for somebody who has seen none: it goes slowly at first, and stops for a moment where the guide has something to say.

A stop ends by itself, or with space; any other key that moves takes over from it.
"""

from __future__ import annotations

from minipaged.trace.events import StepDelta
from minipaged.trace.player import Player
from minipaged.trace.sources import Source
from minipaged.tui.guide import Guide
from minipaged.tui.session import Change, Session

SLOWLY = 8.0  # steps a second, until the guide has said all
STOP_SECONDS = 7.0  # that a stop lasts
AFTER_SECONDS = 4.0  # of it that are left when a window closes


class GuidedSession(Session):
    """A session with a guide, which is gone once it has said all or somebody has chosen a speed."""

    def __init__(self, source: Source, *, speed: float | None = None) -> None:
        super().__init__(source, speed=speed)
        self.guide: Guide | None = Guide()
        self._stop_ends: float | None = None  # when the stop that we stand in ends; None: we stand in none

    @property
    def pace(self) -> float:
        """Slow at first."""
        return self.speed if self.guide is None else min(self.speed, SLOWLY)

    @property
    def speed_text(self) -> str:
        """In words."""
        if self._stop_ends is not None:
            return "goes on by itself"
        return super().speed_text if self.guide is None else "slowly at first"

    def look_away(self, now: float) -> None:
        """A stop waits for whoever reads something else."""
        if self._stop_ends is not None:
            self._stop_ends = max(self._stop_ends, now + AFTER_SECONDS)

    def tick(self, now: float) -> Change:
        """As ever, and on from a stop that has been long enough."""
        if self.live is not None and self.live.ended:
            self._stop_ends = None  # nothing goes on, and the message says why
        if self._stop_ends is not None and now >= self._stop_ends:
            self._go_on()
        return super().tick(now)

    def _follow(self, player: Player, now: float) -> list[StepDelta]:
        """Step by step, up to where the guide has something to say."""
        applied: list[StepDelta] = []
        while self.guide is not None and player.behind and (come := player.advance(1)):
            applied += come
            words = self.guide.words(come[0], player.snapshot)
            if words:
                self.pause()
                self.message, self._stop_ends = words, now + STOP_SECONDS
                return applied
            self._dismiss_guide()
        return applied + (super()._follow(player, now) if self.guide is None else [])

    def _dismiss_guide(self) -> None:
        if self.guide is not None and self.guide.over:
            self.guide = None
            self._let_run()

    def _go_on(self) -> None:
        self._stop_ends, self.message = None, ""
        self.playing = True
        self._rest()
        self._dismiss_guide()
        self.refresh()

    def toggle(self) -> None:
        """Run or pause; in a stop, go on."""
        if self._stop_ends is not None:
            self._go_on()
        else:
            super().toggle()

    def pause(self) -> None:
        """Stop here, and stay."""
        self._stop_ends = None
        super().pause()

    def _take_over(self) -> None:
        self._stop_ends = None
        super()._take_over()

    def change_speed(self, by: int) -> None:
        """Whoever chooses a speed needs no guide."""
        if self._stop_ends is not None:
            self._go_on()  # a stop is the guide's pause, not theirs
        self.guide = None
        super().change_speed(by)
