"""L74: a client that goes away, in any state, gives its blocks back within two steps; a slow one costs nobody else anything."""

from __future__ import annotations

import asyncio
import threading
import time

import httpx
import pytest

from tests.serving.engines import scripted
from tests.serving.running import Serving, connect, raw_request, serving, text_of

STEP = 0.03


def holds(server: Serving) -> int:
    """Tickets that the server has open."""
    link = server.run.app.link
    assert link is not None
    return len(link.tickets)


def until(condition: object, seconds: float = 10.0) -> float:
    """Seconds until the condition holds."""
    assert callable(condition)
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, "it never came"
        time.sleep(0.005)
    return time.monotonic() - start


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("state", ["queued", "prefill", "decode"])
def test_L74_a_client_that_leaves_gives_its_blocks_back(state: str, stream: bool) -> None:
    """The engine's own account of its pool: nothing is held two steps after the connection closed."""
    with serving(
        scripted, step_seconds=STEP, max_num_seqs=1 if state == "queued" else 8, max_model_len=40_000
    ) as server:
        link = server.run.app.link
        assert link is not None
        first = connect(server.port)
        first.sendall(raw_request("/v1/completions", {"prompt": "first", "max_tokens": 2000, "stream": True}))
        until(lambda: link.metrics.gauges.get("running") == 1)
        leaving = connect(server.port)
        prompt = "x" * (30_000 if state == "prefill" else 40)  # fifteen steps of 2,048 tokens
        leaving.sendall(raw_request("/v1/completions", {"prompt": prompt, "max_tokens": 1000, "stream": stream}))
        until(lambda: len(link.tickets) == 2)
        newest = max(link.tickets.values(), key=lambda ticket: ticket.number)
        if state != "queued":
            until(lambda: newest.started_at > 0)
        if state == "decode":
            until(lambda: newest.first_at > 0)
        leaving.close()
        first.close()
        until(lambda: holds(server) == 0)
        until(
            lambda: link.metrics.gauges.get("running") == 0 and link.metrics.gauges["referenced_blocks"] == 0,
            2 * STEP + 1.0,
        )
        counted = link.metrics.gauges["computed_tokens"]
        time.sleep(3 * STEP)
        assert link.metrics.gauges["computed_tokens"] == counted, "it computes for nobody"


def test_an_abort_storm() -> None:
    with serving(scripted, step_seconds=0.01, max_num_seqs=64) as server:
        connections = []
        for i in range(500):
            connection = connect(server.port)
            body = {"prompt": f"storm {i}", "max_tokens": 500, "stream": i % 2 == 0, "n": 1 + i % 3}
            connection.sendall(raw_request("/v1/completions", body))
            connections.append(connection)
        until(lambda: holds(server) > 100)
        for connection in connections:
            connection.close()
        until(lambda: holds(server) == 0, 30)
        server.wait_idle(20)
        assert server.complete(prompt="xyz", max_tokens=3)["choices"][0]["text"] == "def"


def test_a_pipelined_connection_that_closes_frees_the_request_being_answered() -> None:
    with serving(scripted, step_seconds=0.01) as server:
        connection = connect(server.port)
        body = {"prompt": "a", "max_tokens": 3000}
        connection.sendall(raw_request("/v1/completions", body) * 3)
        until(lambda: holds(server) == 1)
        connection.close()
        until(lambda: holds(server) == 0)
        server.wait_idle()


def test_stalled_readers_do_not_slow_the_others() -> None:
    """Twenty clients ask and never read. Another stream is as fast as alone."""
    with serving(scripted, step_seconds=0.01, max_num_seqs=256, num_blocks=40_000) as server:

        def stream_seconds() -> float:
            start = time.monotonic()
            assert len(text_of(server.events(prompt="xyz", max_tokens=100))) == 100
            return time.monotonic() - start

        alone = min(stream_seconds() for _ in range(2))
        stalled = []
        for _ in range(20):
            connection = connect(server.port)
            body = {"prompt": "stalled", "max_tokens": 3000, "n": 8, "stream": True, "logprobs": 0}
            connection.sendall(raw_request("/v1/completions", body))
            stalled.append(connection)
        until(lambda: holds(server) == 20)
        beside = min(stream_seconds() for _ in range(2))
        for connection in stalled:
            connection.close()
        until(lambda: holds(server) == 0)
        assert beside < 2 * alone + 0.5, f"{beside:.2f} s beside stalled readers, {alone:.2f} s alone"


def test_a_slow_reader_finds_its_text_in_few_pieces_and_none_missing() -> None:
    with serving(scripted, step_seconds=0.0, num_blocks=8192) as server:
        connection = connect(server.port)
        connection.sendall(
            raw_request(
                "/v1/completions",
                {"prompt": "xyz", "max_tokens": 2000, "stream": True, "n": 4},
                "connection: close\r\n",
            )
        )
        until(lambda: holds(server) == 0, 30)  # it is done, and nobody has read
        parts = []
        while part := connection.recv(1 << 16):
            parts.append(part)
        text = b"".join(parts)
        assert b"[DONE]" in text
        letters = sum(len(piece.split(b'"')[0]) for piece in text.split(b'"text":"')[1:])
        assert letters == 4 * 2000


def test_ten_prompts_of_a_megabyte_do_not_stall_the_loop() -> None:
    with serving(scripted, step_seconds=0.0, max_model_len=64) as server:
        lags: list[float] = []

        async def measure() -> None:
            while True:
                start = time.monotonic()
                await asyncio.sleep(0.005)
                lags.append(time.monotonic() - start - 0.005)

        assert server.loop is not None
        task = asyncio.run_coroutine_threadsafe(measure(), server.loop)
        with httpx.Client(timeout=60) as client:

            def post() -> None:
                found.append(client.post(server.url + "/v1/completions", json={"prompt": "x" * 1_000_000}).status_code)

            found: list[int] = []
            threads = [threading.Thread(target=post) for _ in range(10)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        task.cancel()
        assert found == [400] * 10, "they are longer than the context"
        assert sorted(lags)[int(0.99 * len(lags))] < 0.25, f"the loop stood for {max(lags):.3f} s"
