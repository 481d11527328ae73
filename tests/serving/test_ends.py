"""How a server ends: drained, killed, with an engine that dies, hangs or fails; and what clients are told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from minipaged.errors import InputError
from minipaged.serving.http.server import Address, listen
from tests.serving.engines import scripted
from tests.serving.running import Serving, connect, events_of, raw_request, serving, text_of

ROOT = Path(__file__).resolve().parents[2]
STREAM = {"prompt": "xyz", "max_tokens": 4000, "stream": True}


class Streams:
    """Clients that read a stream each, in threads."""

    def __init__(self, server: Serving, count: int, **body: object) -> None:
        self.texts: list[str] = []
        self.at: list[float] = []
        self._threads = [
            threading.Thread(target=self._read, args=(server.url, {**STREAM, **body})) for _ in range(count)
        ]
        for thread in self._threads:
            thread.start()
        deadline = time.monotonic() + 20
        while server.run.app.link is None or sum(t.first_at > 0 for t in server.run.app.link.tickets.values()) < count:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def _read(self, url: str, body: dict[str, object]) -> None:
        answer = httpx.post(url + "/v1/completions", json=body, timeout=60)
        self.texts.append(answer.text)
        self.at.append(time.monotonic())

    def join(self) -> list[str]:
        """All texts, once they have ended."""
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()
        return self.texts


def test_the_engines_death_is_told_to_every_stream() -> None:
    with serving(scripted, step_seconds=0.01) as server:
        streams = Streams(server, 10)
        killed = time.monotonic()
        os.kill(server.child.pid, signal.SIGKILL)
        texts = streams.join()
        assert max(streams.at) - killed < 1.0
        for text in texts:
            last = events_of(text)[-1]["error"]
            assert (last["type"], last["code"]) == ("server_error", "engine_error")
        assert server.ended() == 1
        assert any("ended" in words for words in server.said)


def test_an_unstreamed_request_is_told_too_and_the_exit_code_says_it() -> None:
    with serving(scripted, step_seconds=0.01, die_at=20) as server:
        answer = server.http.post("/v1/completions", json={"prompt": "xyz", "max_tokens": 100})
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "engine_error"
        assert server.ended() == 1


def test_a_step_that_raises_ends_the_server_with_its_words() -> None:
    with serving(scripted, step_seconds=0.01, fail_at=20) as server:
        last = server.events(prompt="xyz", max_tokens=100)[-1]
        assert "this step fails" in last["error"]["message"]
        assert server.ended() == 1
        assert "this step fails" in "".join(server.said)


def test_an_engine_that_cannot_start_says_why() -> None:
    server = Serving(scripted, refuse="no such model: try another")
    try:
        assert server.ended() == 2
        assert server.said[-1] == "no such model: try another"
    finally:
        server.close()


def test_while_the_model_loads_everything_says_so() -> None:
    server = Serving(scripted, load_seconds=1.0)
    try:
        for method, path in (("GET", "/health"), ("POST", "/v1/completions"), ("POST", "/tokenize")):
            answer = server.http.request(method, path, json={"prompt": "a", "max_tokens": 1})
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "1"
            assert answer.json()["error"]["code"] == "loading"
        assert server.http.get("/version").status_code == 200
        server.wait_ready()
        assert server.complete(prompt="a", max_tokens=1)
    finally:
        server.close()


def test_a_stopped_engine_is_not_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minipaged.serving.http.link.STALLED_SECONDS", 1.0)
    with serving(scripted, step_seconds=0.01) as server:
        assert server.http.get("/health").status_code == 200
        os.kill(server.child.pid, signal.SIGSTOP)
        try:
            deadline = time.monotonic() + 10
            while server.http.get("/health").status_code == 200:
                assert time.monotonic() < deadline, "healthy while it stands still"
            assert server.http.get("/version").status_code == 200, "the server itself goes on"
            connection = connect(server.port)  # a command pipe that nobody reads does not stop the server either
            connection.sendall(raw_request("/v1/completions", {"prompt": "x" * 5000, "max_tokens": 1}) * 10)
            assert server.http.get("/version").status_code == 200
            connection.close()
        finally:
            os.kill(server.child.pid, signal.SIGCONT)
        server.wait_ready()
        assert server.complete(prompt="xyz", max_tokens=3)["choices"][0]["text"] == "def"


def test_the_first_signal_lets_fifty_streams_end() -> None:
    with serving(scripted, step_seconds=0.01, drain=30.0) as server:
        streams = Streams(server, 50, max_tokens=150)
        kept = connect(server.port)
        server.signal()
        time.sleep(0.3)
        with pytest.raises(httpx.ConnectError):
            httpx.get(server.url + "/health")
        kept.close()
        for text in streams.join():
            assert len(text_of(events_of(text))) == 150
            assert text.endswith("data: [DONE]\n\n")
        assert server.ended() == 0


def test_the_drain_ends_in_an_error_event() -> None:
    with serving(scripted, step_seconds=0.01, drain=0.5) as server:
        streams = Streams(server, 5)
        server.signal()
        begun = time.monotonic()
        for text in streams.join():
            assert "shutting down" in events_of(text)[-1]["error"]["message"]
        assert 0.3 < time.monotonic() - begun < 5
        assert server.ended() == 0


def test_a_second_signal_ends_it_at_once() -> None:
    with serving(scripted, step_seconds=0.01, drain=60.0) as server:
        streams = Streams(server, 5)
        server.signal()
        time.sleep(0.2)
        begun = time.monotonic()
        server.signal()
        for text in streams.join():
            assert "error" in events_of(text)[-1]
        assert server.ended() == 0
        assert time.monotonic() - begun < 5


def test_overload_refuses_exactly_the_overflow() -> None:
    """Four run, eight wait; of forty requests at once the other twenty-eight are told to come again."""
    with serving(scripted, step_seconds=0.02, max_num_seqs=4, options={"max_waiting": 8}) as server:
        connections = [connect(server.port) for _ in range(40)]
        request = raw_request("/v1/completions", {"prompt": "xyz", "max_tokens": 50}, "connection: close\r\n")
        for connection in connections:
            connection.sendall(request)
        answers = []
        for connection in connections:
            parts = []
            while part := connection.recv(1 << 16):
                parts.append(part)
            answers.append(b"".join(parts))
        codes = [int(answer.split(b" ")[1]) for answer in answers]
        assert sorted(codes) == [200] * 12 + [429] * 28
        refused = next(answer for answer in answers if b" 429 " in answer[:20])
        assert b"retry-after: 1" in refused
        assert json.loads(refused.partition(b"\r\n\r\n")[2])["error"]["type"] == "rate_limit_error"
        server.wait_idle()


def test_a_port_that_is_taken() -> None:
    taken = listen(Address(port=0))
    with pytest.raises(InputError, match="choose another --port"):
        listen(Address(port=taken.getsockname()[1]))
    taken.close()


CHILD = """
import sys
from minipaged.serving.http.app import Options
from minipaged.serving.http.server import Address, serve
from tests.serving.engines import scripted
def say(text): print(text, flush=True)
sys.exit(serve(scripted, {"step_seconds": 0.01}, Options("scripted", ("scripted",)), Address(port=int(sys.argv[1]), drain=1.0), say))
"""


@pytest.mark.parametrize(("sign", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 0), (signal.SIGINT, 0)])
def test_a_server_that_is_killed_leaves_no_engine_and_no_file(sign: signal.Signals, code: int, tmp_path: Path) -> None:
    free = listen(Address(port=0))
    port = free.getsockname()[1]
    free.close()
    command = [sys.executable, "-c", CHILD, str(port)]
    place = os.environ | {"TMPDIR": str(tmp_path)}
    process = subprocess.Popen(command, cwd=ROOT, env=place, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert "ready" in process.stdout.readline()
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 1
        with connect(port) as connection:
            connection.sendall(raw_request("/v1/completions", STREAM))
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
            process.send_signal(sign)
            assert process.wait(15) == code
        assert "has ended" not in process.stdout.read()
        deadline = time.monotonic() + 5
        while Path(f"/proc/{children[0]}").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not Path(f"/proc/{children[0]}").exists()
        assert list(tmp_path.iterdir()) == []
    finally:
        process.kill()
        process.wait()
