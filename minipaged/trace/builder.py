"""Turns what an engine did in one step into a StepDelta for whoever listens. With nobody listening a step costs one test.

It reads the scheduler's events, its plan and the batch's columns; it changes nothing. Block tables it reads only once, when the first
listener comes: from then on it folds its own deltas, as every reader of the trace does, and takes the gauges from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from heapq import nsmallest
from typing import TYPE_CHECKING

import numpy as np

from minipaged.memory.types import BlockEvent
from minipaged.scheduling.plan import StepPlan
from minipaged.scheduling.request import Request, RequestOutput, Sequence
from minipaged.scheduling.running_set import SchedulerEvent
from minipaged.text.detokenizer import TextCodec
from minipaged.trace.events import (
    FLAG_CACHED,
    Event,
    Progress,
    Queues,
    SequencePatch,
    Stats,
    StepDelta,
    StepEvents,
)
from minipaged.trace.observed import events_between, pool_stats, progress_of, tables_of
from minipaged.trace.snapshot import Snapshot, as_longs

if TYPE_CHECKING:
    from minipaged.scheduling.runtime_settings import SettingChange
    from minipaged.scheduling.scheduler import Scheduler

Listener = Callable[[StepDelta], None]
RawEvent = SchedulerEvent | BlockEvent
MAX_WAITING_SHOWN = 64  # sequences of the waiting queue that a delta names; Stats counts them all
_ENDS = frozenset({"finish", "abort", "prune", "preempt"})


class TraceBuilder:
    """The trace of one engine. `subscribe` takes a listener; it is called once a step, in the engine's thread."""

    def __init__(self, scheduler: Scheduler, codec: TextCodec | None, clock: Callable[[], int]) -> None:
        self._scheduler = scheduler
        self._codec = codec
        self._clock = clock
        self._listeners: list[Listener] = []
        self._state = Snapshot()  # what the listeners were sent, folded
        self._began = 0
        self._step = 0
        self._next_event = 0
        self._changes: list[SettingChange] = []
        self._settled: set[Request] = set()  # sent, and from now on their sequences only grow, until an event names one
        self._ended: set[int] = set()  # sequences that were sent as ended, of requests that have not ended
        self._causes: dict[tuple[str, int], int] = {}  # (kind, sequence or block) -> newest event of that kind
        num_slots = len(scheduler.batch.seq_id)
        # By slot, after the last step: whose it was, and how many tokens were known of it.
        self._seq_id, self._known = np.full(num_slots, -1, np.int64), np.zeros(num_slots, np.int64)

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Call `listener` with the delta of every step from the next on. Returns the way out.

        Where the engine already holds something, one delta more goes to it at once, whose events lead to what there is.
        """
        if not self._listeners:
            self._scheduler.take_events()  # nobody listened when they happened
            self._state = Snapshot()
            self._settled.clear()
            self._ended.clear()
            self._seq_id[:] = -1
            self._state.apply(self._engine_as_delta())
            self._state.gauge()
        catch_up = _as_delta(self._state, self._next_event)
        if catch_up.events or catch_up.sequences:
            self._next_event += len(catch_up.events)
            listener(catch_up)
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def state(self) -> Snapshot:
        """The state after the last step, where somebody listens. It changes in place."""
        return self._state

    def begin(self) -> None:
        """A step begins."""
        if self._listeners:
            self._began = self._clock()

    def note_change(self, change: SettingChange) -> None:
        """A setting was changed."""
        self._changes.append(change)

    def emit(self, plan: StepPlan | None, outputs: list[RequestOutput]) -> None:
        """A step is done: send it to the listeners."""
        raw = self._scheduler.take_events()
        if not self._listeners:
            self._changes.clear()
            return
        delta = self._delta(plan, outputs, raw)
        for listener in list(self._listeners):
            listener(delta)

    def _delta(self, plan: StepPlan | None, outputs: list[RequestOutput], raw: list[RawEvent]) -> StepDelta:
        changed = self._changed(outputs, raw)
        progress = self._progress(plan, changed)
        now = self._clock()
        delta = StepDelta(
            step=self._step,
            t_ns=now,
            events=self._events(raw, plan),
            sequences=tuple(self._patch(sequence) for sequence in changed),
            progress=progress,
            token_bytes=self._new_token_bytes(progress),
            queues=self._queues(),
            stats=self._stats(plan, now - self._began),
        )
        self._step += 1
        self._state.apply(delta)
        return replace(delta, stats=self._state.gauge())

    # ---- sequences

    def _changed(self, outputs: list[RequestOutput], raw: Iterable[RawEvent]) -> list[Sequence]:
        """The sequences that did something else than grow: of requests that events name, and of those that are not settled."""
        requests = dict.fromkeys(output.request for output in outputs if output.request not in self._settled)
        requests.update(
            (e.sequence.request, None) for e in raw if isinstance(e, SchedulerEvent) and e.sequence is not None
        )
        changed: list[Sequence] = []
        for request in requests:
            changed += [sequence for sequence in request.sequences if sequence.seq_id not in self._ended]
            ended = {sequence.seq_id for sequence in request.sequences if sequence.finished}
            if len(ended) == len(request.sequences):
                self._settled.discard(request)
                self._ended -= ended
            else:
                self._ended |= ended
                if _only_grows(request):
                    self._settled.add(request)
        return changed

    def _patch(self, sequence: Sequence) -> SequencePatch:
        request, reason = sequence.request, sequence.finish_reason
        return SequencePatch(
            sequence=sequence.seq_id,
            request=request.request_id,
            parent=sequence.parent,
            status="aborted" if reason == "abort" else sequence.status.value,
            num_cached=sequence.num_cached,
            num_prompt=request.num_prompt,
            score=sequence.cumulative_logprob or math.nan,
            finish_reason=reason,
        )

    def _progress(self, plan: StepPlan | None, changed: list[Sequence]) -> Progress:
        """The plan's rows in its order; then the sequences that gained tokens without it, or of which `changed` tells.

        Sequences in the batch go by columns: hundreds of them gain one token each in a step.
        """
        batch = self._scheduler.batch
        same = self._seq_id == batch.seq_id
        gained = np.where(same, batch.num_tokens - self._known, -1)  # -1: unknown, the state says how many were sent
        gained[batch.seq_id < 0] = 0
        in_plan = np.zeros(len(same), bool)
        if plan is None:
            slots = np.flatnonzero(gained)
            num_planned = 0
        else:
            in_plan[plan.slots] = True
            slots = np.concatenate([plan.slots, np.flatnonzero((gained != 0) & ~in_plan)])
            num_planned = len(plan.slots)
        sequences: list[int] = batch.seq_id[slots].tolist()
        computed: list[int] = batch.num_computed[slots].tolist()
        new: list[int] = gained[slots].tolist()
        if plan is not None:
            sequences[:num_planned] = plan.seq_ids.tolist()
        self._seq_id[:], self._known[:] = batch.seq_id, batch.num_tokens
        tokens: list[int] = []
        left: set[int] = set()  # rows of the plan whose sequences have left their slot meanwhile
        holders = batch.sequences
        for row, (slot, count) in enumerate(zip(slots.tolist(), new, strict=True)):
            sequence = holders[slot]
            if sequence is None or sequence.seq_id != sequences[row]:
                left.add(row)
                new[row] = 0
            elif count == 1:
                tokens.append(sequence.token_ids[-1])
            elif count:
                start = len(sequence.token_ids) - count if count > 0 else self._num_sent(sequence.seq_id)
                tokens += sequence.token_ids[start:]
                new[row] = len(sequence.token_ids) - start
        scheduled = plan.lengths.tolist() if plan is not None else []
        scheduled += [0] * (len(sequences) - num_planned)
        in_rows = set(sequences)
        for sequence in changed:
            if sequence.seq_id in in_rows and sequence.slot >= 0:
                continue
            start = self._num_sent(sequence.seq_id)
            tokens += sequence.token_ids[start:]
            sequences.append(sequence.seq_id)
            computed.append(sequence.num_computed)
            new.append(len(sequence.token_ids) - start)
            scheduled.append(0)
        for row in left:  # what was computed for a sequence that is gone is sent with its end
            state = self._state.sequences.get(sequences[row])
            computed[row] = state.num_computed if state is not None else 0
        return Progress(as_longs(sequences), as_longs(computed), as_longs(scheduled), as_longs(new), as_longs(tokens))

    def _num_sent(self, seq_id: int) -> int:
        state = self._state.sequences.get(seq_id)
        return len(state.token_ids) if state is not None else 0

    def _new_token_bytes(self, progress: Progress) -> dict[int, bytes]:
        if self._codec is None:
            return {}
        read = self._codec.token_bytes
        new = set(progress.token_ids.tolist()).difference(self._state.token_bytes)
        return {token: read(token) for token in sorted(new) if token >= 0}

    # ---- events and gauges

    def _events(self, raw: list[RawEvent], plan: StepPlan | None) -> tuple[Event, ...] | StepEvents:
        events: list[Event] = []
        for change in self._changes:
            events.append(Event(self._next_event, "knob", -1, -1, -1, change.setting, change.amount))
            self._next_event += 1
        self._changes.clear()
        for item in raw:
            if isinstance(item, BlockEvent):
                block, other, amount = item.block, item.other, item.index
            else:
                block, other, amount = -1, -1, item.amount
            events.append(Event(self._next_event, item.kind, self._cause_of(item), item.seq_id, block, other, amount))
            self._causes[(item.kind, item.seq_id)] = self._next_event
            if block >= 0:
                self._causes[(item.kind, -2 - block)] = self._next_event
            self._next_event += 1
        if len(self._causes) > 100_000:  # causes are for the recent past
            self._causes = dict(list(self._causes.items())[-50_000:])
        if plan is None:
            return tuple(events)
        rows = StepEvents(tuple(events), self._next_event, plan.seq_ids, plan.lengths.astype(np.int64))
        self._next_event += len(plan.seq_ids)
        return rows

    def _cause_of(self, item: RawEvent) -> int:
        """The newest event that explains this one: a copy its fork, a hit its publication, a free its sequence's end."""
        causes, sequence = self._causes, item.seq_id
        if item.kind in ("copy", "fork"):
            return max(causes.get(("fork", sequence), -1), causes.get(("fork", getattr(item, "other", -1)), -1))
        if item.kind in ("free", "swap_out"):
            return max(causes.get((kind, sequence), -1) for kind in _ENDS)
        if item.kind == "cache_hit" and isinstance(item, BlockEvent):
            return causes.get(("publish", -2 - item.block), -1)
        if item.kind in ("swap_in", "admit", "rejoin"):
            return causes.get(("preempt", sequence), -1)
        return -1

    def _queues(self) -> Queues:
        scheduler = self._scheduler
        running = tuple(scheduler.batch.seq_id[scheduler.order()].tolist())
        first = nsmallest(MAX_WAITING_SHOWN, scheduler.waiting, key=scheduler.service_key)
        waiting = tuple(s.seq_id for r in first for s in r.alive)
        swapped = tuple(s.seq_id for r in scheduler.swapped for s in r.alive)
        return Queues(running, waiting, swapped)

    def _stats(self, plan: StepPlan | None, elapsed: int) -> Stats:
        """Without the gauges that the fold finds."""
        scheduler = self._scheduler
        counters = scheduler.counters
        return pool_stats(scheduler.manager.usage(), scheduler.block_size)._replace(
            num_tokens=plan.num_tokens if plan is not None else 0,
            num_drawn=len(plan.draw_rows) if plan is not None else 0,
            copies=counters.copies,
            hit_tokens=counters.hit_tokens,
            queried_tokens=counters.queried_tokens,
            preemptions=counters.preemptions,
            swaps=counters.swaps,
            generated_tokens=counters.generated_tokens,
            elapsed_ns=elapsed,
            num_waiting=len(scheduler.waiting),
        )

    # ---- what there was before

    def _engine_as_delta(self) -> StepDelta:
        """A delta that leads from nothing to what the engine holds. What its cache could find is not known before it is published anew."""
        scheduler = self._scheduler
        alive = [sequence for request in scheduler.requests.values() for sequence in request.alive]
        tables, host_tables = tables_of(scheduler.manager, (sequence.seq_id for sequence in alive))
        found = events_between(Snapshot(), tables, host_tables)
        rows = [(s.seq_id, s.num_computed, 0, len(s.token_ids)) for s in alive]
        progress = progress_of(rows, [token for s in alive for token in s.token_ids])
        return StepDelta(
            step=self._step - 1,
            t_ns=self._clock(),
            events=tuple(Event(-1, kind, -1, *rest) for kind, *rest in found),
            sequences=tuple(map(self._patch, alive)),
            progress=progress,
            token_bytes=self._new_token_bytes(progress),
            queues=self._queues(),
            stats=self._stats(None, 0),
        )


def _only_grows(request: Request) -> bool:
    """Whether its sequences change by a token at a time and nothing else, from now on to their ends."""
    params = request.params
    if params.logprobs is not None or params.best_of is not None or params.beam_width is not None:
        return False
    return request.forked or params.num_sequences == 1


def _as_delta(state: Snapshot, next_event: int) -> StepDelta:
    """A delta that leads from nothing to a state: for a listener that comes later."""
    found = events_between(Snapshot(), state.tables, state.host_tables)
    cached = np.flatnonzero(state.device.flags & FLAG_CACHED).tolist()
    found += [("publish", -1, block, -1, -1) for block in cached]
    alive = [s for s in state.sequences.values() if s.alive]
    rows = [(s.sequence, s.num_computed, 0, len(s.token_ids)) for s in alive]
    return StepDelta(
        step=state.step,
        t_ns=state.t_ns,
        events=tuple(Event(next_event + i, kind, -1, *rest) for i, (kind, *rest) in enumerate(found)),
        sequences=tuple(s.patch() for s in alive),
        progress=progress_of(rows, [token for s in alive for token in s.token_ids]),
        token_bytes=dict(state.token_bytes),
        queues=state.queues,
        stats=state.stats,
    )
