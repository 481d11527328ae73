"""A kernel that writes down which chunks decode cuts its rows into, and in which order. Imports triton."""
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803

import triton
import triton.language as tl

from minipaged.kernels.attention.decode_chunks import chunks_of_rows


@triton.jit
def chunks_kernel(
    counts_ptr, ends_ptr, lengths_ptr, num_rows, target, ROWS: tl.constexpr, TILE: tl.constexpr, MIN_CHUNK: tl.constexpr
):
    """Chunks of each row, and where they end in the order of the programs: int32 [num_rows] each."""
    counts, ends = chunks_of_rows(lengths_ptr, lengths_ptr, num_rows, 0, target, False, False, ROWS, TILE, MIN_CHUNK)
    row = tl.arange(0, ROWS)
    tl.store(counts_ptr + row, counts, mask=row < num_rows)
    tl.store(ends_ptr + row, ends, mask=row < num_rows)
