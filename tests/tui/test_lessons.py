"""The lessons: what the captions say is what the pool shows, and the screen walks through them."""

from __future__ import annotations

import asyncio

import pytest
from screens import drive, replay, text
from textual.pilot import Pilot
from textual.widgets import OptionList

from minipaged.trace.events import FLAG_CACHED
from minipaged.trace.player import Player
from minipaged.trace.snapshot import Snapshot
from minipaged.trace.words import sentence
from minipaged.tui.scripted.lessons import LESSONS, Lesson
from minipaged.tui.scripted.walk import FLASH_SECONDS, LessonWalk
from minipaged.tui.session import Session
from minipaged.tui.view import View


def states(lesson: Lesson) -> list[Snapshot]:
    return [Player(lesson.source, beat.position).snapshot for beat in lesson.beats]


def test_the_five_beats_of_copy_on_write() -> None:
    lesson = LESSONS["copy-on-write"]()
    one, fork, still, ask, copied, end = states(lesson)
    assert one.tables == {0: (1, 2, 3)}
    assert fork.tables == {0: (1, 2, 3), 1: (1, 2, 3)}
    assert fork.stats.free_blocks == one.stats.free_blocks, "no memory copied"
    assert still.tables == ask.tables == fork.tables
    assert copied.tables == {0: (1, 2, 3), 1: (1, 2, 4)}
    assert copied.device.refs[1:5].tolist() == [2, 2, 1, 1]
    assert end.stats.copies == 1
    assert "3→4" in lesson.beats[4].caption
    assert lesson.beats[3].caption.startswith("Which block number")


def walk(*, animated: bool) -> tuple[Session, LessonWalk]:
    """The copy-on-write lesson, painted once, at its first beat."""
    session = Session.of_lesson(LESSONS["copy-on-write"](), animated=animated)
    assert isinstance(session.playback.script, LessonWalk)
    return session, session.playback.script


def test_what_a_beat_changes_lights_up_for_a_moment() -> None:
    session, script = walk(animated=True)
    for _ in range(4):
        session.playback.toggle()
    assert script.flash == {3, 4}
    assert session.tick(10.0).ids is None, "a jump concerns every block"
    assert not session.tick(10.0 + FLASH_SECONDS / 2).moved
    assert script.flash
    assert session.tick(10.0 + FLASH_SECONDS).moved
    assert not script.flash
    session.playback.step(-1)
    assert not script.flash, "going back is no event"


def test_without_animations_the_caption_tells_before_and_after() -> None:
    session, script = walk(animated=False)
    for _ in range(4):
        session.playback.toggle()
    assert script.caption.endswith("[B 1 2 3 → 1 2 4]")
    assert not script.flash


def test_an_app_without_animations_shows_the_words() -> None:
    app = replay()
    app.animation_level = "none"

    async def script(pilot: Pilot[int]) -> None:
        app.start_lesson("copy-on-write")
        await pilot.press("space")
        assert "[B – → 1 2 3]" in text(app)

    drive(app, (120, 40), script)


def test_the_other_lessons_show_what_they_name() -> None:
    found = {name: states(make()) for name, make in LESSONS.items()}
    assert found["prefix hit"][-1].tables[1][:2] == (1, 2)
    assert [s.stats.free_blocks for s in found["preemption"]][1:3] == [0, 0]
    assert found["preemption"][3].sequences[1].status == "waiting"
    assert len(found["preemption"][3].sequences[1].token_ids) == 12, "its words are kept"
    assert found["swap"][1].host_tables[1]
    assert found["swap"][3].tables[1] != found["swap"][0].tables[1]
    assert found["beam step"][-1].sequences[0].status == "finished"
    assert found["beam step"][-1].stats.copies == 2
    evicted = found["eviction"]
    assert evicted[1].stats.free_blocks == evicted[1].stats.cached_blocks == 2
    assert evicted[3].device.flags[1] & FLAG_CACHED
    assert evicted[-1].tables[2][0] == 1


@pytest.mark.parametrize("name", list(LESSONS))
def test_every_lesson_asks_and_explains_in_few_words(name: str) -> None:
    lesson = LESSONS[name]()
    assert 4 <= len(lesson.beats) <= 7
    assert all(20 < len(beat.caption) <= 160 for beat in lesson.beats)
    for beat in lesson.beats:
        player = Player(lesson.source, beat.position)
        assert sentence(View(player.snapshot, player.delta))


@pytest.mark.parametrize("size", [(80, 24), (120, 40)], ids=["80x24", "120x40"])
def test_a_lesson_on_the_screen(size: tuple[int, int]) -> None:
    app = replay(at=5)

    async def script(pilot: Pilot[int]) -> None:
        await pilot.press("L")
        assert app.screen.query_one(OptionList).option_count == len(LESSONS)
        await pilot.press("enter")
        await pilot.pause()
        assert isinstance(app.session.playback.script, LessonWalk)
        assert "LESSON 1 of 6" in text(app)
        await pilot.press("space")
        await pilot.pause()
        assert "the cells read 2" in " ".join(text(app).replace("│", " ").split())
        await pilot.press("space", "right_square_bracket", "space", "right_curly_bracket")
        assert "LESSON 6 of 6" in text(app)
        assert "That is copy-on-write" in " ".join(text(app).replace("│", " ").split())
        await pilot.press("space")
        assert "that was all" in text(app)
        await pilot.press("left_square_bracket")
        assert "LESSON 5 of 6" in text(app)
        await pilot.press("escape")
        await pilot.pause()
        assert app.session.position == 5
        assert "REPLAY" in text(app)
        assert "LESSON" not in text(app)

    drive(app, size, script)


def test_the_beats_are_told_by_text_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without animations and colour each beat still differs from the one before, in words."""
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TEXTUAL_ANIMATIONS", "none")

    async def read() -> list[str]:
        app = replay()
        shots = []
        async with app.run_test(size=(80, 24)) as pilot:
            app.frame()
            app.start_lesson("copy-on-write")
            for _ in range(6):
                await pilot.pause()
                shots.append(text(app))
                await pilot.press("space")
        return shots

    shots = asyncio.run(read())
    assert len(set(shots)) == 6
    assert "2→◆4▆  was 3" in shots[4]
