"""Every key, at the three sizes, from a list of deltas; and a live engine behind the screen. Waits are for conditions."""

from __future__ import annotations

import os
import signal
from functools import partial

import pytest
from screens import SIZES, drive, replay, text, until
from scripted import failing_engine, scripted_engine, sharing_scene
from textual.binding import Binding
from textual.geometry import Offset
from textual.pilot import Pilot
from textual.widgets import Input, Label

from minipaged.config import SamplingParams
from minipaged.serving.live import EngineProcess
from minipaged.tui.app import ScreenApp
from minipaged.tui.map.blockmap import BlockMap
from minipaged.tui.map.layout import Zoom
from minipaged.tui.panes.dialogs import AddPrompt, Overlay, Reading
from minipaged.tui.panes.inspector import Inspector
from minipaged.tui.session import Session

at_each_size = pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")

LEAVING = ("quit", "quit.now")


@at_each_size
def test_stepping_seeking_and_events(size: tuple[int, int]) -> None:
    app = replay()

    async def script(pilot: Pilot[int]) -> None:
        session = app.session
        assert "the start: every block is free" in text(app)
        await pilot.press("right_square_bracket", "right_square_bracket", "right_square_bracket")
        assert session.position == 3
        assert "B forks from A: the same 3 blocks, no memory copied" in text(app)
        await pilot.press("left_square_bracket")
        assert session.position == 2
        await pilot.press("right_curly_bracket", "right_curly_bracket")
        assert session.position == 4
        assert "copied to 4" in text(app)
        await pilot.press("left_curly_bracket")
        assert session.position == 3
        await pilot.press("G")
        assert session.position == 10
        await pilot.press("right_square_bracket")
        assert "end of the trace" in text(app)
        await pilot.press("g")
        assert session.position == 0
        await pilot.press("left_curly_bracket")
        assert "no earlier event" in text(app)

    drive(app, size, script)


@at_each_size
def test_play_to_the_end_and_speed(size: tuple[int, int]) -> None:
    app = replay()

    async def script(pilot: Pilot[int]) -> None:
        await pilot.press("greater_than_sign", "greater_than_sign", "greater_than_sign")
        assert app.session.playback.speed_text == "full speed"
        await pilot.press("less_than_sign")
        assert app.session.playback.speed_text == "50 steps/s"
        await pilot.press("space")
        await until(pilot, lambda: app.session.position == 10)
        await until(pilot, lambda: app.session.playback.word == "REPLAY")
        await pilot.press(*["less_than_sign"] * 6)
        assert app.session.playback.speed_text == "1 steps/s"
        await pilot.press("space")  # from the end it starts again
        assert app.session.playback.moving
        await pilot.press("space")
        assert not app.session.playback.moving

    drive(app, size, script)


@at_each_size
def test_zoom_cursor_and_inspect(size: tuple[int, int]) -> None:
    app = replay(at=5)

    async def script(pilot: Pilot[int]) -> None:
        block_map = app.query_one(BlockMap)
        assert block_map.model.zoom >= Zoom.FOUR, "it opens as close as the pool fits"
        assert block_map.model.num_rows <= block_map.size.height
        block_map.set_zoom(Zoom.CELL)
        await pilot.press("plus")
        assert block_map.model.zoom == Zoom.FOUR
        await pilot.press("plus", "plus")
        assert block_map.model.zoom == Zoom.SLOTS
        first = next(line for line in text(app).splitlines() if " A2 " in line)
        assert first.split(" A2 ")[1].replace(" ", "").startswith("The␣"), "a token a slot"
        await pilot.press("minus", "minus", "minus", "minus", "minus")
        assert block_map.model.zoom == Zoom.HEAT
        await pilot.press("0")
        assert block_map.model.num_rows <= block_map.size.height
        await pilot.press("right", "l", "down", "up", "left", "h")
        block_map.set_zoom(Zoom.CELL)
        for _ in range(6):
            await pilot.press("left")
        await pilot.press("right", "right", "right", "right")
        assert app.view.block == 4
        await pilot.press("enter")
        await pilot.pause()
        shown = text(app)
        assert "block 4  ref 1" in shown
        assert "owner B[2]" in shown
        if isinstance(app.screen, Overlay):
            await pilot.press("up", "enter")
        else:
            assert isinstance(app.focused, Inspector)
            await pilot.press("down", "up", "enter")
        await pilot.pause()
        assert app.session.position == 4  # the newest line of its past: the copy

    drive(app, size, script)


