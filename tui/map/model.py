"""The block map without a screen: each row as segments.

Rows are made of runs of equal looks, and a run's segment is cached by (look, length): what changes is a row, not a cell.
"""

from __future__ import annotations

import numpy as np
from rich.cells import set_cell_size
from rich.segment import Segment
from rich.style import Style

from minipaged.text.safe import clean_bytes
from minipaged.trace.words import NUM_HUES, NUM_LOOKS
from minipaged.tui.map.cells import (
    CACHED,
    FAINT_SHARED,
    FREE,
    LONGEST,
    STYLE_BITS,
    STYLES,
    Ints,
    Labels,
    Looks,
    heat_codes,
    runs,
)
from minipaged.tui.map.layout import GAP, MapLayout, Zoom
from minipaged.tui.palette import Glyphs
from minipaged.tui.view import View
from minipaged.tui.words.cells import to_ascii

SELECT = len(STYLES)
NAMES = (*STYLES, "select")
# Two blocks in a cell: what stands for (upper, lower).
_FREE, _CACHED, _HELD, _SHARED = range(4)
HALVES = {
    (_CACHED, _FREE): "▘",
    (_FREE, _CACHED): "▖",
    (_CACHED, _CACHED): "▌",
    (_HELD, _FREE): "▀",
    (_FREE, _HELD): "▄",
    (_HELD, _HELD): "█",
    (_HELD, _CACHED): "▛",
    (_CACHED, _HELD): "▙",
    (_SHARED, _SHARED): "2",
    **{(_SHARED, other): "²" for other in (_FREE, _CACHED, _HELD)},
    **{(other, _SHARED): "₂" for other in (_FREE, _CACHED, _HELD)},
}
HALVES_ASCII = {
    pair: "2"
    if max(pair) == _SHARED
    else "c"
    if max(pair) == _CACHED
    else {"▀": '"', "▛": '"', "▄": ",", "▙": ","}.get(mark, "#")
    for pair, mark in HALVES.items()
}


