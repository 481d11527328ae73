"""From logits to tokens, on the device. Each draw is one number in [0, 1) looked up in the cumulative distribution, so a draw depends on
its stream and its logits alone, never on its neighbours in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch

from minipaged.execution.step_inputs import to_device
from minipaged.kernels.sampling import draw_tokens, truncation_threshold
from minipaged.scheduling.plan import LogitAdjustments, SamplingColumns


def adjust(logits: torch.Tensor, adjustments: Iterable[LogitAdjustments | None]) -> torch.Tensor:
    """Do to the logits of each draw what was asked, in place, and return them. logits: float32 [draws, vocab]; one adjustment a draw.

    The order and the formulas are vLLM's (and, each by itself, those of transformers' processors).
    """
    asked = [(row, each) for row, each in enumerate(adjustments) if each is not None]

    def places(tokens: Callable[[LogitAdjustments], Iterable[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows, tokens) of all that are named, [named] each."""
        pairs = [(row, token) for row, each in asked for token in tokens(each)]
        index = to_device(np.array(pairs, np.int64).reshape(-1, 2).T.copy(), logits.device)
        return index[0], index[1]

    def values(numbers: Callable[[LogitAdjustments], Iterable[float]]) -> torch.Tensor:
        return to_device(np.array([x for _, each in asked for x in numbers(each)], np.float32), logits.device)

    limited = [row for row, each in asked if each.allowed is not None]
    if limited:
        allowed = places(lambda each: each.allowed or ())
        kept = logits[allowed]
        logits[to_device(np.array(limited, np.int64), logits.device)] = float("-inf")
        logits[allowed] = kept
    masked = [(row, each.mask) for row, each in asked if each.mask is not None]
    if masked:
        may = np.zeros(
            (len(masked), logits.shape[1]), bool
        )  # a network may know more tokens than the grammar: none of these
        for row, (_, mask) in enumerate(masked):
            bits = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")[: logits.shape[1]]
            may[row, : len(bits)] = bits
        rows = to_device(np.array([row for row, _ in masked], np.int64), logits.device)
        logits[rows] = logits[rows].masked_fill(~to_device(may, logits.device), float("-inf"))
    if any(each.banned for _, each in asked):
        logits[places(lambda each: each.banned)] = float("-inf")
    if any(each.bias for _, each in asked):
        biased = places(lambda each: (token for token, _ in each.bias))
        logits[biased] += values(lambda each: (bias for _, bias in each.bias))
    if any(each.seen for _, each in asked):
        seen = places(lambda each: each.seen)
        before, penalty = logits[seen], values(lambda each: [each.repetition] * len(each.seen))
        logits[seen] = torch.where(before > 0, before / penalty, before * penalty)
    if any(each.drawn for _, each in asked):
        drawn = places(lambda each: (token for token, _ in each.drawn))
        logits[drawn] -= values(lambda each: (each.presence + each.frequency * count for _, count in each.drawn))
    return logits


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
