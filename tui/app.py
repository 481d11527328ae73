"""The terminal app: panes over a session, painted from a timer. The engine is never called here, only its trace is read."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

from textual import events
from textual.app import ComposeResult, SystemCommand
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.filter import ANSIToTruecolor, LineFilter
from textual.screen import Screen
from textual.theme import Theme
from textual.widget import Widget
from textual.widgets import Static

from minipaged.serving.live import LiveSource
from minipaged.trace.events import StepDelta
from minipaged.trace.snapshot import Snapshot
from minipaged.tui.actions import Actions
from minipaged.tui.map.blockmap import BlockMap
from minipaged.tui.palette import ASCII, UNICODE, Mode
from minipaged.tui.panes.bars import Caption, Gauge, Header, HostStrip, Keys, Legend, News
from minipaged.tui.panes.compare import ComparePane
from minipaged.tui.panes.dialogs import Overlay
from minipaged.tui.panes.inspector import Inspector, Journey
from minipaged.tui.panes.pane import ListPane, Pane
from minipaged.tui.panes.side import TreePane, WastePane
from minipaged.tui.panes.tables import TablesPane
from minipaged.tui.panes.text import TextPane, text_title
from minipaged.tui.panes.timeline import Timeline, timeline_title
from minipaged.tui.panes.trends import TrendsPane
from minipaged.tui.reading.history import History
from minipaged.tui.scripted.lessons import LESSONS
from minipaged.tui.session import Change, Session
from minipaged.tui.view import View, shown

FRAME_SECONDS = 1 / 30
LEAVE_SECONDS = 5.0  # after SIGTERM or SIGHUP, to give the terminal back
LEAST_SIZE = (40, 12)  # columns and rows that the screen needs to show anything
# Of one core, while an engine runs at full speed: the screen's frames become fewer before the engine becomes slower.
CPU_SHARE = 0.1 * max(1, (os.cpu_count() or 2) - 1)
THEMES = (
    Theme("minipaged", primary="#B4A5FF", background="#101010", surface="#1c1c1c", foreground="#d8d8d8", dark=True),
    Theme(
        "minipaged-light", primary="#5B3FBF", background="#ffffff", surface="#f0f0f0", foreground="#202020", dark=False
    ),
)
_PAINTED = "#header, #news, #gauge, #map, #host, #caption, #inspector, #text, #timeline, #keys"
PANE_IDS = ("blocks", "tables", "text", "timeline", "inspector", "waste", "tree", "trends")


class ScreenApp(Actions):
    """One trace on a terminal: the last station of a step on its way from the engine.

    1. `minipaged/engine.py` `Engine._emit` ends a step by `minipaged/trace/builder.py` `TraceBuilder.emit`, which makes a StepDelta.
    2. `minipaged/serving/loop.py` `sender` writes it into a pipe: the engine runs in a process of its own.
    3. `minipaged/serving/live.py` `LiveSource` receives it; a recording is read by `minipaged/trace/sources.py` `FileSource`.
    4. `minipaged/trace/player.py` `Player.advance` folds it into a `minipaged/trace/snapshot.py` `Snapshot`, the state of one moment.
    5. `frame`, called by a timer here, asks `tui/session.py` `Session.tick` for the moment to show; `paint` hands it to every pane.
    """

    CSS_PATH = "screen.tcss"
    TITLE = "minipaged"
    # What has no room yields before the map does: tables below 72 columns, text below 20 rows. Nothing fits below LEAST_SIZE.
    HORIZONTAL_BREAKPOINTS = [  # noqa: RUF012  textual declares it so
        (0, "-too-small"), (LEAST_SIZE[0], "-slim"), (72, "-narrow"), (120, "-wide"), (190, "-wider")
    ]  # fmt: skip
    VERTICAL_BREAKPOINTS = [  # noqa: RUF012
        (0, "-too-low"), (LEAST_SIZE[1], "-flat"), (20, "-low"), (34, "-tall"), (54, "-taller")
    ]  # fmt: skip
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "leave", "quit", id="quit"),
        Binding("ctrl+c", "leave", "quit", show=False, priority=True, id="quit.now"),
        Binding("ctrl+z", "suspend_process", "suspend", show=False, priority=True, id="suspend"),
        Binding("space", "play", "run or pause", id="run"),
        Binding("right_square_bracket", "step", "one step", id="step"),
        Binding("left_square_bracket", "step_back", "one step back", id="back"),
        Binding("right_curly_bracket", "event(1)", "next event", id="event.next"),
        Binding("left_curly_bracket", "event(-1)", "previous event", id="event.previous"),
        Binding("slash", "find", "find", id="find"),
        Binding("n", "again(1)", "find the next", id="find.next"),
        Binding("N", "again(-1)", "find the previous", id="find.previous"),
        Binding("g", "go_start", "start", id="start"),
        Binding("G", "go_edge", "newest", id="edge"),
        Binding("less_than_sign", "speed(-1)", "slower", id="slower"),
        Binding("greater_than_sign", "speed(1)", "faster", id="faster"),
        Binding("w", "why", "why", id="why"),
        Binding("f", "only", "dim all but one", id="only"),
        Binding("z", "maximise", "one pane alone", id="maximise"),
        Binding("a", "add", "add a prompt", id="add"),
        Binding("b", "bookmark", "bookmark", id="bookmark"),
        Binding("x", "abort", "abort the request", id="abort"),
        Binding("plus,equals_sign", "zoom(1)", "zoom in", id="zoom.in"),
        Binding("minus", "zoom(-1)", "zoom out", id="zoom.out"),
        Binding("0", "fit", "fit", id="zoom.fit"),
        Binding("B", "branch", "branch here", id="branch"),
        Binding("R", "again_all", "run all again", id="again"),
        Binding("e", "knobs", "settings", id="knobs"),
        Binding("t", "journey", "a token's journey", id="journey"),
        Binding("c", "compare", "compare", id="compare"),
        Binding("L", "lessons", "lessons", id="lessons"),
        Binding(
            "escape", "leave_lesson", "leave the pane, the comparison or the lesson", show=False, id="lesson.leave"
        ),
        Binding("question_mark,f1", "help", "help", id="help"),
        *(
            Binding(str(n + 1), f"pane('{name}')", name, show=False, id=f"pane.{name}")
            for n, name in enumerate(PANE_IDS)
        ),
    ]

    def __init__(
        self,
        session: Session,
        *,
        ascii: bool = False,
        light: bool = False,
        keymap: Mapping[str, str] | None = None,
        restart: Callable[[Mapping[str, object]], LiveSource] | None = None,
        compare: bool = False,
    ) -> None:
        """restart: ends the engine and starts another like it but for the settings it is given, for a branch. compare: begin so."""
        mode: Mode = "plain" if "NO_COLOR" in os.environ else "light" if light else "dark"
        super().__init__(ansi_color=True if mode == "plain" else None)
        self.session = session
        self.view = View(glyphs=ASCII if ascii else UNICODE, mode=mode)
        self._history = History()
        self._keymap = dict(keymap or {})
        self._restart = restart
        self._compare_first = compare
        self._next_run: dict[str, object] = {}
        self._painted: tuple[Widget, ...] = ()
        self._panes: tuple[Pane, ...] = ()  # all of the base screen's: asked once, not in each frame
        self._painted_words = ("", "", 0)
        self._before: Session | None = None  # the run that another one took the place of
        self._rest_until = 0.0
        self._used = time.process_time()
        self._outer: Session | None = None  # what a lesson stands in front of
        for theme in THEMES:
            self.register_theme(theme)
        if mode != "plain":
            self.theme = THEMES[mode == "light"].name

    def compose(self) -> ComposeResult:
        """The panes."""
        view = self.view
        yield Static(
            f"this terminal is too small: {LEAST_SIZE[0]} × {LEAST_SIZE[1]} at least", id="too-small", markup=False
        )
        yield Header(view, id="header")
        yield News(view, id="news")
        yield _titled(Caption(view, id="caption"), "Lesson")
        yield Gauge(view, id="gauge")
        with Horizontal(id="upper"):
            with Vertical(id="blocks", classes="pane") as blocks:
                blocks.border_title = "1 Blocks"
                yield BlockMap(view, id="map")
                yield HostStrip(view, id="host")
                yield Legend(view, id="legend")
            yield _titled(ComparePane(view, id="compare", classes="pane"), "Compare: the same requests elsewhere")
            yield _titled(TablesPane(view, id="tables", classes="pane"), shown("2 Tables: logical→physical", view))
            yield _titled(Inspector(view, id="inspector"), "5 Inspector")
        with Horizontal(id="middle"):
            yield _titled(TextPane(view, id="text", classes="pane"), "3 Text")
            yield _titled(WastePane(view, id="waste", classes="pane"), "6 Waste")
            yield _titled(TrendsPane(view, id="trends", classes="pane"), "8 Trends")
            yield _titled(TreePane(view, id="tree", classes="pane"), "7 Tree")
        yield _titled(Timeline(view, id="timeline", classes="pane"), "4 Timeline")
        yield Keys(view, id="keys")

    def on_mount(self) -> None:
        """Start painting."""
        self.screen.set_class(self.view.glyphs.ascii, "-ascii")
        self.set_keymap(self._keymap)
        self.query_one("#inspector").add_class("pane")
        self._painted = tuple(self.query(_PAINTED).results(Widget))
        self._panes = tuple(self.query(Pane))
        self.query_one("#map").focus()
        if self._compare_first:
            self.action_compare()
        self.paint()  # so that the first picture has the prompts and the mode
        self.theme_changed_signal.subscribe(self, self._follow_theme)
        self.set_interval(FRAME_SECONDS, self.frame)
        if not self.is_headless:
            for number in (signal.SIGTERM, signal.SIGHUP):
                asyncio.get_running_loop().add_signal_handler(number, self._end_by_signal, number)

    def _end_by_signal(self, number: int) -> None:
        """Leave in good order, so that the terminal is as it was before. The code is 128 + the signal's number, as a shell has it."""
        # Where the terminal itself is gone, Textual may wait for ever to write its farewell. The engine ends when its pipe does.
        overdue = threading.Timer(LEAVE_SECONDS, os._exit, (128 + number,))
        overdue.daemon = True
        overdue.start()
        self.exit(128 + number)

    def _follow_theme(self, theme: Theme) -> None:
        """Another theme was chosen: dark hues on dark, light ones on light."""
        if self.view.mode != "plain":
            self.view = replace(self.view, mode="dark" if theme.dark else "light")
            self.paint()

    def get_system_commands(self, screen: Screen[Any]) -> Iterable[SystemCommand]:
        """The command palette: every key's action by name, the lessons, and Textual's own."""
        yield from super().get_system_commands(screen)
        for binding in self.BINDINGS:
            if isinstance(binding, Binding) and binding.id not in ("quit.now", "suspend", "lesson.leave"):
                action = partial(self.run_action, binding.action)
                yield SystemCommand(binding.description.capitalize(), f"key {binding.key.split(',')[0]}", action)
        for name in LESSONS:
            yield SystemCommand(f"Lesson: {name}", "beat by beat", partial(self.start_lesson, name))

    # Painting.

    def get_line_filters(self) -> Sequence[LineFilter]:
        """Textual's, without the one that looks for the sixteen terminal colours: none is used, and it reads every cell of a frame."""
        return [found for found in super().get_line_filters() if not isinstance(found, ANSIToTruecolor)]

    @property
    def whole(self) -> bool:
        """Whether all that is painted is there. While the screen is taken down its clock still ticks, and keys are still obeyed."""
        return bool(self._painted) and all(widget.is_attached for widget in self._painted)

    def frame(self) -> None:
        """Take in what is new and paint it."""
        session, now = self.session, time.monotonic()
        if now < self._rest_until and session.playback.at_full_speed:
            return
        if not self.whole:
            return
        if len(self.screen_stack) > 1:
            session.playback.look_away(now)
        change = session.tick(now)
        if session.failed and not session.playback.ready:
            if self._before is None:
                self.exit(2 if session.input_error else 1)
            else:
                self._return_from_failed_run(self._before)
        elif (
            change.moved
            or self._painted_words != _words_of(session)
            or (session.trends_behind and self._shows(TrendsPane))
        ):
            self.paint(change)
            used = time.process_time()
            self._rest_until, self._used = now + (used - self._used) / CPU_SHARE, used

    def paint(self, change: Change | None = None) -> None:
        """Show the session's moment. Without a change only the panes around it are new."""
        if not self.whole:
            return
        session = self.session
        script = session.playback.script
        self._painted_words = _words_of(session)
        block_map = self.screen_stack[0].query_one("#map", BlockMap).model
        self.view = view = replace(
            self.view,
            snapshot=session.snapshot,
            delta=session.delta,
            header=session.source.header,
            position=session.position,
            length=len(session.source),
            occupied=session.source.occupied,
            marks=session.source.marks,
            token_bytes=session.snapshot.token_bytes,
            word=session.playback.word,
            people=session.people,
            branched=session.branched,
            speed=session.playback.speed_text,
            message=session.message,
            bookmarks=tuple(session.bookmarks),
            caption=script.caption if script is not None else "",
            zoom=block_map.zoom,
            per_cell=block_map.per_cell,
            moves=session.moves,
            flash=script.flash if script is not None else frozenset(),
            pending=session.pending,
            final=session.final,
            trends=session.trends() if self._shows(TrendsPane) else self.view.trends,
            shadows=session.shadows(),
            hindsight=session.live is None,
        )
        if view.block < 0:
            watched = telling_block(session.delta)
            view.watched = (
                watched if watched >= 0 else view.watched if view.watched > 0 else most_shared(session.snapshot)
            )
        # The past of a block that changes with each step is not read back.
        still = view.block >= 0 or not session.playback.moving
        view.past = ()
        if view.inspected >= 0 and still and self._inspecting():
            view.past = tuple(self._history.of(session.source, view.inspected, session.position))
        self._show_all(view, None if change is None else change.ids, everything=change is None)

    def _show_all(self, view: View, ids: Any, *, everything: bool) -> None:
        base = self.screen_stack[0]
        for pane in self._panes:
            pane.show(view)
        block_map = base.query_one("#map", BlockMap)
        block_map.show(view, ids if not everything else None)
        blocks = base.query_one("#blocks")
        usable = max(0, len(view.snapshot.device) - 1)
        size = view.snapshot.stats.block_size
        blocks.border_title = shown(
            f"1 Blocks {block_map.zoom_title}" + (f" · {usable} × {size} tokens" if size else ""), view
        )
        base.query_one("#text").border_title = shown(text_title(view), view)
        timeline = base.query_one("#timeline")
        timeline.border_title = shown(timeline_title(view, timeline.size.width), view)
        caption = base.query_one("#caption", Caption)
        caption.set_class(bool(view.caption), "shown")
        base.set_class(bool(view.caption), "-lesson")
        base.set_class(not view.length and bool(view.pending), "-loading")
        base.set_class(any(state.parent >= 0 for state in view.snapshot.sequences.values()), "-forks")
        base.query_one("#host").set_class(len(view.snapshot.host) > 0, "shown")
        if isinstance(self.screen, Overlay):
            self.screen.pane.show(view)

    def _inspecting(self) -> bool:
        base = self.screen_stack[0]
        return base.query_one("#inspector").display or isinstance(self.screen, Overlay)

    def _shows(self, kind: type[Pane]) -> bool:
        """Whether a pane of that kind is seen, in its place or over the others."""
        over = isinstance(self.screen, Overlay) and isinstance(self.screen.pane, kind)
        return over or any(pane.display for pane in self._panes if isinstance(pane, kind))

    def pick(self, block: int) -> None:
        """Put the cursor on a block."""
        self.view = replace(self.view, block=block)
        self.paint()

    # Messages from panes.

    def on_block_map_picked(self, message: BlockMap.Picked) -> None:
        """The cursor moved."""
        self.pick(message.block)

    def on_block_map_inspect(self, message: BlockMap.Inspect) -> None:
        """A block was chosen."""
        self.view = replace(self.view, block=message.block)
        self.action_pane("inspector")
        self.paint()

    def on_timeline_sought(self, message: Timeline.Sought) -> None:
        """A place on the timeline."""
        self.session.go(message.position)

    def on_inspector_sought(self, message: Inspector.Sought) -> None:
        """A line of a block's past."""
        self.session.go(message.position)

    def on_resize(self, _: events.Resize) -> None:
        """Titles depend on the size."""
        self.call_after_refresh(self.paint)


def _words_of(session: Session) -> tuple[str, str, int]:
    """What the panes show beside the state: painted anew where it differs."""
    return session.playback.word, session.playback.speed_text, len(session.pending)


def telling_block(delta: StepDelta | None) -> int:
    """The block of a step's most telling event: a copy's new block, else one found, forgotten or taken; -1: there is none."""
    events = delta.events if delta is not None else ()
    found = {event.kind: event.other if event.kind == "copy" else event.block for event in events if event.block > 0}
    return next((found[kind] for kind in ("copy", "cache_hit", "evict", "swap_in", "alloc") if kind in found), -1)


def most_shared(snapshot: Snapshot) -> int:
    """The block that most tables name; -1 where none is shared."""
    refs = snapshot.device.refs
    return int(refs.argmax()) if len(refs) and refs.max() > 1 else -1


def _titled(pane: Pane, title: str) -> Pane:
    pane.border_title = title
    return pane


def binding_ids() -> set[str]:
    """The ids by which keys can be remapped."""
    bindings = [binding for owner in (ScreenApp, BlockMap, Inspector, Journey, ListPane) for binding in owner.BINDINGS]
    return {binding.id for binding in bindings if isinstance(binding, Binding) and binding.id}
