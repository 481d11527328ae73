"""The record stream: what is written to a file, and what a live engine says over a pipe.

    magic (8 bytes) · u32 length, JSON header · records: u32 body length, u8 kind, i64 step, u32 CRC32 of (kind, step, body), body

A keyframe comes first and then before every 256th delta, made by whoever keeps the stream: over the pipe from a live
engine none comes, and nothing is compressed, so that no token waits for it. A file ends in an index record and a trailer that says
where it is; without them the index is rebuilt by scanning. Knows bytes; knows nothing of who reads them.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from minipaged.errors import TraceError
from minipaged.trace import codec, packing
from minipaged.trace.records import SCHEMA_MAJOR, SCHEMA_MINOR, Event, ShadowDelta, Stats, StepDelta
from minipaged.trace.rows import SequenceRows, beside_appends
from minipaged.trace.snapshot import Snapshot

MAGIC = b"mpgtrace"
TRAILER_MAGIC = b"mpgindex"
KEYFRAME_EVERY = 256
MAX_HEADER_BYTES = 1 << 20
_LENGTH = struct.Struct("<I")
_FRAME = struct.Struct("<IBqI")
_CHECKED = struct.Struct("<Bq")
_TRAILER = struct.Struct("<Q8s")
FRAME_BYTES = _FRAME.size


class Kind(IntEnum):
    """What a record holds. Readers skip kinds that they do not know."""

    KEYFRAME = 1  # a whole Snapshot: the state before the next delta
    DELTA = 2
    SHADOW = 3  # what another system would hold after the delta before it
    PIECES = 4  # token id -> bytes, for ids not told before
    INDEX = 5
    NOTE = 6  # live only: a word from the engine's process
    COMMAND = 7  # live only: a word to it
    HEADER = 8  # live only: the header, once the engine is there to be described


class Record(NamedTuple):
    """One record, its body still encoded."""

    kind: int
    step: int
    body: bytes

    def to_bytes(self) -> bytes:
        """The record as it stands in a stream."""
        crc = zlib.crc32(self.body, zlib.crc32(_CHECKED.pack(self.kind, self.step)))
        return _FRAME.pack(len(self.body), self.kind, self.step, crc) + self.body


@dataclass(frozen=True, slots=True)
class Header:
    """What the trace is of. `extra` keeps what a newer minor version adds.

    finding: what its last state shows, where the trace was kept for that alone: a screen opens it there, and says so.
    """

    model: str = ""
    seed: int = 0
    engine: Mapping[str, Any] = field(default_factory=dict)
    major: int = SCHEMA_MAJOR
    minor: int = SCHEMA_MINOR
    extra: Mapping[str, Any] = field(default_factory=dict)
    finding: str = ""

    def to_json(self) -> dict[str, Any]:
        """The header as it is written."""
        schema = {"major": self.major, "minor": self.minor}
        told = {**self.extra, "schema": schema, "model": self.model, "seed": self.seed, "engine": dict(self.engine)}
        return {**told, "finding": self.finding} if self.finding else told

    def to_bytes(self) -> bytes:
        """Magic, length and JSON: the start of a stream."""
        text = json.dumps(self.to_json(), default=str).encode()
        return MAGIC + _LENGTH.pack(len(text)) + text

    @classmethod
    def from_json(cls, told: object) -> Header:
        """Read a header. Raises TraceError if it is none or of a newer major version."""
        try:
            rest = dict(told)  # type: ignore[call-overload]
            schema = rest.pop("schema")
            major, minor = int(schema["major"]), int(schema["minor"])
            model, seed, engine = rest.pop("model", ""), rest.pop("seed", 0), rest.pop("engine", {})
            finding = str(rest.pop("finding", ""))
            header = cls(str(model), int(seed), dict(engine), major, minor, rest, finding)
        except (KeyError, TypeError, ValueError) as error:
            raise TraceError(f"the trace's header cannot be read: {error!r}") from None
        if major != SCHEMA_MAJOR:
            raise TraceError(
                f"this trace has schema {major}.{minor}; this reader knows {SCHEMA_MAJOR}.x: "
                + ("update minipaged to open it" if major > SCHEMA_MAJOR else "open it with an older minipaged")
            )
        return header


def read_header(stream: BinaryIO, name: str = "the stream") -> Header:
    """Read magic and header. Raises TraceError."""
    start = read_exactly(stream, len(MAGIC) + _LENGTH.size)
    if start is None or not start.startswith(MAGIC):
        raise TraceError(f"{name} is not a minipaged trace (a trace starts with {MAGIC.decode()!r})")
    (size,) = _LENGTH.unpack_from(start, len(MAGIC))
    text = read_exactly(stream, size) if size <= MAX_HEADER_BYTES else None
    if text is None:
        raise TraceError(f"{name} ends inside its header")
    try:
        return Header.from_json(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise error if isinstance(error, TraceError) else TraceError(f"{name} has a header that is not JSON") from None


def read_exactly(stream: BinaryIO, size: int) -> bytes | None:
    """`size` bytes, or None where the stream ends before."""
    parts = []
    while size:
        part = stream.read(size)
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def read_record(stream: BinaryIO) -> Record | None:
    """The next record; None at a clean end. Raises TraceError where the stream is cut short or damaged."""
    first = stream.read(1)
    if not first:
        return None
    rest = read_exactly(stream, FRAME_BYTES - 1)
    if rest is None:
        raise TraceError("cut short inside a record")
    size, kind, step, crc = _FRAME.unpack(first + rest)
    body = read_exactly(stream, size) if size <= packing.MAX_BODY_BYTES else None
    if body is None:
        raise TraceError("cut short inside a record")
    if zlib.crc32(body, zlib.crc32(_CHECKED.pack(kind, step))) != crc:
        raise TraceError(f"a record's check sum is wrong (after step {step})")
    return Record(kind, step, body)


def note(**words: Any) -> Record:
    """A word from the engine's process."""
    return Record(Kind.NOTE, 0, packing.pack(words, {}))


