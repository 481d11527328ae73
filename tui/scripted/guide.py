"""What the tour of a first run explains: the first admission, cache hit, fork, copy and preemption, a sentence each."""

from __future__ import annotations

from minipaged.trace.events import Event, StepDelta, beside_appends
from minipaged.trace.snapshot import Snapshot
from minipaged.trace.words import letter, listing, plural

MOST_STEPS = 400  # after which it no longer slows the run: what has not happened by then may never happen
KINDS = ("admit", "cache_hit", "fork", "copy", "preempt")


class Guide:
    """Sentences for a run that nobody has seen before, each at most once."""

    def __init__(self) -> None:
        self._left = set(KINDS)
        self._steps = 0

    @property
    def over(self) -> bool:
        """Whether it has nothing more to say."""
        return not self._left or self._steps >= MOST_STEPS

    def words(self, delta: StepDelta, snapshot: Snapshot) -> str:
        """What to say of the step that led to this snapshot; "" where nothing happened for the first time."""
        self._steps += 1
        found: dict[str, list[Event]] = {}
        for event in beside_appends(delta.events):
            if event.kind == "fork" and event.other < 0:
                continue  # a copy that was given up
            found.setdefault(event.kind, []).append(event)
        for kind in KINDS:
            if kind in self._left and kind in found:
                self._left.discard(kind)
                return _SAYS[kind](found[kind], snapshot)
        return ""


def _name(snapshot: Snapshot, sequence: int) -> str:
    state = snapshot.sequences.get(sequence)
    return letter(state.label) if state is not None else "?"


def _admit(events: list[Event], snapshot: Snapshot) -> str:
    size = snapshot.stats.block_size
    return f"A letter is one answer being written, a cell is a block of {plural(size, 'token')}"


def _cache_hit(events: list[Event], snapshot: Snapshot) -> str:
    who = events[0].sequence
    count = len({event.block for event in events if event.sequence == who})
    state = snapshot.sequences.get(who)
    if state is not None and len(state.token_ids) > state.num_prompt:  # it ran before, and had to make way
        return f"{_name(snapshot, who)} comes back: {plural(count, 'block')} of its own stayed in the cache, and need not be computed"
    return f"{_name(snapshot, who)} begins as one before it: it shares {plural(count, 'block')} and computes none anew"


def _fork(events: list[Event], snapshot: Snapshot) -> str:
    parent = events[0].other
    family = [parent, *dict.fromkeys(event.sequence for event in events if event.other == parent)]
    names = listing([_name(snapshot, sequence) for sequence in family])
    return f"{names} are {len(family)} answers to one prompt: one copy of its blocks serves them all"


def _copy(events: list[Event], snapshot: Snapshot) -> str:
    event = events[0]
    who = _name(snapshot, event.sequence)
    return f"{who} writes into block {event.block}, which others read: {who} gets a copy, block {event.other}"


def _preempt(events: list[Event], snapshot: Snapshot) -> str:
    names = listing([_name(snapshot, sequence) for sequence in dict.fromkeys(event.sequence for event in events)])
    return f"No block is free: {names} makes way, and comes back when there is room"


_SAYS = {"admit": _admit, "cache_hit": _cache_hit, "fork": _fork, "copy": _copy, "preempt": _preempt}
