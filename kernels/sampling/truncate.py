"""Top-k, top-p and min-p as one number a row: the least logit that a draw may still take.

Tokens below it weigh nothing in `draw_tokens`; nothing is sorted, gathered or written back. Tokens that tie with the last one kept stay, as
in transformers' top-k. The Triton kernels are in truncate_triton.py and, for few rows,
truncate_parts_triton.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minipaged.kernels.checks import COLDEST, check_column, check_logits
from minipaged.kernels.dispatch import use_triton

SORTED_ROWS = 32  # of the twin at a time: a sort takes about 50 bytes a logit


def truncation_threshold(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """float32 [rows]: the least logit that stays of each row; -inf where nothing is cut, or the draw is greedy.

    Of softmax(logits / temperature) stay the top_k likeliest tokens (0: all); of those the fewest whose share of their sum reaches top_p
    (1: all); and no token with less than min_p times the likeliest one's probability (0: all). The likeliest token always stays.

    logits: [rows, vocab], its last dimension contiguous. The others: [rows] numbers of any dtype; top_k whole. Raises ValueError on shapes,
    dtypes or devices that do not fit. Source of top-p: Holtzman et al. 2020.
    """
    check_logits(logits)
    for name, column in (("temperature", temperature), ("top_k", top_k), ("top_p", top_p), ("min_p", min_p)):
        check_column(name, column, logits)
    if use_triton(logits):
        from minipaged.kernels.sampling.truncate_parts_triton import takes_few_rows, truncation_threshold_by_parts
        from minipaged.kernels.sampling.truncate_triton import truncation_threshold_triton

        if takes_few_rows(logits):
            return truncation_threshold_by_parts(logits, temperature, top_k, top_p, min_p)
        return truncation_threshold_triton(logits, temperature, top_k, top_p, min_p)
    return truncation_threshold_torch(logits, temperature, top_k, top_p, min_p)


def truncation_threshold_torch(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    """The twin of truncation_threshold_triton: by sorting. Sums in float64."""
    threshold = torch.full(logits.shape[:1], float("-inf"), dtype=torch.float32, device=logits.device)
    cut = (temperature.float() >= COLDEST) & ((top_k > 0) | (top_p < 1) | (min_p > 0))
    for rows in torch.split(cut.nonzero().squeeze(1), SORTED_ROWS):
        threshold[rows] = _by_sorting(logits[rows].float(), *(x[rows] for x in (temperature, top_k, top_p, min_p)))
    return threshold


def _by_sorting(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    ordered = logits.sort(dim=-1, descending=True).values
    vocab = ordered.shape[-1]
    last = top_k.where(top_k > 0, vocab).clamp(max=vocab).long() - 1
    stays = ordered >= ordered.gather(1, last[:, None])
    scaled = ordered.double() / temperature.double()[:, None]
    likelihood = scaled.masked_fill(~stays, float("-inf")).softmax(dim=-1)
    before = likelihood.cumsum(dim=-1) - likelihood
    stays &= (before < top_p[:, None]) | (top_p >= 1)[:, None]
    stays &= scaled - scaled[:, :1] >= min_p.double().log()[:, None]
    stays[:, 0] = True
    return ordered.gather(1, stays.sum(dim=-1, keepdim=True) - 1).squeeze(1)
