"""The record stream: what is written to a file, and what a live engine sends over a pipe.

    magic (8 bytes) · u32 length, JSON header · records: u32 body length, u8 kind, i64 step, u32 CRC32 of (kind, step, body), body

A keyframe comes first and then before every 128th delta, made by whoever keeps the stream: over the pipe from a live
engine none comes, and nothing is compressed, so that no token waits for it. A file ends in an index record and a trailer that says
where it is; without them the index is rebuilt by scanning.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import sys
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from minipaged.errors import TraceError
from minipaged.text.safe import one_line
from minipaged.trace import codec, packing
from minipaged.trace.events import SCHEMA_MAJOR, SCHEMA_MINOR, ShadowDelta, StepDelta, marks_of, occupancy
from minipaged.trace.snapshot import Snapshot

MAGIC = b"mpgtrace"
TRAILER_MAGIC = b"mpgindex"
KEYFRAME_EVERY = 128
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
    INDEX = 5
    NOTE = 6  # live only: a word from the engine's process
    COMMAND = 7  # live only: a word to that process
    HEADER = 8  # live only: the header, once the engine is there to be described
    ANSWERS = 10  # live only: what a step added to the answers that a server waits for; neither stored nor recorded


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
        values = {**self.extra, "schema": schema, "model": self.model, "seed": self.seed, "engine": dict(self.engine)}
        return {**values, "finding": self.finding} if self.finding else values

    def to_bytes(self) -> bytes:
        """Magic, length and JSON: the start of a stream."""
        text = json.dumps(self.to_json(), default=str).encode()
        return MAGIC + _LENGTH.pack(len(text)) + text

    @classmethod
    def from_json(cls, values: object) -> Header:
        """Read a header, its texts made safe to print. Raises TraceError if it is none or of another major version."""
        rest = _safe(values)
        schema = rest.pop("schema", None) if isinstance(rest, dict) else None
        if not isinstance(rest, dict) or not isinstance(schema, dict):
            raise TraceError("the trace's header cannot be read: it names no schema")
        major, minor = schema.get("major"), schema.get("minor")
        if type(major) is not int or type(minor) is not int:
            raise TraceError("the trace's header cannot be read: its schema has no version")
        if major != SCHEMA_MAJOR:
            raise TraceError(
                f"this trace has schema {major}.{minor}; this reader knows {SCHEMA_MAJOR}.x: "
                + (
                    "update minipaged to open it"
                    if major > SCHEMA_MAJOR
                    else "record it again, or open it with an older minipaged"
                )
            )
        model, seed, engine = rest.pop("model", ""), rest.pop("seed", 0), rest.pop("engine", {})
        finding = rest.pop("finding", "")
        fits = type(model) is str and type(seed) is int and isinstance(engine, dict) and type(finding) is str
        if not fits:
            raise TraceError("the trace's header cannot be read: its model, seed, settings or finding are none")
        return cls(model, seed, engine, major, minor, rest, finding)

    def setting(self, name: str, default: int) -> int:
        """A whole number above 0 among the engine's settings; `default` where it says none."""
        value = self.engine.get(name)
        return value if type(value) is int and value > 0 else default


def _safe(values: object) -> Any:
    """A JSON value with its texts made safe to print: a stranger may have written them."""
    if isinstance(values, str):
        return one_line(values)
    if isinstance(values, list):
        return [_safe(item) for item in values]
    if isinstance(values, dict):
        return {one_line(str(name)): _safe(item) for name, item in values.items()}
    return values


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
        return Header.from_json(packing.read_json(text))
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


def parse_header(data: bytes | bytearray) -> int:
    """How many bytes magic and header take at a stream's beginning; 0 while they are not there in full. TraceError if these are others."""
    start = len(MAGIC) + _LENGTH.size
    if len(data) < start:
        return 0
    if not data.startswith(MAGIC):
        raise TraceError(f"the stream is not a minipaged trace (a trace starts with {MAGIC.decode()!r})")
    (size,) = _LENGTH.unpack_from(data, len(MAGIC))
    return start + size if len(data) >= start + size else 0


def parse_record(data: bytes | bytearray, offset: int) -> Record | None:
    """The record that begins at `offset`; None while it is not there in full. TraceError if it is damaged."""
    start = offset + FRAME_BYTES
    if len(data) < start:
        return None
    size, kind, step, crc = _FRAME.unpack_from(data, offset)
    if size > packing.MAX_BODY_BYTES:
        raise TraceError("a record is too large to be one")
    if len(data) < start + size:
        return None
    body = bytes(data[start : start + size])
    if zlib.crc32(body, zlib.crc32(_CHECKED.pack(kind, step))) != crc:
        raise TraceError(f"a record's check sum is wrong (after step {step})")
    return Record(kind, step, body)


def note(**words: Any) -> Record:
    """A word from the engine's process."""
    return Record(Kind.NOTE, 0, packing.pack(words, {}))


def command(do: str, *, columns: packing.Columns | None = None, **words: Any) -> Record:
    """A word to the engine's process."""
    return Record(Kind.COMMAND, 0, packing.pack({"do": do, **words}, columns or {}, level=0))


