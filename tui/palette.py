"""Colours, glyphs and letters: how a state looks. State is always a glyph, never a hue alone, so colour can be taken
away.

Seven hues of Okabe and Ito (Color Universal Design, 2008), which differ in the three simulated colour-blindnesses. Past seven sequences
hues repeat (words.other_hues keeps living siblings apart), and the letters tell sequences apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

from rich.style import Style

Mode = Literal["dark", "light", "plain"]

HUES_DARK = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
# The same hues, darkened for white.
HUES_LIGHT = (
    "#8F6200",
    "#1C6EA4",
    "#00694D",
    "#75690A",
    "#004C78",
    "#A34800",
    "#8F3F6C",
)


@dataclass(frozen=True, slots=True)
class Glyphs:
    """One cell a state."""

    free: str
    filling: tuple[str, ...]  # by share filled, rising
    many: str  # shared by more than nine
    cached: str
    copied: str
    swapped: str
    null: str
    heat: str  # nothing to full
    ascii: bool


UNICODE = Glyphs("·", ("▂", "▄", "▆"), "#", "░", "◆", "▽", "○", " ▁▂▃▄▅▆▇█", False)
ASCII = Glyphs(".", ("-", "+"), "#", "c", "*", "v", "0", " .:-=+*%#", True)


@cache
def style(name: str, mode: Mode) -> Style:
    """The look of a role. Names: text dim strong faint alert good mark, hueN, sharedN (N a hue), free cached null copied select."""
    if name.startswith("hue"):
        return _hue(int(name[3:]), mode)
    if name.startswith("shared"):
        base = _hue(int(name[6:]), mode)
        return Style(bold=True, reverse=True) + base
    table = {"dark": _DARK, "light": _LIGHT, "plain": _PLAIN}[mode]
    return table[name]


def _hue(number: int, mode: Mode) -> Style:
    if mode == "plain":
        return Style()
    return Style(color=(HUES_DARK if mode == "dark" else HUES_LIGHT)[number % len(HUES_DARK)])


_DARK = {
    "text": Style(color="#D8D8D8"),
    "dim": Style(color="#9A9A9A"),
    "faint": Style(color="#6C6C6C"),
    "strong": Style(color="#FFFFFF", bold=True),
    "alert": Style(color="#FF8A5C", bold=True),
    "good": Style(color="#3FCFA0"),
    "mark": Style(color="#101010", bgcolor="#FFFFFF", bold=True),
    "free": Style(color="#5A5A5A"),
    "cached": Style(color="#8E8E8E"),
    "null": Style(color="#5A5A5A"),
    "copied": Style(color="#FFFFFF", bold=True),
    "select": Style(reverse=True, bold=True),
    "waste": Style(color="#A0522D"),
}
_LIGHT = {
    "text": Style(color="#202020"),
    "dim": Style(color="#555555"),
    "faint": Style(color="#767676"),
    "strong": Style(color="#000000", bold=True),
    "alert": Style(color="#A33000", bold=True),
    "good": Style(color="#00694D"),
    "mark": Style(color="#FFFFFF", bgcolor="#000000", bold=True),
    "free": Style(color="#8A8A8A"),
    "cached": Style(color="#666666"),
    "null": Style(color="#8A8A8A"),
    "copied": Style(color="#000000", bold=True),
    "select": Style(reverse=True, bold=True),
    "waste": Style(color="#A0522D"),
}
_PLAIN = {
    "text": Style(),
    "dim": Style(dim=True),
    "faint": Style(dim=True),
    "strong": Style(bold=True),
    "alert": Style(bold=True),
    "good": Style(),
    "mark": Style(reverse=True, bold=True),
    "free": Style(dim=True),
    "cached": Style(dim=True),
    "null": Style(dim=True),
    "copied": Style(bold=True),
    "select": Style(reverse=True, bold=True),
    "waste": Style(dim=True),
}
