"""The trace: the fold equals the engine's own state; a stream says what was written, however it is cut; damage is named."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import Scene, sharing_scene

from minipaged.errors import TraceError
from minipaged.memory.types import PoolBreakdown, Run
from minipaged.trace import codec, packing
from minipaged.trace.player import Player
from minipaged.trace.records import FLAG_CACHED, ShadowDelta, StepDelta
from minipaged.trace.snapshot import KEPT_DEAD, Snapshot, fold
from minipaged.trace.sources import FileSource, ListSource
from minipaged.trace.stream import Header, Kind, Record, StreamWriter, note, read_header, read_record


def check_against(scene: Scene, snapshot: Snapshot) -> None:
    """The fold says what the scene's own lists say."""
    assert snapshot.device.refs.tolist() == [len(owners) for owners in scene.owners]
    assert snapshot.device.owner.tolist() == [min(owners, default=-1) for owners in scene.owners]
    assert snapshot.device.fill.tolist() == scene.fill
    assert [bool(flag & FLAG_CACHED) for flag in snapshot.device.flags] == scene.cached
    assert snapshot.host.refs.tolist() == [len(owners) for owners in scene.host_owners]
    tables = {seq: tuple(line.table) for seq, line in scene.lines.items() if line.table and line.tier == 0}
    assert {seq: ids for (seq, _), ids in snapshot.tables.items()} == tables
    host = {seq: tuple(line.table) for seq, line in scene.lines.items() if line.table and line.tier == 1}
    assert {seq: ids for (seq, _), ids in snapshot.host_tables.items()} == host
    for seq, state in snapshot.sequences.items():
        line = scene.lines[seq]
        assert (bytes(state.text).decode(), state.status, state.num_computed) == (line.text, line.status, line.computed)
        assert state.token_ids == [ord(letter) for letter in line.text]
    assert snapshot.stats == scene.stats()


@st.composite
def scenes(draw: st.DrawFn) -> Iterator[Scene]:
    """A scene after some random steps of a random script."""
    scene = Scene(num_blocks=64, num_host=32)
    for _ in range(draw(st.integers(1, 25))):
        running = [seq for seq, line in scene.lines.items() if line.status == "running"]
        waiting = [seq for seq, line in scene.lines.items() if line.status == "waiting"]
        swapped = [seq for seq, line in scene.lines.items() if line.status == "swapped"]
        do = draw(
            st.sampled_from(["add", "admit", "write", "write", "fork", "finish", "preempt", "swap_out", "swap_in"])
        )
        room = sum(not owners for owners in scene.owners)
        if do == "add":
            scene.add(draw(st.text("abc", min_size=1, max_size=9)))
        elif do == "admit" and waiting and room > 12:
            scene.admit(waiting[0])
        elif do == "write" and running and room > 8:
            scene.write(draw(st.sampled_from(running)), draw(st.text("xyz", min_size=1, max_size=5)))
        elif do == "fork" and running and len(running) < 6:
            scene.fork(running[-1])
        elif do == "finish" and running:
            scene.finish(running[0], cache=draw(st.booleans()))
        elif do == "preempt" and running:
            scene.preempt(running[-1])
        elif (
            do == "swap_out"
            and running
            and len(scene.lines[running[-1]].table) <= sum(not o for o in scene.host_owners)
        ):
            scene.swap_out(running[-1])
        elif do == "swap_in" and swapped and room > 20:
            scene.swap_in(swapped[0])
        scene.step()
    return scene  # type: ignore[return-value]


def write(deltas: list[StepDelta], *, every: int = 256, finish: bool = True) -> bytes:
    out = io.BytesIO()
    writer = StreamWriter(out, Header("scripted", 7, {"block_size": 4}), keyframe_every=every)
    for delta in deltas:
        writer.delta(delta)
    if finish:
        writer.finish()
    return out.getvalue()


