"""Plots as SVG text, with no plotting library: lines, bars and stacked bars.

The text can stand inside an HTML page or a file of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from minipaged.lab.paper.figure_types import Curve

WIDTH, HEIGHT = 640, 340
LEFT, RIGHT, TOP, BOTTOM = 64, 150, 34, 48
# Okabe and Ito's palette, told apart with any colour vision; then greys.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#555555", "#b0a800")
PART_COLOURS = {
    "token": "#009e73",
    "reserved": "#56b4e9",
    "internal": "#d55e00",
    "external": "#cc79a7",
    "padding": "#e69f00",
    "idle": "#dddddd",
}


def line_chart(
    title: str, curves: Sequence[Curve], x_label: str, y_label: str, *, log_x: bool = False, log_y: bool = False
) -> str:
    """Lines over common axes. Points that a logarithm cannot show are left out; an empty plot says so."""
    shown = [
        (c.name, [p for p in c.points if _finite(p) and (p[0] > 0 or not log_x) and (p[1] > 0 or not log_y)])
        for c in curves
    ]
    points = [p for _, line in shown for p in line]
    if not points:
        return _frame(title, x_label, y_label, [_text(WIDTH / 2, HEIGHT / 2, "nothing to show", "middle")])
    x_low, x_high = _span([math.log10(p[0]) if log_x else p[0] for p in points])
    ys = [math.log10(p[1]) if log_y else p[1] for p in points]
    y_low, y_high = _span(ys if log_y else [0.0, *ys])
    parts = []

    def place(x: float, y: float) -> tuple[float, float]:
        value = math.log10(y) if log_y else y
        return (
            LEFT + ((math.log10(x) if log_x else x) - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (value - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM),
        )

    for tick in sorted({p[0] for p in points}) if log_x else _ticks(x_low, x_high):
        x = place(tick, 10**y_low if log_y else y_low)[0]
        parts.append(_text(x, HEIGHT - BOTTOM + 16, f"{tick:g}", "middle"))
        parts.append(_line(x, TOP, x, HEIGHT - BOTTOM, "#eee"))
    for value in _log_ticks(y_low, y_high) if log_y else _ticks(y_low, y_high):
        y = place(points[0][0], value)[1]
        parts.append(_text(LEFT - 6, y + 4, f"{value:.3g}", "end"))
        parts.append(_line(LEFT, y, WIDTH - RIGHT, y, "#eee"))
    for i, (name, line) in enumerate(shown):
        colour = COLOURS[i % len(COLOURS)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*p) for p in line))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        if len(line) <= 20:
            dots = (place(*p) for p in line)
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in dots]
        parts += _legend(i, name, colour)
    return _frame(title, x_label, y_label, parts)


def stacked_bars(title: str, bars: Mapping[str, Mapping[str, float]], y_label: str) -> str:
    """One bar a name; its parts stand on each other in the order given, each a share of 1."""
    parts = []
    slot = (WIDTH - LEFT - RIGHT) / max(1, len(bars))
    height = HEIGHT - TOP - BOTTOM
    for tick in range(0, 101, 25):
        y = HEIGHT - BOTTOM - height * tick / 100
        parts += [_text(LEFT - 6, y + 4, str(tick), "end"), _line(LEFT, y, WIDTH - RIGHT, y, "#eee")]
    for i, (name, shares) in enumerate(bars.items()):
        x, y = LEFT + i * slot + slot * 0.12, float(HEIGHT - BOTTOM)
        for part, share in shares.items():
            tall = share * height
            y -= tall
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{slot * 0.76:.1f}" height="{tall:.2f}" fill="{PART_COLOURS[part]}">'
                f"<title>{escape(name)}: {part} {100 * share:.1f} %</title></rect>"
            )
        middle = x + slot * 0.38
        label = _text(middle, HEIGHT - BOTTOM + 12, name, "end")
        parts.append(label.replace("<text", f'<text transform="rotate(-25 {middle:.1f} {HEIGHT - BOTTOM + 12})"', 1))
    names = list(next(iter(bars.values()), {}))
    for i, part in enumerate(names):
        parts += _legend(i, part, PART_COLOURS[part])
    return _frame(title, "", y_label, parts)


def bars(title: str, groups: Mapping[str, Sequence[tuple[str, float, str]]], x_label: str) -> str:
    """Horizontal bars under the name of their group: (name, value, what stands behind the bar). Values that are not
    finite are left out.
    """
    left, right, bar, gap, head = 250, 130, 16, 6, 22
    shown = {group: [b for b in members if math.isfinite(b[1])] for group, members in groups.items()}
    most = max((value for members in shown.values() for _, value, _ in members), default=0.0) or 1.0
    names = list(dict.fromkeys(name for members in shown.values() for name, _, _ in members))
    parts: list[str] = []
    y = TOP + 4.0
    for group, members in shown.items():
        parts.append(_text(8, y + 12, group, "start").replace("<text", '<text font-weight="bold"', 1))
        y += head
        parts.append(_line(left, y - 2, left, y + len(members) * (bar + gap) - gap + 2, "#444"))
        for name, value, behind in members:
            long = value / most * (WIDTH - left - right)
            colour = COLOURS[names.index(name) % len(COLOURS)]
            parts += [
                _text(left - 6, y + 12, name, "end"),
                f'<rect x="{left}" y="{y:.1f}" width="{long:.1f}" height="{bar}" fill="{colour}"/>',
                _text(left + long + 5, y + 12, behind, "start"),
            ]
            y += bar + gap
        y += gap
    height = y + 24
    axis = _text(8, 18, title, "start").replace("<text", '<text font-weight="bold" font-size="13"', 1)
    return _sheet(height, f"{''.join(parts)}{axis}{_text(left, y + 14, x_label, 'start')}")


def _finite(point: tuple[float, float]) -> bool:
    return math.isfinite(point[0]) and math.isfinite(point[1])


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers within [low, high]."""
    step = 10 ** math.floor(math.log10((high - low) / 5))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= 6)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten within [10^low, 10^high]; powers alone where they are many, the ends where there is none."""
    found = [m * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1) for m in (1, 2, 5)]
    inside = [value for value in found if low - 1e-9 <= math.log10(value) <= high + 1e-9]
    if len(inside) > 8:
        inside = [value for value in inside if math.isclose(math.log10(value), round(math.log10(value)))]
    return inside or [10**low, 10**high]


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def _legend(row: int, name: str, colour: str) -> list[str]:
    x, y = WIDTH - RIGHT + 12, TOP + 8 + 16 * row
    return [f'<rect x="{x}" y="{y - 8}" width="10" height="10" fill="{colour}"/>', _text(x + 15, y + 1, name, "start")]


def _frame(title: str, x_label: str, y_label: str, parts: Sequence[str]) -> str:
    axis = (
        _line(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM, "#444")
        + _line(LEFT, TOP, LEFT, HEIGHT - BOTTOM, "#444")
        + _text(LEFT, 18, title, "start").replace("<text", '<text font-weight="bold"', 1)
        + _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, x_label, "middle")
        + _text(14, HEIGHT / 2, y_label, "middle").replace("<text", f'<text transform="rotate(-90 14 {HEIGHT / 2})"', 1)
    )
    return _sheet(HEIGHT, f"{''.join(parts)}{axis}")


def _sheet(height: float, content: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" height="{height:g}" '
        f'font-family="sans-serif" font-size="11"><rect width="{WIDTH}" height="{height:g}" fill="white"/>{content}</svg>'
    )
