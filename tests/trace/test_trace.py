"""The trace: the fold equals the engine's own state; a stream says what was written, however it is cut; damage is named."""

from __future__ import annotations

import errno
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
from minipaged.trace.events import FLAG_CACHED, NO_PROGRESS, ShadowDelta, StepDelta
from minipaged.trace.file import Header, Kind, Record, Recorder, StreamWriter, note, read_header, read_record
from minipaged.trace.player import Player
from minipaged.trace.snapshot import KEPT_DEAD, Snapshot, fold
from minipaged.trace.sources import FileSource, ListSource


def check_against(scene: Scene, snapshot: Snapshot) -> None:
    """The fold says what the scene's own lists say."""
    assert snapshot.device.refs.tolist() == [len(owners) for owners in scene.owners]
    assert snapshot.device.owner.tolist() == [min(owners, default=-1) for owners in scene.owners]
    assert snapshot.device.fill.tolist() == scene.fill
    assert [bool(flag & FLAG_CACHED) for flag in snapshot.device.flags] == scene.cached
    assert snapshot.host.fill.tolist() == scene.host_fill
    assert snapshot.host.refs.tolist() == [len(owners) for owners in scene.host_owners]
    tables = {seq: tuple(line.table) for seq, line in scene.lines.items() if line.table and not line.on_host}
    assert snapshot.tables == tables
    host = {seq: tuple(line.table) for seq, line in scene.lines.items() if line.table and line.on_host}
    assert snapshot.host_tables == host
    for seq, state in snapshot.sequences.items():
        line = scene.lines[seq]
        assert (bytes(state.text).decode(), state.status, state.num_computed) == (line.text, line.status, line.computed)
        assert state.token_ids == [ord(letter) for letter in line.text]
    assert snapshot.stats == snapshot.gauge() == scene.stats()
    assert not snapshot.misfit


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
    [({"major": 3, "minor": 0}, "update minipaged"), ({"major": 1, "minor": 0}, "record it again"), ("x", "header")],
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
        columns["p.temperature"] = np.ones(3, np.float64)
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


def some_delta() -> tuple[packing.Head, packing.Columns]:
    """A record that has something in every table."""
    deltas = sharing_scene().deltas
    whole = replace(deltas[0], events=tuple(event for delta in deltas for event in delta.events))
    return packing.unpack(codec.encode_delta(whole))


def changed(columns: packing.Columns, name: str, change: str) -> packing.Columns:
    """The columns with one of them spoiled."""
    column = columns[name]
    to = {
        "short": column[1:],
        "long": np.concatenate([column, column]),
        "float": column.astype(np.float64) + 0.5,
        "huge": column.astype(np.int64) + (1 << 62),
        "unsigned": column.astype(np.uint64) + np.uint64((1 << 64) - 2),
        "negative": column.astype(np.int64) - (1 << 40),
    }[change]
    return {**columns, name: to}


INT_COLUMNS = [
    *("e.id", "e.kind", "e.cause", "e.sequence", "e.block", "e.other", "e.amount"),
    *("s.sequence", "s.request", "s.parent", "s.status", "s.num_cached", "s.num_prompt"),
    *("p.sequence", "p.num_computed", "p.num_scheduled", "p.num_new", "p.token_ids", "w.ids", "w.lengths", "w.bytes"),
]


@pytest.mark.parametrize("change", ["short", "long", "float", "negative"])
@pytest.mark.parametrize("name", INT_COLUMNS)
def test_a_column_that_does_not_fit_is_refused(name: str, change: str) -> None:
    """Whoever wrote it made the check sum right: its values are looked at nevertheless."""
    head, columns = some_delta()
    codec.decode_delta(1, packing.pack(head, columns))
    with pytest.raises(TraceError):
        codec.decode_delta(1, packing.pack(head, changed(columns, name, change)))


