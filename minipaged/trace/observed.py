"""A memory's life seen from outside, as StepDeltas: for lessons, for a learner's own code, and for the trace of a failing property.

Whoever drives a block manager hands in what stands in its tables after each thing worth seeing, and what its events said. Where those
do not explain the tables, events that do are put in their place. There is no engine here. For small pools: each step copies the state.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

from minipaged.memory.types import BlockEvent, PoolUsage
from minipaged.trace.events import NO_LONGS, Event, Longs, Progress, Queues, SequencePatch, Stats, StepDelta
from minipaged.trace.snapshot import Snapshot, Tables, as_longs

Change = tuple[str, int, int, int, int]  # kind, sequence, block, other, index: what an event says but for its number


def events_between(state: Snapshot, tables: Tables, host_tables: Tables) -> list[Change]:
    """Events that lead from the state's tables to these: what leaves first, then what comes.

    A block that replaces a shared one is a copy of it; one that somebody else's table names already is shared.
    """
    leaves: list[Change] = []
    comes: list[Change] = []
    held = Counter(block for table in state.tables.values() for block in table if block)
    for seq in sorted({*state.tables, *tables}):
        old, new = state.tables.get(seq, ()), _without_null_end(tables.get(seq, ()))
        kept = 0
        while kept < min(len(old), len(new)):
            gone, come = old[kept], new[kept]
            if gone != come:
                if not come:
                    leaves.append(("release", seq, gone, -1, kept))
                elif held[gone] > 1 and not held[come]:
                    comes.append(("copy", seq, gone, come, kept))
                    held[come] += 1
                else:
                    break
                held[gone] -= bool(gone)
            kept += 1
        leaves += [("free", seq, old[i], -1, i) for i in range(len(old) - 1, kept - 1, -1) if old[i]]
        held.subtract(block for block in old[kept:] if block)
        comes += [("alloc", seq, new[i], -1, i) for i in range(kept, len(new)) if new[i]]
    for seq in sorted({*state.host_tables, *host_tables}):
        old, new = state.host_tables.get(seq, ()), host_tables.get(seq, ())
        if old != new:
            leaves += [("free", seq, old[i], -1, i) for i in range(len(old) - 1, -1, -1) if old[i] >= 0]
            comes += [("swap_out", seq, -1, block, i) for i, block in enumerate(new) if block >= 0]
    found = leaves
    for kind, seq, block, other, index in comes:
        shares = kind == "alloc" and held[block] > 0
        held[block] += kind == "alloc"
        found.append(("fork" if shares else kind, seq, block, other, index))
    return found


def _without_null_end(table: tuple[int, ...]) -> tuple[int, ...]:
    """The table without null entries at its end, of which no event tells."""
    end = len(table)
    while end and not table[end - 1]:
        end -= 1
    return table[:end]


class Line(NamedTuple):
    """A sequence as its driver knows it."""

    patch: SequencePatch
    num_computed: int
    token_ids: Sequence[int]  # all of them


class ObservedSteps:
    """One delta for each time that somebody looked, in `deltas`; `state` is their fold."""

    def __init__(self) -> None:
        self.deltas: list[StepDelta] = []
        self.state = Snapshot()
        self._next_event = 0

    def add(
        self,
        *,
        lines: Sequence[Line],
        stats: Stats,
        queues: Queues,
        tables: Tables,
        host_tables: Tables | None = None,
        reported: Iterable[Change] = (),
        counts: Sequence[int] | None = None,
        token_bytes: Callable[[int], bytes] = lambda token: b"",
    ) -> StepDelta:
        """How things stand now.

        stats: without the gauges that follow from the tables. reported: what the manager's events said since the last one. counts: each
        block's reference count, where it may be another than the tables give.
        """
        patches, progress = self._what_changed(lines)
        step = len(self.deltas)
        delta = StepDelta(
            step=step,
            t_ns=step * 1_000_000,
            sequences=patches,
            progress=progress,
            token_bytes={
                token: token_bytes(token)
                for token in progress.token_ids.tolist()
                if token not in self.state.token_bytes
            },
            queues=queues,
            stats=stats,
        )
        events, hosts = list(reported), host_tables or {}
        after = self._after(delta, events)
        if after.misfit:
            events = events_between(self.state, tables, hosts)
        else:
            events += events_between(after, tables, hosts)
        after = self._after(delta, events)
        if counts is not None:
            refs = after.device.refs.tolist()
            events += [("count", -1, block, -1, n) for block, n in enumerate(counts) if block and refs[block] != n]
        delta = replace(delta, events=self._numbered(events))
        self.state.apply(delta)
        delta = replace(delta, stats=self.state.gauge())
        self._next_event += len(events)
        self.deltas.append(delta)
        return delta

    def _after(self, delta: StepDelta, events: list[Change]) -> Snapshot:
        state = self.state.copy()
        state.apply(replace(delta, events=self._numbered(events)))
        return state

    def _numbered(self, events: list[Change]) -> tuple[Event, ...]:
        return tuple(
            Event(self._next_event + i, kind, -1, seq, block, other, index)
            for i, (kind, seq, block, other, index) in enumerate(events)
        )

    def _what_changed(self, lines: Sequence[Line]) -> tuple[tuple[SequencePatch, ...], Progress]:
        patches: list[SequencePatch] = []
        rows: list[tuple[int, int, int, int]] = []
        tokens: list[int] = []
        for line in lines:
            known = self.state.sequences.get(line.patch.sequence)
            if known is not None and not known.alive:
                continue
            new = line.token_ids[len(known.token_ids) if known is not None else 0 :]
            if known is None or repr(known.patch()) != repr(line.patch):  # repr: nan equals itself here
                patches.append(line.patch)
            if new or known is None or known.num_computed != line.num_computed:
                rows.append((line.patch.sequence, line.num_computed, 0, len(new)))
                tokens += new
        return tuple(patches), progress_of(rows, tokens)


def progress_of(rows: Sequence[tuple[int, int, int, int]], token_ids: Iterable[int]) -> Progress:
    """Rows of (sequence, num_computed, num_scheduled, num_new), and their tokens, as columns."""
    columns: Iterable[Longs] = as_longs(rows, 4).T if rows else [NO_LONGS] * 4
    return Progress._make((*columns, as_longs(token_ids)))


class Manager(Protocol):
    """What is asked of a block manager."""

    def table(self, seq_id: int) -> tuple[int, ...]:
        """Its device blocks."""
        ...

    def host_table(self, seq_id: int) -> tuple[int, ...]:
        """Its host blocks."""
        ...

    def usage(self) -> PoolUsage:
        """Blocks by state."""
        ...

    def take_events(self) -> tuple[BlockEvent, ...]:
        """What happened since the last call."""
        ...


def tables_of(manager: Manager, sequences: Iterable[int]) -> tuple[Tables, Tables]:
    """The device and host tables of those sequences that the manager knows."""
    found: tuple[Tables, Tables] = ({}, {})
    for seq in sequences:
        for tables, read in zip(found, (manager.table, manager.host_table), strict=True):
            try:
                table = read(seq)
            except KeyError:
                continue
            if table:
                tables[seq] = table
    return found


def pool_stats(usage: PoolUsage, block_size: int) -> Stats:
    """The stats that a pool's usage gives."""
    return Stats(
        total_blocks=usage.total,
        free_blocks=usage.free,
        cached_blocks=usage.cached,
        host_total=usage.host_total,
        host_free=usage.host_free,
        host_cached=usage.host_cached,
        block_size=block_size,
    )


