"""Where deltas come from: a list, a file, and (serving/live.py) an engine. All answer the same questions.

A position is a number of deltas: position p is the state after the first p, so delta(p) leads from p to p + 1. A
source grows while it is live and shrinks where damage is found; it never changes what it has given.
"""

from __future__ import annotations

import mmap
import os
import struct
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from minipaged.errors import TraceError
from minipaged.trace import codec
from minipaged.trace.events import ShadowDelta, StepDelta, marks_of, occupancy
from minipaged.trace.file import (
    FRAME_BYTES,
    KEYFRAME_EVERY,
    Header,
    Index,
    Kind,
    Record,
    read_header,
    read_record,
    read_trailer,
)
from minipaged.trace.snapshot import Snapshot

Progress = Callable[[int, int], None]  # bytes done, bytes in all
_FRAME = struct.Struct("<IBqI")
_CHECKED = struct.Struct("<Bq")


class Source(Protocol):
    """Deltas by position."""

    @property
    def header(self) -> Header:
        """What the trace is of."""
        ...

    @property
    def damage(self) -> str:
        """A sentence on where and how the trace ends early; "" where it does not."""
        ...

    @property
    def live(self) -> bool:
        """Whether more deltas may come."""
        ...

    @property
    def occupied(self) -> npt.NDArray[np.uint16]:
        """Share of the pool in use after each delta, in 1/10000."""
        ...

    @property
    def marks(self) -> npt.NDArray[np.uint16]:
        """Bits of MARKS: the kinds of event in each delta."""
        ...

    def __len__(self) -> int: ...

    def delta(self, position: int) -> StepDelta:
        """The delta that leads from `position` to the next. Raises TraceError where it is damaged, and ends the source there."""
        ...

    def shadows(self, position: int) -> list[ShadowDelta]:
        """What other systems would hold after that delta. Raises TraceError where that is damaged, and ends the source there."""
        ...

    def end_at(self, position: int, reason: str) -> None:
        """What comes after `position` does not fit what came before: the source ends there, unless it is live."""
        ...

    def keyframe(self, position: int) -> tuple[int, Snapshot]:
        """The latest whole state at or before `position`, and its position."""
        ...


def damaged(position: int, reason: str) -> str:
    """A sentence on a trace that is only good up to a position."""
    return f"the trace is damaged after {position} steps ({reason}); what comes before is shown"


class Growing:
    """A numpy column that grows at its end; `view` is what there is."""

    __slots__ = ("_data", "_length")

    def __init__(self, data: npt.NDArray[Any]) -> None:
        self._data, self._length = data, len(data)

    def append(self, value: int) -> None:
        """Add one entry; amortised O(1)."""
        if self._length == len(self._data):
            bigger = np.empty(max(64, 2 * self._length), self._data.dtype)
            bigger[: self._length] = self._data
            self._data = bigger
        self._data[self._length] = value
        self._length += 1

    def cut(self, length: int) -> None:
        """Forget what is at and past `length`."""
        self._length = min(self._length, length)

    @property
    def view(self) -> npt.NDArray[Any]:
        """The entries, without a copy."""
        return self._data[: self._length]

    def __len__(self) -> int:
        return self._length


