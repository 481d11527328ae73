"""How a playback moves: one mode at a time, and only the transitions that are listed."""

from __future__ import annotations

import math
from functools import partial

import pytest
from scripted import scripted_engine, sharing_scene

from minipaged.config import SamplingParams
from minipaged.serving.live import EngineProcess
from minipaged.trace.sources import ListSource
from minipaged.tui.playback import TRANSITIONS, Mode, Playback, Script
from minipaged.tui.session import Session


def recorded(**settings: float) -> Playback:
    return Playback(ListSource(sharing_scene().deltas), **settings)


@pytest.mark.parametrize("before", Mode)
@pytest.mark.parametrize("after", Mode)
def test_only_listed_transitions_are_made(before: Mode, after: Mode) -> None:
    playback = recorded()
    playback.mode = before
    if after is before or after in TRANSITIONS[before]:
        playback._enter(after)
        assert playback.mode is after
    else:
        with pytest.raises(RuntimeError, match=f"{before.value} cannot become {after.value}"):
            playback._enter(after)
        assert playback.mode is before


def test_a_recording_is_paused_replayed_and_paused_at_its_end() -> None:
    playback = recorded(speed=math.inf)
    assert (playback.mode, playback.word) == (Mode.PAUSED, "REPLAY")
    playback.toggle()
    assert (playback.mode, playback.word) == (Mode.REPLAYING, "PLAYING")
    assert len(playback.tick(0.0).applied) == len(playback.source)
    assert (playback.mode, playback.word, playback.at_edge) == (Mode.PAUSED, "REPLAY", True)
    assert playback.step(1) == "this is the end of the trace"
    playback.toggle()
    assert (playback.mode, playback.position) == (Mode.REPLAYING, 0), "from the start again"
    playback.go(3)
    assert (playback.mode, playback.position) == (Mode.PAUSED, 3), "a key takes over"


def test_another_speed_leaves_a_replay_where_it_is() -> None:
    """Of an engine that rests, the past is shown again: a speed chosen meanwhile must not jump to its newest step."""
    with EngineProcess(partial(scripted_engine, num_blocks=64)) as engine:
        session, live = Session(engine.source), engine.source
        assert live.wait(lambda: live.ready)
        session.submit("a prompt", SamplingParams(max_tokens=20))
        session.playback.start()
        assert live.wait(lambda: live.idle and len(live) > 5)
        session.tick(0.0)
        session.go(2)
        session.playback.toggle()
        session.playback.change_speed(-1)
        assert (session.playback.mode, session.position) == (Mode.REPLAYING, 2)
        assert session.tick(0.0).moved
        session.tick(60.0)
        assert session.playback.mode is Mode.FOLLOWING, "at its end the engine is followed again"


def test_a_branch_takes_no_step_from_a_key_before_it_has_come_to_its_own() -> None:
    with EngineProcess(partial(scripted_engine, num_blocks=64)) as engine:
        session, live = Session(engine.source), engine.source
        prompts = [(0, ("one", SamplingParams(max_tokens=20))), (3, ("two", SamplingParams(max_tokens=20)))]
        session.repeat(prompts, 5)
        assert live.wait(lambda: live.ready)
        assert session.playback.word == "BRANCHING"
        assert "first comes to step 5" in session.playback.toggle()
        assert "first comes to step 5" in session.playback.step(1)
        assert live.outstanding == 0, "no permit was given"
        for now in range(2000):
            session.tick(now / 100)
            if session.playback.mode is Mode.PAUSED:
                break
            live.wait(lambda: live.outstanding == 0, 1.0)
        assert (session.position, len(live), session.playback.script) == (5, 5, None)
        assert len(session.asked) == 2


def test_a_script_without_opinions_lets_the_playback_be() -> None:
    playback = recorded()
    playback.begin(Script())
    assert not playback.tick(0.0).applied
    assert playback.go(4) == ""
    assert (playback.position, playback.mode) == (4, Mode.SCRIPTED)
    playback.end_script()
    assert (playback.mode, playback.script) == (Mode.PAUSED, None)
