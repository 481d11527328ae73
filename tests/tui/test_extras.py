"""Compare, the journey, the gallery, a user's keys, the headless run, the light and the plain look."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest
from screens import SIZES, drive, replay, text, until
from scripted import failing_engine, scripted_engine, sharing_scene
from textual.pilot import Pilot

from minipaged.cli.show import show
from minipaged.config import DEFAULT_MODEL, SamplingParams
from minipaged.errors import InputError, RequestError
from minipaged.memory.types import PoolBreakdown, Run
from minipaged.trace.events import ShadowDelta
from minipaged.trace.file import Header
from minipaged.trace.player import Player
from minipaged.trace.sources import FileSource, ListSource
from minipaged.tui.app import ScreenApp, binding_ids
from minipaged.tui.gallery import SCENARIOS, scenario_path
from minipaged.tui.keys import load_keys
from minipaged.tui.panes.compare import compare_lines, real_breakdown, share_text
from minipaged.tui.panes.dialogs import Overlay
from minipaged.tui.panes.inspector import Journey
from minipaged.tui.run import run_screen
from minipaged.tui.view import View, width_of


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_compare_and_journey_keys(size: tuple[int, int]) -> None:
    app = replay(at=7)

    async def script(pilot: Pilot[int]) -> None:
        await pilot.press("c")
        await until(pilot, lambda: "paged (real)" in text(app) and "orca-pow2" in text(app))
        assert "accounting, not speed" in text(app) or size[0] < 100
        await pilot.press("right_square_bracket")
        assert app.session.position == 8
        await pilot.press("c")
        await until(pilot, lambda: "1 Blocks" in text(app))
        await pilot.press("c")
        await until(pilot, lambda: "paged (real)" in text(app))
        await pilot.press("escape")
        await until(pilot, lambda: "1 Blocks" in text(app))
        await until(pilot, lambda: app.focused is app.query_one("#map"))  # so that arrows move the cursor again
        await pilot.press("t")
        await until(pilot, lambda: isinstance(app.screen, Overlay) and "slot number" in text(app))
        journey = app.screen.query_one(Journey)
        before = journey.position
        await pilot.press("left")
        assert journey.position == before - 1
        await pilot.press("down", "up", "right", "escape")

    drive(app, size, script)


def test_shadows_of_the_trace_itself_are_shown() -> None:
    deltas = sharing_scene().deltas
    shadows = [
        ShadowDelta(
            d.step,
            "contiguous",
            (Run(0, 64, "token", 0), Run(64, 60, "reserved", 0)),
            PoolBreakdown(64, 60, 0, 0, 0, 0),
        )
        for d in deltas
    ]
    app = replay(source=ListSource(deltas, shadows=shadows), at=7)

    async def script(pilot: Pilot[int]) -> None:
        await pilot.press("c")
        await until(pilot, lambda: "contiguous" in text(app))
        assert "tokens 52% reserved 48%" in text(app)
        assert "orca" not in text(app)

    drive(app, (120, 40), script)


def test_comparing_where_nobody_is_says_where_to_look() -> None:
    path = scenario_path("cow")
    source = FileSource(path)

    def alive(app: ScreenApp) -> bool:
        return any(state.alive for state in app.session.snapshot.sequences.values())

    app = replay(source=source, at=len(source))

    async def script(pilot: Pilot[int]) -> None:
        assert not alive(app)
        await pilot.press("c")
        await until(pilot, lambda: "nobody is here at this step: { goes back" in text(app))
        await pilot.press("left_curly_bracket")
        await until(pilot, lambda: alive(app))
        await pilot.press("c", "c")
        await until(pilot, lambda: "orca" in text(app))
        assert "nobody is here at this step" not in text(app)

    drive(app, (120, 40), script)


def test_the_real_breakdown_fill_the_pool() -> None:
    deltas = sharing_scene().deltas
    for position in range(1, len(deltas) + 1):
        view = View(Player(ListSource(deltas), position).snapshot)
        assert sum(real_breakdown(view)) == 31 * 4
    assert share_text(PoolBreakdown(1, 2, 0, 1, 0, 0)) == "tokens 25% reserved 50% fragments 25%"


@pytest.mark.parametrize("width", [60, 100, 160])
@pytest.mark.parametrize("height", [6, 20])
def test_compare_fits(width: int, height: int) -> None:
    deltas = sharing_scene().deltas
    view = View(Player(ListSource(deltas), 7).snapshot)
    bands = PoolBreakdown(30, 30, 30, 20, 4, 10)
    runs = (Run(0, 30, "token", 0), Run(30, 60, "internal", 0), Run(90, 34, "external", -1))
    view.shadows = {name: ShadowDelta(6, name, runs, bands) for name in ("a", "b")}
    lines = compare_lines(view, width, height)
    assert len(lines) <= height
    assert all(width_of(line) <= width for line in lines)


@pytest.mark.parametrize("name", list(SCENARIOS))
def test_the_gallery_shows_what_it_says(name: str) -> None:
    path = scenario_path(name)
    assert path.stat().st_size < 200_000
    source = FileSource(path)
    assert not source.damage
    assert source.header.extra["about"] == SCENARIOS[name]
    wanted = {
        "cow": "copy",
        "prefix": "cache_hit",
        "beam": "prune",
        "preempt": "preempt",
        "swap": "swap_in",
        "evict": "evict",
        "offload": "host_hit",
        "orca": "admit",
    }
    kinds = {event.kind for at in range(len(source)) for event in source.delta(at).events}
    assert wanted[name] in kinds
    player = Player(source, len(source))
    assert player.position == len(source)
    assert all(state.text for state in player.snapshot.sequences.values())
    source.close()


def test_the_orca_scenario_begins_in_compare_mode(tmp_path: Path) -> None:
    """What it is about is how the others fare; each of them has a picture on the narrowest screen too."""
    target = tmp_path / "orca.svg"
    assert show(DEFAULT_MODEL, scenario="orca", headless=True, steps=60, size="80x24", screenshot=target) == 0
    picture = target.read_text().replace("&#160;", " ")
    assert "Compare: the same requests elsewhere" in picture
    assert "1 Blocks" not in picture
    assert "never used 2% frag 7%" in picture


def test_an_unknown_scenario_is_named() -> None:
    with pytest.raises(InputError, match="moon"):
        scenario_path("moon")


def test_a_users_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text('step = "s"\nevent.next = "e"\n')
    assert load_keys(binding_ids(), path) == {"step": "s", "event.next": "e"}
    assert load_keys(binding_ids(), tmp_path / "none.toml") == {}
    for bad, word in (("dance = 's'", "dance"), ("step = 3", "step must be a key"), ("step", "TOML")):
        path.write_text(bad)
        with pytest.raises(InputError, match=word):
            load_keys(binding_ids(), path)


def test_headless_over_a_live_engine(tmp_path: Path) -> None:
    shot, record = tmp_path / "shot.svg", tmp_path / "run.mpt"
    prompts = ["The cache is split", ("Once upon", SamplingParams(max_tokens=5)), ""]
    code = run_screen(
        (scripted_engine, {"num_blocks": 64}),
        prompts=prompts,
        headless=True,
        steps=7,
        screenshot=shot,
        record=record,
        size=(120, 40),
    )
    assert code == 0
    svg = shot.read_text()
    assert "PAUSED" in svg
    assert "Blocks" in svg
    assert len(FileSource(record)) == 7, "exactly the steps that were asked for"
    again = tmp_path / "again.svg"
    assert run_screen(record, headless=True, steps=5, screenshot=again, ascii=True, light=True) == 0
    assert "REPLAY" in again.read_text()


def test_headless_to_the_end(tmp_path: Path) -> None:
    record = tmp_path / "run.mpt"
    assert run_screen(scripted_engine, prompts=["hello"], headless=True, record=record) == 0
    source = FileSource(record)
    assert Player(source, len(source)).snapshot.sequences[0].status == "finished"


def test_headless_errors_are_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_screen(failing_engine, headless=True) == 2
    assert "unknown model" in capsys.readouterr().err
    assert run_screen((scripted_engine, {"die_at": 2}), prompts=["hello world"], headless=True) == 1
    assert "die here" in capsys.readouterr().err
    with pytest.raises(InputError, match="nowhere"):
        run_screen(tmp_path / "nowhere.mpt", headless=True)
    with pytest.raises(InputError, match="screenshot"):
        run_screen(scripted_engine, prompts=["x"], headless=True, steps=1, screenshot=tmp_path / "no" / "such.svg")


@pytest.fixture
def hostile() -> list[str]:
    return ["\x1b]0;owned\x07\x1b[2J", "\u202e\u2066abc\u200b\u200d", "𝕏👩‍💻\U000e0041", "a\r\nb\tc\x00\x9b31m"]


@pytest.mark.parametrize("plain", [True, False])
def test_hostile_text_never_reaches_the_terminal(
    hostile: list[str], plain: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts, tokens and a recording full of what a terminal would obey."""
    if plain:
        monkeypatch.setenv("NO_COLOR", "1")
    record = tmp_path / "t.mpt"
    assert run_screen(scripted_engine, prompts=hostile, headless=True, record=record, steps=4) == 0
    for size in ((80, 24), (200, 60)):
        app = replay(source=FileSource(record))

        async def script(pilot: Pilot[int], app: object = app) -> str:
            seen = ""
            for keys in (["G"], ["right", "right", "enter"], ["escape", "plus", "plus"], ["t"]):
                await pilot.press(*keys)
                await pilot.pause()
                seen += text(pilot.app)  # type: ignore[arg-type]
            return seen

        shown = drive(app, size, script)
        assert not set("\x1b\x07\r\t\x00\x9b\u202e\u2066\u200b\u200d") & set(shown)
        assert max(map(ord, shown)) < 0x10000