def command(do: str, **words: Any) -> Record:
    """A word to the engine's process."""
    return Record(Kind.COMMAND, 0, packing.pack({"do": do, **words}, {}))


def pieces_record(step: int, pieces: Mapping[int, bytes], *, level: int = 1) -> Record:
    """Token ids and the bytes that they stand for. level: zlib's."""
    ids = np.fromiter(pieces, np.int64)
    lengths = np.fromiter((len(piece) for piece in pieces.values()), np.int64)
    text = np.frombuffer(b"".join(pieces.values()), np.uint8)
    columns: packing.Columns = {"p.ids": ids, "p.lengths": lengths, "p.bytes": text}
    return Record(Kind.PIECES, step, packing.pack({}, columns, level=level))


def decode_pieces(body: bytes) -> dict[int, bytes]:
    """The pieces of a body."""
    _, columns = packing.unpack(body)
    if "p.ids" not in columns:
        return {}
    text = columns["p.bytes"].tobytes() if "p.bytes" in columns else b""
    ends = np.cumsum(columns["p.lengths"]).tolist()
    starts = [0, *ends[:-1]]
    return {token: text[a:b] for token, a, b in zip(columns["p.ids"].tolist(), starts, ends, strict=True)}


# What a timeline shows of each step without reading it: one bit an event kind, and the occupied share of the pool in 1/10000.
MARKS: dict[str, int] = {
    kind: 1 << bit
    for bit, kind in enumerate(
        (
            "admit",
            "copy",
            "cache_hit",
            "preempt",
            "swap_out",
            "swap_in",
            "finish",
            "evict",
            "fork",
            "abort",
            "refuse",
            "prune",
            "release",
            "knob",
        )
    )
}


def marks_of(events: Sequence[Event]) -> int:
    """The bits of the kinds that happened."""
    bits = 0
    for event in beside_appends(events):  # appends have no mark
        bits |= MARKS.get(event.kind, 0)
    return bits


