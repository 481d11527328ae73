"""The one place that makes text of models, prompts and files safe to show: nothing in it may steer the terminal.

Unsafe and invisible are different things. Control characters (escape sequences begin with one) and the marks that reorder a line are
unsafe: U+FFFD stands in their place. Joiners, soft hyphens and the tags of some flags are merely invisible: lines that flow keep those
that shape the letters beside them, and a grid of cells, where every character must take the cells it is counted for, leaves them out.
"""

from __future__ import annotations

import unicodedata
from functools import lru_cache

from rich.cells import get_character_cell_size

REPLACED = "\ufffd"
ASTRAL = "□"  # in a grid: characters outside the basic plane, on whose width terminals disagree
# Marks that reorder what follows, up to the line's end: embeddings, overrides and isolates.
_REORDERS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
# Without a meaning on a terminal: soft hyphen, byte order mark, line annotations, deprecated controls. And the carriage return: not
# writing it leaves of CRLF the line break, and of one that stands alone nothing that could overwrite the line.
_DROPPED = frozenset("\r\xad\ufeff\ufff9\ufffa\ufffb\u206a\u206b\u206c\u206d\u206e\u206f")
_BREAKS = frozenset("\n\u2028\u2029")


def steers(char: str) -> bool:
    """Whether a terminal may act on this character, or cannot be sent it: control, reordering, half a surrogate pair."""
    return char in _REORDERS or unicodedata.category(char) in ("Cc", "Cs")


@lru_cache(maxsize=4096)
def _flowing(char: str) -> str:
    if char in _DROPPED:
        return ""
    if char in _BREAKS:
        return "\n"
    return REPLACED if char != "\t" and (steers(char) or unicodedata.category(char) == "Co") else char


def printable(text: str) -> str:
    """Text that flows over lines: newline, tab, joiners, direction marks and emoji stay. Any part of it can be made safe alone."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_flowing, text))


def one_line(text: str) -> str:
    """As `printable`, and on one line: a name, not a text."""
    return " ".join(printable(text).split("\n"))


@lru_cache(maxsize=4096)
def _in_cells(char: str) -> str:
    if char in _DROPPED:
        return ""
    if char in _BREAKS:
        return "↵"
    category = unicodedata.category(char)
    if char == "\t" or category == "Zs":
        return " "
    if steers(char):
        return REPLACED
    if category in ("Cf", "Mn", "Me"):  # invisible, or a mark without a base character that is left after composition
        return ""
    if ord(char) > 0xFFFF:
        return ASTRAL
    return REPLACED if category in ("Co", "Cn") or get_character_cell_size(char) <= 0 else char


def clean(text: str) -> str:
    """One line for a grid of cells: a line break shows as ↵, what is unsafe as �, what is invisible not at all."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_in_cells, unicodedata.normalize("NFC", text)))


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
