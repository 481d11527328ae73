"""What each program of prefill_hopper works on: items of 128 rows, queries times packed heads, longest first within a section.

Loading and computing warps ask for it separately, and get the same answer.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803, N806

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

HALF = gl.constexpr(64)  # rows of a computing warpgroup: what one instruction multiplies


@gluon.jit
def work_item(turn):
    """This program's item of a turn. There and back over the programs, since items get shorter along a section."""
    programs = gl.num_programs(0)
    place = gl.program_id(0)
    return turn * programs + gl.where(turn % 2 == 0, place, programs - 1 - place)


@gluon.jit
def describe(item, work, HEADS: gl.constexpr, PACK: gl.constexpr, TILE: gl.constexpr):
    """What an item is.

    (tiles of keys, 0 if there is nothing to do; how many of them every query sees; the row's first query, its queries; the item's tile
    of them; the row's context; first head; row). Read anew each turn: carried from the turn before, the second of them came
    out as the first turn's (Triton 3.6; its loop-aware elimination of common subexpressions took the two for one).
    """
    query_starts_ptr, context_lens_ptr, num_rows, tiles, section = work
    QUERIES: gl.constexpr = 2 * HALF // PACK
    in_section = item % (section * tiles)
    pair = item // (section * tiles) * section + in_section % section
    row = pair // (HEADS // PACK)
    inside = row < num_rows
    row = gl.where(inside, row, 0)
    first_query = gl.load(query_starts_ptr + row)
    num_queries = gl.load(query_starts_ptr + row + 1) - first_query
    length = gl.load(context_lens_ptr + row)
    tile = (num_queries + QUERIES - 1) // QUERIES - 1 - in_section // section
    first = length - num_queries + tile * QUERIES  # position of the tile's first query
    high = gl.minimum(first + QUERIES, length)
    key_tiles = gl.where(inside & (tile >= 0), (high + TILE - 1) // TILE, 0)
    first_head = pair % (HEADS // PACK) * PACK
    return key_tiles, (first + 1) // TILE, first_query, num_queries, tile, length, first_head, row