def occupancy(stats: Stats) -> int:
    """Blocks in use (held by a sequence) out of those that can be, in 1/10000."""
    usable = stats.total_blocks - 1
    return 0 if usable <= 0 else max(0, min(10000, round(10000 * (usable - stats.free_blocks) / usable)))


class StreamWriter:
    """Writes a stream: deltas in, keyframes added, the index kept and written at the end.

    Folds the deltas to know the keyframes, or takes them from another stream through `write`.
    """

    def __init__(
        self, out: BinaryIO, header: Header, *, start: Snapshot | None = None, keyframe_every: int = KEYFRAME_EVERY
    ) -> None:
        self._out = out
        self._every = keyframe_every
        self._snapshot = start.copy() if start is not None else Snapshot()
        self._num_deltas = 0
        self._rows: list[tuple[int, int, int, int, int]] = []  # kind, step, bytes, occupancy, marks
        first = header.to_bytes()
        out.write(first)
        self._offset = len(first)

    def delta(self, delta: StepDelta) -> None:
        """Write one step, with the keyframe before it where one is due."""
        if self._num_deltas % self._every == 0:
            self.write(Record(Kind.KEYFRAME, self._snapshot.step, codec.encode_keyframe(self._snapshot)))
        self.write(
            Record(Kind.DELTA, delta.step, codec.encode_delta(delta)), occupancy(delta.stats), marks_of(delta.events)
        )
        self._snapshot.apply(delta)

    def shadow(self, shadow: ShadowDelta) -> None:
        """Write what another system would hold after the last delta."""
        self._snapshot.apply_shadow(shadow)
        self.write(Record(Kind.SHADOW, shadow.step, codec.encode_shadow(shadow)))

    def write(self, record: Record, occupied: int = 0, marks: int = 0) -> None:
        """Write a record as it is, and flush: a reader may be waiting."""
        data = record.to_bytes()
        self._out.write(data)
        self._out.flush()
        self._num_deltas += record.kind == Kind.DELTA
        self._rows.append((record.kind, record.step, len(data), occupied, marks))
        self._offset += len(data)

    def finish(self) -> None:
        """Write the index and the trailer that says where it is. A live stream has neither."""
        if not self._num_deltas:  # even an empty trace opens: it shows an idle engine
            self.write(Record(Kind.KEYFRAME, self._snapshot.step, codec.encode_keyframe(self._snapshot)))
        index = Index.from_rows(self._rows)
        self._out.write(Record(Kind.INDEX, 0, index.encode()).to_bytes() + _TRAILER.pack(self._offset, TRAILER_MAGIC))
        self._out.flush()


class RecordPipe:
    """Says records to another process as they come: no keyframes and no index, which whoever keeps the stream makes."""

    def __init__(self, out: BinaryIO, header: Header) -> None:
        self._out = out
        out.write(header.to_bytes())

    def write(self, *records: Record) -> None:
        """Write records as they are, at once: a reader may be waiting."""
        self._out.write(b"".join([record.to_bytes() for record in records]))
        self._out.flush()


class Recorder:
    """Records an engine's steps to a file: a listener of its trace."""

    def __init__(self, path: str | os.PathLike[str], engine: object, header: Header) -> None:
        try:
            self._file = open(path, "wb")  # noqa: SIM115  closed by close()
        except OSError as error:
            raise TraceError(f"cannot record to {str(path)!r}: {error.strerror}") from None
        self._writer = StreamWriter(self._file, header)
        self._pieces = Pieces(engine)

    def write(self, delta: StepDelta) -> None:
        """Record one step."""
        fresh = self._pieces.fresh(delta)
        if fresh:
            self._writer.write(pieces_record(delta.step, fresh))
        self._writer.delta(delta)

    def shadow(self, shadow: ShadowDelta) -> None:
        """Record what another system would hold after the last step."""
        self._writer.shadow(shadow)

    def close(self) -> None:
        """Write the index and let the file go. Does nothing the second time."""
        if not self._file.closed:
            self._writer.finish()
            self._file.close()


