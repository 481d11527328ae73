"""The block map without an app: what a row reads, where a block lies, what is painted again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import Scene, sharing_scene

from minipaged.trace.events import FLAG_CACHED
from minipaged.trace.snapshot import Snapshot, fold
from minipaged.trace.words import LETTERS, NUM_HUES, NUM_LOOKS
from minipaged.tui.map.cells import STYLE_BITS, STYLES
from minipaged.tui.map.layout import Zoom
from minipaged.tui.map.model import MapModel, _fill_bar
from minipaged.tui.palette import ASCII, UNICODE, Glyphs, Mode
from minipaged.tui.scripted.lessons import LESSONS
from minipaged.tui.view import View


def view_at(position: int, **words: object) -> View:
    deltas = sharing_scene().deltas
    view = View(fold(deltas[:position]), deltas[position - 1] if position else None, **words)  # type: ignore[arg-type]
    view.token_bytes = {code: bytes([code]) for code in range(128)}
    return view


def row(model: MapModel, number: int) -> str:
    return "".join(segment.text for segment in model.row(number))


def big_snapshot(num_blocks: int, seed: int = 0) -> Snapshot:
    """A pool of random states owned by a dozen sequences."""
    scene = Scene(num_blocks=2)
    for _ in range(12):
        scene.add("x")
    scene.step()
    snapshot = fold(scene.deltas)
    rng = np.random.default_rng(seed)
    pool = snapshot.device
    pool.grow(num_blocks)
    pool.refs[:] = rng.choice([0, 0, 1, 1, 1, 2, 3], num_blocks)
    pool.owner[:] = np.where(pool.refs > 0, rng.integers(0, 12, num_blocks), -1)
    pool.fill[:] = np.where(pool.refs > 0, rng.integers(1, 5, num_blocks), 0)
    pool.flags[:] = np.where(pool.refs == 0, rng.choice([0, FLAG_CACHED], num_blocks), 0)
    return snapshot


def test_states_are_glyphs() -> None:
    """Each beat of copy-on-write, cell by cell."""
    readings = [row(MapModel(view_at(position)), 0)[3:12] for position in (1, 2, 3, 4, 5)]
    assert readings == ["○········", "○AA▄·····", "○222·····", "○22▄◆····", "○22▆B····"]


def test_ascii_states() -> None:
    readings = [row(MapModel(view_at(position, glyphs=ASCII)), 0)[3:12] for position in (1, 2, 3, 4, 9)]
    assert readings == ["0........", "0AA+.....", "0222.....", "022+*....", "0AAAcCCCC"]


def test_shares_are_reversed_without_colour() -> None:
    model = MapModel(view_at(3, mode="plain"))
    shared = [segment for segment in model.row(0) if segment.text == "222"]
    assert shared[0].style is not None
    assert shared[0].style.reverse
    assert all(segment.style is None or segment.style.color is None for segment in model.row(0))


def test_four_cells_and_slots() -> None:
    model = MapModel(view_at(5))
    model.resize(40, 7)
    model.set_zoom(Zoom.FOUR)
    assert "A2█ " in row(model, 0)
    assert "A1▆ " in row(model, 0)
    model.resize(80, 4)
    model.set_zoom(Zoom.SLOTS)
    first = row(model, 0)
    assert model.slot_width == 5, "words, though not all of the pool is in view"
    assert " 1 A2 T     h     e     ␣" in first
    model.resize(24, 9)
    assert [row(model, number).rstrip() for number in range(2, 6)] == [
        " 1 A2 T     h     e",
        "      ␣",
        " 2 A2 c     a     c",
        "      h",
    ]


def test_tiles_show_how_full_a_block_is_where_there_is_room() -> None:
    model = MapModel(view_at(5))
    model.resize(44, 8)
    model.set_zoom(Zoom.FOUR)
    assert model.num_rows == 8
    assert row(model, 0).startswith(" 0 ○○○○ A2   A2   A1   B1")
    assert row(model, 1).startswith("   ○○○○ ████ ████ ███· ████")
    assert model.block_at(8, 0) == model.block_at(8, 1) == 1
    assert model.row_of(9) == 2
    model.resize(94, 29)
    assert row(model, 0).startswith(" 0 ○○○○○○○○○○○○○○ A2             A2             A1 3/4         B1 ")
    assert row(model, 2).startswith("   ○○○○○○○○○○○○○○ ██████████████ ██████████████ ██████████▌···")


def test_slots_widen_to_words_where_there_is_room() -> None:
    lesson = LESSONS["copy-on-write"]()
    snapshot = fold(lesson.source.delta(at) for at in range(lesson.beats[-2].position))
    model = MapModel(View(snapshot, token_bytes=snapshot.token_bytes))
    model.resize(44, 8)
    model.set_zoom(Zoom.SLOTS)
    assert model.slot_width == 9
    assert row(model, 1).rstrip() == "1 A2 The       best      thing     about"
    assert row(model, 3).rstrip() == "3 A1 it        never     ·         ·"
    assert row(model, 4).rstrip() == "4◆B1 it        never     sleeps    ·"


def test_half_blocks_and_heat_show_the_whole_pool() -> None:
    view = View(big_snapshot(1000))
    model = MapModel(view)
    model.resize(44, 10)
    for zoom, most in ((Zoom.HALF, 13), (Zoom.HEAT, 10)):
        model.set_zoom(zoom)
        assert model.num_rows <= most
        assert all(row(model, number).strip() for number in range(model.num_rows))
        for number in range(model.num_rows + 2):  # below the pool too
            assert model.cells(number) == len(row(model, number))


@given(st.integers(2, 3000), st.integers(20, 160), st.integers(3, 40), st.sampled_from(list(Zoom)))
def test_a_block_is_found_where_it_is_drawn(num_blocks: int, width: int, height: int, zoom: Zoom) -> None:
    """block_at inverts the layout, at each zoom and size; rows never exceed the width."""
    snapshot = Snapshot(num_blocks=num_blocks)
    snapshot.stats = snapshot.stats._replace(block_size=4)
    model = MapModel(View(snapshot))
    model.resize(width, height)
    model.set_zoom(zoom)
    found: set[int] = set()
    for number in range(model.num_rows):
        assert sum(len(segment.text) for segment in model.row(number)) <= max(width, model._slot_cells)
        found |= {model.block_at(x, number) for x in range(width)} - {-1}
    shown = {block for block in range(num_blocks) if block % max(1, model.per_cell if zoom == Zoom.HEAT else 1) == 0}
    if zoom == Zoom.HALF:  # the lower half of a cell belongs to the cell above it
        shown = {block for block in shown if block % model.per_row < model.per_row // 2}
    assert shown <= found
    for block in list(found)[:50]:
        assert any(model.block_at(x, model.row_of(block)) == block for x in range(width))


@given(st.integers(0, 1000))
def test_painting_what_changed_equals_painting_all(seed: int) -> None:
    before, after = big_snapshot(500, 1), big_snapshot(500, 1)
    rng = np.random.default_rng(seed)
    ids = np.unique(rng.integers(0, 500, 20)).astype(np.int32)
    after.device.refs[ids] = rng.integers(0, 3, len(ids))
    model = MapModel(View(before))
    rows = [row(model, number) for number in range(model.num_rows)]
    dirty = model.update(View(after), ids)
    fresh = MapModel(View(after))
    assert dirty is not None
    for number in range(model.num_rows):
        assert row(model, number) == row(fresh, number)
        if number not in dirty:
            assert rows[number] == row(fresh, number)


def test_dimming_all_but_one() -> None:
    model = MapModel(view_at(8, only=0))
    styles = {segment.text[0]: segment.style for segment in model.row(0)}
    assert styles["B"] == model.view.style("faint")
    assert styles["A"] == model.view.style("hue0")


def test_the_cursor_is_seen() -> None:
    model = MapModel(view_at(5, block=4))
    marked = [segment for segment in model.row(0) if segment.style == model.view.style("select")]
    assert [segment.text for segment in marked] == ["B"]


def test_letters_repeat_past_the_alphabet() -> None:
    scene = Scene(num_blocks=200)
    for _ in range(len(LETTERS) + 2):
        scene.admit(scene.add("abcd"))
    scene.step()
    model = MapModel(View(fold(scene.deltas)))
    cells = "".join(row(model, number)[4:] for number in range(model.num_rows))
    assert cells[1 : len(LETTERS) + 3] == LETTERS + LETTERS[:2]


@pytest.mark.parametrize("num_blocks", [0, 1])
def test_no_pool_yet(num_blocks: int) -> None:
    model = MapModel(View(Snapshot(num_blocks=num_blocks)))
    for zoom in Zoom:
        model.set_zoom(zoom)
        for number in range(model.num_rows):
            model.row(number)


@given(
    st.sampled_from(list(Zoom)),
    st.sampled_from([(40, 12), (79, 24), (160, 50), (12, 30)]),
    st.integers(0, 2**32 - 1),
    st.integers(0, 4),
    st.booleans(),
)
def test_what_is_painted_again_is_all_that_differs(
    zoom: Zoom, size: tuple[int, int], seed: int, count: int, cursor: bool
) -> None:
    """Some blocks change: the rows that are kept, and those made anew, read as in a map that is drawn from nothing."""
    rng = np.random.default_rng(seed)
    snapshot = big_snapshot(700, seed % 5)
    view = View(snapshot, token_bytes={ord("x"): b"x"})
    model = MapModel(view)
    model.resize(*size)
    model.set_zoom(zoom)
    before = {number: list(model.row(number)) for number in range(model.num_rows)}
    for _ in range(2):
        ids = rng.integers(0, 700, count).astype(np.int32)
        snapshot.device.refs[ids] = rng.choice([0, 1, 2], count)
        snapshot.device.fill[ids] = rng.integers(0, 5, count)
        view = replace(view, block=int(rng.integers(0, 700)) if cursor else -1)
        dirty = model.update(view, ids)
        fresh = MapModel(view)
        fresh.resize(*size)
        fresh.set_zoom(zoom)
        assert dirty is not None
        for number in range(model.num_rows):
            expected = fresh.row(number)
            assert model.row(number) == expected
            assert number in dirty or before[number] == expected, "a row that reads otherwise is painted"
            cells = model.cells(number)
            assert cells in (None, sum(segment.cell_length for segment in expected))
            before[number] = list(expected)


def test_no_two_living_answers_to_one_prompt_look_alike() -> None:
    """Labels seven apart have one hue: of two living siblings the later one takes another, on the map and in every pane."""
    scene = Scene(num_blocks=64)
    beam = scene.add("abcd")
    scene.admit(beam)
    scene.step()
    family = [beam, *(scene.fork(beam) for _ in range(6))]
    scene.step()
    for sequence in family[1:]:
        scene.finish(sequence)
    scene.step()
    others = [scene.fork(beam) for _ in range(2)]  # labels 7 and 8, while the finished ones are kept
    for sequence in (beam, *others):
        scene.write(sequence, "wxyz")
    scene.step()
    snapshot = fold(scene.deltas)
    view = View(snapshot)
    labels = [snapshot.sequences[sequence].label for sequence in (beam, *others)]
    assert labels[0] == labels[1] - NUM_HUES == 0, "the scene is of the kind that looked alike"
    assert len({view.look(sequence) % NUM_HUES for sequence in (beam, *others)}) == 3
    model = MapModel(view)
    model.resize(80, 10)
    for sequence in (beam, *others):
        table = snapshot.tables[sequence]
        own = [block for block in table if snapshot.device.refs[block] == 1]
        codes = model.looks.codes(snapshot.device, slice(own[0], own[0] + 1), model._labels, 4)
        assert STYLES[int(codes[0]) % STYLE_BITS] == f"hue{view.look(sequence)}"


def test_a_hue_that_changes_is_painted_everywhere() -> None:
    """A sequence gets its own hue back when the sibling that had it is gone: also in blocks that this step did not touch."""
    scene = Scene(num_blocks=64)
    beam = scene.add("abcdefgh")
    scene.admit(beam)
    scene.step()
    for _ in range(NUM_HUES):
        scene.fork(beam)
    scene.step()
    view = View(fold(scene.deltas))
    model = MapModel(view)
    assert view.other_looks == {}, "seven have a hue each, the eighth the first hue on a tint"
    assert view.look(NUM_HUES) == NUM_HUES
    for sequence in range(1, NUM_HUES):
        scene.finish(sequence)
    scene.step()
    last = View(fold(scene.deltas))
    assert last.other_looks == {NUM_HUES: 1 + NUM_HUES}
    assert model.update(last, np.zeros(0, np.int32)) is None, "all rows"


@pytest.mark.parametrize("mode", ["dark", "light", "plain"])
def test_fourteen_living_answers_have_fourteen_looks(mode: Mode) -> None:
    """All of them on the map; as letters they differ in more than colour where there is none."""
    scene = Scene(num_blocks=200)
    first = scene.add("abcd")
    scene.admit(first)
    scene.step()
    family = [first, *(scene.fork(first) for _ in range(13))]
    for sequence in family:
        scene.write(sequence, "wxyz")
    scene.step()
    view = View(fold(scene.deltas), mode=mode)
    assert sorted(view.look(sequence) for sequence in family) == list(range(NUM_LOOKS))
    styles = {str(view.style(view.role(sequence))) for sequence in family}
    assert len(styles) == (NUM_LOOKS if mode != "plain" else 2)
    for glyphs in (UNICODE, ASCII):
        bars = {_fill_bar(2, 4, 4, glyphs, tinted=tinted) for tinted in (False, True)}
        assert len(bars) == 2


@pytest.mark.parametrize("glyphs", [UNICODE, ASCII])
def test_half_blocks_tell_shared_and_cached_without_colour(glyphs: Glyphs) -> None:
    """Upper and lower blocks of a cell, free, cached, held and shared in each pair: each pair of states has a picture of its own."""
    snapshot = Snapshot(num_blocks=32)
    pool = snapshot.device
    pool.refs[:16], pool.refs[16:] = np.repeat([0, 0, 1, 2], 4), np.tile([0, 0, 1, 2], 4)
    pool.flags[:16] = np.repeat([0, FLAG_CACHED, 0, 0], 4)
    pool.flags[16:] = np.tile([0, FLAG_CACHED, 0, 0], 4)
    model = MapModel(View(snapshot, glyphs=glyphs, mode="plain"))
    model.resize(19, 1)
    model.set_zoom(Zoom.HALF)
    drawn = [(mark, segment.style.reverse) for segment in model.row(0)[1:] for mark in segment.text]  # type: ignore[union-attr]
    shown = "".join(mark for mark, _ in drawn)
    if glyphs.ascii:
        assert shown == '.c,2cc,2""#22222'
    else:
        assert shown == "·▖▄₂▘▌▙₂▀▛█₂²²²2"
        assert len({pair for pair in drawn if pair[0] in "²₂"}) == 4, "the ground tells whether the other one is in use"
