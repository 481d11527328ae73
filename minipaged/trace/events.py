"""The trace's vocabulary: what one step did, as plain values that screen, recorder, tests, lessons and lab all read.

A delta is events and token columns. Block tables, owners and reference counts are not in it: snapshot.py folds them from the events.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, overload

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from minipaged.memory.types import PoolBreakdown, Run

SCHEMA_MAJOR, SCHEMA_MINOR = 2, 0

# Bits of a block's flags. COPIED: a copy wrote this block in this very step
FLAG_CACHED, FLAG_PINNED, FLAG_COPIED, FLAG_NULL = 1, 2, 4, 8
ENDED = frozenset({"finished", "aborted", "refused"})  # the statuses that a sequence does not leave

Longs = npt.NDArray[np.int64]
NO_LONGS: Longs = np.zeros(0, np.int64)


class Event(NamedTuple):
    """One thing that happened. Events stand in causal order.

    kind: a block event's (alloc free fork copy cache_hit publish evict swap_out swap_in release) or one of
    admit rejoin append preempt prune finish refuse abort knob. memory.types.BlockEvent says what each of the former does to tables and
    counts; `amount` is its index. `cause` is the id of the event that led to it, -1 if none. Kind `count`, rare: somebody looked at a
    manager whose reference count of a block is not what its events say; it is `amount`.
    """

    id: int
    kind: str
    cause: int
    sequence: int
    block: int
    other: int
    amount: int


class StepEvents(Sequence[Event]):
    """`first`, then one "append" a sequence that the step computed: numbered from `next_id`, `amounts[i]` tokens of `sequences[i]`.

    Reads as the tuple of its events, and equals it. A step of plain decoding appends to hundreds of sequences: making an object of
    each takes longer than all else that the trace does, so they are made only for whoever looks at them one by one.
    """

    __slots__ = ("_made", "amounts", "first", "next_id", "sequences")

    def __init__(self, first: tuple[Event, ...], next_id: int, sequences: Longs, amounts: Longs) -> None:
        self.first = first
        self.next_id = next_id
        self.sequences = sequences
        self.amounts = amounts
        self._made: tuple[Event, ...] | None = None

    @property
    def _all(self) -> tuple[Event, ...]:
        if self._made is None:
            rows = enumerate(zip(self.sequences.tolist(), self.amounts.tolist(), strict=True), self.next_id)
            self._made = self.first + tuple(Event(id_, "append", -1, seq, -1, -1, n) for id_, (seq, n) in rows)
        return self._made

    @overload
    def __getitem__(self, index: int) -> Event: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Event, ...]: ...
    def __getitem__(self, index: int | slice) -> Event | tuple[Event, ...]:
        return self._all[index]

    def __iter__(self) -> Iterator[Event]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self.first) + len(self.sequences)

    def __eq__(self, other: object) -> bool:
        return self._all == tuple(other) if isinstance(other, (tuple, StepEvents)) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._all)

    def __repr__(self) -> str:
        return repr(self._all)


def beside_appends(events: Sequence[Event]) -> Sequence[Event]:
    """The events without most appends, of which there is one a sequence and step: for whoever looks for others. Makes no object."""
    return events.first if isinstance(events, StepEvents) else events


class SequencePatch(NamedTuple):
    """A sequence that is new, or about which more changed than that it grew. All fields replace."""

    sequence: int
    request: int
    parent: int  # -1: none
    status: str  # waiting running swapped finished aborted refused
    num_cached: int
    num_prompt: int
    score: float  # cumulative log-probability, nan if not tracked
    finish_reason: str  # "" while it lives


class Progress(NamedTuple):
    """What the step computed and appended: columns, one row a sequence that was scheduled or has gained tokens."""

    sequence: Longs
    num_computed: Longs  # tokens whose keys and values are written, after the step
    num_scheduled: Longs  # tokens that this step computed; those that it did not schedule have 0 and stand last
    num_new: Longs  # tokens appended (the prompt at first)
    token_ids: Longs  # those of all rows, one after another


NO_PROGRESS = Progress(NO_LONGS, NO_LONGS, NO_LONGS, NO_LONGS, NO_LONGS)


class Queues(NamedTuple):
    """Sequence ids by queue, in the order they are visited."""

    running: tuple[int, ...] = ()
    waiting: tuple[int, ...] = ()
    swapped: tuple[int, ...] = ()


class Stats(NamedTuple):
    """Counters and gauges after the step. Counts are since the start; *_blocks are now."""

    num_tokens: int = 0  # computed in this step
    num_drawn: int = 0  # sampled in this step
    total_blocks: int = 0  # null block included
    free_blocks: int = 0  # cached ones included
    cached_blocks: int = 0
    host_total: int = 0
    host_free: int = 0
    block_size: int = 0
    token_slots: int = 0  # device slots that hold a live token's KV, each physical slot once
    tail_slots: int = 0  # slots of referenced blocks that hold none (internal waste)
    shared_saved_blocks: int = 0  # table entries less distinct blocks: what sharing saves now
    copies: int = 0
    hit_tokens: int = 0
    queried_tokens: int = 0
    preemptions: int = 0
    swaps: int = 0
    generated_tokens: int = 0
    elapsed_ns: int = 0  # wall time of the step
    num_waiting: int = 0  # sequences not started; Queues names the first of them


@dataclass(frozen=True, slots=True, eq=False)
class StepDelta:
    """All that one step changed. `events` is a tuple, or reads as one (StepEvents)."""

    step: int
    t_ns: int
    events: Sequence[Event] = ()
    sequences: tuple[SequencePatch, ...] = ()
    progress: Progress = NO_PROGRESS
    # What each token reads that no earlier delta has named.
    token_bytes: Mapping[int, bytes] = field(default_factory=dict)
    queues: Queues = field(default_factory=Queues)
    stats: Stats = field(default_factory=Stats)


@dataclass(frozen=True, slots=True)
class ShadowDelta:
    """What another system would hold after this step, on the same traffic: accounting, not speed."""

    step: int
    system: str
    runs: tuple[Run, ...]
    stats: PoolBreakdown


# What a timeline shows of each step without reading it: one bit an event kind.
MARKS: dict[str, int] = {
    kind: 1 << bit
    for bit, kind in enumerate(
        (
            *("admit", "copy", "cache_hit", "preempt", "swap_out", "swap_in", "finish", "evict"),
            *("fork", "abort", "refuse", "prune", "release", "knob"),
        )
    )
}


def marks_of(events: Sequence[Event]) -> int:
    """The bits of the kinds that happened."""
    bits = 0
    for event in beside_appends(events):  # appends have no mark
        bits |= MARKS.get(event.kind, 0)
    return bits


def occupancy(stats: Stats) -> int:
    """Blocks in use (held by a sequence) out of those that can be, in 1/10000."""
    usable = stats.total_blocks - 1
    return 0 if usable <= 0 else max(0, min(10000, round(10000 * (usable - stats.free_blocks) / usable)))
