"""Who looks on: the record stream for an attached screen, and the blocks as JSON for the page at `/`.

The engine makes no trace until somebody watches. A watcher gets a keyframe and then the deltas; one that lags is given a keyframe again,
and what lies between is dropped. Texts are hidden from watchers unless the server was started to show them: the engine's process hides
them.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from minipaged.errors import TraceError
from minipaged.serving.http.link import EngineLink
from minipaged.serving.http.mailbox import Signal
from minipaged.trace import codec
from minipaged.trace.events import FLAG_CACHED
from minipaged.trace.file import Header, Kind, Record, note
from minipaged.trace.snapshot import Snapshot

if TYPE_CHECKING:
    from minipaged.serving.http.mailbox import Ticket

MAX_BEHIND = 4 << 20  # bytes that may wait for a watcher before it jumps to a keyframe
FRAME_SECONDS = 0.2  # between two pictures of the page
SHOWN_BLOCKS = 1 << 16
LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Watcher:
    """One who looks on: records that wait to be read."""

    def __init__(self) -> None:
        self.records: deque[Record] = deque()
        self.signal = Signal()
        self.size = 0  # bytes that wait
        self.synced = False  # whether a keyframe has come, so that deltas fit
        self.jumps = 0

    def take(self) -> list[Record]:
        """What came since the last call."""
        found, self.size = list(self.records), 0
        self.records.clear()
        return found

    def put(self, record: Record) -> None:
        """One more."""
        self.records.append(record)
        self.size += len(record.body)
        self.signal.set()


class Feed:
    """The watchers of one engine."""

    def __init__(self, link: EngineLink, *, show_text: bool) -> None:
        self._link = link
        self._show_text = show_text
        self._watchers: set[Watcher] = set()
        link.on_trace = self._pass_on
        link.on_request = self._name

    def join(self) -> Watcher:
        """One more who looks on. A keyframe comes first, then who the requests are."""
        watcher = Watcher()
        if not self._watchers:
            self._link.send("watch", on=True, show=self._show_text)
        self._watchers.add(watcher)
        self._link.send("keyframe")
        for ticket in self._link.tickets.values():
            if ticket.request >= 0:
                watcher.put(_named(ticket))
        return watcher

    def leave(self, watcher: Watcher) -> None:
        """They look away; with the last one the engine stops telling."""
        self._watchers.discard(watcher)
        if not self._watchers:
            self._link.send("watch", on=False)

    @property
    def header(self) -> Header:
        """What the stream is of."""
        return self._link.header

    def _pass_on(self, record: Record) -> None:
        for watcher in self._watchers:
            if record.kind == Kind.KEYFRAME and not watcher.synced:
                watcher.synced = True
                watcher.put(record)
            elif record.kind == Kind.DELTA and watcher.synced:
                if watcher.size > MAX_BEHIND:
                    kept = [r for r in watcher.take() if r.kind == Kind.NOTE]
                    watcher.records.extend(kept)
                    watcher.synced = False
                    watcher.jumps += 1
                    self._link.send("keyframe")
                else:
                    watcher.put(record)

    def _name(self, ticket: Ticket) -> None:
        if self._watchers:
            record = _named(ticket)
            for watcher in self._watchers:
                watcher.put(record)


def _named(ticket: Ticket) -> Record:
    """Who a request of the trace is."""
    words: dict[str, Any] = {
        "request": ticket.request,
        "client": ticket.client,
        "method": ticket.method,
        "id": ticket.request_id,
    }
    return note(kind="request", first=_first(ticket), first_ns=round(1e9 * ticket.first_at), **words)


def _first(ticket: Ticket) -> float | None:
    return round(ticket.first_at - ticket.asked_at, 4) if ticket.first_at else None


class BlockView:
    """The state of the pool as the page draws it, folded from what one watcher gets."""

    def __init__(self, link: EngineLink, watcher: Watcher) -> None:
        self._link = link
        self._watcher = watcher
        self._state: Snapshot | None = None  # until a keyframe has come

    async def frames(self) -> Any:
        """Documents, at most one in FRAME_SECONDS; the next when something has changed."""
        while True:
            await self._watcher.signal.wait_for(2.0)
            records = self._watcher.take()
            if self._link.dead:
                return
            # Folding a burst, and drawing a large pool, takes milliseconds: streams go on meanwhile.
            document = await asyncio.get_running_loop().run_in_executor(None, self._frame, records)
            if document is not None:
                yield document
            await asyncio.sleep(FRAME_SECONDS)

    def _frame(self, records: list[Record]) -> dict[str, Any] | None:
        self._fold(records)
        return None if self._state is None else self.document(self._state)

    def _fold(self, records: list[Record]) -> None:
        for record in records:
            try:
                if record.kind == Kind.KEYFRAME:
                    self._state = codec.decode_keyframe(record.step, record.body)
                elif record.kind == Kind.DELTA and self._state is not None:
                    self._state.apply(codec.decode_delta(record.step, record.body))
            except TraceError:
                continue  # the next keyframe mends it

    def document(self, state: Snapshot) -> dict[str, Any]:
        """Blocks as characters of three texts: letters (`.` free, `-` found in the cache alone, a to z by request, capital where several
        hold it); how many hold it, 9 at most; how full it is, 9 is full.
        """
        now = time.monotonic()
        owners = {seq: s.request for seq, s in state.sequences.items()}
        device = state.device
        cells = []
        part = slice(1, SHOWN_BLOCKS)
        columns = (device.owner, device.refs, device.flags)
        for owner, refs, flags in zip(*(column[part].tolist() for column in columns), strict=True):
            if refs == 0:
                cells.append("-" if flags & FLAG_CACHED else ".")
            else:
                letter = LETTERS[owners.get(owner, 0) % 26]
                cells.append(letter.upper() if refs > 1 else letter)
        held: dict[int, int] = {}
        for seq, table in state.tables.items():
            held[owners.get(seq, -1)] = held.get(owners.get(seq, -1), 0) + len(table)
        stats = state.stats
        return {
            "model": self._link.header.model,
            "step": state.step,
            "block_size": stats.block_size,
            "blocks": "".join(cells),
            "counts": _digits(device.refs[part]),
            "fills": _digits(device.fill[part] * 9 // max(1, stats.block_size)),
            "free": stats.free_blocks - stats.cached_blocks,
            "cached": stats.cached_blocks,
            "saved": stats.shared_saved_blocks,
            "preemptions": stats.preemptions,
            "waiting": self._link.num_waiting,
            "requests": [_row(ticket, held, now) for ticket in list(self._link.tickets.values())[:200]],
        }


def _digits(values: npt.NDArray[np.int32]) -> str:
    return (np.clip(values, 0, 9) + ord("0")).astype(np.uint8).tobytes().decode()


def _row(ticket: Ticket, held: dict[int, int], now: float) -> dict[str, Any]:
    """A request as a line of the page."""
    spent = ticket.last_at - ticket.first_at
    return {
        "request": ticket.request,
        "letter": LETTERS[ticket.request % 26] if ticket.request >= 0 else "",
        "client": ticket.client,
        "method": ticket.method,
        "id": ticket.request_id,
        "state": "runs" if ticket.started_at else "waits",
        "seconds": round(now - ticket.asked_at, 1),
        "prompt": ticket.num_prompt,
        "cached": ticket.cached,
        "tokens": ticket.drawn,
        "blocks": held.get(ticket.request, 0),
        "first": _first(ticket),
        "rate": round((ticket.drawn - 1) / spent, 1) if spent > 0 and ticket.drawn > 1 else None,
    }
