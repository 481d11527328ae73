"""From logits to tokens: the most likely one, or one drawn at a temperature by looking a uniform number up in the cumulative distribution.

Truncation (top-k, top-p) is one number a row: see truncate.py. The Triton kernels are in draw_triton.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minipaged.kernels.checks import COLDEST, check_column, check_logits
from minipaged.kernels.dispatch import use_triton


def draw_tokens(
    logits: Tensor, temperature: Tensor | None = None, uniform: Tensor | None = None, threshold: Tensor | None = None
) -> Tensor:
    """One token a row, int64 [rows]: the first most likely one where temperature is below COLDEST (or not given), else the token at
    which the cumulative distribution of softmax(logits / temperature) passes `uniform`.

    logits: [rows, vocab], its last dimension contiguous. temperature: float32 or float64 [rows]. uniform: float64
    [rows], each in [0, 1). threshold: float32 [rows]: logits below it weigh nothing (see truncation_threshold); nothing is cut without. A
    row's draw depends on that row alone; -1 where nothing can be drawn: all its logits are NaN or -inf, or the largest is inf. Reads the
    logits once, and one part of them again. Raises ValueError on shapes, dtypes or devices that do not fit.
    """
    check_logits(logits)
    if (temperature is None) != (uniform is None):
        raise ValueError("temperature and uniform go together: give both, or neither for the most likely tokens")
    for name, column, dtypes in (
        ("temperature", temperature, (torch.float32, torch.float64)),
        ("uniform", uniform, (torch.float64,)),
        ("threshold", threshold, (torch.float32,)),
    ):
        if column is not None:
            check_column(name, column, logits, dtypes)
    if use_triton(logits):
        from minipaged.kernels.sampling.draw_triton import draw_tokens_triton

        return draw_tokens_triton(logits, temperature, uniform, threshold)
    return draw_tokens_torch(logits, temperature, uniform, threshold)


def draw_tokens_torch(
    logits: Tensor, temperature: Tensor | None = None, uniform: Tensor | None = None, threshold: Tensor | None = None
) -> Tensor:
    """The twin of draw_tokens_triton. Sums in float64, so that a draw near a boundary is decided as exactly as it can be."""
    if threshold is not None:
        logits = logits.masked_fill(logits < threshold[:, None], float("-inf"))
    best = logits.argmax(dim=-1)
    drawable = logits.gather(1, best[:, None]).squeeze(1).isfinite()
    if temperature is None or uniform is None:
        return best.where(drawable, -1)
    warm = temperature.float() >= COLDEST
    scaled = logits.float() / temperature.where(warm, 1.0).float()[:, None]
    cumulative = scaled.softmax(dim=-1).double().cumsum(dim=-1)
    threshold = uniform[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, threshold, right=True).squeeze(1).clamp(max=logits.shape[1] - 1)
    return torch.where(warm, drawn, best).where(drawable, -1)
