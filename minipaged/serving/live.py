"""A live engine as a source: the parent's end of the transport.

The engine runs in a child process, started before any screen; it sends the record stream over one pipe and receives
commands over another. It takes one step per permit, so pause and single step are exact.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from minipaged.config import SamplingParams
from minipaged.errors import TraceError
from minipaged.serving.child import EngineChild
from minipaged.text.safe import printable
from minipaged.trace import codec, packing
from minipaged.trace.events import StepDelta
from minipaged.trace.file import (
    KEYFRAME_EVERY,
    Header,
    Kind,
    Record,
    Recorder,
    command,
    read_header,
    read_record,
    record_to,
)
from minipaged.trace.snapshot import Snapshot
from minipaged.trace.sources import RecordSource

WINDOW = 32  # permits ahead of the newest step while the engine runs; a pause takes them back
AT_HAND = 256  # of the newest deltas stay decoded
SWITCH_SECONDS = 0.0005  # Python's own 5 ms would pass between two reads while the screen draws
Note = dict[str, Any]


class LiveSource(RecordSource):
    """A stream that is still being written. Records arrive on a thread of its own; `poll` takes them in on the caller's.

    records, commands: the two directions of a pipe or socket. recording: a file that gets every record too.
    """

    def __init__(
        self, records: BinaryIO, commands: BinaryIO, *, recording: str | os.PathLike[str] | None = None
    ) -> None:
        super().__init__(Header())
        self.ready = False  # whether the engine is loaded and has described itself
        self.idle = False  # whether it has nothing to do
        self.looks_on = ""  # why the engine cannot be steered from here; "" where it can
        self.ended = ""  # why no more will come; "" while more may
        self.notes: deque[Note] = deque()  # words for people, not yet taken
        self.jumps: set[int] = set()  # positions before which deltas are missing: a keyframe stands there
        self._stored: list[Record] = []
        self._folded = Snapshot()  # after all deltas, for the keyframes
        # Position -> delta: the newest, which whoever follows the engine asks for next.
        self._fresh: dict[int, StepDelta] = {}
        self._records, self._commands = records, commands
        self._arrived: deque[Record] = deque()
        self._arrival = threading.Event()
        self._eof = ""
        self._lock = threading.Lock()
        self._running = False
        self._submitted = 0
        self._outstanding = 0  # permits sent and not yet answered by a delta
        self._recording = Path(recording) if recording is not None else None
        self._recorder: Recorder | None = None
        self._thread = threading.Thread(target=self._read, name="trace-reader", daemon=True)
        self._thread.start()

    # The reading thread: takes records off the pipe and hands out permits.

    def _read(self) -> None:
        try:
            read_header(self._records, "the engine's stream")
            while (record := read_record(self._records)) is not None:
                if record.kind == Kind.DELTA:
                    with self._lock:
                        self._outstanding = max(0, self._outstanding - 1)
                        self._top_up()
                if record.kind == Kind.DELTA:
                    record = record._replace(body=packing.recompress(record.body))
                self._arrived.append(record)
                self._arrival.set()
            self._eof = "the engine's process has ended"
        except (TraceError, OSError, ValueError) as error:
            self._eof = f"the engine's stream broke off: {error}"
        self._arrival.set()

    def _top_up(self) -> None:
        if self._running and self._outstanding <= WINDOW // 2:
            more = WINDOW - self._outstanding
            self._outstanding += more
            self._send(command("permit", steps=more))

    def _send(self, record: Record) -> None:
        with contextlib.suppress(OSError, ValueError):  # a dead engine is reported by the reading side
            self._commands.write(record.to_bytes())
            self._commands.flush()

    # Commands.

    def run(self) -> None:
        """Let the engine step until `pause`."""
        with self._lock:
            self._running = True
            self._top_up()

    def pause(self) -> None:
        """Take back the permits: the engine stops after the step it is in."""
        with self._lock:
            self._running = False
            self._outstanding = 0
            self._send(command("pause"))

    def permit(self, steps: int = 1) -> None:
        """Let the engine take exactly this many more steps."""
        with self._lock:
            self._outstanding += steps
            self._send(command("permit", steps=steps))

    def submit(self, prompt: str, params: SamplingParams) -> None:
        """Ask for an answer. A bad request comes back as a note of kind "refused"."""
        with self._lock:
            self._submitted, self.idle = self._submitted + 1, False
            self._send(command("submit", prompt=prompt, params=asdict(params)))

    def abort(self, request: int) -> None:
        """End a request."""
        with self._lock:
            self._send(command("abort", request=request))

    def knob(self, name: str, value: object) -> None:
        """Change a setting of the engine, if it has it."""
        with self._lock:
            self._send(command("knob", name=name, value=value))

    @property
    def running(self) -> bool:
        """Whether the engine may step without being asked."""
        return self._running

    @property
    def outstanding(self) -> int:
        """Permits that no delta has answered yet."""
        return self._outstanding

    # The caller's thread.

    @property
    def live(self) -> bool:
        """Whether more deltas may come."""
        return not self.ended

    def _record(self, number: int) -> Record:
        return self._stored[number]

    def poll(self) -> int:
        """Take in what has arrived; returns how many deltas. Never waits."""
        before = len(self)
        ended = self._eof  # read first: what arrived before the end must not be lost
        self._arrival.clear()
        while self._arrived:
            self._take(self._arrived.popleft())
        if ended and not self.ended:
            self.ended = ended
            self.close_recording()
        return len(self) - before

    def wait(self, condition: Callable[[], bool], timeout_seconds: float = 30.0) -> bool:
        """Poll until the condition holds; False at the time's end, or when the engine has ended without it."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            self.poll()
            if condition():
                return True
            left = deadline - time.monotonic()
            if left <= 0 or self.ended:
                return False
            if not self._arrived and not self._eof:
                self._arrival.wait(min(left, 0.1))

    def _take(self, record: Record) -> None:
        if record.kind == Kind.NOTE:
            self._take_note(packing.unpack(record.body)[0])
        elif record.kind == Kind.HEADER:
            self.header = Header.from_json(packing.unpack(record.body)[0])
            self.ready = True
            self._open_recording()
        elif record.kind == Kind.KEYFRAME:  # from a server: the state that it begins with, or jumps to
            self._folded = codec.decode_keyframe(record.step, record.body)
            if len(self):
                self.jumps.add(len(self))
            self._keep(record)
        else:
            if record.kind == Kind.DELTA and len(self) % KEYFRAME_EVERY == 0:
                self._keep(Record(Kind.KEYFRAME, self._folded.step, codec.encode_keyframe(self._folded)))
            self._keep(record)

    def _keep(self, record: Record) -> None:
        """Store and record; fold a delta, and have it at hand for whoever follows."""
        delta = self._index_record(len(self._stored), record)
        self._stored.append(record)
        occupied = marks = 0
        if delta is not None:
            self.idle = False
            occupied, marks = int(self.occupied[-1]), int(self.marks[-1])
            self._folded.apply(delta)
            self._folded.misfit = ""  # whoever shows it says so
            self._fresh[len(self) - 1] = delta
            self._fresh.pop(len(self) - 1 - AT_HAND, None)
        if self._recorder is not None:
            self._recorder.record(record, occupied, marks)

    def delta(self, position: int) -> StepDelta:
        """The delta that leads from `position` to the next. Raises TraceError where it is damaged, and ends the source there."""
        fresh = self._fresh.get(position)
        return fresh if fresh is not None else super().delta(position)

    def end_at(self, position: int, reason: str) -> None:
        """A live source goes on: what does not fit becomes a note."""
        self._problem(f"step {position} does not fit the steps before it: {reason}")

    def _problem(self, text: str) -> None:
        self.notes.append({"kind": "problem", "text": text})

    def _take_note(self, note: Note) -> None:
        if "idle" in note:  # true once the engine has received all that was asked of it
            self.idle = note["idle"] == self._submitted
        else:
            self.notes.append({name: printable(v) if isinstance(v, str) else v for name, v in note.items()})

    def _open_recording(self) -> None:
        if self._recording is not None and self._recorder is None:
            try:
                self._recorder = record_to(self._recording, self.header, report=self._problem)
            except TraceError as error:
                self._problem(str(error))

    def close_recording(self) -> None:
        """End the recording with its index."""
        if self._recorder is not None:
            self._recorder.close()
        self._recorder = self._recording = None

    def close(self) -> None:
        """Hang up: the engine's process ends when it receives it."""
        with self._lock:
            self._send(command("quit"))
            with contextlib.suppress(OSError):
                self._commands.close()
        self.poll()
        self.close_recording()


class EngineProcess(EngineChild):
    """An engine in a child process, and the source that its records make. The arguments are those of EngineChild and LiveSource."""

    def __init__(
        self,
        factory: Callable[..., Any],
        arguments: Mapping[str, Any] | None = None,
        *,
        recording: str | os.PathLike[str] | None = None,
        log_path: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(factory, arguments, log_path=log_path)
        sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_SECONDS))
        self.source = LiveSource(self.records, self.commands, recording=recording)

    def close(self, grace_seconds: float = 2.0) -> None:
        """Hang up and see the child out."""
        self.source.close()
        self.see_out(grace_seconds)

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
