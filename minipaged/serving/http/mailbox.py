"""A request on its way, as the server keeps it: a ticket whose mailbox merges what comes, and the signal that wakes its reader.

A mailbox holds one piece an answer, however slow its reader is: it costs what the answer is long, and nothing waits for it.
"""

from __future__ import annotations

import asyncio

Entry = list[list[float]]  # of one token: [token, logprob, rank], itself first, then the likeliest


class Growth:
    """What an answer gained since it was last read."""

    __slots__ = ("finish", "logprobs", "stop_reason", "text", "tokens")

    def __init__(self) -> None:
        self.text = ""
        self.tokens: list[int] = []
        self.logprobs: list[Entry] = []
        self.finish = ""
        self.stop_reason: int | str | None = None


class Signal:
    """Wakes the one task that reads some mailboxes. Set twice before it looks, it wakes once."""

    __slots__ = ("_set", "_waiter", "gone")

    def __init__(self) -> None:
        self._set = False
        self._waiter: asyncio.Future[None] | None = None
        self.gone = False  # the client has left

    def set(self) -> None:
        """There is something to read."""
        self._set = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self) -> None:
        """Until there is something to read."""
        if not self._set:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self._set = False

    async def wait_for(self, seconds: float) -> bool:
        """As `wait`, but not for ever: False if nothing came."""
        if self._set:
            self._set = False
            return True
        loop = asyncio.get_running_loop()
        waiter = self._waiter = loop.create_future()
        late = loop.call_later(seconds, _give_up, waiter)
        try:
            await waiter
        finally:
            late.cancel()
            self._waiter = None
        came, self._set = self._set, False
        return came


def _give_up(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


class Ticket:
    """One request on its way. growth: the mailbox, by answer. whole: its reader is woken at the end alone."""

    __slots__ = (
        "accepted",
        "asked_at",
        "cached",
        "client",
        "drawn",
        "ended",
        "error",
        "finish",
        "first_at",
        "growth",
        "last_at",
        "method",
        "most",
        "num_prompt",
        "number",
        "prompt_logprobs",
        "refused",
        "request",
        "request_id",
        "signal",
        "started_at",
        "status",
        "whole",
        "width",
    )

    def __init__(self, number: int, num_prompt: int, width: int, signal: Signal, *, whole: bool, now: float) -> None:
        self.number = number
        self.num_prompt = num_prompt
        self.width = width  # sequences that it runs at once
        self.signal = signal
        self.whole = whole
        self.asked_at = now
        self.started_at = self.first_at = self.last_at = 0.0
        self.accepted = False
        self.most = 0  # tokens of an answer
        self.refused: str | None = None
        self.cached = 0  # prompt tokens found in the prefix cache
        self.prompt_logprobs: list[Entry | None] | None = None
        self.growth: dict[int, Growth] = {}
        self.ended = False
        self.error: str | None = None  # why it ended before its time
        self.status = 500  # what that is to HTTP
        self.drawn = 0  # tokens drawn for it
        self.finish = ""
        self.request = -1  # its number in the trace
        self.client = self.method = self.request_id = ""  # for who looks on

    def take(self) -> dict[int, Growth]:
        """What came since the last call."""
        growth, self.growth = self.growth, {}
        return growth
