"""Attention sinks (StreamingLLM, Xiao et al., 2024): the first tokens stay, and positions are those within the cache.

A query at position i sees `count` sinks and the `window` tokens up to itself. Among these it stands at min(i, count + window - 1), so its
distance to every token of the window is the true one, and to the sinks a smaller one. Keys are rotated once, at their true positions, and
never again: since only distances count, a second query serves the sinks, the first turned back by i - min(i, count + window - 1).

So only the query is turned, by angles that the caller makes once a step; they are 0, and both queries one, while nothing is left out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from minipaged.kernels.checks import shape_of


class Sinks(NamedTuple):
    """The first `count` positions of each row are seen by every query behind them, by way of the second query."""

    count: int  # type: ignore[assignment]  # tuples have a method of the name
    turn: Tensor  # float32 [tokens, head_dim]: cosines, then sines, of the angle by which each query is turned for the sinks


def check_sinks(sinks: Sinks, query: Tensor, window: int | None) -> None:
    """A count of at least 1 with a window beside it, and an angle for each pair of dimensions of each token."""
    if window is None or sinks.count < 1:
        raise ValueError(f"sinks are {sinks.count} with window {window}; they must be at least 1, with a window")
    tokens, _, head_dim = query.shape
    turn = sinks.turn
    if turn.shape != (tokens, head_dim) or head_dim % 2 or turn.stride(1) != 1 or turn.device != query.device:
        raise ValueError(
            f"turn has shape {shape_of(turn)} on {turn.device}; it must be [{tokens}, {head_dim}], its last dimension contiguous, "
            f"even, and on {query.device}"
        )


def turned(query: Tensor, turn: Tensor) -> Tensor:
    """Queries [T, heads, head_dim], each pair (x[i], x[i + D/2]) rotated by the token's angle."""
    wide = torch.promote_types(query.dtype, torch.float32)
    cos, sin = turn.to(wide)[:, None].chunk(2, dim=-1)
    first, second = query.to(wide).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(query.dtype)


def both_queries(query: Tensor, key: Tensor, second: Tensor, is_sink: Tensor) -> tuple[Tensor, Tensor]:
    """One dot product of twice the width that is query . key, and second . key where the key is a sink's.

    query, second: [..., queries, head_dim]; key: [..., keys, head_dim]; is_sink: bool, its last dimension the keys.
    """
    hidden = is_sink[..., None]
    return torch.cat((query, second), dim=-1), torch.cat(
        (key.masked_fill(hidden, 0), key.masked_fill(~hidden, 0)), dim=-1
    )
