"""What a server must bear, in a process of its own whose memory, descriptors and time are counted.

By hand: pytest -o addopts= -m slow -s tests/serving/test_load.py; SERVE_SOAK=100000 for the whole soak.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from minipaged.config import SamplingParams
from minipaged.lab.measure.serve_load import Load, drive, summary
from minipaged.serving.http.server import Address, listen
from tests.serving.engines import scripted
from tests.serving.running import connect, raw_request

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
CHILD = """
import json, sys
from minipaged.serving.http.app import Options
from minipaged.serving.http.server import Address, serve
from tests.serving.engines import scripted
options = Options("scripted", ("scripted",), max_waiting=10_000)
sys.exit(serve(scripted, json.loads(sys.argv[2]), options, Address(port=int(sys.argv[1]), drain=1.0), lambda text: print(text, flush=True)))
"""


class Process:
    """A server's process."""

    def __init__(self, pid: int, port: int) -> None:
        self.pid, self.port = pid, port
        self.url = f"http://127.0.0.1:{port}"

    @property
    def rss(self) -> int:
        """Bytes of memory."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    @property
    def descriptors(self) -> int:
        """Open files."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    @property
    def seconds(self) -> float:
        """Processor time."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def idle(self) -> None:
        """Until no block is held and no request is there."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            text = httpx.get(self.url + "/metrics").text
            held = [
                line
                for line in text.splitlines()
                if line.startswith(("minipaged:num_requests_running", "minipaged:kv_cache_usage"))
            ]
            if all(line.endswith(" 0.0") for line in held):
                return
            time.sleep(0.1)
        raise AssertionError(text)


@contextmanager
def process(settings: str = "{}") -> Iterator[Process]:
    free = listen(Address(port=0))
    port = free.getsockname()[1]
    free.close()
    running = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(port), settings], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert running.stdout is not None
        assert "ready" in running.stdout.readline()
        yield Process(running.pid, port)
    finally:
        running.terminate()
        running.wait(20)


def in_process(requests: int, max_tokens: int, **settings: Any) -> float:
    """Seconds that the engine takes by itself."""
    engine = scripted(**settings)
    asked = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    rng = random.Random(0)
    outputs = [engine.ask([rng.randrange(1, 250) for _ in range(128)], asked) for _ in range(requests)]
    start = time.perf_counter()
    while not all(output.finished for output in outputs):
        engine.step()
    return time.perf_counter() - start


def test_256_streams_at_a_step_of_20_ms() -> None:
    with process('{"step_seconds": 0.02, "num_blocks": 40000}') as server:
        load = Load(server.url, requests=256, prompt_tokens=128, max_tokens=256)
        asyncio.run(drive(load))
        before = server.seconds
        row = summary(load, asyncio.run(drive(load)))
        used = server.seconds - before
    alone = in_process(256, 256, step_seconds=0.02, num_blocks=40_000)
    print(
        f"\n256 streams: {row['seconds']:.2f} s through HTTP, {alone:.2f} s in process; largest gap p50 {row['largest_gap_p50_ms']} ms; "
    )
    print(f"server's CPU {1e6 * used / 65_536:.1f} us a token; {row}")
    assert row["failed"] == 0


def test_one_token() -> None:
    """What HTTP adds to a request. The clock's figures are for a machine that does nothing else; the processor's hold on any."""
    engine = scripted()
    one = SamplingParams(max_tokens=1)
    inside: list[float] = []
    for i in range(400):
        start = time.perf_counter()
        engine.submit([1 + i % 200] * 8, one)
        while engine.has_work:
            engine.step()
        inside.append(1000 * (time.perf_counter() - start))
    with process() as server, httpx.Client(base_url=server.url) as client:
        through: list[float] = []
        before = server.seconds
        for i in range(400):
            start = time.perf_counter()
            client.post("/v1/completions", json={"prompt": [1 + i % 200] * 8, "max_tokens": 1})
            through.append(1000 * (time.perf_counter() - start))
        used = 1000 * (server.seconds - before) / 400
        bare: list[float] = []  # what the client itself takes
        for _ in range(400):
            start = time.perf_counter()
            client.get("/version")
            bare.append(1000 * (time.perf_counter() - start))
    middle = [sorted(values)[200] for values in (inside, through, bare)]
    late = [sorted(values)[395] for values in (inside, through, bare)]
    print(f"\n1 token, ms, in process / through HTTP / GET /version: p50 {middle}, p99 {late}")
    print(f"server's processor time: {used:.2f} ms a request")
    assert used < 2
    assert middle[1] < 20


