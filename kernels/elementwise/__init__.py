"""Norms, activations and embeddings: each element is read and written once."""

from minipaged.kernels.elementwise.activation import silu_mul
from minipaged.kernels.elementwise.embed import embed_tokens
from minipaged.kernels.elementwise.norm import rms_norm

__all__ = ["embed_tokens", "rms_norm", "silu_mul"]
