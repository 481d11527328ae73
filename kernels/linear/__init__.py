"""The matrix products of a layer, each in one kernel with the norm before it and the residual sum or the gate after it."""

from minipaged.kernels.linear.matmul import gated_linear, linear
from minipaged.kernels.linear.packed import packed_gated_linear, packed_linear
from minipaged.kernels.linear.packed_matrix import PackedMatrix, dequantize, pack

__all__ = ["PackedMatrix", "dequantize", "gated_linear", "linear", "pack", "packed_gated_linear", "packed_linear"]
