"""A server in a thread of the test's process, its engine in a child; and plain sockets to talk to it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx

from minipaged.serving.child import EngineChild
from minipaged.serving.http.app import Options
from minipaged.serving.http.server import Address, Run, listen

JSON = dict[str, Any]


class Serving:
    """A running server. `url` is its address; `run` the object itself, for those who look inside."""

    def __init__(
        self, factory: Callable[..., Any], *, drain: float = 0.2, options: JSON | None = None, **arguments: Any
    ) -> None:
        listener = listen(Address(port=0))
        self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.said: list[str] = []
        self.child = EngineChild(factory, arguments)
        chosen = Options(**{"model": "scripted", "names": ("scripted",), **(options or {})})
        self.run = Run(self.child, chosen, Address(port=self.port, drain=drain), self.said.append)
        self.code: int | None = None
        self.loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._main, args=(listener,), daemon=True)
        self._thread.start()
        keys = chosen.keys
        self.http = httpx.Client(
            base_url=self.url, timeout=60, headers={"authorization": f"Bearer {keys[0]}"} if keys else {}
        )

    def _main(self, listener: socket.socket) -> None:
        async def main() -> int:
            self.loop = asyncio.get_running_loop()
            return await self.run.main(listener)

        self.code = asyncio.run(main())

    def wait_ready(self, seconds: float = 60.0) -> Serving:
        """Until requests are taken."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.http.get("/health").status_code == 200:
                return self
            time.sleep(0.02)
        raise AssertionError(f"not ready: {self.said}, {self.child.last_words()}")

    def call_soon(self, call: Callable[..., Any], *given: Any) -> None:
        """Have the server's thread call it."""
        assert self.loop is not None
        self.loop.call_soon_threadsafe(call, *given)

    def signal(self) -> None:
        """What SIGTERM does."""
        self.call_soon(self.run._signalled)

    def ended(self, seconds: float = 10.0) -> int | None:
        """The exit code, once the server has ended."""
        self._thread.join(seconds)
        assert not self._thread.is_alive(), "the server goes on"
        return self.code

    # ---- asking

    def complete(self, **body: Any) -> JSON:
        """A completion as its document."""
        answer = self.http.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def chat(self, content: str = "hi", **body: Any) -> JSON:
        """A chat completion as its document."""
        body = {"messages": [{"role": "user", "content": content}], **body}
        answer = self.http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def events(self, path: str = "/v1/completions", **body: Any) -> list[JSON]:
        """The events of a stream; it must end in [DONE] or an error."""
        answer = self.http.post(path, json={**body, "stream": True})
        assert answer.status_code == 200, answer.text
        return events_of(answer.text)

    def refusal(self, body: Any, path: str = "/v1/completions") -> tuple[int, JSON]:
        """The status and the error that a body gets."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = self.http.post(path, content=content)
        return answer.status_code, answer.json()["error"]

    def used(self) -> tuple[float, float]:
        """Requests that the engine has, and blocks that they hold."""
        text = self.http.get("/metrics").text
        values = {line.split("{")[0].split(" ")[0]: line for line in text.splitlines() if not line.startswith("#")}
        running = float(values["minipaged:num_requests_running"].rsplit(" ", 1)[1])
        return running, float(values["minipaged:kv_cache_usage_perc"].rsplit(" ", 1)[1])

    def wait_idle(self, seconds: float = 10.0) -> None:
        """Until the engine holds no block for anybody."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.used() == (0.0, 0.0) and not self.run.app.link.tickets:  # type: ignore[union-attr]
                return
            time.sleep(0.02)
        raise AssertionError(f"blocks are held: {self.used()}")

    def close(self) -> None:
        """End it."""
        self.http.close()
        if self._thread.is_alive():
            with contextlib.suppress(RuntimeError):
                self.signal()
                self.signal()
            self._thread.join(10)
        self.run.close()


def events_of(text: str) -> list[JSON]:
    """The JSON of each event. The stream must say how it ended."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]" or "error" in json.loads(lines[-1]), f"the stream merely ends: {lines[-1]}"
    return [json.loads(line) for line in lines if line != "[DONE]"]


def text_of(events: list[JSON], index: int = 0) -> str:
    """The joined text of one choice."""
    choices = [choice for event in events for choice in event["choices"] if choice["index"] == index]
    return "".join(c["text"] if "text" in c else c["delta"].get("content", "") for c in choices)


@contextlib.contextmanager
def serving(factory: Callable[..., Any], **arguments: Any) -> Iterator[Serving]:
    """A server that is ready, for a test of its own."""
    server = Serving(factory, **arguments)
    try:
        yield server.wait_ready()
    finally:
        server.close()


def raw_request(path: str, body: JSON, headers: str = "") -> bytes:
    """The bytes of a POST."""
    content = json.dumps(body).encode()
    return f"POST {path} HTTP/1.1\r\nhost: x\r\n{headers}content-length: {len(content)}\r\n\r\n".encode() + content


def connect(port: int) -> socket.socket:
    """A connection."""
    found = socket.create_connection(("127.0.0.1", port))
    found.settimeout(20)
    return found


def read_all(connection: socket.socket) -> bytes:
    """What comes until the server closes."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)
