"""The server's end of the engine process: requests go out under tickets, rows come back and are merged into mailboxes.

All of it runs on the event loop and nothing waits: what the engine sends is taken in as it comes, and a reader that is slow finds its text
joined into one piece. answers.py says what the rows are.
"""

from __future__ import annotations

import asyncio
import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from minipaged.errors import TraceError
from minipaged.serving.child import EngineChild
from minipaged.serving.http.mailbox import Growth, Signal, Ticket
from minipaged.serving.http.metrics import Metrics
from minipaged.trace import packing
from minipaged.trace.file import FRAME_BYTES, Header, Kind, Record, command, parse_header, parse_record

STALLED_SECONDS = 10.0  # without a word from an engine that was asked for one: it does not answer


class EngineLink(asyncio.Protocol):
    """The two pipes of an engine process, on the event loop.

    settings of the engine stand in `header` once `ready`. on_change is called when the engine is ready or dead.
    """

    def __init__(self, child: EngineChild, metrics: Metrics, on_change: Callable[[], None]) -> None:
        self.child = child
        self.metrics = metrics
        self.header = Header()
        self.codec: Any = None
        self.stage = "starting"  # what it does while it loads
        self.dead = ""  # why it is no more
        self.input_error = False  # whether that was the user's input
        self.tickets: dict[int, Ticket] = {}
        self.heard_at = time.monotonic()
        self.on_trace: Callable[[Record], None] | None = None
        self.on_request: Callable[[Ticket], None] | None = None  # who looks on is told of each, and of its first token
        metrics.waiting = lambda: self._num_waiting
        self._on_change = on_change
        self._buffer = bytearray()
        self._now = 0.0  # when the rows being read were written, by the engine's clock
        self._opened = False  # whether the stream's own header was read
        self._pongs: dict[int, asyncio.Future[None]] = {}
        self._next = 0
        self._num_started = 0  # sequences of tickets that run or have run, and have not ended
        self._num_waiting = 0  # tickets that have not started
        self._commands: asyncio.WriteTransport | None = None
        self._records: asyncio.ReadTransport | None = None

    async def open(self) -> None:
        """Take the pipes over, and ask the engine to serve."""
        loop = asyncio.get_running_loop()
        self._records, _ = await loop.connect_read_pipe(lambda: self, self.child.records)
        self._commands, _ = await loop.connect_write_pipe(asyncio.Protocol, self.child.commands)
        self.send("serve")

    @property
    def ready(self) -> bool:
        """Whether requests can be taken."""
        return self.codec is not None and not self.dead

    # ---- to the engine

    def send(self, do: str, **words: Any) -> None:
        """A command; never waits, whatever the engine does."""
        if self._commands is not None and not self._commands.is_closing():
            self._commands.write(command(do, **words).to_bytes())

    def ask(
        self, tokens: Sequence[int], params: Mapping[str, Any], width: int, signal: Signal, *, whole: bool
    ) -> Ticket:
        """Send a request; its ticket fills as it is answered."""
        columns = {"tokens": np.asarray(tokens, np.int64)}
        self._next += 1
        ticket = Ticket(self._next, len(tokens), width, signal, whole=whole, now=time.monotonic())
        self.tickets[ticket.number] = ticket
        self._num_waiting += 1
        self.send("ask", columns=columns, ticket=ticket.number, params=dict(params))
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Nobody waits for it any more: its blocks go back before the engine's next step."""
        if not ticket.ended and ticket.refused is None:
            self.send("cancel", ticket=ticket.number)
            self._end(ticket, "abort")

    def num_places(self, seats: int, most_waiting: int) -> int:
        """How many requests may still come: those that fit beside what runs, and `most_waiting` behind them."""
        return max(0, seats - self._num_started) + most_waiting - self._num_waiting

    @property
    def num_waiting(self) -> int:
        """Requests that have not started."""
        return self._num_waiting

    async def answers(self, patience: float = 1.0) -> bool:
        """Whether the engine answers. One that is in a long step has time until STALLED_SECONDS after its last word."""
        number = self._next = self._next + 1
        self._pongs[number] = asyncio.get_running_loop().create_future()
        self.send("ping", ping=number)
        try:
            await asyncio.wait_for(self._pongs[number], patience)
            return True
        except TimeoutError:
            return not self.dead and time.monotonic() - self.heard_at < STALLED_SECONDS
        finally:
            del self._pongs[number]

    def hang_up(self) -> None:
        """The engine's process ends when it sees this."""
        self.dead = self.dead or "the server has ended"  # its end is no news from here on
        self.send("quit")
        for transport in (self._commands, self._records):
            if transport is not None:
                transport.close()

    # ---- from the engine

    def data_received(self, data: bytes) -> None:
        """Bytes of the record stream."""
        self.heard_at = time.monotonic()
        self._buffer += data
        try:
            offset = self._read_records()
        except TraceError as error:
            self._die(f"the engine's stream broke off: {error}")
            return
        del self._buffer[:offset]

    def _read_records(self) -> int:
        offset = 0
        if not self._opened:
            offset = parse_header(self._buffer)
            if not offset:
                return 0
            self._opened = True
        while (record := parse_record(self._buffer, offset)) is not None:
            offset += len(record.body) + FRAME_BYTES
            self._take(record)
        return offset

    def connection_lost(self, exc: Exception | None) -> None:
        """The pipe has ended, and so has the engine."""
        self._die("the engine's process has ended")

    def _take(self, record: Record) -> None:
        if record.kind == Kind.ANSWERS:
            head, _ = packing.unpack(record.body, most=packing.MAX_BODY_BYTES)
            if "gauges" in head:
                self.metrics.gauges = head["gauges"]
            self._now = head["at"]
            for row in head["rows"]:
                ticket = self.tickets.get(row[1])
                if ticket is not None:
                    self._take_row(ticket, row)
        elif record.kind == Kind.NOTE:
            self._take_note(*packing.unpack(record.body))
        elif record.kind == Kind.HEADER:
            self.header = Header.from_json(packing.unpack(record.body)[0])
        elif self.on_trace is not None:
            self.on_trace(record)

    def _take_row(self, ticket: Ticket, row: list[Any]) -> None:
        kind = row[0]
        if kind == "grew":
            self._take_growth(ticket, row)
        elif kind == "ended":
            _, _, ticket.error, ticket.drawn = row
            self._end(ticket, ticket.finish or "error")
        elif kind == "started":
            ticket.cached, ticket.started_at = row[2], self._now
            self._num_waiting -= 1
            self._num_started += ticket.width
            self.metrics.prompt_tokens += ticket.num_prompt
        elif kind == "accepted":
            ticket.accepted, ticket.most, ticket.request = True, row[2], row[3]
            ticket.signal.set()
            if self.on_request is not None:
                self.on_request(ticket)
        elif kind == "prompt":
            ticket.prompt_logprobs = row[2]
        elif kind == "refused":
            ticket.refused = row[2]
            self._forget(ticket)
            ticket.signal.set()

    def _take_growth(self, ticket: Ticket, row: list[Any]) -> None:
        _, _, index, text, tokens, logprobs, finish, stop_reason = row
        growth = ticket.growth.get(index)
        if growth is None:
            growth = ticket.growth[index] = Growth()
        growth.text += text
        growth.tokens += tokens
        if logprobs:
            growth.logprobs += logprobs
        if finish:
            growth.finish, growth.stop_reason = finish, stop_reason
            ticket.finish = finish
            self.metrics.finished(finish)
        now = self._now
        if tokens:
            ticket.drawn += len(tokens)
            if not ticket.first_at:
                ticket.first_at = now
                self.metrics.first_token(now - ticket.asked_at)
                if self.on_request is not None:
                    ticket.last_at = now
                    self.on_request(ticket)
            elif now > ticket.last_at:  # once a step, however many answers the request has
                self.metrics.inter_token.observe(now - ticket.last_at)
            ticket.last_at = now
        if not ticket.whole:
            ticket.signal.set()

    def _take_note(self, head: dict[str, Any], columns: packing.Columns) -> None:
        if "pong" in head:
            waiter = self._pongs.get(head["pong"])
            if waiter is not None and not waiter.done():
                waiter.set_result(None)
        elif head.get("kind") == "codec":
            # Some hundred milliseconds for a large vocabulary, in a thread: /health says meanwhile that it loads.
            loading = asyncio.get_running_loop().run_in_executor(None, pickle.loads, columns["codec"].tobytes())
            loading.add_done_callback(self._take_codec)
        elif head.get("kind") == "status":
            self.stage = str(head.get("text"))
        elif head.get("kind") == "failed":
            self.input_error = bool(head.get("input_error"))
            self._die(str(head.get("text")))

    def _take_codec(self, loading: asyncio.Future[Any]) -> None:
        try:
            self.codec = loading.result()
        except Exception as error:
            self._die(f"the engine's tokenizer cannot be read here: {error}")
        self._on_change()

    # ---- ends

    def _end(self, ticket: Ticket, finish: str) -> None:
        ticket.ended = True
        self._forget(ticket)
        self.metrics.ended(ticket, finish)
        ticket.signal.set()

    def _forget(self, ticket: Ticket) -> None:
        if self.tickets.pop(ticket.number, None) is None:
            return
        if ticket.started_at:
            self._num_started -= ticket.width
        else:
            self._num_waiting -= 1

    def end_all(self, why: str, status: int = 503) -> None:
        """Every reader is told that its answer will not be finished."""
        for ticket in list(self.tickets.values()):
            self.send("cancel", ticket=ticket.number)
            ticket.error, ticket.status = why, status
            self._end(ticket, "abort")

    def _die(self, why: str) -> None:
        if self.dead:
            return
        self.dead = why
        for waiter in self._pongs.values():
            if not waiter.done():
                waiter.set_exception(TimeoutError())
        self.end_all(f"the engine died: {why}", 500)
        self._on_change()
