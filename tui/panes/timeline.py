"""The timeline: occupancy over all steps, a tick for each kind of event in a step, and the caret. Click or drag to seek."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from rich.cells import cell_len
from textual import events
from textual.message import Message

from minipaged.trace.events import MARKS
from minipaged.trace.words import TICK_ORDER, TICKS
from minipaged.tui.panes.pane import Pane
from minipaged.tui.view import Line, View

_LEGEND = {  # in the order of a request's life
    "admit": "start",
    "cache_hit": "hit",
    "host_hit": "CPU hit",
    "fork": "fork",
    "copy": "copy",
    "preempt": "preempt",
    "swap_out": "swap out",
    "swap_in": "swap in",
    "finish": "done",
    "evict": "evict",
    "spill": "to CPU",
    "prune": "drop",
    "abort": "abort",
    "refuse": "refuse",
    "release": "let go",
    "knob": "knob",
}
_BITS = [(MARKS[kind], TICKS[kind]) for kind in TICK_ORDER]
WIDEST_STEP = 4  # columns of a step
MORE = "…"  # in the place of a last tick: there were more than have room


class Scale(NamedTuple):
    """Which steps a column stands for: `columns` columns share `length` steps, or each step has several columns."""

    length: int
    columns: int

    @property
    def per_step(self) -> int:
        """Columns of a step; 1 also where a column stands for several steps."""
        return max(1, self.columns // max(1, self.length))

    def column_of(self, position: int) -> int:
        """The first column of the step that led to a position (1 the first)."""
        return (max(1, position) - 1) * self.columns // max(1, self.length)

    def last_of(self, column: int) -> int:
        """The last position that a column stands for."""
        return min(self.length, -(-(column + 1) * self.length // max(1, self.columns)))

    def starts(self) -> npt.NDArray[np.int64]:
        """The first step (0 the first) of each column, or, where steps have several columns, of each step's first column."""
        count = self.columns // self.per_step
        return -(-np.arange(count, dtype=np.int64) * self.length // max(1, count))


def scale(length: int, width: int, *, growing: bool) -> Scale:
    """All steps in the width: few steps get two or more columns each, so that all their marks have room.

    A trace that grows has a power of two of steps a column, or of columns a step, so that the picture keeps still for a while.
    """
    width = max(1, width)
    if length <= width:
        per_step = min(WIDEST_STEP, width // max(1, length))
        return Scale(length, length * (1 << per_step.bit_length() - 1 if growing and per_step else per_step))
    if not growing:
        return Scale(length, width)
    per_column = 1
    while -(-length // per_column) > width:
        per_column *= 2
    columns = -(-length // per_column)
    return Scale(columns * per_column, columns)


def scale_of(view: View, width: int) -> Scale:
    """The scale of a view's timeline."""
    return scale(view.length, width, growing=not view.hindsight)


class Timeline(Pane):
    """Occupancy in the lines that are left, ticks with the caret."""

    class Sought(Message):
        """A place was clicked."""

        def __init__(self, position: int) -> None:
            super().__init__()
            self.position = position

    def lines(self, view: View, width: int, height: int) -> list[Line]:
        """One line: ticks and caret. Two: occupancy above. More: two or three lines of ticks."""
        ticks = 1 if height < 3 else 2 if height < 6 else 3
        return timeline_lines(view, width, max(0, height - ticks), ticks)[: max(1, height)]

    def on_mouse_down(self, event: events.MouseDown) -> None:
        """Start to scrub."""
        self.capture_mouse()
        self._seek(event)

    def on_mouse_move(self, event: events.MouseMove) -> None:
        """Scrub."""
        if event.button:
            self._seek(event)

    def on_mouse_up(self, _: events.MouseUp) -> None:
        """Stop scrubbing."""
        self.release_mouse()

    def _seek(self, event: events.MouseEvent) -> None:
        offset = event.get_content_offset_capture(self)
        column = max(0, min(offset.x, self.content_size.width - 1))
        found = scale_of(self.view, self.content_size.width)
        self.post_message(self.Sought(min(self.view.length, found.last_of(min(column, found.columns - 1)))))


def timeline_lines(view: View, width: int, rows: int = 1, tick_rows: int = 1) -> list[Line]:
    """`rows` lines of occupancy (none on the lowest screens), then the ticks; the caret stands in the last line."""
    found = scale_of(view, width)
    caret = found.column_of(view.position)
    here = caret + found.per_step
    heights, ticks = _columns(view, found, rows, tick_rows)
    lines: list[Line] = [[(row[:here], "gauge"), (row[here:], "faint")] for row in heights]
    lines += [[(row[:here], "text"), (row[here:], "dim")] for row in ticks[:-1]]
    return [*lines, _tick_line(view, ticks[-1], caret, width)]


def full_height(view: View) -> int:
    """What a bar of full height stands for, in 1/10000 of the pool: all of it, or the half, quarter or eighth that is never left."""
    most = int(view.occupied[: view.length].max(initial=0))
    return next((share for share in (1250, 2500, 5000) if most <= share), 10000)


def timeline_title(view: View, width: int) -> str:
    """The pane's title, with the ticks that this trace has."""
    bits = int(np.bitwise_or.reduce(view.marks[: view.length])) if view.length else 0
    height = full_height(view)
    title = "4 Timeline " + (f" bars to {height / 100:g}% " if view.length and height < 10000 else "")
    for kind, word in _LEGEND.items():
        entry = f"  {TICKS[kind]} {word}"
        if bits & MARKS[kind] and cell_len(title + entry) <= width - 6:
            title += entry
    return title


def _columns(view: View, found: Scale, rows: int, tick_rows: int) -> tuple[list[str], list[str]]:
    """Bars of `rows` lines, the top one first, and lines of ticks."""
    if not found.columns:
        return [""] * rows, [""] * tick_rows
    starts, wide = found.starts(), found.per_step
    occupied, marks = np.zeros(found.length, np.uint16), np.zeros(found.length, np.uint16)
    occupied[: view.length] = view.occupied[: view.length]
    marks[: view.length] = view.marks[: view.length]
    most = np.maximum.reduceat(occupied, starts)
    bits = np.bitwise_or.reduceat(marks, starts)
    heat = view.glyphs.heat
    top = len(heat) - 1
    levels = np.where(most > 0, np.maximum(1, most.astype(np.int64) * top * rows // full_height(view)), 0)
    bars = [
        "".join(heat[level] * wide for level in np.clip(levels - row * top, 0, top).tolist())
        for row in reversed(range(rows))
    ]
    return bars, _ticks(bits.tolist(), wide, tick_rows)


def _ticks(columns: list[int], wide: int, rows: int) -> list[str]:
    """A tick for each kind of event, the most telling first: over a step's columns, then on the next line."""
    lines = [[" "] * (wide * len(columns)) for _ in range(rows)]
    for at, bits in enumerate(columns):
        if not bits:
            continue
        found = [tick for mask, tick in _BITS if bits & mask]
        if len(found) > wide * rows:
            found[wide * rows - 1] = MORE
        for place, tick in enumerate(found[: wide * rows]):
            lines[place // wide][at * wide + place % wide] = tick
    return ["".join(line) for line in lines]


def _tick_line(view: View, ticks: str, caret: int, width: int) -> Line:
    """The ticks; the caret ▲ stands on its column with the step beside it, bookmarks as ●."""
    step = str(view.snapshot.step) if view.position else "start"
    label = f"▲{step}"
    room = max(0, width - len(label))
    cells = list(ticks.ljust(width))
    found = scale_of(view, width)
    for position in view.bookmarks:
        cells[min(width - 1, found.column_of(position))] = "●"
    at = min(caret, width - 1)
    if at <= room:
        line: Line = [("".join(cells[:at]), "dim"), (label, "mark"), ("".join(cells[at + len(label) : width]), "dim")]
    else:
        label = f"{step}▲"
        line = [
            ("".join(cells[: at + 1 - len(label)]), "dim"),
            (label, "mark"),
            ("".join(cells[at + 1 : width]), "dim"),
        ]
    edge = f"┊live {view.length}"
    if (
        not view.at_edge
        and not view.hindsight
        and at + len(label) + len(edge) + 1 < width
        and view.length < width - len(edge)
    ):
        text, role = line[-1]
        cut = max(0, len(text) - len(edge))
        line[-1] = (text[:cut], role)
        line.append((edge, "dim"))
    return line
