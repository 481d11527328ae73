"""Text from models and files is not trusted: nothing in it may steer the terminal."""

from __future__ import annotations

import unicodedata

_KEPT = frozenset("\n\t")
_UNSAFE = frozenset(
    {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
)  # control, format (bidi, zero width), surrogate, private, separators


def printable(text: str) -> str:
    """The text with every character that could steer a terminal replaced by U+FFFD; newline, tab and emoji joiners stay."""
    return "".join(
        c if c in _KEPT or c == "\u200d" or unicodedata.category(c) not in _UNSAFE else "\ufffd" for c in text
    )


def one_line(text: str) -> str:
    """As `printable`, and on one line: a name, not a text."""
    return " ".join(printable(text).split("\n"))
