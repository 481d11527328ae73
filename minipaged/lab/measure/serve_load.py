"""Traffic for a server that speaks OpenAI's completions, and what its clients saw: first tokens, gaps, ends, goodput.

Each request is a connection of its own that reads a stream. Arrivals are drawn from an exponential distribution at `rate` a second, or come
all at once. Prompts are random token ids, so that none is found in a prefix cache; answers have exactly `max_tokens` tokens.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from minipaged.config import check_int, check_real
from minipaged.errors import InputError

PERCENTILES = (50, 90, 99)
SECONDS_FOR_ONE = 600.0  # that a request may take


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked. rate: requests a second, inf for all at once; concurrency: at most so many at a time, 0 for no limit.

    goodput: seconds that a request may take and still count: `first` to its first token, `gap` between two on average.
    """

    url: str
    model: str | None = None
    requests: int = 100
    rate: float = math.inf
    concurrency: int = 0
    prompt_tokens: int = 128
    max_tokens: int = 128
    key: str = ""
    seed: int = 0
    first: float = math.inf
    gap: float = math.inf

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"the URL must be http://HOST:PORT, with or without a path, not {self.url!r}")
        for name in ("requests", "prompt_tokens", "max_tokens"):
            check_int(name, getattr(self, name), 1)
        check_int("concurrency", self.concurrency, 0)
        for name in ("rate", "first", "gap"):
            if getattr(self, name) != math.inf:
                check_real(name, getattr(self, name), 0.0, open_low=True)


@dataclass(slots=True)
class Seen:
    """One request as its client saw it; times by one clock, in seconds."""

    start: float
    stamps: list[float] = field(default_factory=list)  # when something of the text came
    tokens: int = 0
    end: float = 0.0
    error: str = ""


class _Stream(asyncio.Protocol):
    """A connection that reads one stream of events. It looks at the bytes no closer than it must: it shares the machine with the server."""

    def __init__(self, request: bytes, seen: Seen) -> None:
        self.seen = seen
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request = request
        self._begun = False
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        if not self._begun:
            self._tail += data
            head, found, rest = self._tail.partition(b"\r\n\r\n")
            if not found:
                return
            self._begun, self._tail = True, b""
            status = head.split(b" ", 2)[1]
            if status != b"200":
                self.seen.error = f"HTTP {status.decode('ascii', 'replace')}"
            data = rest
        if b'"text":' in data or b'"delta":' in data:
            self.seen.stamps.append(time.perf_counter())
        self._tail = (self._tail + data)[-4096:]

    def connection_lost(self, exc: Exception | None) -> None:
        self.seen.end = time.perf_counter()
        if not self.seen.error and (b'"error"' in self._tail or b"[DONE]" not in self._tail):
            self.seen.error = "the stream ended early"
        counts = re.findall(rb'"completion_tokens": ?(\d+)', self._tail)
        self.seen.tokens = int(counts[-1]) if counts else len(self.seen.stamps)
        if not self.done.done():
            self.done.set_result(None)


async def drive(load: Load, progress: Callable[[int, int], object] | None = None) -> list[Seen]:
    """Send all requests and wait for their ends."""
    parts = urlsplit(load.url)
    host, path = str(parts.hostname), parts.path.rstrip("/")
    path = path if path.endswith("/v1") else f"{path}/v1"
    secure = parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    rng = np.random.default_rng(load.seed)
    gaps = rng.exponential(1 / load.rate, load.requests) if load.rate != math.inf else np.zeros(load.requests)
    places = asyncio.Semaphore(load.concurrency or load.requests)
    loop, done = asyncio.get_running_loop(), 0
    context = ssl.create_default_context() if secure else None

    async def one(at: float) -> Seen:
        nonlocal done
        await asyncio.sleep(max(0.0, at - time.perf_counter()))
        async with places:
            tokens = rng.integers(1, 250, load.prompt_tokens).tolist()
            body: dict[str, Any] = {"prompt": tokens, "max_tokens": load.max_tokens, "ignore_eos": True, "stream": True}
            body |= {"temperature": 0, "stream_options": {"include_usage": True}}
            if load.model is not None:
                body["model"] = load.model
            content = json.dumps(body).encode()
            key = f"authorization: Bearer {load.key}\r\n" if load.key else ""
            head = f"POST {path}/completions HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n{key}"
            head += f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
            seen = Seen(time.perf_counter())
            try:
                _, stream = await loop.create_connection(
                    lambda: _Stream(head.encode() + content, seen), host, port, ssl=context
                )
                await asyncio.wait_for(stream.done, SECONDS_FOR_ONE)
            except (OSError, TimeoutError) as error:
                seen.error, seen.end = f"{type(error).__name__}: {error}", time.perf_counter()
        done += 1
        if progress is not None:
            progress(done, load.requests)
        return seen

    begin = time.perf_counter()
    return await asyncio.gather(*(one(begin + at) for at in np.cumsum(gaps).tolist()))


def summary(load: Load, seen: Sequence[Seen]) -> dict[str, Any]:
    """One row of results: counts, tokens a second, and percentiles in milliseconds. InputError if no request was answered."""
    good = [s for s in seen if not s.error and s.stamps]
    if not good:
        raise InputError(f"{load.url}: no request was answered: {seen[0].error or 'no token came'}")
    seconds = max(s.end for s in good) - min(s.start for s in seen)
    first = [s.stamps[0] - s.start for s in good]
    gaps = [b - a for s in good for a, b in zip(s.stamps, s.stamps[1:], strict=False)]
    means = [(s.stamps[-1] - s.stamps[0]) / max(1, s.tokens - 1) for s in good]
    counted = sum(f <= load.first and m <= load.gap for f, m in zip(first, means, strict=True))
    row: dict[str, Any] = {
        "requests": len(seen),
        "failed": len(seen) - len(good),
        "rate": None if load.rate == math.inf else load.rate,
        "concurrency": load.concurrency or None,
        "prompt_tokens": load.prompt_tokens,
        "max_tokens": load.max_tokens,
        "seconds": round(seconds, 4),
        "tokens_per_second": round(sum(s.tokens for s in good) / seconds, 2),
        "requests_per_second": round(len(good) / seconds, 3),
        "goodput": round(counted / seconds, 3),
    }
    ends = [s.end - s.start for s in good]
    for name, values in (("first", first), ("gap", gaps or [0.0]), ("per_token", means), ("end", ends)):
        for percent in PERCENTILES:
            row[f"{name}_p{percent}_ms"] = round(1000 * float(np.percentile(values, percent)), 3)
    largest = [max((b - a for a, b in zip(s.stamps, s.stamps[1:], strict=False)), default=0.0) for s in good]
    row["largest_gap_p50_ms"] = round(1000 * float(np.percentile(largest, 50)), 3)
    return row
