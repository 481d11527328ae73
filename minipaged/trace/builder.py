"""Turns what an engine did in one step into a StepDelta for whoever listens. With nobody listening a step costs one test.

It reads the scheduler's events, the block tables of the sequences they name and the batch's columns; it changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from heapq import nsmallest

from minipaged.memory.types import BlockEvent
from minipaged.scheduling.plan import StepPlan
from minipaged.scheduling.records import SchedulerEvent
from minipaged.scheduling.request import Request, RequestOutput, Sequence
from minipaged.scheduling.runtime_settings import SettingChange
from minipaged.scheduling.scheduler import Scheduler
from minipaged.text.detokenizer import TextCodec
from minipaged.trace.plain_decodes import PlainDecodes, Told
from minipaged.trace.pool_view import PoolView
from minipaged.trace.records import Event, Queues, SequencePatch, Stats, StepDelta
from minipaged.trace.rows import EventRows, SequenceRows

Listener = Callable[[StepDelta], None]
MAX_WAITING_SHOWN = 64  # sequences of the waiting queue that a delta names; Stats counts them all
_TABLE_KEPT = frozenset({"publish", "evict", "submit"})  # events that change the table of no sequence
_ENDS = frozenset({"finish", "abort", "prune", "preempt"})


class TraceBuilder:
    """The trace of one engine. `subscribe` takes a listener; it is called once a step, in the engine's thread."""

    def __init__(self, scheduler: Scheduler, codec: TextCodec | None, clock: Callable[[], int]) -> None:
        self._scheduler = scheduler
        self._codec = codec
        self._clock = clock
        self._listeners: list[Listener] = []
        self._began = 0
        self._step = 0
        self._next_event = 0
        self._changes: list[SettingChange] = []
        self._pool = PoolView(scheduler)
        self._plain = PlainDecodes(scheduler, codec)
        self._shown: dict[int, Told] = {}  # already told, of the sequences that `_plain` does not know
        self._ended: set[int] = set()  # ended and told, of requests that have not ended
        self._causes: dict[tuple[str, int], int] = {}  # (kind, sequence or block) -> newest event of that kind
        self._newcomer = False

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Call `listener` with the delta of every step from the next on; its first delta tells all there is. Returns the way out."""
        self._listeners.append(listener)
        self._newcomer = True
        return lambda: self._listeners.remove(listener)

    def begin(self) -> None:
        """A step begins."""
        if self._listeners:
            self._began = self._clock()

    def note_change(self, change: SettingChange) -> None:
        """A setting was changed."""
        self._changes.append(change)

    def publish(self, plan: StepPlan | None, outputs: list[RequestOutput]) -> None:
        """A step is done: tell the listeners."""
        raw = self._scheduler.take_events()
        if not self._listeners:
            self._changes.clear()
            return
        delta = self._delta(plan, outputs, raw)
        for listener in list(self._listeners):
            listener(delta)

    def _delta(
        self, plan: StepPlan | None, outputs: list[RequestOutput], raw: list[SchedulerEvent | BlockEvent]
    ) -> StepDelta:
        scheduler = self._scheduler
        if self._newcomer:
            self._shown.clear()
            self._plain.clear()
            self._pool.forget()
        sequences = self._singled_out(plan, outputs, raw)
        named = {event.seq_id for event in raw if event.seq_id >= 0 and event.kind not in _TABLE_KEPT}
        if self._newcomer:
            self._newcomer = False
            named |= {s.seq_id for r in scheduler.requests.values() for s in r.alive}
        for sequence in sequences.values():
            self._single_out(sequence)
        plain, others = self._plain.take(plan)
        for sequence in others:
            self._single_out(sequence)
            sequences[sequence.seq_id] = sequence
        tables, dirty = self._pool.update_tables(named)
        blocks = self._pool.patch(plan, raw, dirty)
        patches = SequenceRows(tuple(self._sequence_patch(s) for s in sequences.values()), plain)
        events = self._events(raw, plan)
        now = self._clock()
        delta = StepDelta(
            step=self._step,
            t_ns=now,
            events=events,
            blocks=blocks,
            tables=tables,
            sequences=patches,
            queues=self._queues(),
            stats=self._stats(plan, now - self._began),
        )
        self._step += 1
        self._forget_ended(sequences.values())
        return delta

    def _forget_ended(self, told: Iterable[Sequence]) -> None:
        """What has ended is told once; it is remembered as long as a sibling of it may be told of."""
        for sequence in told:
            if sequence.finished:
                self._shown.pop(sequence.seq_id, None)
                self._ended.add(sequence.seq_id)
                if sequence.request.finished:
                    self._ended.difference_update(s.seq_id for s in sequence.request.sequences)

    # ---- sequences

    def _singled_out(
        self, plan: StepPlan | None, outputs: list[RequestOutput], raw: Iterable[SchedulerEvent | BlockEvent]
    ) -> dict[int, Sequence]:
        """The sequences that changed, or may have, otherwise than plain decodes do."""
        scheduler, batch, plain = self._scheduler, self._scheduler.batch, self._plain.requests
        changed: dict[int, Sequence] = {}
        requests: dict[int, Request] = {
            output.request_id: output.request for output in outputs if output.request not in plain
        }
        if self._newcomer:
            requests.update(scheduler.requests)
            self._ended.clear()
        for event in raw:
            if isinstance(event, SchedulerEvent) and event.sequence is not None:
                changed[event.seq_id] = event.sequence
        for request in requests.values():
            changed.update((s.seq_id, s) for s in request.sequences if s.seq_id not in self._ended)
        if plan is not None:
            for slot in plan.slots[~self._plain.is_known(plan.slots)].tolist():
                sequence = batch.sequences[slot]
                if sequence is not None:
                    changed.setdefault(sequence.seq_id, sequence)
        return changed

    def _single_out(self, sequence: Sequence) -> None:
        """This step tells of it as `_sequence_patch` does."""
        told = self._plain.forget(sequence)
        if told is not None:
            self._shown[sequence.seq_id] = told

    def _sequence_patch(self, sequence: Sequence) -> SequencePatch:
        request = sequence.request
        told = self._shown.get(sequence.seq_id)
        text = sequence.text
        state = sequence.text_state  # read with the text
        end = len(text) if state is None or sequence.finished else state.stable
        if told is None:
            tokens, added = tuple(sequence.token_ids), self._prompt_bytes(request) + text[:end].encode()
        else:
            tokens, added = tuple(sequence.token_ids[told[0] :]), text[told[1] : end].encode()
        now = len(sequence.token_ids), end
        if self._plain.learn(sequence, now):
            self._shown.pop(sequence.seq_id, None)
        else:
            self._shown[sequence.seq_id] = now
        reason, status = sequence.finish_reason, sequence.status.value
        if reason == "abort":
            status = "aborted"
        tracked = sequence.cumulative_logprob != 0.0
        return SequencePatch(
            sequence=sequence.seq_id,
            request=request.request_id,
            parent=sequence.parent,
            status=status,
            num_computed=sequence.num_computed,
            num_cached=sequence.num_cached,
            num_prompt=request.num_prompt,
            token_ids=tokens,
            text=added,
            score=sequence.cumulative_logprob if tracked else math.nan,
            finish_reason=reason,
        )

    def _prompt_bytes(self, request: Request) -> bytes:
        if request.prompt is not None:
            return request.prompt.encode("utf-8", "replace")
        if self._codec is None:
            return b""
        return b"".join(self._codec.token_bytes(token) for token in request.prompt_token_ids)

    # ---- events and gauges

    def _events(self, raw: list[SchedulerEvent | BlockEvent], plan: StepPlan | None) -> tuple[Event, ...] | EventRows:
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
        rows = EventRows(tuple(events), self._next_event, plan.seq_ids, plan.lengths)
        self._next_event += len(plan.seq_ids)
        return rows

    def _cause_of(self, item: SchedulerEvent | BlockEvent) -> int:
        """The newest event that explains this one: a copy its fork, a hit its publication, a free its sequence's end."""
        causes, sequence = self._causes, item.seq_id
        if item.kind in ("copy", "fork"):
            return max(causes.get(("fork", sequence), -1), causes.get(("fork", getattr(item, "other", -1)), -1))
        if item.kind in ("free", "swap_out"):
            return max(causes.get((kind, sequence), -1) for kind in _ENDS)
        if item.kind == "cache_hit" and isinstance(item, BlockEvent):
            return causes.get(("publish", -2 - item.block), -1)
        if item.kind == "swap_in":
            return causes.get(("preempt", sequence), -1)
        if item.kind == "admit":
            return causes.get(("preempt", sequence), -1)
        return -1

    def _queues(self) -> Queues:
        scheduler = self._scheduler
        running = tuple(scheduler.batch.seq_id[scheduler.order()].tolist())
        first = nsmallest(MAX_WAITING_SHOWN, scheduler.waiting, key=scheduler.rank)
        waiting = tuple(s.seq_id for r in first for s in r.alive)
        swapped = tuple(s.seq_id for r in scheduler.swapped for s in r.alive)
        return Queues(running, waiting, swapped)

    def _stats(self, plan: StepPlan | None, elapsed: int) -> Stats:
        scheduler = self._scheduler
        usage, counters = scheduler.manager.usage(), scheduler.counters
        return Stats(
            num_tokens=plan.num_tokens if plan is not None else 0,
            num_drawn=len(plan.draw_rows) if plan is not None else 0,
            total_blocks=usage.total,
            free_blocks=usage.free,
            cached_blocks=usage.cached,
            host_total=usage.host_total,
            host_free=usage.host_free,
            block_size=scheduler.block_size,
            token_slots=self._pool.token_slots,
            tail_slots=usage.referenced * scheduler.block_size - self._pool.token_slots,
            shared_saved_blocks=self._pool.shared_saved,
            copies=counters.copies,
            hit_tokens=counters.hit_tokens,
            queried_tokens=counters.queried_tokens,
            preemptions=counters.preemptions,
            swaps=counters.swaps,
            generated_tokens=counters.generated_tokens,
            elapsed_ns=elapsed,
            num_waiting=len(scheduler.waiting),
        )
