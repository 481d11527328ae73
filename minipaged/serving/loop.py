"""The child's end of the transport: builds an engine, steps it once a permit, and sends what happened as records.

It calls the engine's public methods only (submit, ask, abort, step, has_work, trace.subscribe); the heavy imports happen in the
factory. It ends when the parent's pipe closes, however the parent went.

A screen submits prompts and reads deltas. A server asks under tickets and reads ANSWERS (see answers.py); it switches the deltas off
while nobody watches.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any, BinaryIO, Protocol

import numpy as np

from minipaged.config import SamplingParams
from minipaged.errors import InputError, TraceError
from minipaged.serving.answers import Answers
from minipaged.trace import codec, packing
from minipaged.trace.events import StepDelta
from minipaged.trace.file import (
    Header,
    Kind,
    Record,
    RecordPipe,
    header_of,
    note,
    read_record,
)
from minipaged.trace.snapshot import Snapshot

HIDDEN = "·".encode()  # what each token reads to those who may not see texts
Command = dict[str, Any]
NO_TOKENS = np.zeros(0, np.int32)
PIPE_LEVEL = 0  # zlib's: whoever keeps the stream makes it small, in a process that no token waits for
SWITCH_SECONDS = 0.0005  # a command is read between two of Python's turns; its own 5 ms would be a quarter of a step


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

    def step(self) -> Any:
        """One step; a whole Engine returns the outputs that it changed."""
        ...


def main(call: bytes, commands: BinaryIO, records: BinaryIO, own_log: str | None = None) -> None:
    """The process, from the factory to the end. An error goes to the log and, as a note, to the parent; never to the terminal.

    own_log: the log's path, where it is a file that the parent made for this process alone.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(commands, inbox, own_log), name="commands", daemon=True).start()
    try:
        writer = RecordPipe(records, Header())
        try:
            factory, arguments = pickle.loads(call)
            engine = factory(**arguments, progress=Progress(writer))
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


def _listen(commands: BinaryIO, inbox: queue.SimpleQueue[Command], own_log: str | None) -> None:
    try:
        while (record := read_record(commands)) is not None:
            received, columns = packing.unpack(record.body, most=packing.MAX_BODY_BYTES)
            if received.get("do") == "quit":
                break
            inbox.put({**received, **columns})
    except (TraceError, OSError, ValueError):
        pass  # a broken pipe says the same as a closed one
    with contextlib.suppress(OSError):  # a parent that was killed takes nothing away
        if own_log is not None and not os.path.getsize(own_log):
            os.unlink(own_log)
    os._exit(0)  # the parent has hung up or died: whatever the engine is doing, nobody waits for it


class Progress:
    """What a factory reports while it loads: a stage, and how much of it is done. Sent at most ten times a second."""

    def __init__(self, writer: RecordPipe) -> None:
        self._writer = writer
        self._stage = ""
        self._sent = 0.0

    def __call__(self, stage: str, done: int = 0, total: int = 0) -> None:
        """`stage` is at `done` of `total`; without a total it is only named."""
        now = time.monotonic()
        if stage == self._stage and now - self._sent < 0.1 and done < total:
            return
        self._stage, self._sent = stage, now
        share = f" {100 * done // total} %" if total else ""
        self._writer.write(note(kind="status", text=f"{stage}…{share}"))


