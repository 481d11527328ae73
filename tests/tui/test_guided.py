"""A first run stops where something happens for the first time, says what, and goes on by itself; what it came to is said at the end."""

from __future__ import annotations

import os
import re
import signal
from functools import partial
from pathlib import Path

import pytest
from screens import drive, replay, text, until
from scripted import Scene, scripted_engine, sharing_scene
from textual.pilot import Pilot

from minipaged.config import SamplingParams
from minipaged.serving.live import EngineProcess
from minipaged.trace.snapshot import Snapshot
from minipaged.trace.sources import ListSource
from minipaged.trace.words import sentence, summary
from minipaged.tui.app import ScreenApp
from minipaged.tui.panes.bars import news_lines
from minipaged.tui.panes.text import TextPane, text_title
from minipaged.tui.run import run_screen
from minipaged.tui.scripted.guide import MOST_STEPS, Guide
from minipaged.tui.scripted.tour import STOP_SECONDS, Tour
from minipaged.tui.session import Session
from minipaged.tui.view import View

PARAMS = SamplingParams(max_tokens=30)


def test_a_guide_says_each_thing_once_and_names_what_the_screen_shows() -> None:
    guide, snapshot, said = Guide(), Snapshot(), []
    for delta in sharing_scene().deltas:
        snapshot.apply(delta)
        words = guide.words(delta, snapshot)
        if words:
            said.append(words)
            assert len(words) <= 78, "it fits the narrowest screen"
    assert said[0] == "A letter is one answer being written, a cell is a block of 4 tokens"
    assert sum("makes way" in words for words in said) <= 1
    assert any("answers to one prompt" in words for words in said)
    assert any("gets a copy, block" in words for words in said)
    assert len(said) == len(set(said))
    assert len(said) <= 5


def test_a_guide_does_not_slow_a_run_for_ever() -> None:
    guide, scene = Guide(), Scene(8)
    scene.add("x" * 8)
    scene.admit(0)
    delta = scene.step()
    for _ in range(MOST_STEPS):
        assert not guide.over
        guide.words(delta, Snapshot())
    assert guide.over


def guided(engine: EngineProcess) -> Session:
    """A session over a loaded engine that has been asked for something."""
    source = engine.source
    assert source.wait(lambda: source.ready)
    session = Session(source, guided=True)
    session.submit("The cache is split into pages", PARAMS)
    session.playback.start()
    return session


def go(session: Session, now: float, until: str) -> float:
    """Tick, a tenth of a second each, until the session is called that; returns the time."""
    source = session.live
    assert source is not None
    for _ in range(2000):
        session.tick(now)
        if session.playback.word == until:
            return now
        now += 0.1
        source.wait(lambda: source.outstanding == 0, 1.0)
    raise AssertionError(f"it never came to {until}: {session.playback.word}")


def test_a_run_stops_says_why_and_goes_on_by_itself() -> None:
    with EngineProcess(partial(scripted_engine, num_blocks=64)) as engine:
        session = guided(engine)
        assert session.playback.speed_text == "slowly at first"
        now = go(session, 0.0, "TOUR")
        assert "A letter is one answer" in session.message
        assert session.playback.speed_text == f"goes on in {STOP_SECONDS:.0f} s"
        session.tick(now + 2.5)
        assert session.playback.speed_text == f"goes on in {STOP_SECONDS - 2:.0f} s"
        here = session.position
        session.tick(now + STOP_SECONDS - 0.1)
        assert (session.position, session.playback.word) == (here, "TOUR")
        session.tick(now + STOP_SECONDS)
        assert session.playback.word == "LIVE"
        assert not session.message
        go(session, now + STOP_SECONDS, "IDLE")
        assert session.position > here + 5


def test_a_stop_waits_while_a_window_stands_before_it() -> None:
    with EngineProcess(partial(scripted_engine, num_blocks=64)) as engine:
        session = guided(engine)
        app = ScreenApp(session)

        async def script(pilot: Pilot[int]) -> None:
            await until(pilot, lambda: session.playback.word == "TOUR")
            assert "TOUR" in text(app)
            assert "goes on in" in text(app)
            await pilot.press("question_mark")
            await until(pilot, lambda: len(app.screen_stack) > 1)
            app.frame()
            tour = session.playback.script
            assert isinstance(tour, Tour)
            session.playback.look_away(tour.stop_ends + 100)
            session.tick(tour.stop_ends - 1)
            assert session.playback.word == "TOUR"
            await pilot.press("escape", "space")
            await until(pilot, lambda: session.playback.word != "TOUR")

        drive(app, (80, 24), script)


def test_keys_take_over_from_a_guide() -> None:
    with EngineProcess(partial(scripted_engine, num_blocks=64)) as engine:
        session = guided(engine)
        now = go(session, 0.0, "TOUR")
        session.playback.toggle()
        assert session.playback.word == "LIVE", "space ends a stop"
        session.playback.pause()
        session.tick(now + 100)
        assert session.playback.word == "PAUSED", "a pause of one's own stays"
        session.playback.change_speed(-1)
        assert session.playback.script is None
        assert session.playback.word == "PAUSED", "a speed does not end a pause of one's own"
    with EngineProcess(partial(scripted_engine, num_blocks=64)) as engine:
        session = guided(engine)
        go(session, 0.0, "TOUR")
        session.playback.change_speed(1)
        assert (session.playback.script, session.playback.word) == (None, "LIVE"), "a speed ends a stop, and the tour"
    with EngineProcess(partial(scripted_engine, num_blocks=64)) as engine:
        session = guided(engine)
        now = go(session, 0.0, "TOUR")
        session.go(0)
        session.tick(now + 100)
        assert (session.playback.word, session.position) == ("PAUSED", 0), "who looks back is left alone"