def test_branch_repeats_the_beginning_and_goes_on_otherwise() -> None:
    """The new run is in the same state after as many steps, though its prompts came at different steps."""
    from minipaged.tui.app import ScreenApp
    from minipaged.tui.run import EngineRunner
    from minipaged.tui.session import Session

    runner = EngineRunner(scripted_engine, {"num_blocks": 64}, record=None)
    try:
        session = Session(runner.start())
        session.playback.pause()
        session.submit("a long prompt that takes a while", SamplingParams(max_tokens=60))
        app = ScreenApp(session, restart=runner.start)

        async def script(pilot: Pilot[int]) -> None:
            await until(pilot, lambda: app.session.playback.word == "PAUSED")
            for _ in range(3):
                await pilot.press("right_square_bracket")
            await until(pilot, lambda: app.session.position == 3)
            app.session.submit("a second one, later", SamplingParams(max_tokens=20))
            for _ in range(4):
                await pilot.press("right_square_bracket")
            await until(pilot, lambda: app.session.position == 7)
            await pilot.press("left_square_bracket")
            old = app.session.snapshot.copy()
            await pilot.press("B")
            await until(pilot, lambda: "BRANCH PAUSED" in text(app) and app.session.position == 6)
            new = app.session.snapshot
            assert new.tables == old.tables
            assert new.device == old.device
            assert [bytes(s.text) for s in new.sequences.values()] == [bytes(s.text) for s in old.sequences.values()]
            await pilot.press("space")
            await until(pilot, lambda: "IDLE" in text(app))
            assert len(app.session.asked) == 2

        drive(app, (80, 24), script)
    finally:
        runner.close()


