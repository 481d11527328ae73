"""Heavy hitters (H2O, Zhang et al., 2023): each KV head keeps the tokens that were attended to most, and those that came last.

A token's score is the sum of the attention that it was given so far: of the probabilities that the queries of its KV head's group, at all
positions from its own on, had for it. It stands beside the token's keys and values, in the same slot, with the token's position. A layer
attends first, over everything that its slots hold; then `keep_heaviest` adds the new probabilities, and where a sequence has more tokens
than it may keep, those with the lowest scores go, except for the newest. What stays moves into the slots of what went, so that it fills the
first slots of the sequence's blocks. Keys stay rotated for their true positions.

The paper keeps a set for each head of each layer; here heads that share keys and values share the set. Steps of decodes alone
have Triton kernels on a GPU (heavy_hitters_triton.py); prompts, and what is decoded beside them, take the torch form everywhere.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from minipaged.kernels.attention.decode import GATHER_BYTES, row_batches
from minipaged.kernels.cache.quantize import Scales, dequantize, movable
from minipaged.kernels.checks import check_integers, shape_of
from minipaged.kernels.dispatch import use_triton

QUERY_TILE = 128  # of a chunk, at a time: their probabilities for all keys are held in memory


class Marks(NamedTuple):
    """What is known of the token in each slot, for each KV head: [num_blocks, kv_heads, block_size] both."""

    scores: Tensor  # float32: the attention that it was given
    positions: Tensor  # int32: where it stands in its sequence


class Budget(NamedTuple):
    """heavy + recent tokens are seen by a query, itself included. So `most` stay when it has been computed, the last recent - 1 always."""

    heavy: int
    recent: int

    @property
    def most(self) -> int:
        """Tokens that stay."""
        return self.heavy + self.recent - 1


def keep_heaviest(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    marks: Marks,
    block_tables: Tensor,
    context_lens: Tensor,
    query_starts: Tensor | None,
    positions: Tensor,
    drawn_from: Tensor | None,
    budget: Budget,
    softmax_scale: float,
    *,
    scales: Scales | None = None,
    check: bool = True,
) -> None:
    """Add the attention of the step's queries to the scores of what they saw; where a row is drawn from, drop what is beyond the budget.

    query, key_cache, value_cache, block_tables [B, width], context_lens, softmax_scale, scales: as paged_decode and paged_prefill have just
    had them. query_starts: int32 [B + 1], of chunks; None: each row is one query. positions: int32 [T], of the queries in their
    sequences; the tokens that these belong to are the last ones of their rows, and get their position and their first score here.
    drawn_from: bool [B], whether a row's tokens may go; None: all rows' may, and no row of one query sees more than heavy + recent tokens.
    A row of length 0 is padding.

    What stays of a row is in its first budget.most slots afterwards: those with the highest scores, and the last budget.recent - 1. At
    equal scores the oldest goes. Reads sum(context_lens) * kv_heads * head_dim elements of keys, and 8 bytes of marks for each head_dim of
    them, writes 4; and moves a token of each row and head. ValueError on shapes, dtypes or devices that do not fit, unless check is False.
    """
    if check:
        check_marks(marks, key_cache, budget)
        check_integers("positions", positions, torch.int32, query.shape[0], query.device)
        if drawn_from is not None and drawn_from.shape != context_lens.shape:
            raise ValueError(f"drawn_from has shape {shape_of(drawn_from)}; it must be {shape_of(context_lens)}")
    if query_starts is None:
        # Torch reads lengths on the host, so it has no place in a captured step: there all rows draw, and let go of one token at most.
        if drawn_from is None and use_triton(query):
            from minipaged.kernels.attention.heavy_hitters_triton import keep_heaviest_triton

            keep_heaviest_triton(
                *(query, key_cache, value_cache, marks, block_tables, context_lens, positions, budget, softmax_scale),
                scales=scales,
            )
            return
        keep_heaviest_torch(
            *(
                query,
                key_cache,
                value_cache,
                marks,
                block_tables,
                context_lens,
                positions,
                drawn_from,
                budget,
                softmax_scale,
            ),
            scales=scales,
        )
        return
    starts: list[int] = query_starts.tolist()
    lengths: list[int] = context_lens.tolist()
    for row, length in enumerate(lengths):
        start, end = starts[row], starts[row + 1]
        if start == end:
            continue
        slots = slots_of(block_tables[row : row + 1], length, marks.scores.shape)
        key = keys_of(key_cache, scales, slots, query.dtype)[0]
        given = key.new_zeros(key.shape[1::-1], dtype=torch.promote_types(key.dtype, torch.float32))
        for at in range(start, end, QUERY_TILE):
            given += attention_given(query[at : min(at + QUERY_TILE, end)], key, length - end + at, softmax_scale)
        add_scores(marks, slots, given[None], context_lens[row : row + 1], positions[start:end][None])
        if drawn_from is None or bool(drawn_from[row]):
            compact(key_cache, value_cache, scales, marks, slots, context_lens[row : row + 1], budget)


def check_marks(marks: Marks, key_cache: Tensor, budget: Budget) -> None:
    """Marks fit the cache, and the budget keeps something."""
    num_blocks, block_size, kv_heads, _ = key_cache.shape
    for name, mark, dtype in zip(marks._fields, marks, (torch.float32, torch.int32), strict=True):
        if mark.shape != (num_blocks, kv_heads, block_size) or mark.dtype != dtype or mark.device != key_cache.device:
            raise ValueError(
                f"{name} are {mark.dtype} {shape_of(mark)} on {mark.device}; they must be {dtype} "
                f"[{num_blocks}, {kv_heads}, {block_size}] on {key_cache.device}"
            )
        if not mark.is_contiguous():
            raise ValueError(f"{name} must be contiguous")
    if budget.heavy < 1 or budget.recent < 1:
        raise ValueError(f"the budget is {budget.heavy} + {budget.recent} tokens; both must be at least 1")


def keep_heaviest_torch(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    marks: Marks,
    block_tables: Tensor,
    context_lens: Tensor,
    positions: Tensor,
    drawn_from: Tensor | None,
    budget: Budget,
    softmax_scale: float,
    *,
    scales: Scales | None = None,
) -> None:
    """keep_heaviest for rows of one query, those of similar length together."""
    lengths: list[int] = context_lens.tolist()
    block_bytes = key_cache[0].numel() * 4
    for row_list, _ in row_batches(lengths, max(1, GATHER_BYTES // block_bytes * key_cache.shape[1])):
        rows = torch.tensor(row_list, device=query.device)
        length = context_lens.index_select(0, rows)
        slots = slots_of(block_tables.index_select(0, rows), lengths[row_list[0]], marks.scores.shape)
        key = keys_of(key_cache, scales, slots, query.dtype)
        seen = torch.arange(slots.shape[-1], device=query.device) < length[:, None]
        key = key.masked_fill(~seen[:, :, None, None], 0)  # what nobody wrote may be NaN
        given = probabilities(query.index_select(0, rows)[:, None], key, seen[:, None, None, None], softmax_scale).sum(
            dim=(2, 3)
        )
        add_scores(marks, slots, given, length, positions.index_select(0, rows)[:, None])
        if drawn_from is not None:
            chosen = drawn_from.index_select(0, rows)
            slots, length = slots[chosen], length[chosen]
        compact(key_cache, value_cache, scales, marks, slots, length, budget)


def slots_of(block_tables: Tensor, width: int, shape: torch.Size) -> Tensor:
    """Where the first `width` slots of rows have their marks, int64 [rows, kv_heads, width]: numbers in marks of that shape, flattened."""
    _, kv_heads, block_size = shape
    at = torch.arange(width, device=block_tables.device)
    blocks = block_tables[:, at // block_size].long()
    heads = torch.arange(kv_heads, device=block_tables.device)[:, None]
    return (blocks[:, None] * kv_heads + heads) * block_size + at % block_size


def _by_slot(cache: Tensor, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(block, slot in it, KV head) of numbers that slots_of gave: an index of the cache."""
    block_size, kv_heads = cache.shape[1:3]
    return slots // (kv_heads * block_size), slots % block_size, slots // block_size % kv_heads