@at_each_size
def test_click_on_a_block_and_on_the_timeline(size: tuple[int, int]) -> None:
    app = replay(at=5)

    async def script(pilot: Pilot[int]) -> None:
        block_map = app.query_one(BlockMap)
        block_map.set_zoom(Zoom.CELL)
        await pilot.click("#map", offset=Offset(block_map.model.gutter + 2, 0))
        await until(pilot, lambda: app.view.block == 2)
        await pilot.click("#timeline", offset=Offset(9, 1))  # the third step: each has four columns
        await until(pilot, lambda: app.session.position == 3)

    drive(app, size, script)


@at_each_size
def test_find_and_again(size: tuple[int, int]) -> None:
    app = replay()

    async def ask(pilot: Pilot[int], query: str) -> None:
        await pilot.press("slash")
        await pilot.pause()
        app.screen.query_one(Input).value = query
        await pilot.press("enter")
        await pilot.pause()

    async def script(pilot: Pilot[int]) -> None:
        session = app.session
        for query, position in (
            ("cow", 4),
            ("preempt", 8),
            ("seq A", 10),
            ("step 2", 3),
            ("2", 3),
            ("block 4", 4),
            ("fork", 4),
        ):
            await ask(pilot, query)
            assert session.position == position, (query, session.message)
        assert "no fork after this step" in text(app)
        await pilot.press("N")
        assert session.position == 3
        await pilot.press("n")
        assert "no fork after" in text(app)
        await ask(pilot, "moon")
        assert "cannot find" in text(app)
        await pilot.press("slash", "q", "escape")  # letters go into the line, not to the app
        await pilot.pause()
        assert app.is_running
        assert app.screen is app.screen_stack[0]

    drive(app, size, script)


@at_each_size
def test_focus_why_bookmark_maximise_help_panes(size: tuple[int, int]) -> None:
    app = replay(at=4)

    async def script(pilot: Pilot[int]) -> None:
        await pilot.press("f")
        assert app.view.only == 0
        await pilot.press("f", "f")
        assert app.view.only == -1
        await pilot.press("w")  # the copy's cause: the append in the same step
        assert "same step" in text(app)
        await pilot.press("b", "g", "right_curly_bracket", "right_curly_bracket", "right_curly_bracket")
        assert app.session.bookmarks == {4}
        for key, name in (("1", "blocks"), ("2", "tables"), ("3", "text"), ("4", "timeline")):
            await pilot.press(key, "z")
            pane = app.query_one(f"#{name}")
            lines = [app.query_one(name).outer_size.height for name in ("#header", "#news", "#gauge", "#keys")]
            room = size[1] - sum(lines)
            await until(pilot, lambda pane=pane, room=room: pane.outer_size == (size[0], room))  # type: ignore[misc]
            assert [p.id for p in app.query(".pane") if p.display] == [name]
            await pilot.press("escape" if name == "text" else "z")
            await until(pilot, lambda pane=pane: pane.outer_size.height < size[1] - 8)  # type: ignore[misc]
        await pilot.press("question_mark")
        assert isinstance(app.screen, Reading)
        assert "copy-on-write" in text(app)
        await pilot.press("escape")
        await pilot.press("f1")
        assert isinstance(app.screen, Reading)
        await pilot.press("escape")
        for key, name in zip(
            "12345678", ("map", "tables", "text", "timeline", "inspector", "waste", "tree", "trends"), strict=True
        ):
            await pilot.press(key)
            await pilot.pause()
            if isinstance(app.screen, Overlay):
                await pilot.press("escape")
            else:
                assert app.focused is not None
                assert app.focused.id == name
        await pilot.press("a")
        assert "needs a live engine" in text(app)
        await pilot.press("x")
        assert "nothing can be aborted" in text(app)
        for key, words in (
            ("e", "its settings cannot be changed"),
            ("B", "only a live run can branch"),
            ("R", "can be run again"),
        ):
            await pilot.press(key)
            assert words in text(app), key
        await pilot.press("q")
        await pilot.pause()
        assert app.return_value == 0

    drive(app, size, script)


