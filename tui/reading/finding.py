"""Finding a step by kind of event, sequence, block or number, or as the cause of another event.

Each search returns a position in the source, or a sentence on why there is none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable

import numpy as np
import numpy.typing as npt

from minipaged.errors import TraceError
from minipaged.trace.events import MARKS, Event
from minipaged.trace.snapshot import Snapshot
from minipaged.trace.sources import Source
from minipaged.trace.words import letter

MOST_READ = 20_000  # deltas that one search reads
WORDS = {
    "cow": "copy",
    "copy": "copy",
    "fork": "fork",
    "preempt": "preempt",
    "swap": "swap_out",
    "hit": "cache_hit",
    "cache": "cache_hit",
    "finish": "finish",
    "done": "finish",
    "admit": "admit",
    "start": "admit",
    "evict": "evict",
    "abort": "abort",
    "refuse": "refuse",
    "prune": "prune",
    "release": "release",
    "knob": "knob",
}


def next_event(source: Source, position: int, direction: int, bookmarks: Collection[int] = ()) -> int | str:
    """The next (1) or previous (-1) step in which something but writing happened, or a bookmark stands."""
    found = np.flatnonzero(source.marks) + 1
    if bookmarks:
        found = np.union1d(found, sorted(bookmarks))
    none = "there is no later event yet" if direction > 0 else "there is no earlier event"
    return _nearest(found, position, direction, none)


def _nearest(positions: npt.NDArray[np.int64], position: int, direction: int, none: str) -> int | str:
    if direction > 0:
        at = int(np.searchsorted(positions, position, side="right"))
        return int(positions[at]) if at < len(positions) else none
    at = int(np.searchsorted(positions, position, side="left"))
    return int(positions[at - 1]) if at > 0 else none


def find(source: Source, snapshot: Snapshot, position: int, query: str, direction: int) -> int | str:
    """A kind of event (cow, preempt, swap …), `seq B`, `block 31`, `step 40`."""
    low = query.lower()
    side = "after" if direction > 0 else "before"
    if number := re.fullmatch(r"(?:step )?(\d+)", low):
        first = source.delta(0).step if len(source) else 0  # steps number the deltas, and need not start at 0
        return int(number[1]) - first + 1
    if named := re.fullmatch(r"block (\d+)", low):
        block = int(named[1])
        wanted = scan(source, position, lambda e: block in (e.block, e.other if e.kind == "copy" else -1), direction)
        return f"nothing happened to block {block} {side} this step" if wanted is None else wanted
    if low.startswith("seq "):
        return _find_sequence(source, snapshot, position, query[4:], direction)
    kind = next((kind for word, kind in WORDS.items() if low and word.startswith(low.rstrip("s"))), None)
    if kind is None:
        return f"cannot find {query!r}: try cow, fork, hit, preempt, swap, finish, evict, seq B, block 31, step 40"
    positions = np.flatnonzero(source.marks & np.uint16(MARKS[kind])) + 1
    return _nearest(positions, position, direction, f"no {low} {side} this step")


def _find_sequence(source: Source, snapshot: Snapshot, position: int, name: str, direction: int) -> int | str:
    by_letter = {letter(state.label): seq for seq, state in snapshot.sequences.items()}
    sequence = by_letter.get(name, by_letter.get(name.upper(), int(name) if name.isdigit() else None))
    if sequence is None:
        return f"there is no sequence {name!r} here"
    found = scan(source, position, lambda event: event.sequence == sequence and event.kind != "append", direction)
    side = "after" if direction > 0 else "before"
    return f"nothing happened to {name} {side} this step" if found is None else found


def scan(source: Source, position: int, wanted: Callable[[Event], bool], direction: int) -> int | None:
    """The position after the nearest delta in that direction with an event for which `wanted(event)` holds."""
    steps: Iterable[int] = range(position, len(source)) if direction > 0 else range(position - 2, -1, -1)
    for count, at in enumerate(steps):
        if count >= MOST_READ:
            break
        try:
            if any(wanted(event) for event in source.delta(at).events):
                return at + 1
        except TraceError:
            break
    return None


def cause_of(source: Source, position: int, event: Event, here: Collection[Event]) -> int | str:
    """Where the event that caused this one happened. here: the events of the step we stand at."""
    if event.cause < 0:
        return f"{event.kind} is a first cause: nothing in the trace led to it"
    same = next((other for other in here if other.id == event.cause), None)
    if same is not None:
        return f"{event.kind} was caused in this same step, by {same.kind}"
    found = scan(source, position, lambda other: other.id == event.cause, -1)
    return "the cause lies too far back" if found is None else found


def arrivals(source: Source, upto: int, known: Collection[int]) -> list[tuple[int, int]]:
    """(position, request): before which step each known request was asked, of those in the first `upto` steps."""
    found: list[tuple[int, int]] = []
    seen: set[int] = set()
    for position in range(upto):
        for patch in source.delta(position).sequences:
            if patch.request not in seen and patch.request in known:
                found.append((position, patch.request))
            seen.add(patch.request)
    return found