class MapModel(MapLayout):
    """A pool's rows at a zoom level and width."""

    def __init__(self, view: View, *, host: bool = False) -> None:
        super().__init__(view, host=host)
        self.looks = Looks(view.glyphs)
        self._labels = Labels(view.snapshot, view.other_looks)
        self.base = Style()
        self._segments: dict[int, Segment] = {}  # by code * LONGEST + length
        self._pieces: dict[tuple[str, str], Segment] = {}  # by text and role
        self._rows: dict[int, list[Segment]] = {}
        self._heat: Ints | None = None
        self._many: tuple[int, Ints] | None = (
            None  # a screen's first block and the looks of all its blocks, while rows are made anew
        )
        self._index_of: dict[int, tuple[int, int]] | None = None
        self._look_key: tuple[object, ...] = ()
        self.update(view, None)

    def resize(self, width: int, height: int) -> None:
        """The room there is."""
        if (width, height) != (self.width, self.height):
            self.width, self.height = width, height
            self._forget()

    def set_zoom(self, zoom: Zoom) -> None:
        """Look closer or from farther away."""
        self.zoom = zoom
        self._forget()

    # State.

    def update(self, view: View, ids: Ints | None) -> set[int] | None:
        """Show this view; only the blocks `ids` differ from the last one, or any if None. Returns the rows to paint; None: all."""
        key = (
            view.glyphs,
            view.mode,
            view.only,
            view.flash,
            view.other_looks,
            len(view.snapshot.host if self.host else view.snapshot.device),
        )
        old_block, old = self.view.block, self._look_key
        self.view, self._look_key, self._index_of = view, key, None
        if key != old:
            ids = None
            self._segments.clear()
            self._pieces.clear()
            self.looks = Looks(view.glyphs)
        self._labels = Labels(view.snapshot, view.other_looks)
        if ids is None:
            self._heat = None
            self._rows.clear()
            self._many = None
            return None
        self._many = None
        dirty = set(np.unique(ids // self.per_row).tolist()) if self.zoom != Zoom.HEAT else self._warm(ids)
        if old_block != view.block and not self.host:
            dirty |= {block // self.per_row for block in (old_block, view.block) if block >= 0}
        lines = self._lines_per_block
        if lines > 1:
            dirty = {row * lines + part for row in dirty for part in range(lines)}
        for row in dirty:
            self._rows.pop(row, None)
        return dirty

    def _warm(self, ids: Ints) -> set[int]:
        """The heat of the cells in which these blocks lie, anew; the rows that look different."""
        heat, per_cell = self._heat, self.per_cell
        if heat is None:
            return set(range(self.num_rows))
        cells = np.unique(ids // per_cell)
        codes = heat_codes(self.looks, self.pool, self._labels, per_cell, cells)
        changed = cells[heat[cells] != codes]
        heat[cells] = codes
        return set(np.unique(changed // (self.per_row // per_cell)).tolist())

    def _forget(self) -> None:
        self._rows.clear()
        self._segments.clear()
        self._pieces.clear()
        self._heat = self._many = None

    # Rows.

    def row(self, row: int) -> list[Segment]:
        """The segments of a row."""
        found = self._rows.get(row)
        if found is None:
            found = self._rows[row] = self._make_row(row)
        return found

    def cells(self, row: int) -> int | None:
        """How many cells a row's segments take, where that is known without measuring them."""
        if self.zoom not in (Zoom.HEAT, Zoom.HALF, Zoom.CELL):
            return None
        left = self.num_blocks - row * self.per_row
        if left <= 0:
            return 0
        if self.zoom == Zoom.HALF:
            return self.gutter + self.per_row // 2
        shown = min(left, self.per_row)
        return self.gutter + (shown if self.zoom == Zoom.CELL else -(-shown // self.per_cell))

    def _make_row(self, row: int) -> list[Segment]:
        if not 0 <= row < self.num_rows:
            return []
        if self.zoom == Zoom.SLOTS:
            return self._slots_row(row)
        row, part = divmod(row, self._lines_per_block)
        first = row * self.per_row
        number = Segment(f"{'' if part else first:>{self.gutter - 1}} ", self.base + self.view.style("faint"))
        if self.zoom == Zoom.HEAT:
            if self._heat is None:
                self._heat = heat_codes(self.looks, self.pool, self._labels, self.per_cell)
            cells = self.per_row // self.per_cell
            codes = self._heat[row * cells : (row + 1) * cells]
            marked = (self.view.block - first) // self.per_cell
        else:
            codes = self._row_codes(first, min(first + self.per_row, self.num_blocks))
            marked = self.view.block - first
            if self.zoom == Zoom.FOUR:
                return [number, *(self._tile_bars(first, codes) if part else self._four(first, codes))]
            if self.zoom == Zoom.HALF:
                return [number, *self._half(first, codes)]
        if not self.host and 0 <= marked < len(codes) and self.view.block >= 0:
            codes = codes.copy()
            codes[marked] = codes[marked] // STYLE_BITS * STYLE_BITS + SELECT
        made = self._segments
        return [number, *[made[key] if key in made else self._segment(key) for key in runs(codes)]]

    def _row_codes(self, first: int, end: int) -> Ints:
        """The looks of a row's blocks. The first row that is asked for after a view of which all is new finds those of a whole screen."""
        if self._many is None:
            if self._rows:
                return self._codes(first, end)
            self._many = first, self._codes(first, first + self.per_row * self.height)
        start, codes = self._many
        if not start <= first <= end <= start + len(codes):
            return self._codes(first, end)
        return codes[first - start : end - start]

    def _codes(self, first: int, end: int) -> Ints:
        """The looks of blocks [first, end)."""
        view = self.view
        size = view.snapshot.stats.block_size
        return self.looks.codes(self.pool, slice(first, end), self._labels, size, only=view.only, swapped=self.host)

    def _segment(self, key: int) -> Segment:
        """A run of equal looks, made once."""
        code, length = divmod(key, LONGEST)
        glyph = self.looks.alphabet[code // STYLE_BITS]
        style = self.base + self.view.style(NAMES[code % STYLE_BITS])
        found = self._segments[key] = Segment(glyph * length, style)
        return found

    def _tile_bars(self, first: int, codes: Ints) -> list[Segment]:
        """The lower lines of tiles: how many of a block's slots are written, to an eighth of a cell."""
        view, pool = self.view, self.pool
        size, cells = max(1, view.snapshot.stats.block_size), self._tile_cells
        made, gap = [], self._piece(" ", "text")
        for block, code in enumerate(codes.tolist(), start=first):
            role = NAMES[code % STYLE_BITS].replace("shared", "hue")
            if pool.refs[block]:
                role = "mark" if block in view.flash else role
                text = _fill_bar(int(pool.fill[block]), size, cells, view.glyphs, tinted=_tinted(role))
            else:
                text = self.looks.alphabet[code // STYLE_BITS] * cells
            made += [self._piece(text, role), gap]
        return made

    def _piece(self, text: str, role: str) -> Segment:
        """A text in a role's look, made once: few of them differ in a map of blocks."""
        found = self._pieces.get((text, role))
        if found is None:
            found = self._pieces[text, role] = Segment(text, self.base + self.view.style(role))
        return found

    def _four(self, first: int, codes: Ints) -> list[Segment]:
        """`A2▆◆`: owner, count, how full, copied now. As the upper line of tiles the fill is a number, or left to the bar below."""
        view, pool, glyphs = self.view, self.pool, self.view.glyphs
        size, cells, tile = max(1, view.snapshot.stats.block_size), self._tile_cells, self._tile
        piece = self._piece
        made, gap = [], piece(" ", "text")
        part = slice(first, first + len(codes))
        columns = (codes, pool.refs[part], pool.fill[part], pool.owner[part])
        for block, (code, refs, fill, owner) in enumerate(zip(*(c.tolist() for c in columns), strict=True), first):
            state = self.looks.alphabet[code // STYLE_BITS]
            if refs:
                level = glyphs.heat[-1] if fill >= size else view.fill_glyph(fill) if fill else glyphs.free
                copied = glyphs.copied if state == glyphs.copied else " "
                head = f"{view.letter(owner)}{min(refs, 9)}"
                rest = (
                    f"{level}{copied}"
                    if not tile
                    else f"{copied}{f'{fill}/{size}' if tile > 1 and fill < size else ''}"
                )
            else:
                head, rest = state * 2, state * (cells - 2)
            role = "select" if block == view.block and not self.host else NAMES[code % STYLE_BITS]
            role = "mark" if block in view.flash else role
            plain = role.replace("shared", "hue")
            made += [piece(head, role), piece(f"{rest:<{cells - 2}.{cells - 2}}", plain), gap]
        return made

    def _half(self, first: int, codes: Ints) -> list[Segment]:
        half = self.per_row // 2
        styles = np.full(self.per_row, FREE, np.int32)
        styles[: len(codes)] = codes % STYLE_BITS
        if not self.host and first <= self.view.block < first + len(codes):
            styles[self.view.block - first] = SELECT
        keys = runs(styles[:half] * STYLE_BITS + styles[half:])
        made = self._segments
        return [made[key] if key in made else self._pair(key) for key in keys]

    def _pair(self, key: int) -> Segment:
        """A run of two equal looks above each other, made once."""
        code, length = divmod(key, LONGEST)
        found = self._segments[key] = self._two(*divmod(code, STYLE_BITS), length)
        return found

    def _two(self, upper: int, lower: int, length: int) -> Segment:
        """Two blocks in a cell: a held one is half of it, a cached one a quarter, and a shared one a number on its half.

        Where a number stands, the ground tells whether the other block is in use too.
        """
        view = self.view
        over, under = (
            Style(color=found.color, dim=found.dim, underline=found.underline)
            for found in (view.style(NAMES[n].replace("shared", "hue")) for n in (upper, lower))
        )
        pair = (_kind(upper), _kind(lower))
        mark = (HALVES_ASCII if view.glyphs.ascii else HALVES).get(pair, view.glyphs.free)
        owners = [look for look, kind in ((over, pair[0]), (under, pair[1])) if kind == max(pair)]
        style = self.base + owners[0]
        if max(pair) == _SHARED:
            style += Style(bold=True, reverse=min(pair) >= _HELD)
        elif pair == (_HELD, _HELD) and upper != lower and view.mode != "plain" and not view.glyphs.ascii:
            mark, style = "▀", style + Style(bgcolor=under.color)
        return Segment(mark * length, style)

    def _slots_row(self, row: int) -> list[Segment]:
        lines = self._lines_per_block
        first = row // lines * self.per_row
        part = row % lines
        made: list[Segment] = []
        width = self.slot_width
        codes = self._row_codes(first, min(first + self.per_row, self.num_blocks))
        for block, code in enumerate(codes.tolist(), start=first):
            if made:
                made.append(Segment(" " * GAP, self.base))
            made += self._slots(block, code, part, lines, width)
        return made

    def _slots(self, block: int, code: int, part: int, lines: int, width: int) -> list[Segment]:
        """`31 B2 it never sleeps ·`: number, owner and count, and what lies in each slot."""
        view, pool = self.view, self.pool
        size = max(1, view.snapshot.stats.block_size)
        role, refs = NAMES[code % STYLE_BITS], int(pool.refs[block])
        role = "mark" if block in view.flash else role
        plain_role = role.replace("shared", "hue")
        owner = f"{view.letter(int(pool.owner[block]))}{min(refs, 9)}" if refs else "  "
        each = self._slots_per_line if lines > 1 else size
        text = " ".join(self._slot_text(block, code, size, width)[part * each : (part + 1) * each])
        if part:
            return [
                Segment(" " * self._head, self.base),
                Segment(to_ascii(text) if view.glyphs.ascii else text, self.base + view.style(plain_role)),
            ]
        chosen = "select" if block == view.block else "faint"
        copied = view.glyphs.copied if self.looks.alphabet[code // STYLE_BITS] == view.glyphs.copied else " "
        return [
            Segment(f"{block:>{self.gutter - 1}}", self.base + view.style(chosen)),
            Segment(copied, self.base + view.style("copied")),
            Segment(owner, self.base + view.style(role)),
            Segment(" ", self.base),
            Segment(to_ascii(text) if view.glyphs.ascii else text, self.base + view.style(plain_role)),
        ]

    def _slot_text(self, block: int, code: int, size: int, width: int) -> list[str]:
        """A slot's token, whose keys and values lie there: its first `width` cells."""
        view, pool = self.view, self.pool
        free = view.glyphs.free.ljust(width)
        if not pool.refs[block]:
            return [self.looks.alphabet[code // STYLE_BITS].ljust(width)] * size
        owner, index = self._place(block)
        state = view.snapshot.sequences.get(owner)
        fill = int(pool.fill[block])
        cells = []
        for slot in range(size):
            position = index * size + slot
            if slot >= fill or state is None or position >= len(state.token_ids):
                cells.append(free)
            else:
                cells.append(self._token_cells(state.token_ids[position], width))
        return cells

    def _place(self, block: int) -> tuple[int, int]:
        """(owner, logical index) of a block; built once a view."""
        if self._index_of is None:
            tables = self.view.snapshot.host_tables if self.host else self.view.snapshot.tables
            self._index_of = {}
            for sequence, ids in tables.items():
                for index, physical in enumerate(ids):
                    self._index_of.setdefault(physical, (sequence, index))
        return self._index_of.get(block, (-1, 0))

    def _token_cells(self, token: int, width: int) -> str:
        text = clean_bytes(self.view.token_bytes.get(token, b""))
        shown = text.strip() or ("␣" if text else "▪")
        return set_cell_size(shown, width)


def _kind(style: int) -> int:
    """What a look says of a block where two are in a cell."""
    if style in (FREE, CACHED):
        return _FREE if style == FREE else _CACHED
    return _SHARED if NUM_LOOKS <= style < 2 * NUM_LOOKS or style == FAINT_SHARED else _HELD


def _tinted(role: str) -> bool:
    """Whether the role is one of the second seven looks."""
    return role.startswith("hue") and int(role[3:]) >= NUM_HUES


def _fill_bar(fill: int, size: int, cells: int, glyphs: Glyphs, *, tinted: bool = False) -> str:
    """Cells filled from the left; coarser in the second seven looks, so that they differ without colour too."""
    if glyphs.ascii or tinted:
        mark = "=" if glyphs.ascii and tinted else "#" if glyphs.ascii else "▓"
        return (mark * -(-cells * min(fill, size) // size)).ljust(cells, glyphs.free)
    full, eighths = divmod(8 * cells * min(fill, size) // size, 8)
    return ("█" * full + ("▏▎▍▌▋▊▉"[eighths - 1] if eighths else "")).ljust(cells, glyphs.free)
