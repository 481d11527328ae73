"""What each key does: the actions of the screen. They ask the session and open windows; painting is the screen's."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from textual.app import App
from textual.widget import Widget

from minipaged.serving.live import LiveSource
from minipaged.tui.map.blockmap import BlockMap
from minipaged.tui.panes.dialogs import AddPrompt, Ask, Choose, Knobs, Overlay, Reading
from minipaged.tui.panes.inspector import Inspector, Journey
from minipaged.tui.panes.pane import Pane
from minipaged.tui.panes.side import TreePane, WastePane
from minipaged.tui.panes.tables import TablesPane
from minipaged.tui.panes.text import TextPane
from minipaged.tui.panes.trends import TrendsPane
from minipaged.tui.reading.finding import arrivals
from minipaged.tui.scripted.lessons import LESSONS
from minipaged.tui.session import Change, Session
from minipaged.tui.view import View
from minipaged.tui.words.help import help_text

OVERLAYS: dict[
    str, tuple[str, Callable[[View], Pane]]
] = {  # panes that open over the others where they have no room beside them
    "tables": ("2 Tables", TablesPane),
    "text": ("3 Text", TextPane),
    "inspector": ("5 Inspector", Inspector),
    "waste": ("6 Waste", WastePane),
    "tree": ("7 Tree", TreePane),
    "trends": ("8 Trends", TrendsPane),
}


class Actions(App[int]):
    """The screen without its panes."""

    session: Session
    view: View
    _outer: Session | None  # what a lesson stands in front of
    _restart: Callable[[Mapping[str, object]], LiveSource] | None
    _next_run: dict[str, object]  # settings that only another run can have
    _before: Session | None  # the run that this one took the place of

    def paint(self, change: Change | None = None) -> None:
        """Show the session's moment."""
        raise NotImplementedError

    def _moved(self, message: str) -> None:
        self.session.message = message
        self.paint()

    def action_leave(self) -> None:
        """Quit."""
        self.exit(0)

    def action_play(self) -> None:
        """Run or pause."""
        self._moved(self.session.playback.toggle())

    def action_step(self) -> None:
        """One step on."""
        self._moved(self.session.playback.step(1))

    def action_step_back(self) -> None:
        """One step back."""
        self._moved(self.session.playback.step(-1))

    def action_event(self, direction: int) -> None:
        """To another event."""
        self.session.next_event(direction)
        self.paint()

    def action_find(self) -> None:
        """Ask what to find."""

        def found(answer: object) -> None:
            if isinstance(answer, str) and answer.strip():
                self.session.find(answer)
                self.paint()

        hint = "cow · fork · hit · preempt · swap · finish · seq B · block 31 · 40 (a step)"
        self.push_screen(Ask("Find", hint, self.session.query), found)

    def action_again(self, direction: int) -> None:
        """Find once more."""
        if self.session.query:
            self.session.find(self.session.query, direction)
        else:
            self.session.message = "nothing to find yet: press /"
        self.paint()

    def action_go_start(self) -> None:
        """To the start."""
        self.session.go(0)
        self.paint()

    def action_go_edge(self) -> None:
        """To the newest."""
        self.session.go(len(self.session.source))
        self.paint()

    def action_speed(self, by: int) -> None:
        """Faster or slower."""
        self._moved(self.session.playback.change_speed(by))

    def action_why(self) -> None:
        """To the cause of what happened here."""
        view, delta = self.view, self.session.delta
        named = [past.event for past in view.past if past.position == self.session.position]
        candidates = named or [event for event in (delta.events if delta is not None else ()) if event.cause >= 0]
        if candidates:
            self.session.why(candidates[-1])
        else:
            self.session.message = "nothing here has a cause in the trace"
        self.paint()

    def action_only(self) -> None:
        """Dim all but the sequence under the cursor, then the next, then none."""
        alive = [seq for seq, state in self.session.snapshot.sequences.items() if state.alive]
        owners = self.session.snapshot.owners(self.view.block) if self.view.block >= 0 else []
        order = [-1, *([owners[0][0]] if owners and self.view.only == -1 else alive)]
        at = order.index(self.view.only) if self.view.only in order else 0
        self.view = replace(self.view, only=order[(at + 1) % len(order)])
        self.paint()

    def action_maximise(self) -> None:
        """The focused pane alone, between the status line and the keys; or all again."""
        screen, focused = self.screen, self.screen.focused
        panes = [
            widget for widget in screen.query(".pane") if focused is not None and widget in focused.ancestors_with_self
        ]
        alone = not screen.has_class("-alone") and bool(panes)
        for widget in screen.query(".pane, #upper, #middle"):
            widget.set_class(alone and (widget in panes or widget in panes[0].ancestors), "alone")
        screen.set_class(alone, "-alone")

    def action_add(self) -> None:
        """Ask for a prompt."""
        refused = self.session.cannot_steer("a prompt needs a live engine")
        if refused:
            self.session.message = refused
            self.paint()
            return

        def asked(answer: object) -> None:
            if isinstance(answer, tuple):
                self.session.submit(*answer)
                self.paint()

        self.push_screen(AddPrompt(), asked)

    def action_bookmark(self) -> None:
        """Mark this step."""
        self.session.bookmark()
        self.paint()

    def action_abort(self) -> None:
        """Abort the request of the sequence that is looked at, or that owns the block under the cursor."""
        snapshot, live = self.session.snapshot, self.session.live
        owners = snapshot.owners(self.view.block) if self.view.block >= 0 else []
        sequence = self.view.only if self.view.only >= 0 else owners[0][0] if owners else -1
        state = snapshot.sequences.get(sequence)
        refused = self.session.cannot_steer("nothing can be aborted")
        if live is None or refused:
            self.session.message = refused
        elif state is None or not state.alive:
            self.session.message = "put the cursor on a block of the sequence to abort"
        else:
            live.abort(state.request)
            self.session.message = f"asked to abort {self.view.letter(sequence)}: it ends with the next step"
        self.paint()

    def action_zoom(self, by: int) -> None:
        """Zoom the map."""
        self.screen_stack[0].query_one("#map", BlockMap).action_zoom(by)

    def action_fit(self) -> None:
        """Show the whole pool."""
        self.screen_stack[0].query_one("#map", BlockMap).action_fit()

    def action_branch(self) -> None:
        """A new run from the same prompts and seeds, up to this step."""
        session = self.session
        if session.live is None or self._restart is None or self._outer is not None:
            session.message = "only a live run can branch"
        elif not session.asked or not session.position:
            session.message = "nothing has been asked yet: there is nothing to branch from"
        else:
            self._run_again(self._restart, session.position, then_run=False)
        self.paint()

    def action_again_all(self) -> None:
        """All prompts again, from the start, with what was set for the next run."""
        session = self.session
        if session.live is None or self._restart is None or self._outer is not None:
            session.message = "only a live run can be run again"
        elif not session.asked:
            session.message = "nothing has been asked yet: there is nothing to run again"
        else:
            self._run_again(self._restart, len(session.source), then_run=True)
        self.paint()

    def _run_again(self, restart: Callable[[Mapping[str, object]], LiveSource], until: int, *, then_run: bool) -> None:
        """What was asked up to a step, at the same steps of a new engine."""
        old = self.session
        script = [(at, old.asked[request]) for at, request in arrivals(old.source, until, old.asked)]
        old.playback.pause()
        self._before = old
        self.session = Session(restart(self._next_run), speed=old.playback.speed, ends_fullest=old.ends_fullest)
        last = max((at for at, _ in script), default=0)
        self.session.repeat(script, last if then_run else until, then_run=then_run)
        self.view = replace(self.view, block=-1, watched=-1, only=-1)

    def _return_from_failed_run(self, before: Session) -> None:
        """The next run's engine could not start. Its settings are forgotten, and what the run before did is shown again."""
        failure = self.session.failed
        self._before, self.session = None, before
        self._next_run.clear()
        before.tick(time.monotonic())  # takes in that its engine is gone
        before.message = f"the next run could not start: {failure}"
        before.playback.refresh()
        self.paint()

    def action_knobs(self) -> None:
        """Change the engine's settings."""
        refused = self.session.cannot_steer("its settings cannot be changed")
        if refused:
            self.session.message = refused
            self.paint()
            return

        def turned(answer: object) -> None:
            if isinstance(answer, dict):
                if "num_blocks" in answer:
                    self._next_run["num_blocks"] = answer.pop("num_blocks")
                    self.session.message = f"the next run has {self._next_run['num_blocks']} blocks: R runs all again"
                for name, value in answer.items():
                    self.session.knob(name, value)
                self.paint()

        self.push_screen(Knobs({**self.session.settings, **self._next_run}), turned)

    def action_journey(self) -> None:
        """One token from its position to its slot."""
        overlay = Overlay("A token's journey: arrows choose the token", Journey(self.view))
        self.push_screen(overlay)
        self.call_after_refresh(self._fill_overlay, overlay)

    def action_compare(self) -> None:
        """Other systems in the place of the map and the tables, or these again."""
        base = self.screen_stack[0]
        base.toggle_class("-compare")
        if base.has_class("-compare"):
            self.session.compare()
            states = self.session.snapshot.sequences.values()
            if self.session.position and not any(state.alive for state in states):
                self.session.message = "nobody is here at this step: { goes back to what happened before"
        elif self.screen.focused is None:
            self.screen.query_one("#map").focus()
        self.call_after_refresh(self.paint)

    def action_lessons(self) -> None:
        """Choose a lesson."""

        def chosen(answer: object) -> None:
            if isinstance(answer, str):
                self.start_lesson(answer)

        self.push_screen(Choose("Lessons: what happens in the blocks, beat by beat", list(LESSONS)), chosen)

    def start_lesson(self, name: str) -> None:
        """Put a lesson in place of the session, which pauses."""
        if self._outer is None:
            self._outer = self.session
            self.session.playback.take_over()
        lesson = LESSONS[name]()
        self.session = Session.of_lesson(lesson, animated=self.animation_level != "none")
        self.screen_stack[0].query_one("#map", BlockMap).fit()
        self.view = replace(self.view, block=-1, watched=-1, only=-1)
        self.query_one("#caption").border_title = f"Lesson: {lesson.title}"
        self.paint()

    def action_leave_lesson(self) -> None:
        """All panes again, the map in the place of other systems, or back to where the lesson was opened."""
        if self.screen.has_class("-alone"):
            self.action_maximise()
        elif self.screen_stack[0].has_class("-compare"):
            self.action_compare()
        elif self._outer is not None:
            self.session, self._outer = self._outer, None
            self.view = replace(self.view, block=-1, watched=-1, only=-1)
            self.session.playback.refresh()
            self.paint()

    def action_help(self) -> None:
        """The help."""
        focused = self.screen.focused
        name = focused.id if focused is not None and focused.id else "blocks"
        self.push_screen(Reading("minipaged", help_text("blocks" if name == "map" else name, self.view.glyphs)))

    def action_pane(self, name: str) -> None:
        """Go to a pane; one that has no room opens over the others."""
        base = self.screen_stack[0]
        if name in ("blocks", "tables") and base.has_class("-compare"):
            base.remove_class("-compare")  # they stand where the comparison is
            self.call_after_refresh(self.paint)
        target = base.query_one("#map" if name == "blocks" else f"#{name}", Widget)
        if all(node.display for node in target.ancestors_with_self):
            if target.can_focus:
                target.focus()
            return
        if name == "timeline":
            self.session.message = "this screen is too low for the timeline beside a lesson"
            self.paint()
            return
        title, make = OVERLAYS[name]
        overlay = Overlay(title, make(self.view))
        self.push_screen(overlay)
        self.call_after_refresh(self._fill_overlay, overlay)

    def _fill_overlay(self, overlay: Overlay) -> None:
        self.paint()
        if overlay.pane.can_focus:
            overlay.pane.focus()