class EngineLoop:
    """Commands in, one step a permit, records out."""

    def __init__(self, engine: SteppedEngine, writer: RecordPipe, inbox: queue.SimpleQueue[Command]) -> None:
        self.engine = engine
        self.writer = writer
        self.inbox = inbox
        self.permits = 0
        self._sent_idle = False
        self._submitted = 0  # prompts received, refused ones included
        self._answers: Answers | None = None  # once a server has asked
        self._show_text = True
        self._unsubscribe: object = engine.trace.subscribe(sender(writer))

    def run(self) -> None:
        """Until the process ends."""
        header = header_of(self.engine)
        self.writer.write(Record(Kind.HEADER, 0, packing.pack(header.to_json(), {})))
        while True:
            may_step = self.permits > 0 and self.engine.has_work
            if not may_step:
                self._send_idle()
            self._drain(wait=not may_step)
            if self._answers is not None and (not may_step or self._answers.has_rows):
                self._send_answers()  # refusals and arrivals are not for the step to wait for
            if self.permits > 0 and self.engine.has_work:
                self._sent_idle = False
                self.permits -= 1
                outputs = self.engine.step()
                if self._answers is not None:
                    self._answers.grow(outputs)
                    self._send_answers()

    def _send_answers(self) -> None:
        while self._answers is not None and (record := self._answers.take(time.monotonic())) is not None:
            self.writer.write(record)

    def _send_idle(self) -> None:
        if not self.engine.has_work and not self._sent_idle:
            self._sent_idle = True
            self.writer.write(note(idle=self._submitted))
            if self._answers is not None:
                self._answers.account()
                self._send_answers()

    def _drain(self, *, wait: bool) -> None:
        """Obey all commands that are there; wait for one first if there is nothing else to do."""
        try:
            self._obey(self.inbox.get(block=wait))
            while True:
                self._obey(self.inbox.get_nowait())
        except queue.Empty:
            return

    def _obey(self, received: Command) -> None:
        do = received.get("do")
        try:
            if do == "permit":
                self.permits += int(received["steps"])
            elif do == "pause":
                self.permits = 0
            elif do == "submit":
                self._submit(received)
            elif do == "ask" and self._answers is not None:
                self._answers.ask(
                    int(received["ticket"]), received.get("tokens", NO_TOKENS).tolist(), received["params"]
                )
            elif do == "call":
                received["call"]()
            elif do == "cancel" and self._answers is not None:
                self._answers.cancel(int(received["ticket"]))
            elif do == "serve":
                self._serve()
            elif do == "watch":
                self._watch(bool(received["on"]), show_text=bool(received.get("show", True)))
            elif do == "keyframe":
                self._send_keyframe()
            elif do == "ping":
                self.writer.write(note(pong=received["ping"]))
            elif do == "abort":
                self.engine.abort(int(received["request"]))
            elif do == "knob":
                self._turn(str(received["name"]), received["value"])
        except InputError as error:
            self.writer.write(note(kind="refused", text=str(error)))

    def _submit(self, received: Command) -> None:
        self._submitted += 1
        self._sent_idle = False
        params = received["params"]
        given: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in params.items()
        }
        asked = SamplingParams(**given)
        request = self.engine.submit(str(received["prompt"]), asked)
        self.writer.write(note(kind="submitted", request=request, max_tokens=asked.max_tokens, text=""))

    def _serve(self) -> None:
        """From now on a server asks: it needs the tokenizer, and no deltas until somebody watches."""
        engine: Any = self.engine  # a whole Engine: screens are served by less
        self._answers = Answers(engine, lambda call: self.inbox.put({"do": "call", "call": call}))
        with contextlib.suppress(InputError):  # no llguidance, or no end token: the first request for a schema is told
            engine.read_vocabulary()
        self._watch(False)
        self.permits = 1 << 62
        codec_bytes = np.frombuffer(pickle.dumps(engine.codec), np.uint8)
        self.writer.write(
            Record(Kind.NOTE, 0, packing.pack({"kind": "codec"}, {"codec": codec_bytes}, level=PIPE_LEVEL))
        )

    def _watch(self, on: bool, *, show_text: bool = True) -> None:
        """Send each step's delta from now on, or no more."""
        self._show_text = show_text
        if on and self._unsubscribe is None:
            self._unsubscribe = self.engine.trace.subscribe(sender(self.writer, show_text=show_text))
        elif not on and callable(self._unsubscribe):
            self._unsubscribe()
            self._unsubscribe = None

    def _send_keyframe(self) -> None:
        """The state that the deltas so far have led to, for a watcher who has not seen them all."""
        trace: Any = self.engine.trace
        state = trace.state() if self._show_text else without_text(trace.state())
        self.writer.write(Record(Kind.KEYFRAME, state.step, codec.encode_keyframe(state)))

    def _turn(self, name: str, value: object) -> None:
        knob = getattr(self.engine, "knob", None)
        if knob is None:
            raise InputError(f"this engine has no setting {name!r}")
        self.writer.write(
            note(kind="turned", name=name, value=value, text=f"from the next step on {knob(name, value)}")
        )


def sender(pipe: RecordPipe, *, show_text: bool = True) -> Callable[[StepDelta], None]:
    """A listener that sends each step's delta over the pipe, with the tokens' ids and texts or without."""

    def send(delta: StepDelta) -> None:
        if not show_text:
            hidden = delta.progress._replace(token_ids=np.zeros_like(delta.progress.token_ids))
            delta = replace(delta, progress=hidden, token_bytes={0: HIDDEN})
        pipe.write(Record(Kind.DELTA, delta.step, codec.encode_delta(delta, level=PIPE_LEVEL)))

    return send


def without_text(state: Snapshot) -> Snapshot:
    """A state of which nobody can tell what was asked and answered, but how long both are."""
    twin = state.copy()
    twin.token_bytes.clear()
    twin.token_bytes[0] = HIDDEN
    for sequence in twin.sequences.values():
        sequence.token_ids[:] = [0] * len(sequence.token_ids)
    return twin