def open_recorder(path: str | os.PathLike[str], engine: object, header: Header | None = None) -> Recorder:
    """A recorder of that engine; subscribe its `write`. TraceError if the file cannot be written."""
    return Recorder(path, engine, header if header is not None else header_of(engine))


class Pieces:
    """Which token ids the stream has told the bytes of."""

    def __init__(self, engine: object) -> None:
        self._known: set[int] = set()
        self._token_bytes: Callable[[int], bytes] | None = getattr(getattr(engine, "codec", None), "token_bytes", None)

    def fresh(self, delta: StepDelta) -> dict[int, bytes]:
        """The bytes of the ids that a delta names for the first time."""
        if self._token_bytes is None:
            return {}
        rows, known = delta.sequences, self._known
        first = rows.first if isinstance(rows, SequenceRows) else rows
        new = {token for patch in first for token in patch.token_ids if token not in known and token >= 0}
        if isinstance(rows, SequenceRows):
            new.update([token for token in rows.plain.token_ids if token not in known and token >= 0])
        known |= new
        return {token: self._token_bytes(token) for token in sorted(new)}


def header_of(engine: object) -> Header:
    """What the trace of this engine is of: what it says of itself in `describe()`."""
    describe = getattr(engine, "describe", None)
    told = describe() if callable(describe) else {}
    return Header(str(told.get("model", "")), int(told.get("seed", 0)), dict(told.get("engine", {})))


@dataclass(frozen=True, slots=True)
class Index:
    """One entry a record: enough to seek and to draw a timeline without reading the records."""

    kind: npt.NDArray[np.uint8]
    step: npt.NDArray[np.int64]
    size: npt.NDArray[np.uint32]  # bytes in the stream, frame included
    occupied: npt.NDArray[np.uint16]  # deltas: share of the pool in use, in 1/10000
    marks: npt.NDArray[np.uint16]  # deltas: bits of MARKS

    @classmethod
    def from_rows(cls, rows: list[tuple[int, int, int, int, int]]) -> Index:
        """From (kind, step, bytes, occupancy, marks), one a record."""
        table = np.array(rows, np.int64).reshape(-1, 5)
        kind, step, size, occupied, marks = table.T
        return cls(
            kind.astype(np.uint8),
            step.copy(),
            size.astype(np.uint32),
            occupied.astype(np.uint16),
            marks.astype(np.uint16),
        )

    def encode(self) -> bytes:
        """As a record's body. Steps are kept as differences, which compress."""
        step = np.diff(self.step, prepend=0)
        columns = {"kind": self.kind, "step": step, "size": self.size, "occupied": self.occupied, "marks": self.marks}
        return packing.pack({}, {f"i.{name}": column for name, column in columns.items()})

    @classmethod
    def decode(cls, body: bytes) -> Index:
        """Raises TraceError."""
        _, columns = packing.unpack(body)
        try:
            found = [columns[f"i.{name}"] for name in ("kind", "step", "size", "occupied", "marks")]
        except KeyError as error:
            raise TraceError(f"the trace's index lacks {error}") from None
        if len({len(column) for column in found}) != 1:
            raise TraceError("the trace's index is damaged")
        kind, step, size, occupied, marks = found
        return cls(kind, np.cumsum(step), size, occupied, marks)


def read_trailer(stream: BinaryIO, size: int) -> int | None:
    """Where the index record starts, or None where the file has no trailer. Moves the stream."""
    if size < _TRAILER.size:
        return None
    stream.seek(size - _TRAILER.size)
    end = read_exactly(stream, _TRAILER.size)
    offset, magic = _TRAILER.unpack(end) if end is not None else (0, b"")
    return int(offset) if magic == TRAILER_MAGIC and offset < size else None
