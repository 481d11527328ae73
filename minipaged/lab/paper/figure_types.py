"""What a reproduced figure is: numbers of the paper beside ours."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """One number. `paper` is a value, a range, or None where the paper draws but does not print it."""

    what: str
    ours: float
    paper: float | tuple[float, float] | None = None
    unit: str = ""  # "%" is compared in points, everything else as a ratio
    fitted: bool = False  # a constant was chosen so that this number comes out: agreement says nothing

    @property
    def difference(self) -> str:
        """How far ours is from the paper's, in words."""
        if self.paper is None:
            return ""
        low, high = self.paper if isinstance(self.paper, tuple) else (self.paper, self.paper)
        if low != high and low <= self.ours <= high:
            return "inside"
        nearest = min(max(self.ours, low), high)
        if self.unit == "%":
            text = f"{self.ours - nearest:+.1f} points"
        elif nearest:
            text = f"{100 * (self.ours / nearest - 1):+.0f} %"
        else:
            text = f"{self.ours - nearest:+.3g}"
        return text + " (fitted)" if self.fitted else text

    @property
    def paper_text(self) -> str:
        """The paper's number or range."""
        if self.paper is None:
            return "-"
        if isinstance(self.paper, tuple):
            if not self.paper[0]:
                return f"up to {self.paper[1]:g}"
            return f"{self.paper[0]:g} to {self.paper[1]:g}"
        return f"{self.paper:g}"


@dataclass(frozen=True, slots=True)
class Curve:
    """A line of a plot: points (x, y) under a name."""

    name: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Figure:
    """A reproduced figure: its rows, its curves where it has any, and what must be said about it."""

    name: str
    title: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    curves: tuple[Curve, ...] = ()
    x_label: str = ""
    y_label: str = ""
    log_x: bool = False