@at_each_size
def test_every_key_in_a_row_keeps_the_screen(size: tuple[int, int]) -> None:
    """All bindings of the screen and of the panes that have the focus, one after another; each window is left again."""
    app = replay(at=5)

    async def script(pilot: Pilot[int]) -> None:
        bindings = [b for cls in (ScreenApp, BlockMap, Inspector) for b in cls.BINDINGS if isinstance(b, Binding)]
        keys = [key for binding in bindings if binding.id not in LEAVING for key in binding.key.split(",")]
        assert len(keys) > 40
        for key in keys:
            await pilot.press(key)
            await pilot.pause()
            while len(app.screen_stack) > 1:
                await pilot.press("escape")
                await pilot.pause()
            assert app.is_running, key
        await pilot.press("1", "g", "G")
        await until(pilot, lambda: "4 Timeline" in text(app) and "10/10" in text(app))

    drive(app, size, script)


def test_every_binding_has_an_id_and_none_is_taken_by_multiplexers() -> None:
    bindings = [b for cls in (ScreenApp, BlockMap, Inspector) for b in cls.BINDINGS if isinstance(b, Binding)]
    assert all(binding.id for binding in bindings)
    assert len({binding.id for binding in bindings}) == len(bindings)
    keys = {key for binding in bindings for key in binding.key.split(",")}
    assert not keys & {"ctrl+s", "ctrl+o", "ctrl+j", "ctrl+b", "ctrl+a"}


def test_keys_can_be_remapped() -> None:
    app = replay()

    async def script(pilot: Pilot[int]) -> None:
        app.set_keymap({"step": "s"})
        await pilot.press("s")
        assert app.session.position == 1

    drive(app, (80, 24), script)


def test_resize_keeps_everything() -> None:
    app = replay(at=5)

    async def script(pilot: Pilot[int]) -> None:
        app.query_one(BlockMap).set_zoom(Zoom.CELL)
        for size in (*SIZES, (80, 24), (60, 16), (240, 70)):
            await pilot.resize_terminal(*size)
            wide, wider = size[0] >= 120, size[0] >= 190
            await until(pilot, lambda wide=wide: app.query_one("#inspector").display == wide)  # type: ignore[misc]
            await until(pilot, lambda: "REPLAY" in text(app) and "22▆B" in text(app))
            assert app.query_one("#tree").display == wider

    drive(app, (80, 24), script)


# A live engine behind the screen.


def live_app(engine: EngineProcess, *, playing: bool = True) -> ScreenApp:
    session = Session(engine.source)
    if playing:
        session.playback.start()
    else:
        session.playback.pause()
    return ScreenApp(session)


def test_a_prompt_added_by_hand_runs() -> None:
    with EngineProcess(scripted_engine) as engine:
        app = live_app(engine)

        async def script(pilot: Pilot[int]) -> None:
            await until(pilot, lambda: app.session.playback.word == "IDLE" or engine.source.idle)
            await pilot.press("a")
            assert isinstance(app.screen, AddPrompt)
            await pilot.press("enter")
            assert "empty" in str(app.screen.query_one("#problem", Label).render())
            app.screen.query_one("#prompt", Input).value = "hello world"
            app.screen.query_one("#n", Input).value = "0"
            await pilot.press("enter")
            assert "n must be" in str(app.screen.query_one("#problem", Label).render())
            app.screen.query_one("#n", Input).value = "1"
            await pilot.press("enter")
            await until(pilot, lambda: "hello world" in text(app) and app.session.playback.word == "IDLE")
            assert "done: 11 tokens" in text(app), "the run is summed up"

        drive(app, (80, 24), script)


def test_pause_step_and_resume_a_live_engine() -> None:
    with EngineProcess(scripted_engine) as engine:
        engine.source.submit("a long prompt that takes a while", SamplingParams(max_tokens=60))
        app = live_app(engine, playing=False)

        async def script(pilot: Pilot[int]) -> None:
            await until(pilot, lambda: app.session.playback.word == "PAUSED")
            await pilot.press("right_square_bracket")
            await until(pilot, lambda: app.session.position == 1)
            await pilot.press("right_square_bracket", "right_square_bracket")
            await until(pilot, lambda: app.session.position == 3)
            assert len(engine.source) == 3
            await pilot.press("left_square_bracket")
            assert app.session.position == 2
            assert "1 behind live" in text(app)
            await pilot.press("right_square_bracket")
            assert len(engine.source) == 3, "the step was already recorded"
            await pilot.press("space")
            await until(pilot, lambda: app.session.playback.word == "IDLE")
            assert app.session.playback.at_edge

        drive(app, (80, 24), script)