@dataclass(slots=True)
class Actor:
    """A sequence that is played by whoever drives the manager."""

    parent: int = -1
    status: str = "running"
    token_ids: list[int] = field(default_factory=list)
    num_prompt: int = 0
    num_computed: int = 0


class ManagerTrace:
    """The trace of one manager. The driver keeps `actors` up to date; `step` makes a delta of what changed.

    token_bytes: what each token reads, by its id.
    """

    def __init__(self, manager: Manager, block_size: int, token_bytes: Mapping[int, bytes]) -> None:
        self.manager = manager
        self.block_size = block_size
        self.actors: dict[int, Actor] = {}
        self._observed = ObservedSteps()
        self._token_bytes = token_bytes
        self._copies = 0

    @property
    def deltas(self) -> list[StepDelta]:
        """One for each step."""
        return self._observed.deltas

    def step(self, counts: Sequence[int] | None = None) -> StepDelta:
        """What changed since the last one. counts: each block's reference count, as the manager gives it."""
        raw = self.manager.take_events()
        self._copies += sum(event.kind == "copy" for event in raw)
        tables, host_tables = tables_of(self.manager, self.actors)
        queues = (tuple(s for s, a in self.actors.items() if a.status == q) for q in Queues._fields)
        return self._observed.add(
            lines=[self._line(seq, actor) for seq, actor in self.actors.items()],
            stats=pool_stats(self.manager.usage(), self.block_size)._replace(copies=self._copies),
            queues=Queues(*queues),
            tables=tables,
            host_tables=host_tables,
            reported=[(e.kind, e.seq_id, e.block, e.other, e.index) for e in raw],
            counts=counts,
            token_bytes=lambda token: self._token_bytes.get(token, b""),
        )

    @staticmethod
    def _line(seq: int, actor: Actor) -> Line:
        reason = "stop" if actor.status == "finished" else ""
        patch = SequencePatch(seq, seq, actor.parent, actor.status, 0, actor.num_prompt, math.nan, reason)
        return Line(patch, actor.num_computed, tuple(actor.token_ids))
