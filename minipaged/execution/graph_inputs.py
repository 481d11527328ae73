"""What a captured step reads: one buffer of integers, the same on host and device, and how a plan is written into it.

A graph is frozen for a shape: so many tokens, decodes and prompt chunks at most. Decodes come first, one token each, then the chunks; what
a step does not fill is padding: slot -1, length 0, no queries, a drawing place of its own. Table entries past a row's length are whatever
stood there before: they are never read. Knows plans and numpy; knows nothing of graphs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from minipaged.scheduling.plan import StepPlan

MOST_TOKENS = 1024  # of a step with prompt chunks that is replayed: the GPU is busy with more for longer than the host with launching it
# Steps with chunks have coarser buckets than decodes alone, since there are more shapes.
TOKEN_BUCKETS = (64, 128, 192, 256, 384, 512, 768, 1024)
ROW_BUCKETS = (16, 64, 256, 512, 1024)
CHUNK_BUCKETS = (4, 32)


class Shape(NamedTuple):
    """What a graph has room for. rows: decodes, and draws; chunks: prompt chunks, 0 for a step of decodes alone."""

    tokens: int
    rows: int
    chunks: int


def bucket_of(rows: int) -> int:
    """Rows that a graph for `rows` decodes has: 1, 2, 4, 8, then multiples of 8 to 64, of 16 to 256, of 32 beyond."""
    for step, limit in ((8, 64), (16, 256), (32, 1 << 30)):
        if rows <= limit:
            return 1 << (rows - 1).bit_length() if rows <= 8 else -(-rows // step) * step
    raise ValueError(f"no bucket holds {rows} rows")


def shape_of(plan: StepPlan) -> Shape | None:
    """The shape whose graph can run this plan; None if it is to be launched kernel by kernel."""
    rows, tokens = len(plan.seq_ids), plan.num_tokens
    if not rows or plan.prompt_queries:
        return None
    if tokens == rows:
        return Shape(bucket_of(rows), bucket_of(rows), 0)
    decodes = int((plan.lengths == 1).sum())
    needed = max(decodes, len(plan.draw_rows), 1)
    if tokens > MOST_TOKENS or rows - decodes > CHUNK_BUCKETS[-1] or needed > MOST_TOKENS:
        return None
    rows_bucket = _bucket(ROW_BUCKETS, needed)
    tokens_bucket = max(_bucket(TOKEN_BUCKETS, tokens), rows_bucket)
    return Shape(tokens_bucket, rows_bucket, _bucket(CHUNK_BUCKETS, rows - decodes))


def _bucket(buckets: tuple[int, ...], needed: int) -> int:
    return next(n for n in buckets if n >= needed)


def largest_shapes(max_num_seqs: int) -> tuple[Shape, Shape]:
    """The shapes that need most room in an engine of so many sequences: of decodes alone, and with chunks."""
    alone = Shape(bucket_of(max_num_seqs), bucket_of(max_num_seqs), 0)
    return alone, Shape(MOST_TOKENS, _bucket(ROW_BUCKETS, min(max_num_seqs, MOST_TOKENS)), CHUNK_BUCKETS[-1])


class Inputs(NamedTuple):
    """Views of one buffer, of torch tensors or numpy arrays alike."""

    tokens: Any  # [4, tokens]: id (IN_FLIGHT: the newest of the token's place), position, slot, place
    draws: Any  # [2, rows]: the token whose logits are drawn from, the place that the draw belongs to
    lengths: Any  # [rows]: contexts of the decodes
    chunk_lengths: Any  # [chunks]: contexts of the prompt chunks
    chunk_starts: Any  # [chunks + 1]: the first token of each
    chunk_tables: Any  # [chunks, width]
    tables: Any  # [rows, width]: of the decodes; last, so that unused rows need not be sent


def size_of(shape: Shape, width: int) -> int:
    """Integers that a shape's inputs take, with block tables of `width` entries."""
    return 4 * shape.tokens + 3 * shape.rows + 2 * shape.chunks + 1 + (shape.chunks + shape.rows) * width