@pytest.mark.parametrize(
    "name", ["e.sequence", "e.block", "e.kind", "p.sequence", "p.num_new", "s.sequence", "s.status"]
)
@pytest.mark.parametrize("change", ["huge", "unsigned"])
def test_a_number_that_nothing_can_have_is_refused(name: str, change: str) -> None:
    head, columns = some_delta()
    with pytest.raises(TraceError, match=r"outside|not as many"):
        codec.decode_delta(1, packing.pack(head, changed(columns, name, change)))


@pytest.mark.parametrize(
    "change",
    [
        {"t_ns": float("inf")},
        {"t_ns": float("nan")},
        {"t_ns": 1.5},
        {"t_ns": "soon"},
        {"t_ns": True},
        {"t_ns": -1},
        {"t_ns": 1 << 80},
        {"kinds": [[], {}]},
        {"kinds": "alloc"},
        {"kinds": ["x" * 1000]},
        {"statuses": None},
        {"reasons": ["stop"] * 50},
        {"next_id": 0.5},
        {"stats": []},
        {"stats": {"total_blocks": 1 << 40}},
        {"stats": {"total_blocks": "many"}},
        {"stats": {"block_size": 1 << 40}},
        {"stats": {"host_total": float("inf")}},
        {"columns": 7},
        {"columns": [["e.id", "<i8", -1]]},
        {"columns": [["e.id", "O", 1]]},
        {"columns": [[["e.id"], "<i8", 1]]},
        {"columns": [["e.id", "<i8", 1 << 40]]},
        {"columns": [["e.id", "<i8", 0.5]]},
    ],
)
def test_a_hostile_head_is_refused(change: dict[str, object]) -> None:
    """Infinity as a time, lists as words, sizes beyond any pool: a sentence, before memory is taken."""
    head, columns = some_delta()
    whole = {**head, "columns": [[n, c.dtype.str, len(c)] for n, c in columns.items()], **change}
    text = json.dumps(whole).encode()
    body = zlib.compress(len(text).to_bytes(4, "little") + text + b"".join(c.tobytes() for c in columns.values()))
    with pytest.raises(TraceError) as caught:
        codec.decode_delta(1, body)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": float("inf")},
        {"seed": "7"},
        {"model": ["m"]},
        {"engine": ["block_size"]},
        {"engine": {"block_size": float("nan")}},
        {"finding": 3},
        {"schema": {"major": 2.0, "minor": 0}},
        {"schema": {"major": True, "minor": 0}},
        {"schema": None},
    ],
)
def test_a_hostile_header_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    text = json.dumps({**Header("m").to_json(), **change}).encode()
    with pytest.raises(TraceError, match="header"):
        FileSource(saved(tmp_path, b"mpgtrace" + len(text).to_bytes(4, "little") + text))


def test_events_that_do_not_fit_end_a_replay_with_a_word() -> None:
    """Each value may be there, but not after what came before: a block is freed that nobody holds."""
    deltas = sharing_scene().deltas
    number, event = next((i, e) for i, d in enumerate(deltas) for e in d.events if e.kind == "free")
    spoiled = [
        *deltas[:number],
        replace(deltas[number], events=(event._replace(block=20), *deltas[number].events)),
        *deltas[number + 1 :],
    ]
    for change in (spoiled, [*deltas[:5], deltas[7], *deltas[8:]]):
        source = ListSource(change)
        player = Player(source, len(source))
        assert player.position == len(source) < len(change)
        assert "does not fit" in source.damage
        assert player.snapshot == fold(change[: len(source)])


