"""Turns what an engine did in one step into a StepDelta for whoever listens. With nobody listening a step costs one test.

It reads the scheduler's events, the block tables of the sequences they name and the batch's columns; it changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from heapq import nsmallest

import numpy as np

from minipaged.generation.detokenizer import TextCodec
from minipaged.memory.types import BlockEvent
from minipaged.scheduling.knobs import Turn
from minipaged.scheduling.plan import StepPlan
from minipaged.scheduling.records import SchedulerEvent
from minipaged.scheduling.request import Request, RequestOutput, Sequence, Status
from minipaged.scheduling.scheduler import Scheduler
from minipaged.trace.records import (
    FLAG_CACHED,
    FLAG_COPIED,
    FLAG_NULL,
    TIER_DEVICE,
    TIER_HOST,
    BlockPatch,
    Event,
    Queues,
    SequencePatch,
    Stats,
    StepDelta,
    TablePatch,
)

Listener = Callable[[StepDelta], None]
MAX_WAITING_SHOWN = 64  # sequences of the waiting queue that a delta names; Stats counts them all
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
        self._turns: list[Turn] = []
        self._pool = _PoolView(scheduler)
        self._shown: dict[int, tuple[int, int]] = {}  # sequence -> (tokens, characters of text) already told
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

    def note_turn(self, turn: Turn) -> None:
        """A knob was turned."""
        self._turns.append(turn)

    def publish(self, plan: StepPlan | None, outputs: list[RequestOutput]) -> None:
        """A step is done: tell the listeners."""
        raw = self._scheduler.take_events()
        if not self._listeners:
            self._turns.clear()
            return
        delta = self._delta(plan, outputs, raw)
        for listener in list(self._listeners):
            listener(delta)

    def _delta(
        self, plan: StepPlan | None, outputs: list[RequestOutput], raw: list[SchedulerEvent | BlockEvent]
    ) -> StepDelta:
        scheduler = self._scheduler
        sequences = self._changed_sequences(plan, outputs, raw)
        named = {event.seq_id for event in raw if event.seq_id >= 0}
        if self._newcomer:
            self._newcomer = False
            self._shown.clear()
            self._pool.forget()
            named |= {s.seq_id for r in scheduler.requests.values() for s in r.alive}
        tables, dirty = self._pool.update_tables(named, sequences)
        blocks = self._pool.patch(plan, raw, dirty)
        patches = tuple(self._sequence_patch(s) for s in sequences.values())
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
            if sequence.status is Status.FINISHED:
                self._shown.pop(sequence.seq_id, None)
                self._ended.add(sequence.seq_id)
                if sequence.request.finished:
                    self._ended.difference_update(s.seq_id for s in sequence.request.sequences)

    # ---- sequences

    def _changed_sequences(
        self, plan: StepPlan | None, outputs: list[RequestOutput], raw: Iterable[SchedulerEvent | BlockEvent]
    ) -> dict[int, Sequence]:
        scheduler, batch = self._scheduler, self._scheduler.batch
        changed: dict[int, Sequence] = {}
        requests: dict[int, Request] = {output.request_id: output.request for output in outputs}
        if self._newcomer:
            requests.update(scheduler.requests)
            self._ended.clear()
        for event in raw:
            if isinstance(event, SchedulerEvent) and event.sequence is not None:
                changed[event.seq_id] = event.sequence
        for request in requests.values():
            changed.update((s.seq_id, s) for s in request.sequences if s.seq_id not in self._ended)
        if plan is not None:
            for slot in plan.slots.tolist():
                sequence = batch.sequences[slot]
                if sequence is not None:
                    changed.setdefault(sequence.seq_id, sequence)
        return changed

    def _sequence_patch(self, sequence: Sequence) -> SequencePatch:
        request = sequence.request
        told = self._shown.get(sequence.seq_id)
        text = sequence.text
        state = sequence.text_state  # read with the text
        end = len(text) if state is None or sequence.status is Status.FINISHED else state.stable
        if told is None:
            tokens, added = tuple(sequence.token_ids), self._prompt_bytes(request) + text[:end].encode()
        else:
            tokens, added = tuple(sequence.token_ids[told[0] :]), text[told[1] : end].encode()
        self._shown[sequence.seq_id] = (len(sequence.token_ids), end)
        slot = sequence.slot
        computed = int(self._scheduler.batch.computed[slot]) if slot >= 0 else sequence.computed
        reason, status = sequence.finish_reason, sequence.status.value
        if reason == "abort":
            status = "aborted"
        tracked = sequence.cumulative_logprob != 0.0
        return SequencePatch(
            sequence=sequence.seq_id,
            request=request.request_id,
            parent=sequence.parent,
            status=status,
            num_computed=computed,
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

    def _events(self, raw: list[SchedulerEvent | BlockEvent], plan: StepPlan | None) -> tuple[Event, ...]:
        events: list[Event] = []
        for turn in self._turns:
            events.append(Event(self._next_event, "knob", -1, -1, -1, turn.knob, turn.amount))
            self._next_event += 1
        self._turns.clear()
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
        if plan is not None:
            for seq_id, length in zip(plan.seq_ids.tolist(), plan.lengths.tolist(), strict=True):
                events.append(Event(self._next_event, "append", -1, seq_id, -1, -1, length))
                self._next_event += 1
        if len(self._causes) > 100_000:  # causes are for the recent past
            self._causes = dict(list(self._causes.items())[-50_000:])
        return tuple(events)

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
        running = tuple(s.seq_id for r in scheduler.running for s in r.alive)
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


class _PoolView:
    """Which sequences hold which blocks, and how full each block is, kept up to date from table differences."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        usage = scheduler.manager.usage()
        self._size = scheduler.block_size
        self._fill = np.zeros(usage.total, np.int32)
        self._held = np.zeros(usage.total, bool)
        self._holders: dict[int, list[int]] = {}  # device block -> sequences, earliest first
        self._tables: dict[int, tuple[int, ...]] = {}
        self._host_tables: dict[int, tuple[int, ...]] = {}
        self._cached: set[int] = set()
        self._copied: set[int] = set()
        self._entries = 0
        self._everything = True

    @property
    def token_slots(self) -> int:
        """Device slots that hold a live token's keys and values, each physical slot once."""
        return int(self._fill[self._held].sum())

    @property
    def shared_saved(self) -> int:
        """Table entries less distinct blocks."""
        return self._entries - len(self._holders)

    def forget(self) -> None:
        """The next patch tells every block again."""
        self._tables.clear()
        self._host_tables.clear()
        self._holders.clear()
        self._held[:] = False
        self._fill[:] = 0
        self._entries = 0
        self._everything = True

    def update_tables(self, named: set[int], sequences: dict[int, Sequence]) -> tuple[tuple[TablePatch, ...], set[int]]:
        """Compare the block tables of these sequences with what was told before. Returns the patches and the blocks concerned."""
        manager = self._scheduler.manager
        patches: list[TablePatch] = []
        dirty: set[int] = set()
        for seq_id in sorted(named):
            new, new_host = self._current(manager.table, seq_id), self._current(manager.host_table, seq_id)
            old, old_host = self._tables.get(seq_id, ()), self._host_tables.get(seq_id, ())
            if new != old:
                start = _first_difference(old, new)
                patches.append(TablePatch(seq_id, 0, start, new[start:]))
                self._move(seq_id, old[start:], new[start:], dirty)
                _store(self._tables, seq_id, new)
            if new_host != old_host:
                start = _first_difference(old_host, new_host)
                patches.append(TablePatch(seq_id, 0, start, new_host[start:], TIER_HOST))
                _store(self._host_tables, seq_id, new_host)
        return tuple(patches), dirty

    @staticmethod
    def _current(read: Callable[[int], tuple[int, ...]], seq_id: int) -> tuple[int, ...]:
        try:
            return read(seq_id)
        except KeyError:
            return ()

    def _move(self, seq_id: int, gone: tuple[int, ...], come: tuple[int, ...], dirty: set[int]) -> None:
        for block in gone:
            if block == 0:
                continue
            holders = self._holders[block]
            holders.remove(seq_id)
            if not holders:
                del self._holders[block]
                self._held[block] = False
            dirty.add(block)
        for block in come:
            if block:
                self._holders.setdefault(block, []).append(seq_id)
                self._held[block] = True
                dirty.add(block)
        self._entries += sum(map(bool, come)) - sum(map(bool, gone))

    def patch(self, plan: StepPlan | None, raw: list[SchedulerEvent | BlockEvent], dirty: set[int]) -> BlockPatch:
        """The blocks that changed, as columns."""
        dirty |= self._copied
        self._copied = set()
        for event in raw:
            if not isinstance(event, BlockEvent):
                continue
            if event.tier == "device" and event.block > 0:
                dirty.add(event.block)
            if event.kind == "publish":
                self._cached.add(event.block)
            elif event.kind == "evict":
                self._cached.discard(event.block)
        if plan is not None:
            self._note_plan(plan, dirty)
        if self._everything:
            self._everything = False
            dirty |= set(range(len(self._fill)))
        ids = np.array(sorted(dirty), np.int32)
        return self._columns(ids)

    def _note_plan(self, plan: StepPlan, dirty: set[int]) -> None:
        for _, destination in plan.copies:
            self._copied.add(destination)
            dirty.add(destination)
        size, tables = self._size, self._tables
        for seq_id, start, length in zip(
            plan.seq_ids.tolist(), plan.starts.tolist(), plan.lengths.tolist(), strict=True
        ):
            table = tables.get(seq_id, ())
            dirty.update(block for block in table[start // size : (start + length - 1) // size + 1] if block)

    def _columns(self, ids: np.ndarray) -> BlockPatch:
        n, count = len(ids), self._scheduler.manager.ref_count
        owners, counts, fills, marks = [-1] * n, [0] * n, [0] * n, [0] * n
        for i, block in enumerate(ids.tolist()):
            holders = self._holders.get(block)
            if holders:
                owners[i], counts[i] = holders[0], count(block)
            if block in self._cached:
                marks[i], fills[i] = FLAG_CACHED, self._size
            elif holders:
                fills[i] = max([self._fill_of(seq_id, block) for seq_id in holders])
            if block in self._copied:
                marks[i] |= FLAG_COPIED
        if n and ids[0] == 0:
            marks[0] |= FLAG_NULL
        owner, refs, fill = (np.array(column, np.int32) for column in (owners, counts, fills))
        self._fill[ids] = fill
        flags, tier = np.array(marks, np.uint8), np.full(n, TIER_DEVICE, np.uint8)
        return BlockPatch(ids, owner, refs, fill, flags, tier, np.zeros(n, np.int32))

    def _fill_of(self, seq_id: int, block: int) -> int:
        """Slots of the block that this sequence has written."""
        sequence = self._scheduler.sequences.get(seq_id)
        if sequence is None:
            return 0
        slot = sequence.slot
        computed = int(self._scheduler.batch.computed[slot]) if slot >= 0 else sequence.computed
        table = self._tables[seq_id]
        last = (computed - 1) // self._size
        if computed and last < len(table) and table[last] == block:
            return computed - last * self._size
        index = table.index(block)
        return max(0, min(self._size, computed - index * self._size))


def _first_difference(old: tuple[int, ...], new: tuple[int, ...]) -> int:
    n = min(len(old), len(new))
    return next((i for i in range(n) if old[i] != new[i]), n)


def _store(tables: dict[int, tuple[int, ...]], seq_id: int, table: tuple[int, ...]) -> None:
    if table:
        tables[seq_id] = table
    else:
        tables.pop(seq_id, None)
