"""A pane: a widget whose whole content is a pure function of a View and a size. Only rows that changed are painted."""

from __future__ import annotations

from typing import ClassVar

from rich.style import Style
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Region
from textual.strip import Strip
from textual.widget import Widget

from minipaged.tui.view import Line, View, strip_of


class Pane(Widget, can_focus=True):
    """Override `lines`."""

    DEFAULT_CSS = "Pane { height: 1fr; }"

    def __init__(self, view: View, *, id: str | None = None, classes: str | None = None) -> None:
        super().__init__(id=id, classes=classes)
        self.view = view
        self._lines: list[Line] | None = None
        self._strips: dict[int, Strip] = {}
        self._key: tuple[object, ...] = ()
        self._base: Style | None = None  # what the style sheet says, asked once

    def lines(self, view: View, width: int, height: int) -> list[Line]:
        """The content. Pure, so that it can be tested without an app."""
        raise NotImplementedError

    def show(self, view: View) -> None:
        """Show this view."""
        self.view = view
        if not self.is_mounted or not self.display or not self.size.width:
            self._lines = None
            return
        old, old_key = self._lines, self._key
        self._compute()
        if old is None or old_key != self._key:
            self._strips.clear()
            self.refresh()
            return
        new = self._lines or []
        rows = [y for y in range(max(len(old), len(new))) if old[y : y + 1] != new[y : y + 1]]
        for y in rows:
            self._strips.pop(y, None)
        if len(rows) > 8:
            self.refresh()
        elif rows:
            self.refresh(*(Region(0, y, self.size.width, 1) for y in rows))

    def _compute(self) -> None:
        self._key = (self.view.glyphs, self.view.mode, self.content_size)
        self._lines = self.lines(self.view, self.content_size.width, self.content_size.height)

    def on_resize(self, _: events.Resize) -> None:
        """New room."""
        self._lines = None
        self._strips.clear()
        self.refresh()

    def notify_style_update(self) -> None:
        """Colours changed."""
        super().notify_style_update()
        self._base = None
        self._strips.clear()

    def render_line(self, y: int) -> Strip:
        """One row."""
        if self._lines is None or self._key[2] != self.content_size:
            self._compute()
            self._strips.clear()
        strip = self._strips.get(y)
        if strip is None:
            lines = self._lines or []
            line = lines[y] if y < len(lines) else []
            if self._base is None:
                self._base = self.rich_style
            strip = self._strips[y] = strip_of(line, self.content_size.width, self.view, self._base)
        return strip


class ListPane(Pane):
    """A pane of one entry a sequence: up and down leave some of the first ones out."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "scroll_by(-1)", "up", show=False, id="list.up"),
        Binding("down,j", "scroll_by(1)", "down", show=False, id="list.down"),
    ]

    def __init__(self, view: View, *, id: str | None = None, classes: str | None = None) -> None:
        super().__init__(view, id=id, classes=classes)
        self.first = 0

    def count(self, view: View) -> int:
        """Entries there are."""
        raise NotImplementedError

    def action_scroll_by(self, by: int) -> None:
        """Leave out one entry more, or one less."""
        self.first = max(0, min(self.count(self.view) - 1, self.first + by))
        self.show(self.view)

    def on_mouse_scroll_down(self, _: events.MouseScrollDown) -> None:
        """The wheel does the same."""
        self.action_scroll_by(1)

    def on_mouse_scroll_up(self, _: events.MouseScrollUp) -> None:
        """And back."""
        self.action_scroll_by(-1)