def views(buffer: Any, shape: Shape, width: int) -> Inputs:
    """The inputs of a shape in a flat buffer of at least size_of integers."""
    tokens, rows, chunks = shape
    sizes = (4 * tokens, 2 * rows, rows, chunks, chunks + 1, chunks * width, rows * width)
    forms = ((4, tokens), (2, rows), (rows,), (chunks,), (chunks + 1,), (chunks, width), (rows, width))
    ends = np.cumsum(sizes).tolist()
    pieces = (buffer[end - size : end] for end, size in zip(ends, sizes, strict=True))
    return Inputs(*(piece.reshape(form) for piece, form in zip(pieces, forms, strict=True)))


def fill(inputs: Inputs, plan: StepPlan, block_size: int, parking: int) -> int:
    """Write a plan into the inputs of its shape; returns how many rows of `tables`, the last part, are in use.

    parking: the place that padded draws belong to.
    """
    if plan.num_tokens == len(plan.seq_ids):
        _fill_decodes(inputs, plan, block_size, parking)
        return len(plan.seq_ids)
    return _fill_mixed(inputs, plan, block_size, parking)


def _fill_decodes(inputs: Inputs, plan: StepPlan, block_size: int, parking: int) -> None:
    """Every row is one token: plain columns, since this is written in every step of decoding."""
    rows, width = plan.tables.shape
    tokens = inputs.tokens
    tokens[:, rows:] = np.array([0, 0, -1, parking], np.int32)[:, None]
    tokens[0, :rows] = plan.token_ids
    tokens[1, :rows] = plan.starts
    blocks = plan.tables[np.arange(rows), plan.starts // block_size]
    tokens[2, :rows] = blocks * block_size + plan.starts % block_size
    tokens[3, :rows] = plan.slots
    inputs.draws[1] = tokens[3]
    inputs.lengths[:rows] = plan.starts + 1
    inputs.lengths[rows:] = 0
    inputs.tables[:rows, :width] = plan.tables


def _fill_mixed(inputs: Inputs, plan: StepPlan, block_size: int, parking: int) -> int:
    lengths, width = plan.lengths.astype(np.int64), plan.tables.shape[1]
    single = lengths == 1
    order = np.concatenate([np.flatnonzero(single), np.flatnonzero(~single)])  # rows, decodes first
    decodes, chunks = int(single.sum()), len(lengths) - int(single.sum())
    sizes = lengths[order]
    ends = np.cumsum(sizes)
    row_of = np.repeat(order, sizes)
    within = np.arange(plan.num_tokens) - np.repeat(ends - sizes, sizes)
    source = (np.cumsum(lengths) - lengths)[row_of] + within
    position = plan.starts[row_of] + within
    count = plan.num_tokens
    tokens = inputs.tokens
    tokens[:, count:] = np.array([0, 0, -1, parking], np.int32)[:, None]
    tokens[0, :count] = plan.token_ids[source]
    tokens[1, :count] = position
    tokens[2, :count] = plan.tables[row_of, position // block_size] * block_size + position % block_size
    tokens[3, :count] = plan.slots[row_of]
    last = np.empty(len(order), np.int64)
    last[order] = ends - 1
    draws = len(plan.draw_rows)
    inputs.draws[:, draws:] = np.array([0, parking], np.int32)[:, None]
    inputs.draws[0, :draws] = last[plan.draw_rows]
    inputs.draws[1, :draws] = plan.draw_slots
    context = (plan.starts + plan.lengths)[order]
    inputs.lengths[:decodes] = context[:decodes]
    inputs.lengths[decodes:] = 0
    inputs.chunk_lengths[:chunks] = context[decodes:]
    inputs.chunk_lengths[chunks:] = 0
    inputs.chunk_starts[:chunks] = (ends - sizes)[decodes:]
    inputs.chunk_starts[chunks:] = count
    inputs.chunk_tables[:chunks, :width] = plan.tables[order[decodes:]]
    inputs.tables[:decodes, :width] = plan.tables[order[:decodes]]
    return decodes
