"""From logits to tokens, on the device. Each draw is one number in [0, 1) looked up in the cumulative distribution, so a draw depends on
its stream and its logits alone, never on its neighbours in the batch.
"""

from __future__ import annotations

import numpy as np
import torch

import kernels
from minipaged.model.placement import to_device
from minipaged.scheduling.plan import SamplingColumns

SORTED_ROWS = 32  # truncated draws at a time: each takes about 100 bytes a token of the vocabulary while it is sorted


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

    logits [draws, vocab] float32. Returns int64 [draws]; rows of temperature 0 take the most likely token.
    """
    device = logits.device
    warm = columns.temperature > 0
    if not warm.any():
        return kernels.draw_tokens(logits)
    temperature = to_device(columns.temperature, device)
    uniform = to_device(columns.uniform, device)
    drawn = kernels.draw_tokens(logits, temperature, uniform)
    truncated = warm & ((columns.top_k > 0) | (columns.top_p < 1.0) | (columns.min_p > 0.0))
    if truncated.any():
        rows = to_device(truncated.nonzero()[0], device)
        top_k, top_p, min_p = (
            to_device(column[truncated], device) for column in (columns.top_k, columns.top_p, columns.min_p)
        )
        parts = (torch.split(column, SORTED_ROWS) for column in (rows, top_k.long(), top_p, min_p))
        for part, k, p, floor in zip(*parts, strict=True):
            scaled = logits[part] / temperature[part, None]
            drawn[part] = draw_truncated(scaled, uniform[part], k, p, floor)
    return drawn


def draw_truncated(
    scaled: torch.Tensor, uniform: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """As kernels.draw_tokens, over the tokens that remain: the top_k best (0: all), the fewest whose sum reaches top_p, those with at least
    min_p times the best one's probability. All arguments but `scaled` [draws, vocab] are [draws].
    """
    vocab = scaled.shape[-1]
    ordered, tokens = scaled.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(vocab, device=scaled.device)
    ordered = ordered.masked_fill(rank >= top_k.where(top_k > 0, vocab)[:, None], float("-inf"))
    probabilities = ordered.softmax(dim=-1).double()
    before = probabilities.cumsum(dim=-1) - probabilities
    keep = (before < top_p[:, None]) & (probabilities >= min_p[:, None] * probabilities[:, :1])
    keep[:, 0] = True
    cumulative = (probabilities * keep).cumsum(dim=-1)
    threshold = uniform[:, None] * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, threshold, right=True)
    last_kept = (keep * rank).amax(dim=-1, keepdim=True)
    return tokens.gather(1, torch.minimum(chosen, last_kept)).squeeze(1)