class ListSource:
    """Deltas in memory: tests, lessons and failing properties."""

    live = False

    def __init__(
        self,
        deltas: Iterable[StepDelta],
        *,
        header: Header | None = None,
        shadows: Iterable[ShadowDelta] = (),
    ) -> None:
        self.header = header if header is not None else Header(model="list")
        self.damage = ""
        self._deltas = list(deltas)
        self._keyframes = [Snapshot()]
        self._shadows: dict[int, list[ShadowDelta]] = {}
        for shadow in shadows:
            self._shadows.setdefault(shadow.step, []).append(shadow)
        self.occupied = np.array([occupancy(delta.stats) for delta in self._deltas], np.uint16)
        self.marks = np.array([marks_of(delta.events) for delta in self._deltas], np.uint16)

    def __len__(self) -> int:
        return len(self._deltas)

    def delta(self, position: int) -> StepDelta:
        """The delta that leads from `position` to the next."""
        return self._deltas[position]

    def end_at(self, position: int, reason: str) -> None:
        """End the list there."""
        self._deltas = self._deltas[:position]
        self.occupied, self.marks = self.occupied[:position], self.marks[:position]
        self.damage = damaged(position, reason)

    def shadows(self, position: int) -> list[ShadowDelta]:
        """What other systems would hold after that delta."""
        return self._shadows.get(self._deltas[position].step, [])

    def keyframe(self, position: int) -> tuple[int, Snapshot]:
        """The latest whole state at or before `position`, and its position."""
        wanted = position // KEYFRAME_EVERY
        while len(self._keyframes) <= wanted:
            snapshot = self._keyframes[-1].copy()
            first = (len(self._keyframes) - 1) * KEYFRAME_EVERY
            for at in range(first, first + KEYFRAME_EVERY):
                snapshot.apply(self._deltas[at])
                for shadow in self.shadows(at):
                    snapshot.apply_shadow(shadow)
            self._keyframes.append(snapshot)
        return wanted * KEYFRAME_EVERY, self._keyframes[wanted].copy()


class RecordSource:
    """Records by number, indexed as deltas, keyframes and the rest. Base of the file source and the live source."""

    def __init__(self, header: Header) -> None:
        self.header = header
        self.damage = ""
        self._delta_numbers = Growing(np.zeros(0, np.int64))
        self._keyframe_positions: list[int] = []
        self._keyframe_numbers: list[int] = []
        self._shadow_numbers = Growing(np.zeros(0, np.int64))
        self._occupied = Growing(np.zeros(0, np.uint16))
        self._marks = Growing(np.zeros(0, np.uint16))

    def _record(self, number: int) -> Record:
        raise NotImplementedError

    def _index_record(self, number: int, record: Record) -> StepDelta | None:
        """Take a record in; returns the delta if it is one. Raises TraceError if it cannot be read."""
        if record.kind == Kind.DELTA:
            delta = codec.decode_delta(record.step, record.body)
            self._delta_numbers.append(number)
            self._occupied.append(occupancy(delta.stats))
            self._marks.append(marks_of(delta.events))
            return delta
        if record.kind == Kind.KEYFRAME:
            self._keyframe_positions.append(len(self))
            self._keyframe_numbers.append(number)
        elif record.kind == Kind.SHADOW:
            self._shadow_numbers.append(number)
        return None

    @property
    def live(self) -> bool:
        """Whether more deltas may come."""
        return False

    @property
    def occupied(self) -> npt.NDArray[np.uint16]:
        """Share of the pool in use after each delta, in 1/10000."""
        return self._occupied.view

    @property
    def marks(self) -> npt.NDArray[np.uint16]:
        """Bits of MARKS: the kinds of event in each delta."""
        return self._marks.view

    def __len__(self) -> int:
        return len(self._delta_numbers)

    def end_at(self, position: int, reason: str) -> None:
        """The trace is only good up to `position`."""
        for column in (self._delta_numbers, self._occupied, self._marks):
            column.cut(position)
        self.damage = damaged(position, reason)

    def _record_of(self, number: int, kind: Kind) -> Record:
        record = self._record(number)
        if record.kind != kind:
            raise TraceError(f"record {number} is not what the index says")
        return record

    def delta(self, position: int) -> StepDelta:
        """The delta that leads from `position` to the next. Raises TraceError where it is damaged, and ends the source there."""
        try:
            record = self._record_of(int(self._delta_numbers.view[position]), Kind.DELTA)
            return codec.decode_delta(record.step, record.body)
        except TraceError as error:
            self.end_at(position, str(error))
            raise

    def shadows(self, position: int) -> list[ShadowDelta]:
        """What other systems would hold after that delta. Raises TraceError where that is damaged, and ends the source there."""
        numbers = self._shadow_numbers.view
        if not len(numbers):
            return []
        deltas = self._delta_numbers.view
        first = np.searchsorted(numbers, deltas[position])
        last = np.searchsorted(numbers, deltas[position + 1]) if position + 1 < len(deltas) else len(numbers)
        try:
            records = [self._record_of(int(number), Kind.SHADOW) for number in numbers[first:last]]
            return [codec.decode_shadow(record.step, record.body) for record in records]
        except TraceError as error:
            self.end_at(position, str(error))
            raise

    def keyframe(self, position: int) -> tuple[int, Snapshot]:
        """The latest whole state at or before `position`, and its position. A damaged one is passed over for the one before."""
        at = bisect_right(self._keyframe_positions, position)
        while at > 0:
            at -= 1
            try:
                record = self._record_of(self._keyframe_numbers[at], Kind.KEYFRAME)
                return self._keyframe_positions[at], codec.decode_keyframe(record.step, record.body)
            except TraceError:
                continue
        raise TraceError("the trace has no whole keyframe to start from")