def test_a_stop_does_not_outlive_the_engine() -> None:
    with EngineProcess(partial(scripted_engine, num_blocks=64)) as engine:
        session = guided(engine)
        now = go(session, 0.0, "TOUR")
        os.kill(engine.pid, signal.SIGKILL)
        assert session.live is not None
        session.live._thread.join(30)
        session.tick(now + 1)
        said = session.message
        assert "has ended" in said
        session.tick(now + STOP_SECONDS + 1)
        assert (session.playback.word, session.playback.moving, session.message) == ("ENDED", False, said)
        assert "goes on in" not in session.playback.speed_text


def test_the_end_is_summed_up() -> None:
    deltas = sharing_scene().deltas
    snapshot = Snapshot()
    for delta in deltas:
        snapshot.apply(delta)
    view = View(snapshot=snapshot, delta=deltas[-1], word="IDLE")
    assert text_title(view) == "3 Text: 3 answers to 2 prompts"
    snapshot.stats = snapshot.stats._replace(generated_tokens=1, copies=2, preemptions=1, hit_tokens=8)
    assert summary(view) == "done: 1 token · 2 blocks copied on write · 8 tokens found cached · 1 preempted"
    snapshot.stats = snapshot.stats._replace(generated_tokens=0)
    assert summary(view) == sentence(view)


def test_headless_says_what_it_did_and_what_was_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trace = tmp_path / "t.mpt"
    assert run_screen(partial(scripted_engine, num_blocks=64), prompts=["good", ""], headless=True, record=trace) == 0
    out, err = capsys.readouterr()
    assert out.startswith("minipaged: 1 prompt, 1 answer, ")
    assert "over 63 blocks of 4" in out
    assert err == "minipaged: refused: the prompt is empty: give at least one character\n"
    assert run_screen(scripted_engine, prompts=[""], headless=True) == 2
    assert "refused" in capsys.readouterr().err
    assert run_screen(trace, headless=True) == 0
    assert "steps in this trace" in capsys.readouterr().out


def test_the_whole_run_is_summed_up_wherever_one_looks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has gone back to the start and quits there reads of the whole run."""

    def looked_back(session: Session, *_: object) -> int:
        live = session.live
        assert live is not None
        assert live.wait(lambda: live.ready)
        go(session, 0.0, "DONE")
        session.go(0)
        return 0

    monkeypatch.setattr("minipaged.tui.run._show", looked_back)
    assert run_screen(partial(scripted_engine, num_blocks=64), prompts=["good"]) == 0
    said = re.search(r"1 answer, (\d+) tokens in (\d+) steps", capsys.readouterr().out)
    assert said is not None
    assert min(int(said[1]), int(said[2])) > 0


def test_a_run_that_is_over_shows_its_fullest_moment() -> None:
    with EngineProcess(partial(scripted_engine, num_blocks=64)) as engine:
        source = engine.source
        assert source.wait(lambda: source.ready)
        session = Session(source, ends_fullest=True)
        for prompt in ("The cache is split into pages", "and another one"):
            session.submit(prompt, PARAMS)
        session.playback.start()
        now = go(session, 0.0, "DONE")
        most = int(source.occupied.max())
        assert int(source.occupied[session.position - 1]) == most > int(source.occupied[-1])
        assert session.position < len(source)
        assert session.final is not None
        view = View(snapshot=session.snapshot, delta=session.delta, word="DONE")
        assert summary(view, session.final).startswith(f"done: {session.final.generated_tokens} tokens")
        assert summary(view, session.final).endswith(f"this is step {session.snapshot.step}, its fullest")
        here = session.position
        session.tick(now + 10)
        assert (session.position, session.playback.word) == (here, "DONE"), "it stays there"
        session.submit("one more", PARAMS)
        session.tick(now + 10.1)
        now = go(session, now + 11, "DONE")
        assert session.position > here, "the fullest moment of what came since"
        session.playback.toggle()
        assert session.playback.word == "PLAYING", "space plays it again, from the start"
        assert session.position == 0
        go(session, now + 1, "DONE")
        session.go(len(source))
        assert session.playback.word == "PAUSED"


def test_a_recording_ends_on_its_fullest_moment_too() -> None:
    app = replay()
    source = app.session.source
    app.session = Session(source, ends_fullest=True)

    async def script(pilot: Pilot[int]) -> None:
        app.session.playback.toggle()
        await until(pilot, lambda: "DONE" in text(app))
        assert source.occupied[app.session.position - 1] == source.occupied.max()
        assert "behind live" not in text(app)
        assert "play it again" in text(app)
        await pilot.press("G")
        await until(pilot, lambda: "REPLAY" in text(app))
        assert app.session.position == len(source)

    drive(app, (80, 24), script)


def test_prompts_are_seen_while_the_model_loads() -> None:
    view = View(word="LOADING", pending=("What is a page table? \x1b[31m", "Name a fruit."))
    lines = ["".join(text for text, _ in line) for line in TextPane(view).lines(view, 60, 3)]
    assert lines == ["…│What is a page table? �[31m", "…│Name a fruit."]
    assert news_lines(view, 80, 2) == [[(" ", "text"), ("the model loads: these prompts wait for it", "news")]]


def test_prompts_are_seen_until_the_first_step() -> None:
    """Between the engine's taking a prompt and the end of the step that shows it there may be a second or more."""
    deltas = sharing_scene().deltas
    for steps, seen in ((0, ("Name a fruit.",)), (1, ())):
        session = Session(ListSource(deltas[:steps]))
        session.asked[0] = ("Name a fruit.", PARAMS)
        assert session.pending == seen
