"""From logits to tokens, on the device. Each draw is one number in [0, 1) looked up in the cumulative distribution, so a draw depends on
its stream and its logits alone, never on its neighbours in the batch.
"""

from __future__ import annotations

import numpy as np
import torch

from minipaged.kernels.sampling import draw_tokens, truncation_threshold
from minipaged.model.loading.placement import to_device
from minipaged.scheduling.plan import SamplingColumns


def penalize(logits: torch.Tensor, tokens: tuple[tuple[int, ...], ...], penalties: torch.Tensor) -> None:
    """Repetition penalty in place (Keskar et al. 2019): a seen token's logit is divided by the penalty if positive, else multiplied.

    logits [draws, vocab]; tokens: per draw, the tokens seen; penalties [draws].
    """
    for row, seen in enumerate(tokens):
        if seen:
            index = to_device(np.array(seen, np.int64), logits.device)
            values = logits[row, index]
            logits[row, index] = torch.where(values > 0, values / penalties[row], values * penalties[row])


def ban(logits: torch.Tensor, tokens: tuple[tuple[int, ...], ...]) -> None:
    """Make tokens impossible, in place. logits [draws, vocab]; tokens: per draw."""
    for row, banned in enumerate(tokens):
        if banned:
            logits[row, to_device(np.array(banned, np.int64), logits.device)] = float("-inf")


def sample(logits: torch.Tensor, columns: SamplingColumns) -> torch.Tensor:
    """Draw one token a row: temperature, then top-k, top-p and min-p where asked, then the inverse of the cumulative distribution.

    logits [draws, vocab]. Returns int64 [draws]; rows of temperature 0 take the most likely token.
    """
    if not (columns.temperature > 0).any():
        return draw_tokens(logits)
    temperature, uniform = (to_device(column, logits.device) for column in (columns.temperature, columns.uniform))
    threshold = None
    if is_truncated(columns):
        asked = (to_device(column, logits.device) for column in (columns.top_k, columns.top_p, columns.min_p))
        threshold = truncation_threshold(logits, temperature, *asked)
    return draw_tokens(logits, temperature, uniform, threshold)


def is_truncated(columns: SamplingColumns) -> bool:
    """Whether any draw asks for top-k, top-p or min-p."""
    return bool(((columns.top_k > 0) | (columns.top_p < 1.0) | (columns.min_p > 0.0)).any())
