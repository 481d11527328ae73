"""A lesson being walked through: a session whose steps are beats."""

from __future__ import annotations

from minipaged.tui.lessons import Lesson
from minipaged.tui.palette import letter
from minipaged.tui.session import NOTHING, Change, Session

FLASH_SECONDS = 0.25  # that what a beat changed stands out before it looks as ever


class LessonSession(Session):
    """space, ] and } go to the next beat, [ and { to the one before.

    animated: what a beat changes lights up for a moment; without, the caption says which tables changed, before and after.
    """

    def __init__(self, lesson: Lesson, *, animated: bool = True) -> None:
        super().__init__(lesson.source)
        self.lesson = lesson
        self.animated = animated
        self.beat = 0
        self.changes = ""  # of the tables, in words
        self._flash: frozenset[int] = frozenset()
        self._flash_until: float | None = None  # None: from the next tick on
        self._turn(0)

    @property
    def caption(self) -> str:
        """What to see in this beat."""
        caption = self.lesson.beats[self.beat].caption
        return caption if self.animated or not self.changes else f"{caption} [{self.changes}]"

    @property
    def flash(self) -> frozenset[int]:
        """Blocks that this beat has changed, for a moment."""
        return self._flash

    @property
    def word(self) -> str:
        """Where in the lesson we are."""
        return f"LESSON {self.beat + 1} of {len(self.lesson.beats)}"

    def tick(self, now: float) -> Change:
        """A lesson does not move by itself, but what lit up goes out."""
        if not self._flash:
            return self._change([], False)
        if self._flash_until is None:
            self._flash_until = now + FLASH_SECONDS
        elif now >= self._flash_until:
            self._flash = frozenset()
            return Change(None, True)
        return NOTHING

    def _turn(self, by: int) -> None:
        beat = self.beat + by
        if beat >= len(self.lesson.beats):
            self.message = "that was all: L shows the other lessons, escape goes back"
            return
        self.message = ""
        self.beat = max(0, beat)
        before, old = dict(self.snapshot.tables), self.snapshot.device.copy()
        self.seek(self.lesson.beats[self.beat].position)
        after, new = self.snapshot.tables, self.snapshot.device
        self.changes = "; ".join(
            f"{self._letter(key)} {_row(before.get(key, ()))} → {_row(after.get(key, ()))}"
            for key in sorted({*before, *after})
            if before.get(key, ()) != after.get(key, ())
        )
        if self.animated and by > 0 and len(old) == len(new):
            changed = (old.refs != new.refs) | (old.fill != new.fill) | (old.owner != new.owner)
            self._flash, self._flash_until = frozenset(changed.nonzero()[0].tolist()), None

    def _letter(self, sequence: int) -> str:
        state = self.snapshot.sequences.get(sequence)
        return letter(state.label) if state is not None else "?"

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


def _row(table: tuple[int, ...]) -> str:
    return " ".join(map(str, table)) or "–"
