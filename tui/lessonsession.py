"""A lesson being walked through: a session whose steps are beats."""

from __future__ import annotations

from tui.lessons import Lesson
from tui.session import Change, Session


class LessonSession(Session):
    """space, ] and } go to the next beat, [ and { to the one before."""

    def __init__(self, lesson: Lesson) -> None:
        super().__init__(lesson.source)
        self.lesson = lesson
        self.beat = 0
        self._turn(0)

    @property
    def caption(self) -> str:
        """What to see in this beat."""
        return self.lesson.beats[self.beat].caption

    @property
    def word(self) -> str:
        """Where in the lesson we are."""
        return f"LESSON {self.beat + 1} of {len(self.lesson.beats)}"

    def tick(self, now: float) -> Change:
        """A lesson does not move by itself."""
        return self._change([], False)

    def _turn(self, by: int) -> None:
        beat = self.beat + by
        if beat >= len(self.lesson.beats):
            self.message = "that was all: L shows the other lessons, escape goes back"
            return
        self.message = ""
        self.beat = max(0, beat)
        self.seek(self.lesson.beats[self.beat].position)

    def toggle(self) -> None:
        """The next beat."""
        self._turn(1)

    def step(self) -> None:
        """The next beat."""
        self._turn(1)

    def back(self) -> None:
        """The beat before."""
        self._turn(-1)

    def next_event(self, direction: int) -> None:
        """The next beat, or the one before."""
        self._turn(direction)

    def go(self, position: int) -> None:
        """The last beat at or before a position."""
        positions = [beat.position for beat in self.lesson.beats]
        later = [at for at, found in enumerate(positions) if found <= max(position, positions[0])]
        self._turn(later[-1] - self.beat)
