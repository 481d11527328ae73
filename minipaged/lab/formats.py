"""How the lab writes numbers: seconds, speeds, bytes and shares, each in the unit that reads best."""

from __future__ import annotations

import math


def seconds(value: float) -> str:
    """Seconds in the unit that reads best."""
    if math.isnan(value):
        return "-"
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if value * scale >= 1 or unit == "us":
            return f"{value * scale:,.3g} {unit}" if value * scale < 1000 else f"{value * scale:,.0f} {unit}"
    return "-"


def speed(value: float) -> str:
    """Tokens a second, with a digit behind the point where they are few."""
    return "-" if math.isnan(value) else f"{value:,.0f}" if value >= 20 else f"{value:.1f}"


def size(value: float) -> str:
    """Bytes in the binary unit that reads best."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:,.4g} {unit}"
        value /= 1024
    return f"{value:,.4g} TiB"


def percent(share: float) -> str:
    """A share as percent with one digit."""
    return f"{100 * share:.1f}"