def test_knobs_of_an_engine_that_has_none() -> None:
    from textual.widgets import Input

    from minipaged.serving.live import EngineProcess
    from minipaged.tui.app import ScreenApp
    from minipaged.tui.session import Session

    with EngineProcess(scripted_engine) as engine:
        app = ScreenApp(Session(engine.source))

        async def script(pilot: Pilot[int]) -> None:
            await until(pilot, lambda: engine.source.ready)
            await pilot.press("e")
            app.screen.query_one("#watermark", Input).value = "0.1"
            app.screen.query_one("#watermark", Input).focus()
            await pilot.press("enter")
            await until(pilot, lambda: "no setting 'watermark'" in text(app))

        drive(app, (80, 24), script)


def toy_engine(num_blocks: int = 40, progress: object = None) -> object:
    from minipaged.api import LLM

    return LLM("toy", block_size=4, num_blocks=num_blocks).engine


def test_knobs_turn_and_the_next_run_has_another_pool() -> None:
    from textual.widgets import Input

    from minipaged.tui.app import ScreenApp
    from minipaged.tui.panes.dialogs import Choice, Knobs
    from minipaged.tui.run import EngineRunner
    from minipaged.tui.session import Session

    runner = EngineRunner(toy_engine, {}, record=None)
    try:
        session = Session(runner.start())
        session.playback.pause()
        session.submit("some words", SamplingParams(max_tokens=30, ignore_eos=True))
        app = ScreenApp(session, restart=runner.start)

        async def script(pilot: Pilot[int]) -> None:
            await until(pilot, lambda: app.session.playback.word == "PAUSED")
            await pilot.press("right_square_bracket")
            await until(pilot, lambda: app.session.position == 1)
            await pilot.press("e")
            assert isinstance(app.screen, Knobs)
            assert "continuous" in text(app)
            app.screen.query_one("#watermark", Input).value = "many"
            await pilot.press("enter")
            await until(pilot, lambda: "watermark must be a number, not 'many'" in text(app))
            app.screen.query_one("#watermark", Input).value = "0.25"
            app.screen.query_one("#batching", Choice).focus()
            await pilot.press("right", "right", "left", "enter")
            await until(pilot, lambda: app.session.settings.get("batching") == "static")
            assert app.session.settings["watermark"] == 0.25
            await pilot.press("right_square_bracket")
            await until(pilot, lambda: app.session.position == 2)
            await until(pilot, lambda: "from here on watermark is 0.25, batching is static" in text(app))
            await pilot.press("slash", *"knob", "enter", "e")
            app.screen.query_one("#num_blocks", Input).value = "20"
            app.screen.query_one("#num_blocks", Input).focus()
            await pilot.press("enter")
            await until(pilot, lambda: "the next run has 20 blocks" in text(app))
            await pilot.press("R")
            await until(pilot, lambda: app.session.playback.word == "IDLE" and app.session.playback.ready)
            assert app.session.snapshot.stats.total_blocks == 20
            assert len(app.session.asked) == 1

        drive(app, (80, 24), script)
    finally:
        runner.close()


