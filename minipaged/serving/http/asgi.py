"""The few pieces of ASGI that the routes need: reading a body within limits, one answer, a stream of events."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import msgspec

from minipaged.serving.http.errors import ApiError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = dict[str, str]

MAX_BODY_BYTES = 4 << 20
BODY_SECONDS = 30.0  # that a whole body may take
JSON_TYPE = {"content-type": "application/json"}
EVENT_TYPE = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}
DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"


class ClientLeftError(Exception):
    """Nobody reads the answer any more."""


async def read_body(scope: Scope, receive: Receive) -> bytes:
    """The whole body. ApiError 413 if it is too large, 408 if it is too slow; the connection ends then."""
    close = {"connection": "close"}
    too_large = ApiError(413, f"the body is larger than {MAX_BODY_BYTES} bytes", headers=close)
    length = header(scope, b"content-length")
    if length.isdigit() and int(length) > MAX_BODY_BYTES:
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientLeftError
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > MAX_BODY_BYTES:
                    raise too_large
                if not message.get("more_body"):
                    return b"".join(parts)
    except TimeoutError:
        raise ApiError(408, f"the body took longer than {BODY_SECONDS:g} seconds", headers=close) from None


def header(scope: Scope, name: bytes) -> str:
    """A request's header, "" without it."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")


def _encoded(headers: Headers) -> list[tuple[bytes, bytes]]:
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]


async def respond(send: Send, status: int, body: bytes, headers: Headers) -> None:
    """One answer."""
    told = {**headers, "content-length": str(len(body))}
    await send({"type": "http.response.start", "status": status, "headers": _encoded(told)})
    await send({"type": "http.response.body", "body": body})


async def respond_json(send: Send, document: object, headers: Headers) -> None:
    """A 200 with a document."""
    await respond(send, 200, msgspec.json.encode(document), {**JSON_TYPE, **headers})


async def start_events(send: Send, headers: Headers) -> None:
    """The head of a stream of events."""
    await send({"type": "http.response.start", "status": 200, "headers": _encoded({**EVENT_TYPE, **headers})})


async def send_part(send: Send, data: bytes, *, last: bool = False) -> None:
    """A part of a stream. Waits while the client does not read."""
    await send({"type": "http.response.body", "body": data, "more_body": not last})


def event(document: object) -> bytes:
    """One event of a stream."""
    return b"data: " + msgspec.json.encode(document) + b"\n\n"