def keys_of(key_cache: Tensor, scales: Scales | None, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """The keys in these slots as `dtype`, [rows, width, kv_heads, head_dim]."""
    found = movable(key_cache)[_by_slot(key_cache, slots)].view(key_cache.dtype)
    if scales is not None:
        found = dequantize(found, scales[0].flatten()[slots], dtype)
    return found.transpose(1, 2)


def probabilities(query: Tensor, key: Tensor, seen: Tensor, softmax_scale: float) -> Tensor:
    """Softmax of softmax_scale * query . key over the keys that are seen, [rows, kv_heads, group, queries, keys], in float32 at least.

    query: [rows, queries, heads, head_dim]; key: [rows, keys, kv_heads, head_dim]; seen: bool, broadcast to the result.
    """
    rows, queries, heads, head_dim = query.shape
    wide, kv_heads = torch.promote_types(query.dtype, torch.float32), key.shape[2]
    grouped = query.view(rows, queries, kv_heads, heads // kv_heads, head_dim).to(wide)
    scores = torch.einsum("rqhgd,rkhd->rhgqk", grouped, key.to(wide)) * softmax_scale
    return scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)


def attention_given(query: Tensor, key: Tensor, first: int, softmax_scale: float) -> Tensor:
    """What the queries [queries, heads, head_dim] of places from `first` on give to each key [keys, kv_heads, head_dim] up to their own:
    [kv_heads, keys]."""
    at = torch.arange(key.shape[0], device=key.device)
    seen = at <= torch.arange(first, first + query.shape[0], device=key.device)[:, None]
    return probabilities(query[None], key[None], seen, softmax_scale).sum(dim=(0, 2, 3))


def add_scores(marks: Marks, slots: Tensor, given: Tensor, lengths: Tensor, positions: Tensor) -> None:
    """Add to the scores of rows of these lengths what was given, [rows, kv_heads, width]. The last tokens of each row are new: they get the
    positions [rows, new], and their first score."""
    at, new = torch.arange(slots.shape[-1], device=slots.device), positions.shape[1]
    first_new = lengths[:, None] - new
    valid = (at < lengths[:, None])[:, None].expand_as(slots)
    is_new = (at >= first_new)[:, None].expand_as(slots)
    scores, kept = marks.scores.view(-1), marks.positions.view(-1)
    before = scores[slots].masked_fill(is_new, 0)
    scores[slots[valid]] = (before + given)[valid].float()
    which = (at - first_new).clamp(0, new - 1)
    placed = positions.gather(1, which)[:, None].expand_as(slots)
    write = valid & is_new
    kept[slots[write]] = placed[write].to(kept.dtype)


def dropped(scores: Tensor, positions: Tensor, lengths: Tensor, budget: Budget) -> Tensor:
    """Which tokens go, bool as scores: of rows with more than budget.most tokens, as many as there are too many.

    scores, positions: [rows, kv_heads, width], each row's first lengths[row] entries in use. The lowest scores go, at equal ones the oldest
    token; the newest budget.recent - 1 stay.
    """
    used = (torch.arange(scores.shape[-1], device=scores.device) < lengths[:, None])[:, None]
    newest = positions.masked_fill(~used, -1).amax(dim=-1, keepdim=True)
    stays = ~used | (positions > newest - (budget.recent - 1))
    by_age = positions.argsort(dim=-1, stable=True)
    of_age = scores.masked_fill(stays, torch.inf).gather(-1, by_age)
    order = by_age.gather(-1, of_age.argsort(dim=-1, stable=True))
    count = (lengths - budget.most).clamp(min=0)[:, None, None]
    first = torch.arange(scores.shape[-1], device=scores.device) < count
    return torch.zeros_like(used.expand_as(scores)).scatter(-1, order, first.expand_as(order))


def compact(
    key_cache: Tensor,
    value_cache: Tensor,
    scales: Scales | None,
    marks: Marks,
    slots: Tensor,
    lengths: Tensor,
    budget: Budget,
) -> None:
    """Drop what is beyond the budget, and move what stays of the slots behind it into those that this leaves."""
    chosen = lengths > budget.most
    if not bool(chosen.any()):
        return
    slots, lengths = slots[chosen], lengths[chosen]
    gone = dropped(marks.scores.view(-1)[slots], marks.positions.view(-1)[slots], lengths, budget)
    at = torch.arange(slots.shape[-1], device=slots.device)
    inside = at < budget.most
    # As many go from the first slots of a row and head as stay behind them, and both stand in the same order.
    to, come = slots[gone & inside], slots[~gone & ~inside & (at < lengths[:, None])[:, None]]
    for cache in (key_cache, value_cache):
        moved = movable(cache)
        moved[_by_slot(cache, to)] = moved[_by_slot(cache, come)]
    for mark in (*(scales or ()), *marks):
        flat = mark.view(-1)
        flat[to] = flat[come]
