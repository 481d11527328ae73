"""Text that models, prompts and traces bring, made safe to print: no control or escape character reaches the
terminal, and every character takes the cells that it is counted for.

Knows Unicode; knows nothing of what the text means.
"""

from __future__ import annotations

import unicodedata
from functools import lru_cache

from rich.cells import cell_len, get_character_cell_size

REPLACED = "�"
ASTRAL = "□"  # characters outside the basic plane: terminals disagree on their width
_SPECIAL = {"\n": "↵", "\t": " ", "\r": ""}
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


@lru_cache(maxsize=4096)
def _safe_char(char: str) -> str:
    if char in _SPECIAL:
        return _SPECIAL[char]
    if ord(char) > 0xFFFF:
        return ASTRAL
    category = unicodedata.category(char)
    if category in ("Mn", "Me"):  # marks without a base character left after composition
        return ""
    if category[0] == "C" or category in ("Zl", "Zp") or get_character_cell_size(char) <= 0:
        return REPLACED
    return " " if category == "Zs" else char


def clean(text: str) -> str:
    """One line of printable characters: a line break shows as ↵, what is not printable as �."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_safe_char(char) for char in unicodedata.normalize("NFC", text))


def clean_bytes(text: bytes | bytearray) -> str:
    """The same from UTF-8; a character cut in two at the end is left out until it is whole."""
    return clean(_whole(bytes(text)).decode("utf-8", "replace"))


def _whole(text: bytes) -> bytes:
    """`text` without a last character of which bytes are still to come."""
    for back in range(1, min(4, len(text)) + 1):
        byte = text[-back]
        if byte & 0xC0 != 0x80:  # a first byte
            need = 1 if byte < 0x80 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4 if byte < 0xF8 else 1
            return text[:-back] if need > back else text
    return text


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
