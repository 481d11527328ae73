"""A server's record stream as a live source: for a screen that looks on from elsewhere."""

from __future__ import annotations

import contextlib
import http.client
import io
import socket
import ssl
from typing import Any
from urllib.parse import urlsplit

from minipaged.errors import InputError
from minipaged.serving.live import LiveSource

CONNECT_SECONDS = 10.0


class _Body(io.RawIOBase):
    """What the server sends, as it comes: http.client's own reading waits until a buffer is full."""

    def __init__(self, answer: http.client.HTTPResponse) -> None:
        self._answer = answer

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._answer.read1(len(buffer))
        except (OSError, http.client.HTTPException, ValueError, AttributeError):
            return 0  # cut off, by the server or by our own end: the stream ends
        buffer[: len(data)] = data
        return len(data)


class _HangUp(io.RawIOBase):
    """Where the commands of one who only looks on go: nowhere. Closed, it ends the connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return len(data)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads
        super().close()


def attach(url: str, key: str = "") -> LiveSource:
    """The trace of the server at `url`, from now on. It cannot be paused or asked for anything: others use the server.

    InputError if there is no such server, or it wants a key.
    """
    parts = urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"--attach takes the address of a server, such as http://localhost:8000, not {url!r}")
    path = parts.path.rstrip("/").removesuffix("/v1") + "/trace"
    headers = {"authorization": f"Bearer {key}"} if key else {}
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        context = ssl.create_default_context()
        connection = http.client.HTTPSConnection(parts.hostname, parts.port, timeout=CONNECT_SECONDS, context=context)
    else:
        connection = http.client.HTTPConnection(parts.hostname, parts.port or 80, timeout=CONNECT_SECONDS)
    try:
        connection.request("GET", path, headers=headers)
        sock = connection.sock
        answer = connection.getresponse()
    except (OSError, http.client.HTTPException) as error:
        raise InputError(f"{url}: there is no server: {error}") from None
    if answer.status != 200:
        why = {401: "it wants a key: --api-key", 404: "it is no server of minipaged", 503: "it is not ready"}
        raise InputError(f"{url}: {why.get(answer.status, f'it answers {answer.status}')}")
    sock.settimeout(None)  # nothing comes while nobody asks the server for anything
    return LiveSource(io.BufferedReader(_Body(answer)), io.BufferedWriter(_HangUp(sock)))
