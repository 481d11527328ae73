"""What every pane is given: one moment of a trace, and how to show it. And lines of (text, role), which become strips.

Everything that a pane shows comes from here, so that live runs, replays and tests feed the same widgets.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from rich.cells import cell_len
from rich.segment import Segment
from rich.style import Style
from textual.strip import Strip

from minipaged.text.safe import clean
from minipaged.trace.events import ShadowDelta, Stats, StepDelta
from minipaged.trace.file import Header
from minipaged.trace.snapshot import Snapshot
from minipaged.trace.words import NUM_LOOKS, letter, other_looks
from minipaged.tui import palette
from minipaged.tui.palette import UNICODE, Glyphs, Mode
from minipaged.tui.words.cells import to_ascii

if TYPE_CHECKING:
    from minipaged.tui.reading.history import Past
    from minipaged.tui.reading.people import Person

Run = tuple[str, str]  # text, role (a name of palette.style)
Line = list[Run]


@dataclass(slots=True)
class View:
    """One moment."""

    snapshot: Snapshot = field(default_factory=Snapshot)
    delta: StepDelta | None = None  # what led here
    header: Header = field(default_factory=Header)
    position: int = 0
    length: int = 0  # deltas known
    occupied: npt.NDArray[np.uint16] = field(default_factory=lambda: np.zeros(0, np.uint16))
    marks: npt.NDArray[np.uint16] = field(default_factory=lambda: np.zeros(0, np.uint16))
    token_bytes: Mapping[int, bytes] = field(default_factory=dict)
    word: str = ""  # LIVE, PAUSED, TOUR, REPLAY, IDLE, DONE, LOADING, ENDED
    branched: bool = False  # whether this run repeats another one's beginning
    speed: str = ""
    message: str = ""  # the last word from the engine or the program, shown in place of the sentence
    shadows: Mapping[str, ShadowDelta] = field(default_factory=dict)  # what other systems would hold here
    hindsight: bool = True  # whether they know the answers' true lengths
    trends: npt.NDArray[np.float32] = field(
        default_factory=lambda: np.zeros((0, 5), np.float32)
    )  # reading.trends' rows up to here
    pending: tuple[str, ...] = ()  # prompts that no step has shown yet
    final: Stats | None = None  # what a run that is over has come to, while its fullest moment is shown
    caption: str = ""  # of a lesson's beat
    zoom: int = 2  # the map's (mapmodel.Zoom)
    per_cell: int = 1  # blocks that a cell of the map stands for, at the lowest zoom
    people: Mapping[int, Person] = field(default_factory=dict)  # request -> who asked a server for it
    moves: Mapping[int, str] = field(default_factory=dict)  # sequence -> the queue event it was just seen in
    flash: frozenset[int] = frozenset()  # blocks that a lesson has just changed
    block: int = -1  # the cursor's block; -1: none
    watched: int = -1  # without a cursor: the block of this step's most telling event
    only: int = -1  # the sequence that is not dimmed; -1: all are equal
    bookmarks: tuple[int, ...] = ()
    past: tuple[Past, ...] = ()  # of the cursor's block
    glyphs: Glyphs = UNICODE
    mode: Mode = "dark"
    _other_looks: Mapping[int, int] | None = field(default=None, init=False, repr=False, compare=False)

    def letter(self, sequence: int) -> str:
        """A sequence's letter; ? once it is forgotten."""
        state = self.snapshot.sequences.get(sequence)
        return letter(state.label) if state is not None else "?"

    def look(self, sequence: int) -> int:
        """A sequence's look: its hue, 0 to 6, and 7 more where it stands on a tint."""
        state = self.snapshot.sequences.get(sequence)
        return self.other_looks.get(sequence, state.label % NUM_LOOKS) if state is not None else 0

    @property
    def other_looks(self) -> Mapping[int, int]:
        """The looks of sequences that have not their label's."""
        if self._other_looks is None:
            self._other_looks = other_looks(self.snapshot)
        return self._other_looks

    def role(self, sequence: int, *, shared: bool = False) -> str:
        """A sequence's role for palette.style; faint when another one is looked at alone."""
        if self.only not in (-1, sequence):
            return "faint"
        return f"{'shared' if shared else 'hue'}{self.look(sequence)}"

    def style(self, role: str) -> Style:
        """The look of a role in this mode."""
        return palette.style(role, self.mode)

    def fill_glyph(self, fill: int) -> str:
        """How full a block is, in one cell."""
        size = max(1, self.snapshot.stats.block_size)
        levels = self.glyphs.filling
        return levels[min(len(levels) - 1, max(0, fill * len(levels) // size))]

    @property
    def inspected(self) -> int:
        """The block to look at from near: the cursor's, else the watched one; -1: none."""
        return self.block if self.block >= 0 else self.watched

    @property
    def at_edge(self) -> bool:
        """Whether this is the newest moment."""
        return self.position >= self.length


@lru_cache(maxsize=4096)
def _safe(text: str) -> str:
    """The text without what may steer a terminal: names in a trace, words of an engine and file names are a stranger's."""
    return clean(text)


def shown(text: str, view: View) -> str:
    """The text in the characters that the view allows."""
    text = _safe(text)
    return to_ascii(text) if view.glyphs.ascii else text


def width_of(line: Iterable[Run]) -> int:
    """Cells."""
    return sum(len(text) if text.isascii() else cell_len(text) for text, _ in line)


def strip_of(line: Line, width: int, view: View, base: Style) -> Strip:
    """A line as a strip of exactly `width` cells."""
    segments = [Segment(shown(text, view), base + view.style(role)) for text, role in line if text]
    return Strip(segments).adjust_cell_length(width, base)


def spread(left: Line, right: Line, width: int) -> Line:
    """`left` at the left end and `right` at the right end."""
    return [*left, (" " * max(1, width - width_of(left) - width_of(right)), "text"), *right]


def bar(share: float, width: int) -> str:
    """A bar of `width` cells, `share` of them full."""
    full = round(max(0.0, min(1.0, share)) * width)
    return "█" * full + "░" * (width - full)
