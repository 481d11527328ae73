"""The timeline: occupancy over all steps, a tick an event, the caret, and a sentence for the step at the caret. Click or drag to seek."""

from __future__ import annotations

import numpy as np
from textual import events
from textual.message import Message

from minipaged.trace.stream import MARKS
from tui.pane import Pane
from tui.safe import fit
from tui.sentences import TICK_ORDER, TICKS, sentence
from tui.view import Line, View

_BITS = [(MARKS[kind], TICKS[kind]) for kind in TICK_ORDER]


class Timeline(Pane):
    """Three lines: occupancy, ticks with the caret, a sentence."""

    class Sought(Message):
        """A place was clicked."""

        def __init__(self, position: int) -> None:
            super().__init__()
            self.position = position

    def lines(self, view: View, width: int, height: int) -> list[Line]:
        """Occupancy, ticks and caret, sentence."""
        return timeline_lines(view, width)[: max(1, height)]

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
        per_column = scale(self.view.length, self.content_size.width)
        self.post_message(self.Sought(min(self.view.length, (column + 1) * per_column)))


def scale(length: int, width: int) -> int:
    """Steps a column: the smallest power of two at which all steps fit."""
    per_column = 1
    while -(-length // per_column) > max(1, width):
        per_column *= 2
    return per_column


def timeline_lines(view: View, width: int) -> list[Line]:
    """The timeline's three lines."""
    per_column = scale(view.length, width)
    columns = -(-view.length // per_column)
    caret = max(0, (view.position - 1) // per_column)
    heights, ticks = _columns(view, per_column, columns)
    occupancy: Line = [(heights[: caret + 1], "hue1"), (heights[caret + 1 :], "faint")]
    return [occupancy, _tick_line(view, ticks, caret, width), [(fit(view.message or sentence(view), width), "text")]]


def _columns(view: View, per_column: int, columns: int) -> tuple[str, str]:
    padded = columns * per_column
    occupied = np.zeros(padded, np.uint16)
    occupied[: view.length] = view.occupied[: view.length]
    marks = np.zeros(padded, np.uint16)
    marks[: view.length] = view.marks[: view.length]
    most = occupied.reshape(columns, per_column).max(axis=1) if columns else occupied
    bits = np.bitwise_or.reduce(marks.reshape(columns, per_column), axis=1) if columns else marks
    heat = view.glyphs.heat
    top = len(heat) - 1
    levels = np.where(most > 0, np.maximum(1, most.astype(np.int64) * top // 10000), 0)
    return "".join(heat[level] for level in levels.tolist()), "".join(_tick(bit) for bit in bits.tolist())


def _tick(bits: int) -> str:
    return next((tick for mask, tick in _BITS if bits & mask), " ") if bits else " "


def _tick_line(view: View, ticks: str, caret: int, width: int) -> Line:
    """The ticks; the caret ▲ stands on its column with the step beside it, bookmarks as ●."""
    step = str(view.snapshot.step) if view.position else "start"
    label = f"▲{step}"
    room = max(0, width - len(label))
    cells = list(ticks.ljust(width))
    per_column = scale(view.length, width)
    for position in view.bookmarks:
        cells[min(width - 1, max(0, (position - 1) // per_column))] = "●"
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
        and view.word != "REPLAY"
        and at + len(label) + len(edge) + 1 < width
        and view.length < width - len(edge)
    ):
        text, role = line[-1]
        cut = max(0, len(text) - len(edge))
        line[-1] = (text[:cut], role)
        line.append((edge, "dim"))
    return line
