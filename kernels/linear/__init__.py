"""The matrix products of a layer, each in one kernel with the norm before it and the residual sum or the gate after it."""

from minipaged.kernels.linear.matmul import gated_linear, linear
from minipaged.kernels.linear.packed import PackedMatrix, dequantize, pack, packed_gated_linear, packed_linear

__all__ = ["PackedMatrix", "dequantize", "gated_linear", "linear", "pack", "packed_gated_linear", "packed_linear"]