def test_a_resting_engines_past_is_played_again() -> None:
    with EngineProcess(scripted_engine) as engine:
        engine.source.submit("hello", SamplingParams(max_tokens=4))
        app = live_app(engine)

        async def script(pilot: Pilot[int]) -> None:
            await until(pilot, lambda: app.session.playback.word == "IDLE")
            await pilot.press("g", "space")
            assert app.session.playback.word == "PLAYING"
            await until(pilot, lambda: app.session.playback.word == "IDLE")
            assert app.session.playback.at_edge
            os.kill(engine.pid, signal.SIGKILL)
            await until(pilot, lambda: app.session.playback.word == "ENDED")
            await pilot.press("g", "space")
            assert app.session.playback.word == "PLAYING"
            await until(pilot, lambda: app.session.playback.word == "ENDED")
            assert app.session.playback.at_edge

        drive(app, (80, 24), script)


def test_abort_under_the_cursor() -> None:
    with EngineProcess(scripted_engine) as engine:
        engine.source.submit("a long prompt that takes a while", SamplingParams(max_tokens=60))
        app = live_app(engine, playing=False)

        async def script(pilot: Pilot[int]) -> None:
            await until(pilot, lambda: app.session.playback.word == "PAUSED")
            await pilot.press("right_square_bracket")
            await until(pilot, lambda: app.session.position == 1)
            await pilot.press("right", "right", "x", "right_square_bracket")
            await until(pilot, lambda: app.session.position == 2)
            assert "A aborted" in text(app)

        drive(app, (80, 24), script)


def test_a_killed_engine_leaves_the_screen_whole() -> None:
    with EngineProcess(scripted_engine) as engine:
        engine.source.submit("a long prompt that takes a while", SamplingParams(max_tokens=60))
        app = live_app(engine, playing=False)

        async def script(pilot: Pilot[int]) -> None:
            await until(pilot, lambda: app.session.playback.word == "PAUSED")
            await pilot.press("right_square_bracket")
            await until(pilot, lambda: app.session.position == 1)
            os.kill(engine.pid, signal.SIGKILL)
            await until(pilot, lambda: "ENDED" in text(app))
            assert "the engine's process has ended" in text(app)
            await pilot.press("left_square_bracket")
            assert app.session.position == 0
            await pilot.press("space")
            assert app.is_running

        drive(app, (80, 24), script)


def test_an_engine_that_cannot_start_ends_the_screen_with_code_2() -> None:
    with EngineProcess(failing_engine) as engine:
        app = live_app(engine)

        async def script(pilot: Pilot[int]) -> None:
            await until(pilot, lambda: app.return_value is not None)
            assert app.return_value == 2
            assert "unknown model" in app.session.failed

        drive(app, (80, 24), script)


def test_a_paced_engine_steps_at_the_asked_speed() -> None:
    with EngineProcess(scripted_engine) as engine:
        engine.source.submit("a long prompt that takes a while", SamplingParams(max_tokens=60))
        app = live_app(engine)
        app.session.playback.speed = 50.0
        app.session.playback.start()

        async def script(pilot: Pilot[int]) -> None:
            await until(pilot, lambda: app.session.position > 5)
            assert not engine.source.running, "paced by single permits"

        drive(app, (80, 24), script)


def test_one_trace_three_sources_one_screen(tmp_path: object) -> None:
    """Live, file and list draw the same."""
    from pathlib import Path

    from minipaged.trace.sources import FileSource, ListSource

    path = Path(str(tmp_path)) / "t.mpt"
    with EngineProcess(partial(scripted_engine, num_blocks=64), recording=path) as engine:
        live = engine.source
        for prompt in ("The cache is split", "Once upon a time"):
            live.submit(prompt, SamplingParams(max_tokens=30))
        live.run()
        assert live.wait(lambda: live.idle)
    sources = (live, FileSource(path), ListSource([live.delta(at) for at in range(len(live))]))

    for position in (0, 4, 9, len(live)):
        shots = []
        for source in sources:
            app = ScreenApp(Session(source))
            app.session.playback.pause()

            async def script(pilot: Pilot[int], app: ScreenApp = app, position: int = position) -> str:
                app.session.go(position)
                app.frame()
                await pilot.pause()
                return text(app)

            shot = drive(app, (120, 40), script)
            shots.append("\n".join(shot.splitlines()[3:-4]))  # above stand the source's name and news, below the edge
        assert shots[0] == shots[1] == shots[2]


def test_the_scene_is_what_the_tests_think() -> None:
    assert len(sharing_scene().deltas) == 10
