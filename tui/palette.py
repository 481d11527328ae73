"""Colours, glyphs and letters: how a state looks. State is always a glyph, never a hue alone, so colour can be taken
away.

Seven hues of Okabe and Ito (Color Universal Design, 2008), which differ in the three simulated colour-blindnesses. Each comes in two
weights, plain and pale on a tint, so that there are fourteen looks (words.other_looks keeps living siblings apart); past fourteen sequences
looks repeat, and the letters tell sequences apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

from rich.style import Style

from minipaged.trace.words import NUM_HUES, NUM_LOOKS

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
PAPER = {"dark": "#101010", "light": "#FFFFFF"}


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
    """The look of a role. Names: text dim strong faint alert good mark news, hueN, sharedN (N a look), free cached null copied select."""
    if name.startswith("hue"):
        return _hue(int(name[3:]), mode)
    if name.startswith("shared"):
        base = _hue(int(name[6:]), mode)
        return Style(bold=True, reverse=True) + base
    table = {"dark": _DARK, "light": _LIGHT, "plain": _PLAIN}[mode]
    return table[name]


def _hue(number: int, mode: Mode) -> Style:
    """Looks 0 to 6 are the hues; 7 to 13 the same, pale (dark on white) on a tint, or underlined where there is no colour."""
    again = number % NUM_LOOKS >= NUM_HUES
    if mode == "plain":
        return Style(underline=True) if again else Style()
    hue = (HUES_DARK if mode == "dark" else HUES_LIGHT)[number % NUM_HUES]
    if not again:
        return Style(color=hue)
    ink = "#FFFFFF" if mode == "dark" else "#000000"
    return Style(color=_mix(hue, ink, 0.55), bgcolor=_mix(hue, PAPER[mode], 0.68 if mode == "dark" else 0.78))


def _mix(one: str, other: str, share: float) -> str:
    """The colour that lies `share` of the way from one to the other."""
    pairs = ((int(one[at : at + 2], 16), int(other[at : at + 2], 16)) for at in (1, 3, 5))
    return "#" + "".join(f"{round(a + share * (b - a)):02X}" for a, b in pairs)


_DARK = {
    "text": Style(color="#D8D8D8"),
    "dim": Style(color="#9A9A9A"),
    "faint": Style(color="#6C6C6C"),
    "strong": Style(color="#FFFFFF", bold=True),
    "alert": Style(color="#FF8A5C", bold=True),
    "good": Style(color="#3FCFA0"),
    "news": Style(color="#C3B5FF", bold=True),
    "gauge": Style(color="#9C88F5"),
    "gauge2": Style(color="#E4DDFF"),
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
    "news": Style(color="#4B2FB0", bold=True),
    "gauge": Style(color="#7A62D8"),
    "gauge2": Style(color="#3B2391"),
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
    "news": Style(bold=True),
    "gauge": Style(),
    "gauge2": Style(bold=True),
    "mark": Style(reverse=True, bold=True),
    "free": Style(dim=True),
    "cached": Style(dim=True),
    "null": Style(dim=True),
    "copied": Style(bold=True),
    "select": Style(reverse=True, bold=True),
    "waste": Style(dim=True),
}
