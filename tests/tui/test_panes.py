"""The other panes without an app: tables, queues, text, timeline, header, sentences, inspector."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from scripted import Scene, sharing_scene

from minipaged.memory.types import PoolBreakdown
from minipaged.text.safe import clean, clean_bytes
from minipaged.trace.events import MARKS, ShadowDelta, StepDelta
from minipaged.trace.player import Player
from minipaged.trace.snapshot import fold
from minipaged.trace.sources import ListSource
from minipaged.trace.words import TICKS, sentence, sentences
from minipaged.tui.map.layout import Zoom
from minipaged.tui.palette import ASCII, UNICODE, Glyphs
from minipaged.tui.panes.bars import gauge_lines, header_line, host_line, keys_line, legend_lines, news_lines
from minipaged.tui.panes.inspector import block_lines, journey_lines, past_lines
from minipaged.tui.panes.side import tree_lines, waste_lines
from minipaged.tui.panes.tables import TablesPane, queue_lines, table_lines
from minipaged.tui.panes.text import text_lines, wrap_tail
from minipaged.tui.panes.timeline import _LEGEND, scale, timeline_lines, timeline_title
from minipaged.tui.reading.history import History
from minipaged.tui.reading.moves import MOVE_SECONDS
from minipaged.tui.scripted.lessons import LESSONS
from minipaged.tui.session import Session
from minipaged.tui.view import Line, View, width_of
from minipaged.tui.words.cells import fit, rows_of, tail, to_ascii


def view_at(position: int, deltas: list[StepDelta] | None = None, **words: object) -> View:
    deltas = sharing_scene().deltas if deltas is None else deltas
    source = ListSource(deltas)
    player = Player(source, position)
    view = View(player.snapshot, player.delta, position=position, length=len(deltas), **words)  # type: ignore[arg-type]
    view.occupied, view.marks = source.occupied, source.marks
    view.token_bytes = {code: bytes([code]) for code in range(128)}
    return view


def read(line: Line) -> str:
    return "".join(text for text, _ in line)


def read_all(lines: list[Line]) -> list[str]:
    return [read(line).rstrip() for line in lines]


def test_copy_on_write_in_tables() -> None:
    """The five beats, as a newcomer reads them in the tables pane."""
    assert read_all(table_lines(view_at(2), 40, 8)) == ["A 0→1 1→2 2→3▄"]
    assert read_all(table_lines(view_at(3), 40, 8)) == ["A 0→1 1→2 2→3▄", "B 0→1 1→2 2→3▄"]
    assert read_all(table_lines(view_at(4), 40, 8)) == ["A 0→1 1→2 2→3▄", "B 0→1 1→2 2→◆4▆  was 3"]
    assert read_all(table_lines(view_at(5), 40, 8)) == ["A 0→1 1→2 2→3▆", "B 0→1 1→2 2→4"]


def test_shared_entries_look_shared() -> None:
    line = table_lines(view_at(3), 40, 8)[0]
    assert dict(line)["1"] == "shared0"
    assert dict(table_lines(view_at(2), 40, 8)[0])["1"] == "hue0"


def test_swapped_and_queues() -> None:
    view = view_at(8)
    assert read_all(table_lines(view, 40, 8))[2] == "C ▽ on CPU: 4 blocks"
    assert read_all(queue_lines(view, 40)) == ["run A B", "swapped C · copies 1 · saved 2"]
    assert read_all(queue_lines(view_at(6), 40))[0] == "run A B · wait C"
    assert read(host_line(view, 40)) == "CPU ▽▽▽▽···· 4 of 8 blocks"


def test_the_pane_keeps_queues_at_its_foot() -> None:
    lines = TablesPane(view_at(8)).lines(view_at(8), 30, 8)
    assert len(lines) == 8
    assert read(lines[-2]).startswith("run A B")


@pytest.mark.parametrize(
    ("position", "said"),
    [
        (0, "the start: every block is free"),
        (2, "A starts: 3 blocks for 10 tokens"),
        (3, "B forks from A: the same 3 blocks, no memory copied"),
        (4, "B writes shared block 3 → copied to 4; blocks 1, 2 stay shared"),
        (8, "C moves to CPU memory: 4 blocks"),
        (9, "B is done (it said stop); 4 blocks given back · C comes back from CPU memory: 4 blocks"),
        (10, "the pool is full: C gives its blocks back and will recompute later"),
    ],
)
def test_sentences(position: int, said: str) -> None:
    assert sentence(view_at(position)).startswith(said)


def test_every_kind_of_event_has_words() -> None:
    from minipaged.trace.events import Event

    view = view_at(8)
    assert view.delta is not None
    for kind in (
        "refuse",
        "preempt",
        "copy",
        "fork",
        "abort",
        "prune",
        "finish",
        "admit",
        "rejoin",
        "evict",
        "release",
        "knob",
        "append",
        "swap_in",
    ):
        one = Event(0, kind, -1, 0, 3, 4, 1)
        view.delta = StepDelta(1, 0, (one,), queues=view.delta.queues, stats=view.delta.stats)
        assert sentences(view)[0].strip(), kind
        assert "{" not in sentences(view)[0]


def test_timeline_of_ten_steps() -> None:
    lines = timeline_lines(view_at(4), 60)
    assert read(lines[1]).startswith("    +   f   ▲3"), "ten steps have four columns each"
    assert "◆" not in read(lines[0])
    assert len(read(lines[0])) == 40


def test_all_kinds_of_event_of_a_step_leave_marks() -> None:
    bits = MARKS["preempt"] | MARKS["evict"] | MARKS["finish"] | MARKS["admit"] | MARKS["copy"]
    view = View(position=1, length=2)
    view.occupied, view.marks = np.array([5000, 5000], np.uint16), np.array([bits, MARKS["fork"]], np.uint16)
    rows = [read(line) for line in timeline_lines(view, 40, 1, 3)]
    assert rows[1].startswith("pc✓+f")
    assert rows[2].startswith("e")
    view.length, view.position = 40, 20
    view.occupied, view.marks = np.full(40, 5000, np.uint16), np.full(40, bits, np.uint16)
    assert read(timeline_lines(view, 40, 1, 2)[1])[0] == "p"
    assert read(timeline_lines(view, 40, 1, 2)[2])[0] == "…", "there were more"
    assert read(timeline_lines(view, 40, 1, 5)[5])[0] == "e"


@pytest.mark.parametrize("width", [80, 50, 40])
def test_what_happens_stands_whole_on_two_lines(width: int) -> None:
    """The words of each step of a scene, unless two sentences are too long for the narrowest screens."""
    deltas = sharing_scene().deltas
    for position in range(1, len(deltas) + 1):
        view = view_at(position, deltas)
        lines = [read(line) for line in news_lines(view, width, 2)]
        assert len(lines) <= 2
        assert all(len(line) <= width for line in lines)
        told = " ".join(line.strip() for line in lines).removesuffix(" …").replace(" · ", " ")
        assert sentence(view).replace(" · ", " ").startswith(told)
        if width == 80:
            assert told == sentence(view).replace(" · ", " ")
    view = replace(view, message="words of the program")
    assert news_lines(view, 80, 2) == [[(" ", "text"), ("words of the program", "alert")]]


def test_the_gauge_says_how_full_and_what_is_shared() -> None:
    view = view_at(8)
    for width in (40, 80, 200):
        for height in (1, 2, 3):
            lines = gauge_lines(view, width, height)
            assert len(lines) == height
            assert all(width_of(line) <= width for line in lines[: max(1, height - 1)])
    assert "23%" in read(gauge_lines(view, 80, 1)[0])
    assert "7/31 blocks" in read(gauge_lines(view, 80, 1)[0])
    words = read(gauge_lines(view, 120, 2)[1])
    assert f"{len(view.snapshot.device.sharers)} shared by several" in words
    assert "no pool yet" in read(gauge_lines(View(), 80, 1)[0])


@given(st.integers(0, 100_000), st.integers(16, 300), st.booleans(), st.integers(1, 5))
def test_the_timeline_fits_any_length(length: int, width: int, recorded: bool, rows: int) -> None:
    view = View(position=length // 2, length=length, word="PAUSED", hindsight=recorded)
    view.occupied, view.marks = np.full(length, 5000, np.uint16), np.full(length, 3, np.uint16)
    for line in timeline_lines(view, width, rows, rows):
        assert width_of(line) <= width
    found = scale(length, width, growing=not recorded)
    assert found.columns <= width
    wide = found.per_step
    if recorded:
        assert found.columns == min(length * wide, width), "a recording uses the whole width"
    starts = found.starts().tolist()
    for column in {0, found.columns // 2, found.columns - 1} & set(range(found.columns)):
        last = found.last_of(column)
        assert found.column_of(last) == column - column % wide, "a click goes where the caret then stands"
        assert starts[column // wide] == (found.last_of(column - column % wide - 1) if column >= wide else 0)


def test_a_tall_timeline_stands_on_its_last_line() -> None:
    view = View(position=3, length=3)
    view.occupied, view.marks = np.array([10000, 5000, 100], np.uint16), np.zeros(3, np.uint16)
    rows = [read(line) for line in timeline_lines(view, 20, 4)[:4]]
    assert rows == [
        bar.replace("█", "████").replace(" ", "    ").replace("▁", "▁▁▁▁") for bar in ("█  ", "█  ", "██ ", "██▁")
    ]


@pytest.mark.parametrize(
    ("most", "words"), [(100, "bars to 12.5%"), (1300, "bars to 25%"), (5000, "bars to 50%"), (5001, "")]
)
def test_a_pool_that_stays_nearly_empty_has_bars_that_say_something(most: int, words: str) -> None:
    view = View(position=2, length=2)
    view.occupied, view.marks = np.array([most // 2, most], np.uint16), np.zeros(2, np.uint16)
    assert (words or "bars") in timeline_title(view, 80) or not words
    assert "bars" in timeline_title(view, 80) or not words
    row = read(timeline_lines(view, 20)[0])[::4]
    if most in (5000, 5001):
        assert row == ("▄█" if words else "▂▄")


def test_who_went_to_another_queue_is_marked() -> None:
    deltas = sharing_scene().deltas
    at = next(n + 1 for n, delta in enumerate(deltas) for event in delta.events if event.kind == "swap_out")
    session = Session(ListSource(deltas))
    session.playback.seek(at)
    view = View(session.snapshot, session.delta, moves=session.moves)
    assert any("▽" in text and role == "mark" for line in queue_lines(view, 40) for text, role in line)
    session.playback.seek(at + 1)
    assert "swap_out" not in session.moves.values()


def test_while_it_plays_a_mark_stays_until_it_has_been_seen() -> None:
    session = Session(ListSource(sharing_scene().deltas), speed=1.0)
    session.playback.toggle()
    for now in (0.0, 1.0, 2.0):
        session.tick(now)
    assert session.moves == {0: "admit"}
    session.tick(2.0 + MOVE_SECONDS / 2)
    assert session.moves == {0: "admit"}
    assert session.tick(2.1 + MOVE_SECONDS).moved, "the mark goes: paint"
    assert not session.moves


def test_header_says_where_and_how_full() -> None:
    live = view_at(8, word="PAUSED", speed="full speed")
    live.length = 20
    line = read(header_line(live, 100))
    assert line.startswith(" ‖ PAUSED · step 7 · 12 behind live")
    assert line.endswith("2 run · 1 wait · waste 3.6% ")
    assert width_of(header_line(live, 80)) <= 80
    assert "live" not in read(header_line(view_at(8, word="REPLAY"), 80))


def test_waste_is_tail_slots_over_held_slots() -> None:
    scene = Scene()
    scene.admit(scene.add("abcde"))  # two blocks of four: three slots hold nothing
    scene.step()
    assert "waste 37.5%" in read(header_line(view_at(1, scene.deltas), 80))


def test_text_shows_prompt_and_answer() -> None:
    view = view_at(8)
    line = text_lines(view, view.snapshot.sequences[1], 40, 1)[0]
    assert read(line) == "B │The cache split"
    assert ("The cache ", "dim") in line
    assert ("split", "text") in line


@given(st.text("ab字\u200b ", max_size=300), st.text("xy漢 ↵", max_size=300), st.integers(2, 30), st.integers(1, 5))
def test_wrapped_text_fits_and_ends_with_the_newest(prompt: str, answer: str, width: int, most: int) -> None:
    rows = wrap_tail(clean(prompt), clean(answer), width, most)
    assert len(rows) <= most
    assert all(width_of(row) <= width for row in rows)
    everything = (clean(prompt) + clean(answer)).replace(" ", "")
    shown = "".join(read(row) for row in rows).replace(" ", "")
    assert everything.endswith(shown.lstrip("…")) or not shown.strip("…")


@given(st.text("ab ", max_size=200), st.integers(2, 30), st.integers(0, 40))
def test_rows_lose_nothing_but_spaces_and_break_between_words(text: str, width: int, start: int) -> None:
    rows = rows_of(text, width, start)
    assert all(0 < end - begin <= width for begin, end in rows)
    assert "".join(text[begin:end] for begin, end in rows).replace(" ", "") == text[start:].replace(" ", "")
    for (begin, end), (after, _) in pairwise(rows):
        assert text[end:after] in ("", " ")
        if (
            text[end - 1] != " " and text[after] != " " and end == after
        ):  # inside a word: only of one that fills half a row
            assert " " not in text[begin + width // 2 : end]


def test_rows_keep_still_while_text_grows() -> None:
    """A row that is whole reads the same until it has gone up and out of sight, but where the window moves."""
    text = "the cache is split into pages of one size, and " * 12
    changed = 0
    before: list[str] = []
    for end in range(200, len(text)):
        rows = [read(row) for row in wrap_tail("", text[:end], 30, 5)]
        changed += bool(before) and not set(rows[1:-2]) <= set(before)  # the first is cut, the last two take in words
        before = rows
    assert changed <= 3, "the window moves by as much as it holds"


@given(st.text(max_size=80), st.integers(0, 40))
def test_unsafe_text_is_made_safe(text: str, width: int) -> None:
    """Nothing that a terminal would obey is left, and every character takes the cells that it is counted for."""
    safe = clean(text)
    assert all(c.isprintable() for c in safe)
    assert not any(c in safe for c in "\x1b\x07\r\n\t\u202e\u2066\u200b\u200d\ufeff")
    assert all(cell_len(c) >= 1 for c in safe)
    assert all(ord(c) < 0x10000 for c in safe)
    assert cell_len(fit(safe, width)) <= width
    assert cell_len(tail(safe, width)) <= width
    assert to_ascii(safe).isascii()
    assert cell_len(to_ascii(safe)) == cell_len(safe)


def test_what_escape_sequences_become() -> None:
    assert clean("a\x1b[31mred\x1b]0;title\x07") == "a�[31mred�]0;title�"
    assert clean("line\nbreak") == "line↵break"
    assert clean("a\u202eb") == "a�b"
    assert clean("👩‍💻!") == "□□!", "a joiner is invisible, not unsafe"
    assert clean_bytes("é€".encode()[:-1]) == "é", "a character of which bytes are missing waits"
    assert clean_bytes(b"\xff\xfe") == "��"


def test_a_fork_is_in_the_past_of_the_blocks_it_shares() -> None:
    source = ListSource(LESSONS["copy-on-write"]().source.delta(at) for at in range(2))
    assert [past.event.kind for past in History().of(source, 1, 2)][-1] == "fork"
    assert "fork" not in [past.event.kind for past in History().of(source, 5, 2)]


def test_inspector_tells_owners_text_and_past() -> None:
    deltas = sharing_scene().deltas
    source = ListSource(deltas)
    view = view_at(5, deltas, block=4)
    view.past = tuple(History().of(source, 4, 5))
    assert read_all(block_lines(view, 40))[0] == "block 4  ref 1  4/4 slots"
    assert "owner B[2]" in read_all(block_lines(view, 40))[2]
    assert read_all(block_lines(view, 40))[3] == "“e sp”"
    assert read_all(past_lines(view, 40, 5, 0)) == ["its past", "   3 copied from 3 for B"]
    null = view_at(5, deltas, block=0)
    assert "null block" in read_all(block_lines(null, 60))[1]


def test_history_goes_back_and_forth() -> None:
    source, history = ListSource(sharing_scene().deltas), History()
    late = history.of(source, 3, 10)
    assert [past.event.kind for past in late] == ["alloc", "fork", "copy", "publish", "free"]
    assert [past.event.kind for past in history.of(source, 3, 4)] == ["alloc", "fork", "copy"]
    assert history.of(source, 3, 10) == late


def test_a_tokens_journey() -> None:
    lines = read_all(journey_lines(view_at(5), 1, 9, 60))
    assert lines[0].startswith("token 9 of B")
    assert "logical block 2, slot 1" in lines[1]
    assert "physical block 4" in lines[2]
    assert "4 × 4 + 1 = 17" in lines[3]


def test_waste_beside_shadows() -> None:
    view = view_at(8)
    view.shadows = {"orca-max": ShadowDelta(7, "orca-max", (), PoolBreakdown(22, 66, 0, 12, 0, 0))}
    rows = read_all(waste_lines(view, 50))
    assert rows[0].startswith("orca-max")
    assert rows[0].endswith("78%")
    assert "not speed" in rows[-1]


def test_the_tree_of_forks() -> None:
    rows = read_all(tree_lines(view_at(8), 40, 10))
    assert rows[0].startswith("A ")
    assert rows[1].startswith("└─B ")


def test_keys_and_legend_fit_80_columns() -> None:
    view = view_at(5)
    assert width_of(keys_line(view, 80)) <= 80
    assert "? help" in read(keys_line(view, 80))
    assert all(width_of(line) <= 46 for line in legend_lines(view, 44))


@pytest.mark.parametrize("zoom", list(Zoom))
@pytest.mark.parametrize("glyphs", [UNICODE, ASCII])
def test_the_legend_explains_what_the_zoom_shows(zoom: Zoom, glyphs: Glyphs) -> None:
    view = view_at(8, zoom=zoom, per_cell=3, glyphs=glyphs)
    told = " ".join(read_all(legend_lines(view, 44)))
    assert "free" in told
    assert ("a cell: 3 blocks, its hue: who holds most" in told) is (zoom == Zoom.HEAT)
    assert ("half a cell" in told) is (zoom == Zoom.HALF)
    assert ("A1 owner" in told) is (zoom >= Zoom.FOUR)
    assert ("A full" in told) is (zoom == Zoom.CELL)
    assert told.isascii() or not glyphs.ascii


def test_many_sequences_do_not_overflow() -> None:
    scene = Scene(num_blocks=400)
    for _ in range(50):
        scene.admit(scene.add("some longer prompt text"))
    scene.step()
    view = view_at(1, scene.deltas)
    lines = TablesPane(view).lines(view, 30, 9)
    assert len(lines) == 9
    assert any("more" in read(line) for line in lines)
    assert all(width_of(line) <= 31 for line in lines)
    assert fold(scene.deltas) == view.snapshot


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_timelines_title_explains_the_ticks_that_are_there(width: int) -> None:
    deltas = sharing_scene().deltas[:5]
    view = view_at(5, deltas)
    title = timeline_title(view, width)
    assert cell_len(title) <= width
    assert "+ start" in title
    assert "swap" not in title, "nobody was swapped"
    assert set(_LEGEND) == set(TICKS)
    if width >= 80:
        named = {kind for kind, word in _LEGEND.items() if f"  {TICKS[kind]} {word}" in title}
        assert named == {event.kind for delta in deltas for event in delta.events} & set(TICKS)


def test_a_recordings_keys_are_those_that_do_something() -> None:
    recorded = read(keys_line(replace(view_at(8, word="REPLAY"), hindsight=True), 120))
    live = read(keys_line(replace(view_at(8, word="LIVE"), hindsight=False), 120))
    assert "add" not in recorded
    assert "lesson" in recorded
    assert "a add" in live
    assert "esc leave" in read(keys_line(replace(view_at(8), caption="look"), 80))
