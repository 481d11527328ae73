"""The block map's state, without a screen: what each block's cell looks like, as numpy columns, and a line of them
as runs.

A look is one number: glyph * 64 + style; both are small tables, so that a pool of 100,000 blocks is two array
operations and a row is the runs of equal numbers.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from minipaged.trace.events import FLAG_CACHED, FLAG_COPIED, FLAG_NULL
from minipaged.trace.snapshot import Pool, Snapshot
from minipaged.trace.words import LETTERS, NUM_LOOKS
from minipaged.tui.palette import Glyphs

Ints = npt.NDArray[np.int32]

# Styles by number: the looks of owners, the same for shared blocks, then these.
FREE, CACHED, NULL, COPIED, FAINT, FAINT_SHARED = range(2 * NUM_LOOKS, 2 * NUM_LOOKS + 6)
STYLES = (
    *(f"hue{n}" for n in range(NUM_LOOKS)),
    *(f"shared{n}" for n in range(NUM_LOOKS)),
    "free",
    "cached",
    "null",
    "copied",
    "faint",
    "faint",
)
STYLE_BITS = 64
LONGEST = 1 << 16  # more cells than a run may have
_TRUE = np.ones(1, bool)


class Looks:
    """From a block's columns to its look."""

    def __init__(self, glyphs: Glyphs) -> None:
        heat = glyphs.heat
        fills = "".join(glyphs.filling)
        single = glyphs.free + fills + glyphs.cached + glyphs.copied + glyphs.swapped + glyphs.null + glyphs.many
        self.alphabet = single + "0123456789" + LETTERS + heat
        base = len(single)
        self._free, self._fills, self._num_fills = 0, 1, len(fills)
        self._cached = 1 + len(fills)
        self._copied, self._swapped, self._null, self._many = (self._cached + n for n in (1, 2, 3, 4))
        self._digits = base
        self._letters = base + 10
        self.heat = self._letters + len(LETTERS)
        self.num_heat = len(heat)

    def codes(
        self, pool: Pool, part: slice, labels: Labels, block_size: int, *, only: int = -1, swapped: bool = False
    ) -> Ints:
        """The looks of some consecutive blocks. swapped: a host pool, where a held block is a swapped one."""
        owner, refs, fill, flags = pool.owner[part], pool.refs[part], pool.fill[part], pool.flags[part]
        label, look = labels.of(owner), labels.look_of(owner)
        size = max(1, block_size)
        held, full, shared = refs > 0, fill >= size, refs > 1
        level = np.minimum(self._num_fills - 1, fill * self._num_fills // size)
        glyph = np.where(full, self._letters + label % len(LETTERS), self._fills + level)
        glyph = np.where(shared, np.where(refs > 9, self._many, self._digits + np.minimum(refs, 9)), glyph)
        style = np.where(shared, NUM_LOOKS + look, look)
        if only >= 0:
            style = np.where(owner == only, style, np.where(shared, FAINT_SHARED, FAINT))
        if swapped:
            glyph = np.full_like(glyph, self._swapped)
        cached = (flags & FLAG_CACHED) != 0
        glyph = np.where(held, glyph, np.where(cached, self._cached, self._free))
        style = np.where(held, style, np.where(cached, CACHED, FREE))
        copied = (flags & FLAG_COPIED) != 0
        null = (flags & FLAG_NULL) != 0
        glyph = np.where(copied, self._copied, np.where(null, self._null, glyph))
        style = np.where(copied, COPIED, np.where(null, NULL, style))
        return (glyph * STYLE_BITS + style).astype(np.int32)


class Labels:
    """Sequence -> label and look, as array operations. other_looks: of the sequences that have not their label's."""

    def __init__(self, snapshot: Snapshot, other_looks: Mapping[int, int]) -> None:
        known = snapshot.sequences
        self._first = min(known, default=0)
        self._table: Ints = np.zeros(max(known, default=0) - self._first + 1 if known else 1, np.int32)
        for sequence, state in known.items():
            self._table[sequence - self._first] = state.label
        self._looks: Ints = self._table % NUM_LOOKS
        for sequence, look in other_looks.items():
            self._looks[sequence - self._first] = look

    def of(self, owner: Ints) -> Ints:
        """The label of each owner; 0 where nobody, or nobody known, owns."""
        return self._table.take(owner - self._first, mode="clip")

    def look_of(self, owner: Ints) -> Ints:
        """The look of each owner."""
        return self._looks.take(owner - self._first, mode="clip")


def runs(codes: Ints) -> list[int]:
    """code * LONGEST + length of each run of equal codes."""
    if not len(codes):
        return []
    starts = np.flatnonzero(np.concatenate([_TRUE, codes[1:] != codes[:-1]]))
    lengths = np.diff(starts, append=len(codes))
    keys: list[int] = (codes[starts] * np.int64(LONGEST) + lengths).tolist()
    return keys


def heat_codes(looks: Looks, pool: Pool, labels: Labels, per_cell: int, cells: Ints | None = None) -> Ints:
    """One cell for `per_cell` consecutive blocks: height is the share in use, the look that of the owner of most of them.

    cells: only these; None: all.
    """
    if cells is None:
        count = -(-len(pool) // per_cell)
        held = np.flatnonzero(pool.refs)
        cell = held // per_cell
    else:
        count = len(cells)
        blocks = (cells[:, None] * per_cell + np.arange(per_cell)).ravel()
        places = np.flatnonzero(pool.refs.take(blocks, mode="clip") * (blocks < len(pool)))
        held, cell = blocks[places], places // per_cell
    used = np.bincount(cell, minlength=count)
    look = labels.look_of(pool.owner[held])
    counts = np.bincount(cell * NUM_LOOKS + look, minlength=count * NUM_LOOKS).reshape(count, NUM_LOOKS)
    level = np.where(used == 0, 0, np.maximum(1, used * (looks.num_heat - 1) // per_cell))
    style = np.where(used > 0, counts.argmax(axis=1), FREE)
    glyph = np.where(used > 0, looks.heat + level, 0)  # 0: the free glyph
    return (glyph * STYLE_BITS + style).astype(np.int32)
