"""The trends pane: who runs and waits, tokens a second, prefix-cache hits and waste, each as a small graph over the steps up to here."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from minipaged.tui.panes.pane import Pane
from minipaged.tui.view import Line, View
from minipaged.tui.words.cells import fit

Rows = npt.NDArray[np.float32]
LABEL = 20  # cells of a graph's name and newest figure
_GRAPHS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("running", "hue1", lambda value: f"{value:.0f}"),
    ("waiting", "hue0", lambda value: f"{value:.0f}"),
    ("tok/s", "gauge", lambda value: f"{value:,.0f}"),
    ("found cached", "hue2", lambda value: f"{value:.0%}"),
    ("waste", "hue5", lambda value: f"{value:.1%}"),
)


class TrendsPane(Pane):
    """A graph a figure."""

    def lines(self, view: View, width: int, height: int) -> list[Line]:
        """Below each other, each as high as there is room."""
        return trends_lines(view, width, height)


def trends_lines(view: View, width: int, height: int) -> list[Line]:
    """`running     4 ▁▂▃▅▆` and so on: the newest step at the right end, the highest value beside a graph of two lines or more."""
    rows = view.trends
    if not len(rows):
        return [[("no step has been taken yet", "dim")]]
    each = max(1, height // len(_GRAPHS))
    room = max(4, width - LABEL)
    lines: list[Line] = []
    for number, (name, role, words) in enumerate(_GRAPHS):
        column = rows[:, number]
        most = float(rows[:, :2].max() if number < 2 else column.max())  # the queues have one scale
        for at, bars in enumerate(graph(column, room, each, view.glyphs.heat, most)):
            label = (
                f"{name:<12}{words(float(column[-1])):>7}"
                if at == 0
                else f"most {words(float(column.max()))}"
                if at == 1
                else ""
            )
            lines.append([(f"{fit(label, LABEL - 1):<{LABEL}}", "text" if at == 0 else "faint"), (bars, role)])
    return lines[: max(1, height)]


def graph(column: npt.NDArray[np.float32], width: int, height: int, heat: str, most: float) -> list[str]:
    """Bars of `height` lines for at most `width` columns, the top line first. heat: glyphs of a cell, nothing to full."""
    count = min(width, len(column))
    starts = -(-np.arange(count, dtype=np.int64) * len(column) // max(1, count))
    values = np.maximum.reduceat(column, starts) if count else column
    wide = max(1, min(4, width // max(1, count)))
    top = len(heat) - 1
    levels = np.where(values > 0, np.maximum(1, np.rint(values * top * height / (most or 1.0))), 0).astype(np.int64)
    return [
        "".join(heat[level] * wide for level in np.clip(levels - row * top, 0, top).tolist())
        for row in reversed(range(height))
    ]
