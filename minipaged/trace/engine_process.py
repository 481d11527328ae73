"""The child's end of the transport: builds an engine, steps it once a permit, and says what happened as records.

Knows the engine's public face (submit, abort, step, has_work, trace.subscribe); the heavy imports happen in the
factory. It ends when the parent's pipe closes, however the parent went.
"""

from __future__ import annotations

import os
import pickle
import queue
import threading
import traceback
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, Protocol

from minipaged.config import SamplingParams
from minipaged.errors import InputError, TraceError
from minipaged.trace import codec
from minipaged.trace.records import StepDelta
from minipaged.trace.stream import Header, Kind, Record, StreamWriter, note, pieces_record, read_record

Status = Callable[[str], None]
Command = dict[str, Any]


class Publisher(Protocol):
    """The engine's trace."""

    def subscribe(self, listener: Callable[[StepDelta], None]) -> object:
        """Call the listener with each step's delta."""
        ...


class SteppedEngine(Protocol):
    """What this process asks of an engine. It may also have describe() for the header, codec.token_bytes(id) and knob(name, value)."""

    trace: Publisher

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        ...

    def submit(self, prompt: str, params: SamplingParams) -> int:
        """Ask for an answer; returns the request's number."""
        ...

    def abort(self, request_id: int) -> None:
        """End a request."""
        ...

    def step(self) -> object:
        """One step."""
        ...


def main(call: bytes, commands: BinaryIO, records: BinaryIO) -> None:
    """The process, from the factory to the end. An error goes to the log and, as a note, to the parent; never to the terminal."""
    inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(commands, inbox), name="commands", daemon=True).start()
    try:
        writer = StreamWriter(records, Header())
        try:
            factory, arguments = pickle.loads(call)
            engine = factory(**arguments, status=lambda text: writer.write(note(kind="status", text=text)))
        except InputError as error:
            writer.write(note(kind="failed", text=str(error), input_error=True))
            return
        except Exception as error:
            traceback.print_exc()
            writer.write(note(kind="failed", text=f"the engine could not start: {error}", input_error=False))
            return
        try:
            EngineLoop(engine, writer, inbox).run()
        except Exception as error:
            traceback.print_exc()
            writer.write(
                note(kind="failed", text=f"the engine failed: {type(error).__name__}: {error}", input_error=False)
            )
            raise SystemExit(1) from None
    except BrokenPipeError:
        os._exit(0)  # the parent has gone


def _listen(commands: BinaryIO, inbox: queue.SimpleQueue[Command]) -> None:
    try:
        while (record := read_record(commands)) is not None:
            told, _ = codec.unpack(record.body)
            if told.get("do") == "quit":
                break
            inbox.put(told)
    except (TraceError, OSError, ValueError):
        pass  # a broken pipe says the same as a closed one
    os._exit(0)  # the parent has hung up or died: whatever the engine is doing, nobody waits for it


class EngineLoop:
    """Commands in, one step a permit, records out."""

    def __init__(self, engine: SteppedEngine, writer: StreamWriter, inbox: queue.SimpleQueue[Command]) -> None:
        self.engine = engine
        self.writer = writer
        self.inbox = inbox
        self.permits = 0
        self._told_idle = False
        self._known_pieces: set[int] = set()
        self._token_bytes: Callable[[int], bytes] | None = getattr(getattr(engine, "codec", None), "token_bytes", None)
        engine.trace.subscribe(self._publish)

    def run(self) -> None:
        """Until the process ends."""
        describe = getattr(self.engine, "describe", None)
        told: Mapping[str, Any] = describe() if callable(describe) else {}
        header = Header(str(told.get("model", "")), int(told.get("seed", 0)), dict(told.get("engine", {})))
        self.writer.write(Record(Kind.HEADER, 0, codec.pack(header.to_json(), {})))
        while True:
            may_step = self.permits > 0 and self.engine.has_work
            if not may_step:
                self._tell_idle()
            self._drain(wait=not may_step)
            if self.permits > 0 and self.engine.has_work:
                self._told_idle = False
                self.permits -= 1
                self.engine.step()

    def _tell_idle(self) -> None:
        if not self.engine.has_work and not self._told_idle:
            self._told_idle = True
            self.writer.write(note(idle=True))

    def _drain(self, *, wait: bool) -> None:
        """Obey all commands that are there; wait for one first if there is nothing else to do."""
        try:
            self._obey(self.inbox.get(block=wait))
            while True:
                self._obey(self.inbox.get_nowait())
        except queue.Empty:
            return

    def _obey(self, told: Command) -> None:
        do = told.get("do")
        try:
            if do == "permit":
                self.permits += int(told["steps"])
            elif do == "pause":
                self.permits = 0
            elif do == "submit":
                self._submit(told)
            elif do == "abort":
                self.engine.abort(int(told["request"]))
            elif do == "knob":
                self._turn(str(told["name"]), told["value"])
        except InputError as error:
            self.writer.write(note(kind="refused", text=str(error)))

    def _submit(self, told: Command) -> None:
        given: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in told["params"].items()
        }
        request = self.engine.submit(str(told["prompt"]), SamplingParams(**given))
        self._told_idle = False
        self.writer.write(note(kind="submitted", request=request, text=""))

    def _turn(self, name: str, value: object) -> None:
        knob = getattr(self.engine, "knob", None)
        if knob is None:
            raise InputError(f"this engine has no knob {name!r}")
        knob(name, value)

    def _publish(self, delta: StepDelta) -> None:
        if self._token_bytes is not None:
            fresh = {token for patch in delta.sequences for token in patch.token_ids if token >= 0} - self._known_pieces
            if fresh:
                self._known_pieces |= fresh
                self.writer.write(
                    pieces_record(delta.step, {token: self._token_bytes(token) for token in sorted(fresh)})
                )
        self.writer.delta(delta)