def test_a_flipped_byte_in_another_systems_record_ends_a_replay_with_a_word(tmp_path: Path) -> None:
    scene = sharing_scene()
    bands = PoolBreakdown(10, 20, 0, 98, 0, 0)
    out = io.BytesIO()
    writer = StreamWriter(out, Header("scripted"))
    places = []
    for delta in scene.deltas:
        writer.delta(delta)
        places.append(out.tell())
        writer.shadow(ShadowDelta(delta.step, "orca-pow2", (Run(0, 32, "token", 0),), bands))
    writer.finish()
    data = bytearray(out.getvalue())
    data[places[6] + 40] ^= 1
    source = FileSource(saved(tmp_path, bytes(data)))
    player = Player(source, len(source))
    assert player.position == len(source) == 6
    assert "damaged after 6 steps" in source.damage


def test_a_strangers_words_are_safe_to_print(tmp_path: Path) -> None:
    """A title for the terminal's window, in every place of a trace that holds a word."""
    evil = "\x1b]2;owned\x07\u202e"
    delta = sharing_scene().deltas[1]
    patches = tuple(patch._replace(status=evil, finish_reason=evil) for patch in delta.sequences)
    events = (*delta.events, delta.events[0]._replace(kind=evil))
    out = io.BytesIO()
    header = Header(evil, 0, {evil: evil, "list": [evil]}, extra={"about": {evil: evil}}, finding=evil)
    writer = StreamWriter(out, header, keyframe_every=1)
    writer.delta(replace(delta, events=events, sequences=patches))
    writer.shadow(ShadowDelta(delta.step, evil, (Run(0, 32, evil, 0),), PoolBreakdown(1, 2, 3, 4, 5, 6)))
    writer.delta(replace(delta, step=2, events=(), sequences=(), progress=NO_PROGRESS))
    writer.finish()
    source = FileSource(saved(tmp_path, out.getvalue()))
    player = Player(source, len(source))
    shown = [
        repr(source.header),
        repr(source.delta(0)),
        repr(player.snapshot.shadows),
        repr(source.keyframe(1)[1].events),
    ]
    shown += [repr(state) for state in player.snapshot.sequences.values()]
    assert "\ufffd]2;owned" in "".join(shown)
    for text in shown:
        assert "x1b" not in text
        assert "x07" not in text
        assert "u202e" not in text


class Disk(io.BytesIO):
    """A file on a disk with room for so many bytes."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.kept = b""

    def write(self, data: object) -> int:
        if self.tell() + len(bytes(data)) > self.room:  # type: ignore[call-overload]
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)  # type: ignore[arg-type]

    def close(self) -> None:
        self.kept = self.getvalue()
        super().close()


@pytest.mark.parametrize("room", [0, 100, 2000, 3000])
def test_a_full_disk_ends_the_recording_and_not_the_run(tmp_path: Path, room: int) -> None:
    """One sentence; what was written until then opens."""
    scene, disk, words = sharing_scene(), Disk(room), list[str]()
    recorder = Recorder(disk, Header("m"), "run.mpt", words.append)
    for delta in scene.deltas:
        recorder.write(delta)
    recorder.close()
    recorder.close()
    assert words == ["run.mpt: No space left on device; the recording ends here, and the run goes on"]
    assert len(disk.kept) <= room
    if room >= 2000:
        source = FileSource(saved(tmp_path, disk.kept))
        assert 0 < len(source) < len(scene.deltas)
        assert Player(source, len(source)).snapshot == fold(scene.deltas[: len(source)])


def test_a_recording_takes_the_state_of_whoever_folds_already(tmp_path: Path) -> None:
    """The keyframes are the same; where that state knows more than the recording was sent, the recording folds by itself."""
    scene = sharing_scene()
    for others in (Snapshot(), fold(scene.deltas[:3])):
        out = io.BytesIO()
        writer = StreamWriter(out, Header("m"), keyframe_every=3, state=lambda others=others: others)
        for delta in scene.deltas:
            others.apply(delta)
            writer.delta(delta)
        writer.finish()
        source = FileSource(saved(tmp_path, out.getvalue()))
        for position in range(0, len(scene.deltas), 3):
            assert source.keyframe(position) == (position, fold(scene.deltas[:position]))


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
