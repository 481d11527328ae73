"""A server's record stream as a live source: for a screen that looks on from elsewhere.

It steers the engine where the server allows that (`--allow-control`): commands go to /control, each on a connection of its own, from a
thread that the screen does not wait for.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import queue
import socket
import ssl
import threading
from collections.abc import Callable
from typing import Any, BinaryIO
from urllib.parse import SplitResult, urlsplit

from minipaged.config import SamplingParams
from minipaged.errors import InputError
from minipaged.serving.live import LiveSource

CONNECT_SECONDS = 10.0
ASK_BY_API = "a server is asked by its API, not from a screen"


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
    """Where a pipe's commands would go: nowhere. Closed, it ends the connection."""

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


class AttachedSource(LiveSource):
    """The trace of a server. control: sends a command to it; None where it lets nobody steer."""

    def __init__(
        self, records: BinaryIO, commands: BinaryIO, control: Callable[[dict[str, object]], None] | None
    ) -> None:
        super().__init__(records, commands)
        self._control = control
        self._todo: queue.SimpleQueue[dict[str, object]] = queue.SimpleQueue()
        if control is None:
            self.looks_on = "others use this server, which was started without --allow-control"
        else:
            threading.Thread(target=self._post, name="control", daemon=True).start()

    def _post(self) -> None:
        while self._control is not None:
            try:
                self._control(self._todo.get())
            except (OSError, http.client.HTTPException) as error:
                self._problem(f"the server did not take the command: {error}")

    def _ask(self, do: str, **words: object) -> None:
        if self._control is not None:
            self._todo.put({"do": do, **words})

    def run(self) -> None:
        """Let the engine step until `pause`."""
        if not self._running:
            self._ask("run")
        self._running = True

    def pause(self) -> None:
        """The engine stops after the step it is in, for everybody, until `run` or the end of this connection."""
        if self._running:
            self._ask("pause")
        self._running = False

    def permit(self, steps: int = 1) -> None:
        """Let a paused engine take so many steps."""
        self._ask("permit", steps=steps)

    def submit(self, prompt: str, params: SamplingParams) -> None:
        """Not from here: a server's requests come by its API."""
        self.notes.append({"kind": "refused", "text": ASK_BY_API})

    def abort(self, request: int) -> None:
        """End a request."""
        self._ask("abort", request=request)

    def knob(self, name: str, value: object) -> None:
        """Change a setting of the engine."""
        self._ask("knob", name=name, value=value)


def attach(url: str, key: str = "") -> AttachedSource:
    """The trace of the server at `url`, from now on. InputError if there is no such server, or it wants a key."""
    parts = urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"--attach takes the address of a server, such as http://localhost:8000, not {url!r}")
    path = parts.path.rstrip("/").removesuffix("/v1") + "/trace"
    headers = {"authorization": f"Bearer {key}"} if key else {}
    connection = _connect(parts)
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
    watcher = answer.getheader("x-minipaged-watcher")

    def control(asked: dict[str, object]) -> None:
        connection = _connect(parts)
        told = {**headers, "x-minipaged-watcher": watcher or "", "content-type": "application/json"}
        connection.request("POST", path.removesuffix("/trace") + "/control", json.dumps(asked), told)
        answer = connection.getresponse()
        connection.close()
        if answer.status != 200:
            raise OSError(f"it answers {answer.status}")

    reader, hang_up = io.BufferedReader(_Body(answer)), io.BufferedWriter(_HangUp(sock))
    return AttachedSource(reader, hang_up, control if watcher else None)


def _connect(parts: SplitResult) -> http.client.HTTPConnection:
    host, port = parts.hostname or "", parts.port
    if parts.scheme == "https":
        context = ssl.create_default_context()
        return http.client.HTTPSConnection(host, port, timeout=CONNECT_SECONDS, context=context)
    return http.client.HTTPConnection(host, port or 80, timeout=CONNECT_SECONDS)