def test_a_browser_needs_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from minipaged.tui.web import serve_screen

    monkeypatch.setitem(sys.modules, "textual_serve.server", None)
    with pytest.raises(InputError, match=r"minipaged\[web\]"):
        serve_screen(["tui"])


def test_a_browser_gets_the_screen_over_pipes() -> None:
    """What textual-serve runs: no terminal, its driver named in the environment."""
    environment = {
        **os.environ,
        "TEXTUAL_DRIVER": "textual.drivers.web_driver:WebDriver",
        "COLUMNS": "100",
        "ROWS": "30",
    }
    served = subprocess.Popen(
        [sys.executable, "-m", "minipaged", "tui", "--scenario", "cow"],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert served.stdout is not None
        told = b""
        while b"Timeline" not in told:
            part = os.read(served.stdout.fileno(), 1 << 16)
            assert part, "it went away without a picture"
            told += part
        assert told.startswith(b"__GANGLION__"), "the handshake of the web driver"
    finally:
        served.kill()
        served.communicate()


@pytest.mark.parametrize(("length", "speed"), [(0, 1), (14, 1), (45, 2), (106, 5), (249, 10), (1_000_000, 10)])
def test_a_short_recording_plays_slowly_enough_to_be_followed(length: int, speed: float) -> None:
    from minipaged.tui.run import play_speed

    assert play_speed(length) == speed


def test_the_command_palette_names_the_keys() -> None:
    app = replay()

    async def script(pilot: Pilot[int]) -> None:
        commands = {command.title: command for command in app.get_system_commands(app.screen)}
        assert {"One step", "Compare", "Lesson: swap", "Branch here"} <= set(commands)
        await commands["One step"].callback()
        assert app.session.position == 1

    drive(app, (80, 24), script)


@pytest.mark.parametrize("gone", ["#upper", "#middle", "#timeline", "#keys", "#header"])
def test_a_tick_while_the_screen_is_taken_down_is_no_error(gone: str) -> None:
    """The clock may tick, and a key be obeyed, between the first pane's end and the last one's."""
    app = replay()

    async def script(pilot: Pilot[int]) -> None:
        app.session.playback.pause()
        await app.screen.query_one(gone).remove()
        app.session.playback.refresh()
        app.frame()
        app.paint()
        app.action_step()

    drive(app, (80, 24), script)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_lists_scroll_and_themes_follow(size: tuple[int, int]) -> None:
    app = replay(at=8)

    async def script(pilot: Pilot[int]) -> None:
        await pilot.press("2", "down")
        assert "B 0→1" in _line(app, "0→1", before=2)
        await pilot.press("down", "down", "down", "up", "up", "up", "k")
        assert "A 0→1" in _line(app, "0→1", before=2)
        await pilot.press("3", "j")
        assert not any(line.startswith(" A │") for line in text(app).splitlines())
        app.theme = "minipaged-light"
        await until(pilot, lambda: app.view.mode == "light")
        app.theme = "minipaged"
        await until(pilot, lambda: app.view.mode == "dark")

    drive(app, size, script)


@pytest.mark.parametrize("size", [(50, 15), (40, 12), (71, 24), (80, 15)], ids=lambda size: f"{size[0]}x{size[1]}")
def test_on_a_small_screen_everything_else_yields_before_the_map(size: tuple[int, int]) -> None:
    app = replay(at=8)

    async def script(pilot: Pilot[int]) -> None:
        assert "1 Blocks" in text(app)
        map_size = app.query_one("#map").size
        assert map_size.height >= 2
        assert map_size.width >= 32
        for key, title in (("2", "2 Tables"), ("3", "3 Text")):
            await pilot.press(key)
            await until(pilot, lambda title=title: title in text(app))
            if len(app.screen_stack) > 1:
                await pilot.press("escape")
        app.session.message = "words from the program"
        app.paint()
        await until(pilot, lambda: "words from the program" in text(app))

    drive(app, size, script)


@pytest.mark.parametrize("size", [(39, 24), (80, 11), (20, 5)], ids=lambda size: f"{size[0]}x{size[1]}")
def test_a_terminal_that_is_too_small_says_so(size: tuple[int, int]) -> None:
    app = replay(at=8)

    async def script(pilot: Pilot[int]) -> None:
        assert " ".join(text(app).split()) == "this terminal is too small: 40 × 12 at least"
        await pilot.press("right_square_bracket")
        await pilot.resize_terminal(80, 24)
        await until(pilot, lambda: "1 Blocks" in text(app) and "too small" not in text(app))
        assert app.session.position == 9

    drive(app, size, script)


def limited_engine(num_blocks: int = 40, progress: object = None) -> object:
    if num_blocks > 1000:
        raise RequestError(f"{num_blocks} blocks do not fit this machine [/b]")
    return toy_engine(num_blocks)


def test_a_next_run_that_cannot_start_leaves_the_run_before_on_the_screen() -> None:
    from textual.widgets import Input

    from minipaged.tui.app import ScreenApp
    from minipaged.tui.run import EngineRunner
    from minipaged.tui.session import Session

    runner = EngineRunner(limited_engine, {}, record=None)
    try:
        session = Session(runner.start())
        session.playback.pause()
        session.submit("some words", SamplingParams(max_tokens=30, ignore_eos=True))
        app = ScreenApp(session, restart=runner.start)

        async def ask_for(pilot: Pilot[int], blocks: str) -> None:
            await pilot.press("e")
            app.screen.query_one("#num_blocks", Input).value = blocks
            app.screen.query_one("#num_blocks", Input).focus()
            await pilot.press("enter")

        async def script(pilot: Pilot[int]) -> None:
            await until(pilot, lambda: app.session.playback.word == "PAUSED")
            await pilot.press("right_square_bracket")
            await until(pilot, lambda: app.session.position == 1)
            await ask_for(pilot, "99999999")
            await until(pilot, lambda: "num_blocks must be from 2 to 1000000, not 99999999" in text(app))
            await pilot.press("escape")
            await ask_for(pilot, "5000")
            await until(pilot, lambda: "the next run has 5000 blocks" in text(app))
            await pilot.press("R")
            await until(pilot, lambda: "the next run could not start: 5000 blocks do not fit" in text(app))
            assert (app.session, app.session.position, app.return_value) == (session, 1, None)
            assert app.session.playback.word == "ENDED"
            await pilot.press("R")
            await until(pilot, lambda: app.session.playback.word == "IDLE" and app.session.playback.ready)
            assert app.session.snapshot.stats.total_blocks == 40, "the setting that failed is forgotten"

        drive(app, (80, 24), script)
    finally:
        runner.close()


def test_words_with_brackets_are_words() -> None:
    """What was typed stands in the complaint about it, and is no markup."""
    from textual.widgets import Input

    from minipaged.tui.panes.dialogs import AddPrompt

    app = replay()

    async def script(pilot: Pilot[int]) -> None:
        app.push_screen(AddPrompt())
        await pilot.pause()
        app.screen.query_one("#prompt", Input).value = "x"
        app.screen.query_one("#n", Input).value = "[/b]"
        await pilot.press("enter")
        await until(pilot, lambda: "must be a number, not '[/b]'" in text(app))

    drive(app, (80, 24), script)


def test_names_in_a_trace_never_steer_the_terminal() -> None:
    """A finding, a model's name and the name of another system come from the file as well."""
    scene = sharing_scene()
    source = ListSource(scene.deltas, header=Header(finding="L1 \x1b]0;owned\x07 found", model="m\x1b[2J"))
    app = replay(source=source)
    app.session.message = source.header.finding
    shadow = ShadowDelta(1, "orca\x1b[31m", (), PoolBreakdown(1, 1, 1, 1, 1, 1))
    app.session.snapshot.shadows[shadow.system] = shadow

    async def script(pilot: Pilot[int]) -> None:
        app.paint()
        await pilot.pause()
        assert "L1 �]0;owned� found" in text(app)
        await pilot.press("c")
        await until(pilot, lambda: "orca�[31m" in text(app))
        assert not set("\x1b\x07") & set(text(app))

    drive(app, (120, 40), script)


@pytest.mark.parametrize("name", ["y.png", "y", "y.svg.gz"])
def test_a_screenshot_that_is_no_svg_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"ends in \.svg"):
        run_screen(scripted_engine, prompts=["x"], headless=True, steps=1, screenshot=tmp_path / name)
    assert not (tmp_path / name).exists()


