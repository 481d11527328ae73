"""A step's integers: what they are, where each lies in one buffer, and how a plan is written there.

The buffer is laid out alike on the host and on the device, so a step travels in one copy; the tensors that kernels read are views of it.
A step that is launched kernel by kernel has a buffer of exactly its own shape. A captured graph is frozen for a shape, and what a step
does not fill is padding: KV slot -1, length 0, chunks without tokens, draws for the dummy slot. Table entries past a row's length are
whatever stood there before: they are never read.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from minipaged.kernels.attention.decode_shared import TILE_ROWS, SharedPrefixes, tiles_of
from minipaged.scheduling.plan import StepPlan

# Integers: each view begins at a multiple of 16 bytes, so that Triton compiles a kernel once, whatever the shape.
ALIGNED = 4


class Shape(NamedTuple):
    """How much of each kind there is room for."""

    tokens: int
    decodes: int  # rows of one token
    chunks: int  # rows of several tokens
    draws: int  # 0 also where every decode draws its own next token, as in a graph of decodes alone
    tiles: int = 0  # of decodes that share their first blocks (SharedPrefixes)


class StepInputs(NamedTuple):
    """One step, as views of one buffer: torch tensors or numpy arrays alike, int32.

    Its tokens stand in this order, whatever the plan's: first the decodes, one token each, then the chunks, one after the other.
    """

    token_ids: Any  # [tokens]; IN_FLIGHT where only the device knows it: the newest token of the batch index
    positions: Any  # [tokens] where each stands in its sequence
    slot_mapping: Any  # [tokens] the KV slot that each is written to, block * block_size + offset; -1: nowhere
    batch_indices: Any  # [tokens] whose sequence's: which of the newest tokens that the device keeps (StepPlan.slots)
    draw_tokens: Any  # [draws] the token whose logits are drawn from
    draw_indices: Any  # [draws] the batch index that the drawn token belongs to
    decode_lengths: Any  # [decodes] tokens of each context that the table holds, the new one included
    chunk_lengths: Any  # [chunks] the same, the chunk included
    chunk_starts: Any  # [chunks + 1] the first token of each chunk; the last entry is where the last chunk ends
    shared_rows: Any  # [tiles, TILE_ROWS] decodes that share their first blocks; -1: none
    shared_tile_tokens: Any  # [tiles] how many tokens those of a tile share; 0: the tile is not used
    shared_row_tokens: Any  # [decodes], or [0] without tiles: the same, of each decode
    chunk_tables: Any  # [chunks, width] physical blocks
    decode_tables: Any  # [decodes, width]; last in the buffer, so that unused rows need not be sent
    longest_chunk: int  # no chunk has more tokens
    sink_turn: Any  # float32 [tokens, head_dim]: what turns each query for attention sinks; None without them
    # bool [decodes + chunks]: of heavy hitters, whether each row is drawn from, so that tokens beyond the budget go; None: all are.
    drawn_from: Any

    @property
    def shared(self) -> SharedPrefixes | None:
        """The decodes that share their first blocks, where the shape has room for any."""
        if not len(self.shared_tile_tokens):
            return None
        return SharedPrefixes(self.shared_rows, self.shared_tile_tokens, self.shared_row_tokens)


@lru_cache(maxsize=1024)
def _layout(shape: Shape, width: int) -> tuple[tuple[int, int], ...]:
    """Where each of StepInputs' views begins and ends in the buffer. Tables have rows of `width` entries."""
    tokens, decodes, chunks, draws, tiles = shape
    shared = (tiles * TILE_ROWS, tiles, decodes if tiles else 0)
    flat = (tokens, tokens, tokens, tokens, draws, draws, decodes, chunks, chunks + 1, *shared)
    places, start = [], 0
    for size in (*flat, chunks * width, decodes * width):
        places.append((start, start + size))
        start += -(-size // ALIGNED) * ALIGNED
    return tuple(places)


def size_of(shape: Shape, width: int) -> int:
    """Integers of a buffer of this shape, with block tables of `width` entries."""
    return _layout(shape, width)[-1][1]


def views(buffer: Any, shape: Shape, width: int) -> StepInputs:
    """The inputs of a shape in a flat buffer of at least size_of integers. longest_chunk: the most that the shape allows."""
    *flat, chunk_tables, decode_tables = (buffer[start:end] for start, end in _layout(shape, width))
    tables = (chunk_tables.reshape(shape.chunks, width), decode_tables.reshape(shape.decodes, width))
    inputs = StepInputs._make((*flat, *tables, shape.tokens, None, None))
    return inputs._replace(shared_rows=inputs.shared_rows.reshape(shape.tiles, TILE_ROWS))


def inputs_of(plan: StepPlan, block_size: int, device: torch.device, *, heavy_hitters: bool = False) -> StepInputs:
    """A plan's inputs on the device, in a buffer of their own that has no padding rows; drawn_from only for heavy hitters."""
    decodes, width = int((plan.lengths == 1).sum()), plan.tables.shape[1]
    shape = Shape(len(plan.token_ids), decodes, len(plan.lengths) - decodes, len(plan.draw_rows))
    host = np.zeros(size_of(shape, width), np.int32)
    fill(views(host, shape, width), plan, block_size, dummy_slot=0)
    longest = int(plan.lengths.max()) if shape.chunks else 0
    inputs = views(to_device(host, device), shape, width)._replace(longest_chunk=longest)
    if heavy_hitters:
        order, _ = token_order(plan)
        inputs = inputs._replace(drawn_from=to_device(np.isin(order, plan.draw_rows), device))
    return inputs


def fill(
    inputs: StepInputs,
    plan: StepPlan,
    block_size: int,
    dummy_slot: int,
    groups: Sequence[tuple[list[int], int]] = (),
) -> int:
    """Write a plan into inputs that have room for it; returns how many rows of decode_tables, the last part, are in use.

    dummy_slot: the batch index of padding: what is drawn for it, nobody reads. groups: of shared_prefixes.shared_groups.
    """
    if len(inputs.shared_tile_tokens):
        rows, tile_tokens, row_tokens = tiles_of(groups, len(plan.seq_ids))
        inputs.shared_rows[: len(rows)] = rows
        _put((inputs.shared_tile_tokens, tile_tokens, 0), (inputs.shared_row_tokens, row_tokens, 0))
    if len(plan.token_ids) == len(plan.seq_ids):
        _fill_decodes(inputs, plan, block_size, dummy_slot)
        return len(plan.seq_ids)
    return _fill_mixed(inputs, plan, block_size, dummy_slot)


def _fill_decodes(inputs: StepInputs, plan: StepPlan, block_size: int, dummy_slot: int) -> None:
    """Every row is one token: plain columns, since this is written in every step of decoding."""
    rows, width = plan.tables.shape
    places = _places(plan)
    blocks = plan.tables[np.arange(rows), places // block_size]
    _put(
        (inputs.token_ids, plan.token_ids, 0),
        (inputs.positions, plan.starts, 0),
        (inputs.slot_mapping, blocks * block_size + places % block_size, -1),
        (inputs.batch_indices, plan.slots, dummy_slot),
        (inputs.decode_lengths, places + 1, 0),
    )
    inputs.decode_tables[:rows, :width] = plan.tables
    if len(inputs.draw_tokens):
        _put((inputs.draw_tokens, plan.draw_rows, 0), (inputs.draw_indices, plan.draw_slots, dummy_slot))


def _fill_mixed(inputs: StepInputs, plan: StepPlan, block_size: int, dummy_slot: int) -> int:
    order, starts = token_order(plan)
    lengths, width = plan.lengths.astype(np.int64), plan.tables.shape[1]
    decodes = int((lengths == 1).sum())
    chunks = len(order) - decodes
    row_of = np.repeat(order, lengths[order])
    within = np.arange(plan.num_tokens) - starts[row_of]
    places = _places(plan)
    place = places[row_of] + within
    slots = plan.tables[row_of, place // block_size] * block_size + place % block_size
    context = (places + plan.lengths)[order]
    _put(
        (inputs.token_ids, plan.token_ids[(np.cumsum(lengths) - lengths)[row_of] + within], 0),
        (inputs.positions, plan.starts[row_of] + within, 0),
        (inputs.slot_mapping, slots, -1),
        (inputs.batch_indices, plan.slots[row_of], dummy_slot),
        (inputs.draw_tokens, (starts + lengths - 1)[plan.draw_rows], 0),
        (inputs.draw_indices, plan.draw_slots, dummy_slot),
        (inputs.decode_lengths, context[:decodes], 0),
        (inputs.chunk_lengths, context[decodes:], 0),
        (inputs.chunk_starts, starts[order[decodes:]], plan.num_tokens),
    )
    inputs.chunk_tables[:chunks, :width] = plan.tables[order[decodes:]]
    inputs.decode_tables[:decodes, :width] = plan.tables[order[:decodes]]
    return decodes


def _places(plan: StepPlan) -> np.ndarray:
    """Where each row's first token stands in its table, [rows]: its position, less the tokens that have gone."""
    return plan.starts if plan.num_left_out is None else plan.starts - plan.num_left_out


def _put(*columns: tuple[np.ndarray, np.ndarray | list[int], int]) -> None:
    """Write each (view, column, padding): the column, and padding behind it."""
    for view, column, padding in columns:
        view[: len(column)] = column
        view[len(column) :] = padding


def to_device(array: np.ndarray, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """An array on the device, without waiting for what the device is doing: a GPU fetches it from page-locked memory in its own time."""
    host = torch.from_numpy(np.ascontiguousarray(array))
    host = host if dtype is None else host.to(dtype)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def token_order(plan: StepPlan) -> tuple[np.ndarray, np.ndarray]:
    """(rows in the order of their tokens in StepInputs, the first token of each row): int64 [rows] each."""
    order = np.argsort(plan.lengths > 1, kind="stable")
    lengths = plan.lengths[order].astype(np.int64)
    starts = np.empty(len(order), np.int64)
    starts[order] = np.cumsum(lengths) - lengths
    return order, starts
