"""The matrix products of a layer, each in one kernel with the norm before it and the residual sum or the gate after it."""

from minipaged.kernels.linear.matmul import gated_linear, linear

__all__ = ["gated_linear", "linear"]
