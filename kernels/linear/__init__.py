"""The matrix products of a layer, with the norm before and the residual sum or the gate after on board."""

from minipaged.kernels.linear.matmul import gated_linear, linear

__all__ = ["gated_linear", "linear"]
