"""What decodes with a common beginning share: which rows, and how much, as tensors that a kernel reads.

Sixteen questions behind one system prompt, or the samples of one request, have the same blocks at the front of their tables. Attention
may then read those pages once for many rows, instead of once for each: their queries become the rows of one product. It is the same
attention: the part over the common pages and the part over a row's own are joined as the chunks of a split row are.
Source: Hydragen (Juravsky et al., 2024); "cascade inference" in FlashInfer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

TILE_ROWS = (
    16  # rows that read common pages together: with one head a group, the fewest rows of a tensor core's product
)


class SharedPrefixes(NamedTuple):
    """Tiles of rows whose block tables begin alike. A row is in one tile at most."""

    rows: Tensor  # int32 [tiles, TILE_ROWS]: rows of the batch, those that are there first, then -1
    tile_tokens: Tensor  # int32 [tiles]: leading tokens that all rows of the tile share; 0: the tile is not used
    row_tokens: Tensor  # int32 [B]: the same for each row, below its context's length; 0: it is in no tile


def tiles_of(groups: Sequence[tuple[list[int], int]], num_rows: int) -> tuple[list[list[int]], list[int], list[int]]:
    """SharedPrefixes' three columns as lists, of groups of rows (the rows, their common leading tokens)."""
    tiles, tile_tokens, row_tokens = [], [], [0] * num_rows
    for rows, tokens in groups:
        for start in range(0, len(rows), TILE_ROWS):
            tile = rows[start : start + TILE_ROWS]
            tiles.append(tile + [-1] * (TILE_ROWS - len(tile)))
            tile_tokens.append(tokens)
            for row in tile:
                row_tokens[row] = tokens
    return tiles, tile_tokens, row_tokens