def test_inside_a_running_event_loop_a_picture_is_drawn_and_a_screen_is_refused(tmp_path: Path) -> None:
    """As a notebook's cell would call it."""
    picture = tmp_path / "x.svg"

    async def cell() -> None:
        with pytest.raises(InputError, match=r"needs a terminal and an event loop of its own.*headless=True"):
            run_screen(scenario_path("cow"))
        assert run_screen(scenario_path("cow"), headless=True, screenshot=picture) == 0

    asyncio.run(cell())
    assert "Blocks" in picture.read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scenario": "cow", "max_tokens": 5}, "--max-tokens"),
        ({"scenario": "cow", "temperature": 0.5}, "--temperature"),
        ({"scenario": "cow", "tour": False}, "--no-tour"),
        ({"replay": Path("x.mpt"), "tour": False}, "--no-tour"),
        ({"attach": "http://localhost:1", "settings": {"num_blocks": 9}}, "--num-blocks"),
        ({"attach": "http://localhost:1", "max_tokens": 9}, "--max-tokens"),
        ({"headless": True, "tour": False}, "--no-tour"),
        ({"headless": True, "max_tokens": 0}, "max_tokens"),
        ({"headless": True, "temperature": -1.0}, "temperature"),
    ],
)
def test_options_that_do_nothing_together_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words) as refused:
        show(DEFAULT_MODEL, **options)  # type: ignore[arg-type]
    assert "\n" not in str(refused.value)


