"""uvicorn's HTTP protocol with limits on what a stranger can make it hold: how large a head may be, and how long it may take.

Plain uvicorn accepts a header of 64 MiB and waits for ever for one that is never finished; asgi.py limits bodies. It also tells a
handler of a lost connection where requests were pipelined behind the one that it answers.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from minipaged.serving.http.errors import ApiError

MAX_HEAD_BYTES = 64 << 10
HEAD_SECONDS = 10.0
MAX_PIPELINED = 16  # requests that wait behind the one being answered; more are read when these are done


class LimitedProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._head_bytes = 0
        self._in_head = True
        self._refusal: ApiError | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._answering: RequestResponseCycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        answering = self._answering
        super().connection_lost(exc)
        if answering is not None and not answering.response_complete:
            answering.disconnected = True
            answering.message_event.set()

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse_head()

    def _refuse_head(self) -> None:
        self._refusal = ApiError(431, f"the headers are larger than {MAX_HEAD_BYTES} bytes")
        self.send_400_response("")

    # ---- what the parser finds

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head_size = True, 0
        if self._timer is None:
            self._start_timer()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_size += len(name) + len(value)
        if self._head_size > MAX_HEAD_BYTES:
            self._refusal = ApiError(431, f"the headers are larger than {MAX_HEAD_BYTES} bytes")
            raise ValueError("the head is too large")  # the parser stops, and send_400_response says why
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head, self._head_bytes = False, 0
        self._stop_timer()
        if len(self.url) > MAX_HEAD_BYTES:
            self._refusal = ApiError(431, "the address is too long")
            raise ValueError("the address is too long")
        super().on_headers_complete()
        if self.pipeline and len(self.pipeline) < MAX_PIPELINED:
            self.flow.resume_reading()  # a connection that is not read does not tell that it was closed

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    # ---- time, and refusals

    def _start_timer(self) -> None:
        self._timer = self.loop.call_later(HEAD_SECONDS, self._too_slow)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        self._timer = None
        if not self.transport.is_closing():
            self._refusal = ApiError(408, f"the headers took longer than {HEAD_SECONDS:g} seconds")
            self.send_400_response("")

    def send_400_response(self, msg: str) -> None:
        """Say in JSON what was wrong with the bytes that came, and close; while an answer is being written, only close."""
        if self._answering is None or self._answering.response_complete:
            error = self._refusal or ApiError(400, "this is no valid HTTP request")
            body = error.to_json()
            head = [STATUS_LINE[error.status], b"content-type: application/json\r\n", b"connection: close\r\n"]
            self.transport.write(b"".join([*head, b"content-length: %d\r\n\r\n" % len(body), body]))
        self.transport.close()
