"""How paged_decode cuts rows into chunks, on the device, and joins the chunks' outputs.

Splitting (Flash-Decoding, Dao et al., 2023): the chunk length is computed on the device from the lengths, so that about `target`
programs share all tokens evenly, the longest chunks first; the grid depends on the number of rows alone. A captured CUDA graph therefore
stays right, and balanced, as lengths change.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803

import triton
import triton.language as tl

from minipaged.kernels.dependent_launch import wait_for_previous

MOST_CHUNKS = 2**16  # of all rows together: what a field of _ends_longest_first holds


@triton.jit
def chunks_of_rows(
    context_lens_ptr,
    shared_tokens_ptr,  # leading tokens of each row that are not to be cut: others attend to them
    num_rows,
    window,
    target,
    HAS_WINDOW: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
):
    """(chunks of each row, where they end among all chunks): int32 [ROWS] each. At most target + num_rows chunks, at least 1 a row."""
    row = tl.arange(0, ROWS)
    span = tl.load(context_lens_ptr + row, mask=row < num_rows, other=0)
    if HAS_WINDOW:
        span = tl.minimum(span, window)
    if HAS_SHARED:
        span -= tl.load(shared_tokens_ptr + row, mask=row < num_rows, other=0)
    chunk = (tl.sum(span, 0) + target - 1) // target
    chunk = tl.maximum((chunk + TILE - 1) // TILE * TILE, MIN_CHUNK)
    count = tl.maximum((span + chunk // 2) // chunk, 1)  # a row a little over one chunk is not worth a reduction
    count = tl.where(row < num_rows, count, 0)
    return count, _ends_longest_first(count, span // tl.maximum(count, 1), chunk, ROWS)


@triton.jit
def _ends_longest_first(
    count,  # chunks of each row, below 2**16 in all: int32 [ROWS]
    length,  # of each of a row's chunks
    chunk,  # the length that was aimed at
    ROWS: tl.constexpr,
):
    """Where each row's chunks end, once all are ordered from long to short: int32 [ROWS].

    Programs start in this order, so a grid ends on short ones. Sorted by class only: below 3/8, 6/8, 9/8 of `chunk`, and longer
    (none is longer than 3/2). The four classes are counted in one running sum, 16 bits each. Moves no bytes. Predicted for 64 rows of 100
    to 2048 tokens: 10 % (a simulation of 528 programs that share the bandwidth), measured 5.5 % (H100: 121.6 to 115.2 microseconds); where
    lengths are equal nothing.
    """
    if ROWS == 1:
        return count
    else:
        shortness = 3 - tl.minimum(length * 8 // (chunk * 3), 3)  # the longest class is the lowest field
        shift = 16 * shortness.to(tl.int64)
        counts = count.to(tl.int64) << shift
        in_class = (tl.cumsum(counts, 0) >> shift) & 0xFFFF
        sums = tl.sum(counts, 0)
        classes_before = (sums << 16) + (sums << 32) + (sums << 48)  # each field: the sum of the lower ones
        return (in_class + ((classes_before >> shift) & 0xFFFF)).to(tl.int32)


@triton.jit
def reduce_kernel(
    out_ptr,
    partial_ptr,
    partial_lse_ptr,
    cuts_ptr,  # int32 [rows, 2]: chunks of each row, and the first of them
    shared_partial_ptr,  # of shared_kernel
    shared_lse_ptr,
    shared_tokens_ptr,
    stride_out,
    stride_out_head,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    SHARED_TILE: tl.constexpr,
    SHARED_PARTS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One (row, head): the outputs of its chunks, and of the tokens it shares, weighed by their softmax denominators."""
    wait_for_previous(DEPENDENT)
    head = tl.program_id(0)
    row = tl.program_id(1)
    # Read, not computed again: where no row is cut, as in a large batch, these programs are many and this is all they do.
    count = tl.load(cuts_ptr + 2 * row)
    shared = 0
    if HAS_SHARED:
        shared = tl.load(shared_tokens_ptr + row)
    if (count <= 1) & (shared == 0):
        return
    first = tl.load(cuts_ptr + 2 * row + 1).to(tl.int64)
    dim = tl.arange(0, HEAD_BLOCK)
    accumulated = tl.zeros([HEAD_BLOCK], tl.float32)
    top = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    for start in range(0, count, PARTS):  # a row's first chunk is never empty
        part = start + tl.arange(0, PARTS)
        at = (first + part) * HEADS + head
        accumulated, top, total = _join(
            (accumulated, top, total), partial_ptr, partial_lse_ptr, at, part < count, HEAD_DIM, HEAD_BLOCK
        )
    if HAS_SHARED:
        part = tl.arange(0, SHARED_PARTS)
        low, high = shared_part(shared, part, SHARED_TILE, SHARED_PARTS)
        at = (row.to(tl.int64) * SHARED_PARTS + part) * HEADS + head
        accumulated, top, total = _join(
            (accumulated, top, total), shared_partial_ptr, shared_lse_ptr, at, low < high, HEAD_DIM, HEAD_BLOCK
        )
    pointers = out_ptr + row.to(tl.int64) * stride_out + head * stride_out_head + dim
    tl.store(pointers, (accumulated / total).to(out_ptr.dtype.element_ty), mask=dim < HEAD_DIM)


@triton.jit
def _join(
    state,  # as of attend_tile, of one (row, head)
    partial_ptr,
    lse_ptr,
    at,  # where each part's output lies: int64 [parts]
    present,  # whether it is to be read
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
):
    """The state with the outputs of these parts; some part so far, or one of these, is present."""
    accumulated, top, total = state
    dim = tl.arange(0, HEAD_BLOCK)
    lse = tl.load(lse_ptr + at, mask=present, other=float("-inf"))
    partial = tl.load(
        partial_ptr + at[:, None] * HEAD_DIM + dim[None, :],
        mask=present[:, None] & (dim < HEAD_DIM)[None, :],
        other=0.0,
    )
    new_top = tl.maximum(top, tl.max(lse, 0))
    weight = tl.exp2(lse - new_top)
    decay = tl.exp2(top - new_top)
    total = total * decay + tl.sum(weight, 0)
    accumulated = accumulated * decay + tl.sum(weight[:, None] * partial, 0)
    return (accumulated, new_top, total)


@triton.jit
def shared_part(tokens, part, TILE: tl.constexpr, PARTS: tl.constexpr):
    """Which of a tile's common tokens a part has: [low, high), whole tiles of keys but for the last; empty past the end."""
    size = ((tokens + PARTS - 1) // PARTS + TILE - 1) // TILE * TILE
    low = part * size
    return low, tl.minimum(low + size, tokens)