def test_a_thousand_streams() -> None:
    """More tokens than the cores can send: pieces are merged, all finish, nothing fails."""
    with process('{"step_seconds": 0.005, "num_blocks": 100000, "max_num_seqs": 1024}') as server:
        load = Load(server.url, requests=1000, prompt_tokens=16, max_tokens=400)
        row = summary(load, asyncio.run(drive(load)))
        rss = server.rss
        server.idle()
    print(f"\n1,000 streams: RSS {rss / MIB:.0f} MiB, {row}")
    assert row["failed"] == 0
    assert rss < 250 * MIB


def test_stalled_readers_cost_what_their_answers_are_long() -> None:
    with process('{"step_seconds": 0.002, "num_blocks": 60000}') as server:
        httpx.post(server.url + "/v1/completions", json={"prompt": "warm", "max_tokens": 100})
        before = server.rss
        stalled = []
        for _ in range(20):
            connection = connect(server.port)
            body = {"prompt": "stalled", "max_tokens": 3000, "n": 8, "stream": True}
            connection.sendall(raw_request("/v1/completions", body))
            stalled.append(connection)
        time.sleep(2)
        deadline = time.monotonic() + 120
        while 'running{model_name="scripted"} 0.0' not in httpx.get(server.url + "/metrics").text:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        grown = server.rss - before
        for connection in stalled:
            connection.close()
        server.idle()
    print(f"\n20 stalled readers of 8 x 3,000 tokens: RSS + {grown / MIB:.1f} MiB")
    assert grown < 20 * MIB


@pytest.mark.parametrize("count", [int(os.environ.get("SERVE_SOAK", "20000"))])
def test_mixed_requests_leave_nothing(count: int) -> None:
    """n, stop, cut, bad fields and bodies, streams, slow readers, clients that leave at once or in the middle: memory and descriptors are
    flat after a tenth of them, and no block is lost."""
    marks: list[tuple[int, int]] = []

    async def one(client: httpx.AsyncClient, rng: random.Random) -> None:
        kind = rng.randrange(12)
        body: dict[str, Any] = {
            "prompt": "p" * rng.randrange(1, 200),
            "max_tokens": rng.randrange(1, 12),
            "n": rng.randrange(1, 4),
        }
        if kind == 0:
            body["stop"] = [rng.choice("abcdef")]
        elif kind == 1:
            body["temperature"] = "x"
        elif kind == 2:
            body["max_tokens"] = 10**6
        elif kind == 3:
            body["logprobs"] = 3
        if kind in (4, 5, 6):
            body |= {"stream": True, "max_tokens": 200}
            async with client.stream("POST", "/v1/completions", json=body) as answer:
                async for _ in answer.aiter_raw():
                    if kind == 4:  # leaves in the middle
                        break
                    if kind == 5:  # reads slowly
                        await asyncio.sleep(0.02)
        elif kind == 7:  # leaves before the answer
            body["max_tokens"] = 300
            with contextlib.suppress(httpx.ReadTimeout):
                await client.post("/v1/completions", json=body, timeout=httpx.Timeout(60, read=0.01))
        elif kind in (8, 9):
            bad = json.dumps(body).encode()[: rng.randrange(40)] if kind == 8 else rng.randbytes(rng.randrange(1, 300))
            answer = await client.post("/v1/chat/completions", content=bad)
            assert answer.status_code == 400, answer.text
        else:
            answer = await client.post("/v1/completions", json=body)
            assert answer.status_code == (400 if kind in (1, 2) else 200), answer.text

    async def run(server: Process) -> None:
        rng = random.Random(5)
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            left = iter(range(count))

            async def some() -> None:
                for done in left:
                    await one(client, rng)
                    if done == count // 10:
                        marks.append((server.rss, server.descriptors))

            await asyncio.gather(*(some() for _ in range(50)))
            marks.append((server.rss, server.descriptors))

    with process('{"max_model_len": 512}') as server:
        asyncio.run(run(server))
        server.idle()
        assert server.descriptors < 80
    print(f"\n{count:,} mixed requests: (RSS, descriptors) after a tenth {marks[0]}, at the end {marks[-1]}")
    assert marks[-1][0] - marks[0][0] < 12 * MIB
