"""From logits to tokens: truncation (top-k, top-p, min-p) and the draw."""

from minipaged.kernels.sampling.draw import draw_tokens
from minipaged.kernels.sampling.truncate import truncation_threshold

__all__ = ["draw_tokens", "truncation_threshold"]