class FileSource(RecordSource):
    """A trace in a file, read where it is asked. Raises TraceError if it is none, or has no whole keyframe."""

    def __init__(self, path: str | os.PathLike[str], *, progress: Progress | None = None) -> None:
        self.path = Path(path)
        try:
            self._file = self.path.open("rb")
            size = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise TraceError(f"cannot open the trace {str(path)!r}: {error.strerror}") from None
        try:
            super().__init__(read_header(self._file, repr(str(path))))
            self._start = self._file.tell()
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
            index = self._read_index(size)
            if index is not None:
                self._take_index(index)
            else:
                self._scan(size, progress)
            self.keyframe(0)
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        """Let the file go."""
        self._map.close()
        self._file.close()

    def _read_index(self, size: int) -> Index | None:
        offset = read_trailer(self._file, size)
        if offset is None or offset < self._start:
            return None
        try:
            record = self._at(offset)
            index = Index.decode(record.body) if record.kind == Kind.INDEX else None
        except TraceError:
            return None
        whole = index is not None and self._start + int(index.size.sum(dtype=np.int64)) == offset
        return index if whole else None

    def _take_index(self, index: Index) -> None:
        deltas = np.flatnonzero(index.kind == Kind.DELTA)
        keyframes = np.flatnonzero(index.kind == Kind.KEYFRAME)
        ends = self._start + np.cumsum(index.size, dtype=np.int64)
        self._offsets = Growing(ends - index.size)
        self._delta_numbers = Growing(deltas)
        self._occupied, self._marks = Growing(index.occupied[deltas]), Growing(index.marks[deltas])
        self._shadow_numbers = Growing(np.flatnonzero(index.kind == Kind.SHADOW))
        self._keyframe_numbers = keyframes.tolist()
        self._keyframe_positions = np.searchsorted(deltas, keyframes).tolist()

    def _scan(self, size: int, progress: Progress | None) -> None:
        """Rebuild the index by reading everything, up to the end or the first damage."""
        self._offsets = Growing(np.zeros(0, np.int64))
        self._file.seek(self._start)
        number = 0
        while True:
            offset = self._file.tell()
            if progress is not None and number % 1024 == 0:
                progress(offset, size)
            try:
                record = read_record(self._file)
                if record is None:
                    self.damage = "the trace has no index: its writer was stopped; all whole steps are shown"
                    break
                if record.kind == Kind.INDEX:
                    break
                self._index_record(number, record)
            except TraceError as error:
                self.end_at(len(self), str(error))
                break
            self._offsets.append(offset)
            number += 1
        if progress is not None:
            progress(size, size)

    def _record(self, number: int) -> Record:
        return self._at(int(self._offsets.view[number]))

    def _at(self, offset: int) -> Record:
        data = self._map
        if offset + FRAME_BYTES > len(data):
            raise TraceError("cut short inside a record")
        size, kind, step, crc = _FRAME.unpack_from(data, offset)
        body = data[offset + FRAME_BYTES : offset + FRAME_BYTES + size]
        if len(body) != size or zlib.crc32(body, zlib.crc32(_CHECKED.pack(kind, step))) != crc:
            raise TraceError(f"the record at byte {offset} is damaged")
        return Record(kind, step, body)