class StreamWriter:
    """Writes a stream: deltas in, keyframes added, the index kept and written at the end.

    Folds the deltas to know the keyframes, unless somebody else does already. state: gives the state after the delta that was just written.
    """

    def __init__(
        self,
        out: BinaryIO,
        header: Header,
        *,
        keyframe_every: int = KEYFRAME_EVERY,
        state: Callable[[], Snapshot] | None = None,
    ) -> None:
        self._out = out
        self._every = keyframe_every
        self._snapshot = Snapshot()
        self._state = state
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
        if self._state is None or self._num_deltas == 1:
            self._snapshot.apply(delta)
        elif self._num_deltas % self._every == 0:  # the next delta's keyframe
            self._snapshot = self._state().copy()
        if self._state is not None and self._num_deltas == 1 and self._snapshot != self._state():
            self._state = None  # others listened before, and saw sequences that have ended

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
    """Records an engine's steps to a file: a listener of its trace.

    A file that can no longer be written (a full disk) ends the recording, not the run: `report` gets one sentence, once, and what
    was written until then can be opened.
    """

    def __init__(
        self,
        out: BinaryIO,
        header: Header,
        name: str,
        report: Callable[[str], object],
        state: Callable[[], Snapshot] | None = None,
    ) -> None:
        self._out: BinaryIO | None = out
        self._state = state
        self._name = name
        self._report = report
        self._writer: StreamWriter | None = None
        self._header = header

    def _stream(self) -> StreamWriter | None:
        if self._writer is None and self._out is not None:
            self._writer = StreamWriter(self._out, self._header, state=self._state)
        return self._writer

    def _try(self, do: Callable[[StreamWriter], None]) -> None:
        if self._out is None:
            return
        try:
            writer = self._stream()
            if writer is not None:
                do(writer)
        except OSError as error:
            self._let_go()
            self._report(f"{self._name}: {error.strerror}; the recording ends here, and the run goes on")

    def write(self, delta: StepDelta) -> None:
        """Record one step."""
        self._try(lambda writer: writer.delta(delta))

    def record(self, record: Record, occupied: int = 0, marks: int = 0) -> None:
        """Keep a record of another stream as it is."""
        self._try(lambda writer: writer.write(record, occupied, marks))

    def close(self) -> None:
        """Write the index and let the file go. Does nothing the second time."""
        self._try(lambda writer: writer.finish())
        self._let_go()

    def _let_go(self) -> None:
        out, self._out = self._out, None
        if out is not None:
            with contextlib.suppress(OSError):  # what was buffered does not fit either
                out.close()


def open_recorder(
    path: str | os.PathLike[str],
    engine: object,
    header: Header | None = None,
    *,
    report: Callable[[str], object] | None = None,
) -> Recorder:
    """A recorder of that engine; subscribe its `write`. TraceError if the file cannot be written.

    report: who gets the sentence if it cannot be written any more; without, it is said on the standard error stream.
    """
    state = getattr(getattr(engine, "trace", None), "state", None)
    return record_to(path, header if header is not None else header_of(engine), report=report or _say, state=state)


def record_to(
    path: str | os.PathLike[str],
    header: Header,
    *,
    report: Callable[[str], object],
    state: Callable[[], Snapshot] | None = None,
) -> Recorder:
    """A recorder to a new file; report and state as Recorder and StreamWriter have them. TraceError if it cannot be written."""
    try:
        out = open(path, "wb")  # noqa: SIM115  closed by the recorder
    except OSError as error:
        raise TraceError(f"cannot record to {str(path)!r}: {error.strerror}") from None
    return Recorder(out, header, str(path), report, state)


def _say(sentence: str) -> None:
    print(f"minipaged: {sentence}", file=sys.stderr)


def header_of(engine: object) -> Header:
    """What the trace of this engine is of: what it says of itself in `describe()`."""
    describe = getattr(engine, "describe", None)
    values = describe() if callable(describe) else {}
    return Header(str(values.get("model", "")), int(values.get("seed", 0)), dict(values.get("engine", {})))


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
        values = codec.Body(body)
        kind = values.ints("i.kind", least=0, most=255)
        most = {"size": packing.MAX_BODY_BYTES + FRAME_BYTES, "occupied": 10_000, "marks": (1 << 16) - 1}
        found = {name: values.ints(f"i.{name}", least=0, most=limit, length=len(kind)) for name, limit in most.items()}
        step = values.ints("i.step", least=-codec.MAX_NUMBER, length=len(kind))
        return cls(
            kind.astype(np.uint8),
            np.cumsum(step),
            found["size"].astype(np.uint32),
            found["occupied"].astype(np.uint16),
            found["marks"].astype(np.uint16),
        )


def read_trailer(stream: BinaryIO, size: int) -> int | None:
    """Where the index record starts, or None where the file has no trailer. Moves the stream."""
    if size < _TRAILER.size:
        return None
    stream.seek(size - _TRAILER.size)
    end = read_exactly(stream, _TRAILER.size)
    offset, magic = _TRAILER.unpack(end) if end is not None else (0, b"")
    return int(offset) if magic == TRAILER_MAGIC and offset < size else None
