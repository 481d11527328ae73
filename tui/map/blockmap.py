"""The block map on the screen: one ScrollView with the Line API over a MapModel."""

from __future__ import annotations

from typing import ClassVar

from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Region, Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip

from minipaged.tui.map.cells import Ints
from minipaged.tui.map.layout import TITLES, Zoom
from minipaged.tui.map.model import MapModel
from minipaged.tui.view import View

WHOLE = 0.7  # share of visible rows beyond which the whole widget is painted


class BlockMap(ScrollView, can_focus=True):
    """The physical pool. Posts Picked when the cursor moves and Inspect when a block is chosen."""

    class Picked(Message):
        """The cursor is on another block."""

        def __init__(self, block: int) -> None:
            super().__init__()
            self.block = block

    class Inspect(Message):
        """A block was chosen."""

        def __init__(self, block: int) -> None:
            super().__init__()
            self.block = block

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left,h", "move(-1,0)", "left", show=False, id="map.left"),
        Binding("right,l", "move(1,0)", "right", show=False, id="map.right"),
        Binding("up,k", "move(0,-1)", "up", show=False, id="map.up"),
        Binding("down,j", "move(0,1)", "down", show=False, id="map.down"),
        Binding("enter", "inspect", "inspect", show=False, id="map.inspect"),
        Binding("plus,equals_sign", "zoom(1)", "zoom in", show=False, id="map.zoom_in"),
        Binding("minus", "zoom(-1)", "zoom out", show=False, id="map.zoom_out"),
        Binding("0", "fit", "fit", show=False, id="map.fit"),
    ]

    def __init__(self, view: View, *, host: bool = False, id: str | None = None) -> None:
        super().__init__(id=id)
        self.model = MapModel(view, host=host)
        self._base: Style | None = None  # what the style sheet says, asked once
        self._laid_out = (-1, -1)
        self._fitting = True  # until somebody zooms: as close as the whole pool stays in view
        self._screens = 2  # that it may take, a block a cell: letters say more than dots that all fit; 1 once somebody asked for all

    @property
    def zoom_title(self) -> str:
        """The zoom level's name."""
        zoom = self.model.zoom
        return f"1:{self.model.per_cell}" if zoom == Zoom.HEAT else TITLES[zoom]

    def show(self, view: View, ids: Ints | None) -> None:
        """Show this view, painting what differs. ids: the blocks that may differ from the last view; None: any."""
        dirty = self.model.update(view, ids)
        if self._laid_out != self._shape():
            self._lay_out()
            dirty = None
        top, height = self.scroll_offset.y, self.size.height
        if dirty is None:
            self.refresh()
            return
        rows = [row - top for row in dirty if 0 <= row - top < height]
        if len(rows) > WHOLE * max(1, min(height, self.model.num_rows)):
            self.refresh()
        elif rows:
            self.refresh(*(Region(0, row, self.size.width, 1) for row in rows))

    def _shape(self) -> tuple[int, int]:
        """What the layout depends on beside the room: blocks, and slots of each. The snapshot changes in place, so it is kept."""
        return self.model.num_blocks, self.model.view.snapshot.stats.block_size

    def _lay_out(self) -> None:
        self._laid_out = self._shape()
        size = self.scrollable_content_region.size
        self.model.resize(size.width, size.height)
        if self._fitting:
            self._fit()
        self.virtual_size = Size(size.width, self.model.num_rows)

    def on_resize(self, _: events.Resize) -> None:
        """New room."""
        self._lay_out()
        self.refresh()

    def notify_style_update(self) -> None:
        """Colours changed."""
        super().notify_style_update()
        self._base = None

    def render_line(self, y: int) -> Strip:
        """One row of the pool."""
        if self._base is None:
            self._base = self.model.base = self.rich_style
            self.model.set_zoom(self.model.zoom)
        if self.scrollable_content_region.width != self.model.width:
            self._lay_out()  # a scroll bar came or went
        row, width = y + self.scroll_offset.y, self.model.width
        segments, cells = self.model.row(row), self.model.cells(row)
        if cells is None or cells > width:
            return Strip(segments).adjust_cell_length(width, self._base)
        return Strip([*segments, Segment(" " * (width - cells), self._base)], width)

    def set_zoom(self, zoom: int) -> None:
        """Zoom, keeping the cursor in sight."""
        self._fitting = False
        self.model.set_zoom(Zoom(max(0, min(len(Zoom) - 1, zoom))))
        self._lay_out()
        self._reveal()
        self.refresh()

    def fit(self, *, screens: int = 2) -> None:
        """From now on the closest zoom at which all of the pool is in view."""
        self._fitting, self._screens = True, screens
        self._lay_out()
        self._reveal()
        self.refresh()

    def _fit(self) -> None:
        for zoom in (Zoom.SLOTS, Zoom.FOUR, Zoom.CELL, Zoom.HALF, Zoom.HEAT):
            self.model.set_zoom(zoom)
            room = max(1, self.model.height)
            if self.model.num_rows <= (room * self._screens if zoom == Zoom.CELL else room):
                break

    def _reveal(self) -> None:
        block = self.model.view.block
        if block < 0:
            return
        row, top, height = self.model.row_of(block), self.scroll_offset.y, self.size.height
        if row < top or row >= top + height:
            self.scroll_to(y=max(0, row - height // 2), animate=False, immediate=True)

    def action_zoom(self, by: int) -> None:
        """Closer or farther."""
        self.set_zoom(self.model.zoom + by)
        self.post_message(self.Picked(self.model.view.block))

    def action_fit(self) -> None:
        """The closest zoom that shows the whole pool, now and when the room changes."""
        self.fit(screens=1)
        self.post_message(self.Picked(self.model.view.block))

    def action_move(self, dx: int, dy: int) -> None:
        """Move the cursor."""
        block = self.model.view.block
        if block < 0:
            target = self.model.block_at(self.model.gutter, self.scroll_offset.y)
        else:
            across = self.model.per_cell if self.model.zoom == Zoom.HEAT else 1
            target = block + dx * across + dy * self.model.step_down()
        if 0 <= target < self.model.num_blocks:
            self.post_message(self.Picked(target))
            self.call_after_refresh(self._reveal)

    def action_inspect(self) -> None:
        """Choose the block under the cursor."""
        if self.model.view.block >= 0:
            self.post_message(self.Inspect(self.model.view.block))

    def on_click(self, event: events.Click) -> None:
        """Move the cursor to a cell; a second click inspects."""
        block = self.model.block_at(event.x, event.y + self.scroll_offset.y)
        if block >= 0:
            self.post_message(self.Inspect(block) if event.chain > 1 else self.Picked(block))
