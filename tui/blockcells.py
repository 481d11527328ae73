"""The block map's state, without a screen: what each block's cell looks like, as numpy columns, and a line of them
as runs.

A look is one number: glyph * 64 + style; both are small tables, so that a pool of 100,000 blocks is two array
operations and a row is the runs of equal numbers.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from minipaged.trace.records import FLAG_CACHED, FLAG_COPIED, FLAG_NULL
from minipaged.trace.snapshot import Pool, Snapshot
from tui.palette import LETTERS, NUM_HUES, Glyphs

Ints = npt.NDArray[np.int32]

# Styles by number: 0-6 hues, 7-13 shared in a hue, then these.
FREE, CACHED, NULL, COPIED, FAINT, FAINT_SHARED = 14, 15, 16, 17, 18, 19
STYLES = (
    *(f"hue{n}" for n in range(NUM_HUES)),
    *(f"shared{n}" for n in range(NUM_HUES)),
    "free",
    "cached",
    "null",
    "copied",
    "faint",
    "faint",
)
STYLE_BITS = 64


class Looks:
    """The look of every block of a pool, kept up to date by ids."""

    def __init__(self, glyphs: Glyphs) -> None:
        heat = glyphs.heat
        fills = "".join(glyphs.filling)
        single = glyphs.free + fills + glyphs.cached + glyphs.copied + glyphs.swapped + glyphs.null + glyphs.many
        self.alphabet = single + "0123456789" + LETTERS + heat + "▀▄█"
        base = len(single)
        self._free, self._fills, self._num_fills = 0, 1, len(fills)
        self._cached = 1 + len(fills)
        self._copied, self._swapped, self._null, self._many = (self._cached + n for n in (1, 2, 3, 4))
        self._digits = base
        self._letters = base + 10
        self.heat = self._letters + len(LETTERS)
        self.num_heat = len(heat)
        self.upper, self.lower, self.full = (self.heat + len(heat) + n for n in range(3))
        self.code: npt.NDArray[np.int32] = np.zeros(0, np.int32)
        self.labels: Ints = np.zeros(0, np.int32)  # the owner's label; -1: nobody

    def update(
        self, pool: Pool, snapshot: Snapshot, ids: Ints | None = None, *, only: int = -1, swapped: bool = False
    ) -> None:
        """Look at these blocks again, or at all. swapped: a host pool, where a held block is a swapped one."""
        if ids is None or len(self.code) != len(pool):
            self.code = np.zeros(len(pool), np.int32)
            self.labels = np.full(len(pool), -1, np.int32)
            ids = np.arange(len(pool), dtype=np.int32)
        if not len(ids):
            return
        owner, refs, fill, flags = pool.owner[ids], pool.refs[ids], pool.fill[ids], pool.flags[ids]
        label = _labels(owner, snapshot)
        size = max(1, snapshot.stats.block_size)
        held, full, shared = refs > 0, fill >= size, refs > 1
        level = np.minimum(self._num_fills - 1, fill * self._num_fills // size)
        glyph = np.where(full, self._letters + label % len(LETTERS), self._fills + level)
        glyph = np.where(shared, np.where(refs > 9, self._many, self._digits + np.minimum(refs, 9)), glyph)
        hue = label % NUM_HUES
        style = np.where(shared, NUM_HUES + hue, hue)
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
        self.code[ids] = glyph * STYLE_BITS + style
        self.labels[ids] = np.where(held, label, -1)


def _labels(owner: Ints, snapshot: Snapshot) -> Ints:
    """The label of each owner; 0 where nobody, or nobody known, owns."""
    known, where = np.unique(owner, return_inverse=True)
    sequences = snapshot.sequences
    table = np.array([sequences[seq].label if seq in sequences else 0 for seq in known.tolist()], np.int32)
    return table[where].astype(np.int32)


def runs(codes: Ints) -> list[tuple[int, int]]:
    """(code, length) of the runs of equal codes."""
    if not len(codes):
        return []
    edges = np.flatnonzero(codes[1:] != codes[:-1]) + 1
    starts = [0, *edges.tolist()]
    lengths = np.diff([*starts, len(codes)])
    return list(zip(codes[starts].tolist(), lengths.tolist(), strict=True))


def heat_codes(looks: Looks, pool: Pool, per_cell: int) -> Ints:
    """One cell for `per_cell` consecutive blocks: height is the share in use, hue the owner of most of them."""
    held = pool.refs > 0
    cells = -(-len(pool) // per_cell)
    padded = np.zeros(cells * per_cell, bool)
    padded[: len(pool)] = held
    used = padded.reshape(cells, per_cell).sum(axis=1)
    level = np.where(used == 0, 0, np.maximum(1, used * (looks.num_heat - 1) // per_cell))
    labels = np.full(cells * per_cell, -1, np.int32)
    labels[: len(pool)] = looks.labels
    hues = np.where(labels >= 0, labels % NUM_HUES, -1).reshape(cells, per_cell)
    counts = np.stack([(hues == hue).sum(axis=1) for hue in range(NUM_HUES)])
    style = np.where(used > 0, counts.argmax(axis=0), FREE)
    glyph = np.where(used > 0, looks.heat + level, 0)  # 0: the free glyph
    return (glyph * STYLE_BITS + style).astype(np.int32)
