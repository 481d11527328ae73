"""Which block of the map lies where: zoom levels, blocks a row, rows of the pool, cells of a block."""

from __future__ import annotations

from enum import IntEnum
from functools import lru_cache

from minipaged.trace.snapshot import Pool
from minipaged.tui.view import View

GAP = 2  # cells between blocks that show their slots
WIDEST_SLOT, READABLE = 9, 5  # cells of a token's word
LARGEST_TILE = 3


class Zoom(IntEnum):
    """How much of a block is shown."""

    HEAT = 0  # a cell for many blocks
    HALF = 1  # two blocks a cell
    CELL = 2  # one cell a block
    FOUR = 3  # owner, count, fill, mark
    SLOTS = 4  # a word a token


TITLES = ("heat", "1:2", "1:1", "4:1", "slots")


class MapLayout:
    """A pool's place in a room of so many cells, at a zoom level."""

    def __init__(self, view: View, *, host: bool = False) -> None:
        self.view = view
        self.host = host
        self.zoom = Zoom.CELL
        self.width, self.height = 40, 10

    @property
    def pool(self) -> Pool:
        """The pool shown."""
        return self.view.snapshot.host if self.host else self.view.snapshot.device

    @property
    def num_blocks(self) -> int:
        """Blocks in the pool."""
        return len(self.pool)

    @property
    def gutter(self) -> int:
        """Cells of the block number at a row's start."""
        return len(str(max(0, self.num_blocks - 1))) + 1

    @property
    def columns(self) -> int:
        """Cells of a row beside its number."""
        return max(1, self.width - self.gutter)

    @property
    def per_cell(self) -> int:
        """Blocks that a heat cell stands for, so that the pool fits the view."""
        return max(1, -(-self.num_blocks // (self._rounded(self.columns) * max(1, self.height))))

    @property
    def per_row(self) -> int:
        """Blocks in a row."""
        if self.zoom == Zoom.HEAT:
            return self._rounded(self.columns) * self.per_cell
        if self.zoom == Zoom.HALF:
            return 2 * self._rounded(self.columns)
        if self.zoom == Zoom.CELL:
            return self._rounded(self.columns)
        if self.zoom == Zoom.FOUR:
            return self._in_a_row(self._tile)
        return max(1, (self.width + GAP) // self._slot_cells)

    @staticmethod
    def _rounded(columns: int) -> int:
        """A round number of blocks a row, so that a block can be found by counting, where that costs little room."""
        for step in (10, 8, 4):
            if columns >= step and columns % step <= columns // 8:
                return columns - columns % step
        return columns

    @property
    def _tile(self) -> int:
        """How large four cells a block are drawn where there is room: 0 a line; n: 5n - 1 cells and n lines of bar below the first."""
        for size in range(LARGEST_TILE, 0, -1):
            if (size + 1) * -(-self.num_blocks // self._in_a_row(size)) <= self.height:
                return size
        return 0

    @property
    def _tile_cells(self) -> int:
        return 5 * max(1, self._tile) - 1

    def _in_a_row(self, tile: int) -> int:
        return self._rounded(max(1, self.columns // (5 * max(1, tile))))

    @property
    def slot_width(self) -> int:
        """Cells a slot: as many as leave the whole pool in view, but never fewer than a word needs to be made out."""
        return _widest_slot(self.num_blocks, self.width + GAP, self.height, self._cells_of(0), self._block_size)

    def _cells_of(self, slot_width: int) -> int:
        """Cells of a block: number, owner and count, its slots, and the gap to the next."""
        return self._head + self._block_size * (slot_width + 1) - 1 + GAP

    @property
    def _block_size(self) -> int:
        return max(1, self.view.snapshot.stats.block_size)

    @property
    def _head(self) -> int:
        return self.gutter + 3

    @property
    def _slot_cells(self) -> int:
        return self._cells_of(self.slot_width)

    @property
    def _lines_per_block(self) -> int:
        if self.zoom == Zoom.FOUR:
            return 1 + self._tile
        if self.zoom != Zoom.SLOTS:
            return 1
        return -(-self._block_size // self._slots_per_line)

    @property
    def _slots_per_line(self) -> int:
        """Slots of a block beside each other: all of them, or as many as there is room for."""
        return max(1, min(self._block_size, (self.width - self._head + 1) // (self.slot_width + 1)))

    @property
    def num_rows(self) -> int:
        """Rows of the whole pool."""
        return -(-self.num_blocks // self.per_row) * self._lines_per_block

    def row_of(self, block: int) -> int:
        """The row that shows the block."""
        return block // self.per_row * self._lines_per_block

    def block_at(self, x: int, row: int) -> int:
        """The block (the first, where a cell stands for several) at a cell; -1 beside the pool."""
        if self.zoom == Zoom.SLOTS:
            column = x // self._slot_cells if self._lines_per_block == 1 else 0
            if column >= self.per_row:
                return -1
            block = row // self._lines_per_block * self.per_row + column
        else:
            column = x - self.gutter
            if column < 0:
                return -1
            per_row = self.per_row
            if self.zoom == Zoom.FOUR:
                if column % (self._tile_cells + 1) == self._tile_cells:
                    return -1  # between two
                column //= self._tile_cells + 1
                row //= self._lines_per_block
            elif self.zoom == Zoom.HEAT:
                column *= self.per_cell
            elif self.zoom == Zoom.HALF:
                per_row //= 2
            if column >= per_row:
                return -1
            block = row * self.per_row + column
        return block if 0 <= block < self.num_blocks else -1

    def step_down(self) -> int:
        """How far below in block numbers the next row is."""
        return self.per_row // 2 if self.zoom == Zoom.HALF else self.per_row


@lru_cache(maxsize=64)
def _widest_slot(num_blocks: int, width: int, height: int, least: int, block_size: int) -> int:
    """Cells of a slot at which all blocks are in view, or READABLE. least: cells of a block whose slots have none."""
    for slot in range(WIDEST_SLOT, READABLE, -1):
        per_row = width // (least + slot * block_size)
        if per_row and -(-num_blocks // per_row) <= height:
            return slot
    return READABLE