def test_most_tokens_and_temperature_are_those_of_all_prompts(tmp_path: Path) -> None:
    from minipaged.cli.show import read_prompts, with_params

    prompts = tmp_path / "p"
    prompts.write_text("one\ntwo\n")
    asked = with_params(read_prompts(prompts), 7, 0.5)
    assert [(text, p.max_tokens, p.temperature) for text, p in asked] == [("one", 7, 0.5), ("two", 7, 0.5)]
    assert with_params(asked, None, None) == asked


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_trends_stand_beside_the_rest_or_over_it(size: tuple[int, int]) -> None:
    app = replay(source=FileSource(scenario_path("orca")), at=70)

    async def script(pilot: Pilot[int]) -> None:
        await pilot.press("8")
        await until(pilot, lambda: "8 Trends" in text(app) and "tok/s  " in text(app))
        for word in ("running", "waiting", "found cached", "waste"):
            assert word in text(app)
        stats, queues = app.session.snapshot.stats, app.session.snapshot.queues
        await until(pilot, lambda: f"{len(queues.running)} " in _line(app, "running "))
        assert f"{stats.num_drawn / stats.elapsed_ns * 1e9:,.0f}" in _line(app, "tok/s  ")

    drive(app, size, script)


def _line(app: ScreenApp, word: str, before: int = 0) -> str:
    """The first line with that word, from so many cells before it on."""
    return next((line[line.index(word) - before :] for line in text(app).splitlines() if word in line), "")


def test_trends_of_a_long_trace_keep_every_second_step_and_stop_at_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    from minipaged.tui.panes.trends import trends_lines
    from minipaged.tui.reading import trends

    monkeypatch.setattr(trends, "MOST_ROWS", 4)
    source = ListSource(sharing_scene().deltas)
    kept = trends.Trends(source)
    kept.follow(seconds=60)
    assert kept.every == 4
    assert not kept.behind
    for at, row in enumerate(kept.upto(len(source))):
        assert tuple(row) == pytest.approx(trends.figures(source.delta(4 * at)))
    assert len(kept.upto(4)) == 1
    for width, height in ((40, 5), (60, 11), (20, 1)):
        lines = trends_lines(View(trends=kept.upto(len(source))), width, height)
        assert len(lines) <= height
        assert all(width_of(line) <= max(width, 24) for line in lines)
