"""How published configs stretch the rotary frequencies, as the divisors that follow. Imports no torch."""

from __future__ import annotations

import math

from minipaged.config import RopeDivisors
from minipaged.errors import InputError


def linear(rotary_dim: int, factor: float) -> RopeDivisors:
    """Positions divided by `factor` (Chen et al., 2023)."""
    return RopeDivisors((float(factor),) * (rotary_dim // 2))


def yarn(
    rotary_dim: int,
    theta: float,
    factor: float,
    original_max_position: float,
    *,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    attention_factor: float | None = None,
    truncate: bool = True,
) -> RopeDivisors:
    """YaRN (Peng et al., 2023, section 3.2), rounded as transformers and llama.cpp do.

    Dimensions that turn more than `beta_fast` times over the original context keep their frequency, those that turn less than
    `beta_slow` times are divided by `factor`, those between are blended.
    """

    if beta_fast <= beta_slow or theta <= 1:
        raise InputError(
            f"YaRN's beta_fast ({beta_fast:g}) must be above beta_slow ({beta_slow:g}), and theta ({theta:g}) above 1"
        )

    def dimension_of(turns: float) -> float:
        return rotary_dim * math.log(original_max_position / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension_of(beta_fast), dimension_of(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    high += 0.001 if low == high else 0
    divisors = []
    for pair in range(rotary_dim // 2):
        stretched = min(max((pair - low) / (high - low), 0.0), 1.0)
        divisors.append(1.0 / (stretched / factor + 1.0 - stretched))
    if attention_factor is None:
        attention_factor = yarn_scale(factor)
    return RopeDivisors(tuple(divisors), attention_factor)


def yarn_scale(factor: float, multiplier: float = 1.0) -> float:
    """How much larger YaRN makes queries and keys for a context that is `factor` times as long."""
    return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0
