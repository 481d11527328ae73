"""A lesson being walked through: space, ] and } go to the next beat, [ and { to the one before."""

from __future__ import annotations

from minipaged.trace.snapshot import Snapshot
from minipaged.trace.words import letter
from minipaged.tui.playback import Playback, Script
from minipaged.tui.scripted.lessons import Lesson

FLASH_SECONDS = 0.25  # that what a beat changed stands out


class LessonWalk(Script):
    """animated: what a beat changes lights up for a moment; without, the caption says which tables changed, before and after."""

    by_beats = True

    def __init__(self, lesson: Lesson, *, animated: bool = True) -> None:
        self.lesson = lesson
        self.animated = animated
        self.beat = 0
        self._changed_tables = ""  # by the beat before this moment, in words
        self._flash_until: float | None = None  # None: from the next tick on
        self._say()

    def _say(self) -> None:
        """Which beat this is, and what to see in it."""
        self.word = f"LESSON {self.beat + 1} of {len(self.lesson.beats)}"
        self.caption = self.lesson.beats[self.beat].caption
        if self._changed_tables and not self.animated:
            self.caption += f" [{self._changed_tables}]"

    def begin(self, playback: Playback) -> None:
        """The first beat."""
        playback.begin(self)
        playback.seek(self.lesson.beats[0].position)

    def tick(self, playback: Playback, now: float) -> str | None:
        """A lesson does not move by itself, but what lit up goes out."""
        if self.flash and self._flash_until is None:
            self._flash_until = now + FLASH_SECONDS
        elif self.flash and self._flash_until is not None and now >= self._flash_until:
            self.flash = frozenset()
            playback.refresh()
        return None

    def run(self, playback: Playback) -> str:
        """The next beat."""
        return self.step(playback, 1)

    def step(self, playback: Playback, by: int) -> str:
        """That many beats on."""
        beat = self.beat + by
        if beat >= len(self.lesson.beats):
            return "that was all: L shows the other lessons, escape goes back"
        self.beat = max(0, beat)
        before, old = dict(playback.snapshot.tables), playback.snapshot.device.copy()
        playback.seek(self.lesson.beats[self.beat].position)
        after, new = playback.snapshot.tables, playback.snapshot.device
        self._changed_tables = "; ".join(
            f"{_letter(playback.snapshot, key)} {_row(before.get(key, ()))} → {_row(after.get(key, ()))}"
            for key in sorted({*before, *after})
            if before.get(key, ()) != after.get(key, ())
        )
        self._say()
        self.flash, self._flash_until = frozenset(), None
        if self.animated and by > 0 and len(old) == len(new):
            changed = (old.refs != new.refs) | (old.fill != new.fill) | (old.owner != new.owner)
            self.flash = frozenset(changed.nonzero()[0].tolist())
        return ""

    def go(self, playback: Playback, position: int) -> str:
        """The last beat at or before a position."""
        positions = [beat.position for beat in self.lesson.beats]
        reached = [at for at, found in enumerate(positions) if found <= max(position, positions[0])]
        return self.step(playback, reached[-1] - self.beat)


def _letter(snapshot: Snapshot, sequence: int) -> str:
    state = snapshot.sequences.get(sequence)
    return letter(state.label) if state is not None else "?"


def _row(table: tuple[int, ...]) -> str:
    return " ".join(map(str, table)) or "–"