def saved(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "trace.mpt"
    path.write_bytes(data)
    return path


@given(scenes())
def test_fold_equals_state(scene: Scene) -> None:
    check_against(scene, fold(scene.deltas))


@given(scenes())
def test_delta_and_keyframe_survive_the_wire(scene: Scene) -> None:
    """Decoded deltas fold to the same state, and a keyframe is the state."""
    snapshot = Snapshot()
    for delta in scene.deltas:
        snapshot.apply(codec.decode_delta(delta.step, codec.encode_delta(delta)))
    assert snapshot == fold(scene.deltas)
    again = codec.decode_keyframe(snapshot.step, codec.encode_keyframe(snapshot))
    assert again == snapshot
    one = Scene.step(scene)
    snapshot.apply(one)
    again.apply(one)
    assert again == snapshot, "the copy mark must fade on a decoded keyframe too"


@given(scenes(), st.data())
def test_seeking_equals_folding(tmp_path_factory: pytest.TempPathFactory, scene: Scene, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("trace") / "t.mpt"
    path.write_bytes(write(scene.deltas, every=4))
    source = FileSource(path)
    player = Player(source)
    for position in data.draw(st.lists(st.integers(0, len(scene.deltas)), max_size=6)):
        player.seek(position)
        assert player.position == position
        assert player.snapshot == fold(scene.deltas[:position])
        assert (player.delta.step if player.delta else None) == (scene.deltas[position - 1].step if position else None)
    source.close()


def test_the_copy_mark_lasts_one_step() -> None:
    deltas = sharing_scene().deltas
    lit = [int((fold(deltas[: n + 1]).device.flags & 4).sum()) for n in range(len(deltas))]
    assert sum(lit) == 4
    assert lit.count(4) == 1


def test_finished_sequences_are_forgotten_in_the_end() -> None:
    scene = Scene()
    for _ in range(3 * KEPT_DEAD):
        seq = scene.add("abc")
        scene.admit(seq)
        scene.step()
        scene.finish(seq)
        scene.step()
    snapshot = fold(scene.deltas)
    assert len(snapshot.sequences) == KEPT_DEAD
    assert max(state.label for state in snapshot.sequences.values()) <= KEPT_DEAD


def test_list_and_file_tell_the_same(tmp_path: Path) -> None:
    scene = sharing_scene()
    bands = PoolBreakdown(10, 20, 0, 98, 0, 0)
    shadows = [ShadowDelta(delta.step, "orca-pow2", (Run(0, 32, "token", 0),), bands) for delta in scene.deltas]
    out = io.BytesIO()
    writer = StreamWriter(out, Header("scripted"), keyframe_every=4)
    for delta, shadow in zip(scene.deltas, shadows, strict=True):
        writer.delta(delta)
        writer.shadow(shadow)
    writer.finish()
    from_list = Player(ListSource(scene.deltas, shadows=shadows))
    from_file = Player(FileSource(saved(tmp_path, out.getvalue())))
    for position in [*range(len(scene.deltas) + 1), 3, 9, 0, 5]:
        from_list.seek(position)
        from_file.seek(position)
        assert from_list.snapshot == from_file.snapshot
    assert from_list.source.occupied.tolist() == from_file.source.occupied.tolist()
    assert from_list.source.marks.tolist() == from_file.source.marks.tolist()
    assert from_list.snapshot.shadows["orca-pow2"].stats == bands


def test_a_file_without_its_index_is_scanned(tmp_path: Path) -> None:
    scene = sharing_scene()
    seen: list[tuple[int, int]] = []
    source = FileSource(
        saved(tmp_path, write(scene.deltas, finish=False)), progress=lambda done, size: seen.append((done, size))
    )
    assert len(source) == len(scene.deltas)
    assert "no index" in source.damage
    assert seen[-1][0] == seen[-1][1]
    assert Player(source, len(source)).snapshot == fold(scene.deltas)


def test_every_cut_opens_up_to_the_damage(tmp_path: Path) -> None:
    """Cut at any byte: either a one-line TraceError (no whole keyframe) or the steps before the cut."""
    scene = sharing_scene()
    data = write(scene.deltas, finish=False)
    opened, words = 0, []
    for cut in range(0, len(data), 37):
        path = saved(tmp_path, data[:cut])
        try:
            source = FileSource(path)
        except TraceError as error:
            words.append(str(error))
            continue
        opened += 1
        assert source.damage
        assert Player(source, len(source)).snapshot == fold(scene.deltas[: len(source)])
    assert opened > 20
    assert all(word and "\n" not in word for word in words)


def test_a_flipped_byte_ends_the_trace_there(tmp_path: Path) -> None:
    scene = sharing_scene()
    data = bytearray(write(scene.deltas))
    data[len(data) // 2] ^= 0x10
    source = FileSource(saved(tmp_path, bytes(data)))
    assert len(source) == len(scene.deltas), "the index is whole: the damage is found on the way"
    player = Player(source, len(source))
    assert 0 < player.position < len(scene.deltas)
    assert len(source) == player.position
    assert f"damaged after {player.position} steps" in source.damage
    assert player.snapshot == fold(scene.deltas[: player.position])


@given(st.binary(max_size=400), st.integers(0, 6000))
def test_garbage_is_refused_or_cut(tmp_path_factory: pytest.TempPathFactory, garbage: bytes, at: int) -> None:
    """Bytes overwritten anywhere: a TraceError or a shorter trace, never another exception."""
    data = bytearray(write(sharing_scene().deltas))
    data[at : at + len(garbage)] = garbage
    path = tmp_path_factory.mktemp("trace") / "t.mpt"
    path.write_bytes(data)
    try:
        source = FileSource(path)
        player = Player(source, len(source))
    except TraceError:
        return
    assert player.position == len(source)
    source.close()


@pytest.mark.parametrize(
    ("schema", "word"),
    [({"major": 2, "minor": 0}, "update minipaged"), ({"major": 0, "minor": 9}, "older"), ("x", "header")],
)
def test_another_major_version_is_refused(tmp_path: Path, schema: object, word: str) -> None:
    text = zlib.compress(b"")  # any bytes after the header
    header = Header().to_json() | {"schema": schema}
    raw = json.dumps(header).encode()
    path = saved(tmp_path, b"mpgtrace" + len(raw).to_bytes(4, "little") + raw + text)
    with pytest.raises(TraceError, match=word):
        FileSource(path)


def test_a_header_says_what_was_found_only_where_something_was() -> None:
    """The finding travels; a trace without one is written as before."""
    for header in (Header("m"), Header("m", finding="L02: a count is wrong")):
        assert Header.from_json(json.loads(json.dumps(header.to_json()))) == header
    assert "finding" not in Header("m").to_json()


def test_a_newer_minor_version_opens_and_unknown_things_are_kept(tmp_path: Path) -> None:
    scene = sharing_scene()
    out = io.BytesIO()
    writer = StreamWriter(out, replace(Header("m"), minor=9, extra={"weather": "fine"}))
    writer.write(Record(Kind.KEYFRAME, -1, codec.encode_keyframe(Snapshot())))
    for delta in scene.deltas:
        head, columns = packing.unpack(codec.encode_delta(delta))
        head["stats"]["moon_phase"] = 3
        columns["b.temperature"] = np.ones(3, np.float64)
        writer.write(Record(Kind.DELTA, delta.step, packing.pack(head, columns)))
        writer.write(Record(77, delta.step, packing.pack({"what": "a kind of tomorrow"}, {})))
    source = FileSource(saved(tmp_path, out.getvalue()))
    assert source.header.extra == {"weather": "fine"}
    assert Player(source, len(source)).snapshot == fold(scene.deltas)
    _, columns = packing.unpack(packing.pack(*packing.unpack(packing.pack({}, {"b.temperature": np.ones(3)}))))
    assert columns["b.temperature"].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "data", [b"", b"mpgtrace", b"PK\x03\x04 a zip file", b"mpgtrace\xff\xff\xff\xff", b"mpgtrace\x02\0\0\0{]"]
)
def test_what_is_no_trace_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(TraceError):
        FileSource(saved(tmp_path, data))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="nowhere"):
        FileSource(tmp_path / "nowhere.mpt")


def test_a_hostile_record_does_not_allocate() -> None:
    """Sizes beyond any pool are refused before memory is taken."""
    delta = sharing_scene().deltas[1]
    head, columns = packing.unpack(codec.encode_delta(delta))
    huge = packing.pack({**head, "stats": {**head["stats"], "total_blocks": 1 << 40}}, columns)
    with pytest.raises(TraceError, match="cannot be shown"):
        codec.decode_delta(1, huge)
    with pytest.raises(TraceError, match="no pool has"):
        codec.decode_delta(1, packing.pack(head, {**columns, "b.ids": columns["b.ids"] - 100}))


def test_records_read_back_one_by_one() -> None:
    out = io.BytesIO()
    writer = StreamWriter(out, Header("m"))
    writer.write(note(kind="status", text="loading…"))
    out.seek(0)
    assert read_header(out).model == "m"
    record = read_record(out)
    assert record is not None
    assert packing.unpack(record.body)[0] == {"kind": "status", "text": "loading…"}
    assert read_record(out) is None


def test_play_keeps_time() -> None:
    player = Player(ListSource(sharing_scene().deltas), speed=2.0)
    assert player.tick(100.0) == []
    assert len(player.tick(100.9)) == 1
    assert len(player.tick(102.0)) == 2
    assert len(player.tick(1000.0)) == 2, "a long pause of the screen does not skip ahead"
    player.speed = float("inf")
    player.tick(1000.1)
    assert player.behind == 0
