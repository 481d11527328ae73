"""Text in cells: cut to a width, broken into rows, written in 7 bits. What comes in has been made safe (minipaged.text.safe)."""

from __future__ import annotations

from rich.cells import cell_len, get_character_cell_size

_TO_ASCII = str.maketrans(
    {
        "→": ">",
        "←": "<",
        "…": "~",
        "·": ".",
        "│": "|",
        "─": "-",
        "┊": ":",
        "▲": "^",
        "▶": ">",
        "‖": "=",
        "█": "#",
        "░": ".",
        "▓": "%",
        "▒": ":",
        "▽": "v",
        "△": "^",
        "↓": "v",
        "“": '"',
        "”": '"',
        "◆": "*",
        "✓": "y",
        "✗": "x",
        "└": "`",
        "├": "+",
        "┬": "+",
        "↵": "$",
        "␣": "_",
        "⏎": "=",
        "×": "x",
        "–": "-",
        "●": "@",
        "○": "o",
        "▁": ".",
        "▂": ".",
        "▃": "-",
        "▄": "-",
        "▅": "+",
        "▆": "+",
        "▇": "#",
        "⌕": "/",
        "⋮": ":",
        "↔": "=",
        "±": "~",
    }
)


def to_ascii(text: str) -> str:
    """The same cells in 7 bits."""
    if text.isascii():
        return text
    text = text.translate(_TO_ASCII)
    return text if text.isascii() else "".join(c if c.isascii() else "?" * get_character_cell_size(c) for c in text)


def fit(text: str, width: int) -> str:
    """At most `width` cells, with … where something was cut off at the end."""
    if cell_len(text) <= width:
        return text
    return _cut(text, width - 1) + "…" if width > 0 else ""


def tail(text: str, width: int) -> str:
    """At most `width` cells of the end, with … where something was cut off before."""
    if cell_len(text) <= width:
        return text
    return "…" + _cut(text[::-1], width - 1)[::-1] if width > 0 else ""


def rows_of(text: str, width: int, start: int = 0) -> list[tuple[int, int]]:
    """Where each row of `text` from `start` on begins and ends: at most `width` cells, broken between words where that leaves half a row.

    A space between two rows stands in neither.
    """
    rows: list[tuple[int, int]] = []
    at, narrow = start, text.isascii()
    while at < len(text):
        end = at + width if narrow else at + max(1, len(_cut(text[at : at + width], width)))
        if end >= len(text):
            rows.append((at, len(text)))
            break
        if text[end] == " ":
            rows.append((at, end))
            at = end + 1
            continue
        cut = 1 + max(text.rfind(" ", at, end), text.rfind("↵", at, end))
        end = cut if cut > at + width // 2 else end
        rows.append((at, end - 1 if text[end - 1] == " " and end - 1 > at else end))
        at = end
    return rows


def _cut(text: str, width: int) -> str:
    used = 0
    for at, char in enumerate(text):
        used += get_character_cell_size(char)
        if used > width:
            return text[:at]
    return text
