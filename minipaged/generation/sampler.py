"""From logits to tokens, on the device. Each draw is one number in [0, 1) looked up in the cumulative distribution, so a draw depends on
its stream and its logits alone, never on its neighbours in the batch.
"""

from __future__ import annotations

import torch

from minipaged.scheduling.plan import SamplingColumns


def penalize(logits: torch.Tensor, tokens: tuple[tuple[int, ...], ...], penalties: torch.Tensor) -> None:
    """Repetition penalty in place (Keskar et al. 2019): a seen token's logit is divided by the penalty if positive, else multiplied.

    logits [draws, vocab]; tokens: per draw, the tokens seen; penalties [draws].
    """
    for row, seen in enumerate(tokens):
        if seen:
            index = torch.tensor(seen, dtype=torch.int64, device=logits.device)
            values = logits[row, index]
            logits[row, index] = torch.where(values > 0, values / penalties[row], values * penalties[row])


def ban(logits: torch.Tensor, tokens: tuple[tuple[int, ...], ...]) -> None:
    """Make tokens impossible, in place. logits [draws, vocab]; tokens: per draw."""
    for row, banned in enumerate(tokens):
        if banned:
            logits[row, list(banned)] = float("-inf")


def sample(logits: torch.Tensor, columns: SamplingColumns) -> torch.Tensor:
    """Draw one token a row: temperature, then top-k, top-p, min-p, then the inverse of the cumulative distribution.

    logits [draws, vocab] float32. Returns int64 [draws]; rows of temperature 0 take the most likely token.
    """
    device = logits.device
    best = logits.argmax(dim=-1)
    temperature = torch.from_numpy(columns.temperature).to(device)
    if not bool((columns.temperature > 0).any()):
        return best
    top_k = torch.from_numpy(columns.top_k).to(device).long()
    top_p = torch.from_numpy(columns.top_p).to(device)
    min_p = torch.from_numpy(columns.min_p).to(device)
    uniform = torch.from_numpy(columns.uniform).to(device)
    greedy = temperature == 0
    scaled = logits / torch.where(greedy, torch.ones_like(temperature), temperature)[:, None]
    ordered, tokens = scaled.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(dim=-1).double()
    vocab = logits.shape[-1]
    rank = torch.arange(vocab, device=device)
    keep = rank < torch.where(top_k > 0, top_k, torch.full_like(top_k, vocab))[:, None]
    before = probabilities.cumsum(dim=-1) - probabilities
    keep &= before < top_p[:, None]
    keep &= probabilities >= min_p[:, None] * probabilities[:, :1]
    keep[:, 0] = True
    cumulative = (probabilities * keep).cumsum(dim=-1)
    threshold = uniform[:, None] * cumulative[:, -1:]
    chosen = (cumulative <= threshold).sum(dim=-1, keepdim=True).clamp(max=vocab - 1)
    last_kept = (keep * rank).amax(dim=-1, keepdim=True)
    drawn = tokens.gather(1, torch.minimum(chosen, last_kept)).squeeze(1)
    return torch.where(greedy, best, drawn)
