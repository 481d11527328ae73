"""Who is seated in the batch, who waits for a seat, and the memory that each of them holds.

Requests come in, from the queue or back from the host, and leave again when the pool runs dry or when they end; their sequences fork.
Knows sequences, queues and the block manager; knows nothing of which step does what (that is scheduler.py).
"""

from __future__ import annotations

from bisect import insort

import numpy as np
import numpy.typing as npt

from minipaged.config import EngineConfig
from minipaged.memory.block_manager import BlockManager
from minipaged.memory.types import Admission, Allocation, BlockEvent
from minipaged.scheduling import groups
from minipaged.scheduling.batch import Batch
from minipaged.scheduling.policies import PreemptionCost, may_join, rank_of, wants_swap
from minipaged.scheduling.queue import RequestQueue
from minipaged.scheduling.records import Counters, Draft, SchedulerEvent
from minipaged.scheduling.request import Request, Sequence, Status


class Residents:
    """The requests that have not ended: `running` (seated, by rank), `waiting` and `swapped`.

    config: the limits; manager: the block tables; block_size: as the manager's; cost: what a swap and a recompute take, for
    `preemption="auto"`.
    """

    def __init__(
        self, config: EngineConfig, manager: BlockManager, block_size: int, cost: PreemptionCost | None = None
    ) -> None:
        self.config = config
        self.manager = manager
        self.block_size = block_size
        self.cost = cost or PreemptionCost()
        self.batch = Batch(config.max_num_seqs)
        self.counters = Counters()
        self.running: list[Request] = []  # by rank
        self.rank = rank_of(config.policy)
        self.waiting = RequestQueue(self.rank)
        self.swapped = RequestQueue(self.rank)
        self.requests: dict[int, Request] = {}  # all that have not ended
        self.sequences: dict[int, Sequence] = {}  # theirs, those that have ended left out
        self._order: npt.NDArray[np.int64] | None = np.zeros(
            0, np.int64
        )  # running slots in serving order; None: out of date
        self._num_groups = 0
        self._launched = self._settled = 0  # steps that were launched, and of these those that were committed
        self._next_seq_id = 0
        self._arrivals = 0
        self._events: list[SchedulerEvent | BlockEvent] = []

    def configure(self, config: EngineConfig) -> None:
        """Other choices from the next step on: order, preemption, batching. The limits stay: buffers were made for them."""
        self.config = config
        self.rank = rank = rank_of(config.policy)
        self.running.sort(key=rank)
        self.waiting, self.swapped = RequestQueue(rank, self.waiting), RequestQueue(rank, self.swapped)
        self._order = None

    # ---- room

    def _extend(self, draft: Draft, slots: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]) -> int:
        """Room for positions below ends[i] of slots[i], promised to the end of its block: the manager is asked once a block, not once
        a token. Returns how many got it: the first for whom there is none ends the round.
        """
        batch, append = self.batch, self.manager.append
        goals = -(-ends // self.block_size) * self.block_size
        allocations: list[Allocation] = []
        for seq_id, count in zip(batch.seq_id[slots].tolist(), (goals - batch.room[slots]).tolist(), strict=True):
            allocation = append(seq_id, count)
            if allocation is None:
                break
            allocations.append(allocation)
        served = slots[: len(allocations)]
        batch.room[served] = goals[: len(allocations)]
        self._note_allocations(draft, served, allocations)
        return len(allocations)

    def _note_allocations(self, draft: Draft, slots: npt.NDArray[np.int64], allocations: list[Allocation]) -> None:
        """Take what the manager gave to each of these slots into the step and the tables."""
        batch = self.batch
        blocks = [new[0] for _, new, copies in allocations if len(new) == 1 and not copies]
        if len(blocks) == len(allocations):  # as in a step of plain decodes
            batch.extend_tables(slots, blocks)
            return
        for slot, (_, new_blocks, copies) in zip(slots.tolist(), allocations, strict=True):
            if copies:
                seq_id = int(batch.seq_id[slot])
                draft.copies[seq_id] = draft.copies.get(seq_id, ()) + copies
                batch.set_table(slot, self.manager.table(seq_id))
            else:
                batch.extend_table(slot, new_blocks)

    def mark(self, sequence: Sequence, upto: int) -> None:
        """Tell the manager that the KV of token_ids[:upto] is written."""
        marked = int(self.batch.marked[sequence.slot])
        if upto > marked:
            self.manager.mark_computed(sequence.seq_id, sequence.token_ids[marked:upto])
            self.batch.marked[sequence.slot] = upto

    # ---- coming in

    def _resume_and_admit(self, draft: Draft) -> None:
        """Swapped requests return before new ones start (under priority the two are one queue); the head blocks the line."""
        while draft.budget > 0:
            swapped, waiting = self.swapped.peek(), self.waiting.peek()
            if swapped is None and waiting is None:
                return
            swapped_first = swapped is not None and (
                waiting is None or self.config.policy == "fcfs" or self.rank(swapped) < self.rank(waiting)
            )
            if swapped_first and swapped is not None:
                if not self._resume(draft, swapped):
                    return
            elif waiting is None or not self._admit(draft, waiting):
                return

    def _fits_batch(self, draft: Draft, request: Request) -> bool:
        """Whether slots and token budget are left for every sequence of the request, and no step that has it is in flight."""
        alive = request.alive
        width = request.params.num_sequences if not request.forked else len(alive)
        return (
            width <= self.batch.num_free
            and len(alive) <= draft.budget
            and all(s.left_at <= self._settled for s in alive)
        )

    def _resume(self, draft: Draft, request: Request) -> bool:
        if not self._fits_batch(draft, request):
            return False
        alive = request.alive
        pairs = self.manager.swap_in([s.seq_id for s in alive])
        if pairs is None:
            return False
        draft.swap_ins.extend(pairs)
        self.swapped.pop()
        self._seat(request, [s.computed for s in alive])
        self._take_tokens(draft, alive)
        return True

    def _admit(self, draft: Draft, request: Request) -> bool:
        if not self._fits_batch(draft, request) or not may_join(self.config.batching, request, self.running):
            return False
        alive, params = request.alive, request.params
        read_cache = params.prompt_logprobs is None
        share = draft.budget - len(alive) + 1  # at least one token stays for each of the others
        ends: list[int] = []
        for sequence in alive:
            n = len(sequence.token_ids)
            hit = self.manager.match_prefix(sequence.token_ids, salt=params.cache_salt) if read_cache else 0
            chunk = min(n - hit, share)
            share -= chunk - 1
            ends.append(hit + chunk)
        tokens = alive[0].token_ids if len(alive) == 1 and read_cache else None
        if (
            self.manager.can_admit(
                max(ends), num_sequences=len(alive), token_ids=tokens, salt=params.cache_salt if tokens else None
            )
            is not Admission.OK
        ):
            return False
        allocations: list[Allocation] = []
        for sequence, end in zip(alive, ends, strict=True):
            allocation = self.manager.allocate(
                sequence.seq_id,
                sequence.token_ids,
                num_tokens=end,
                salt=params.cache_salt,
                read_cache=read_cache,
            )
            if allocation is None:
                for done in alive[: len(allocations)]:
                    self.manager.free(done.seq_id)
                return False
            allocations.append(allocation)
        self.waiting.pop()
        self._count_hits(request, allocations)
        for sequence, allocation in zip(alive, allocations, strict=True):
            sequence.computed = sequence.marked = sequence.num_cached = allocation.cached_tokens
        self._seat(request, ends)
        self._take_tokens(draft, alive)
        return True

    def _count_hits(self, request: Request, allocations: list[Allocation]) -> None:
        for sequence, allocation in zip(request.alive, allocations, strict=True):
            if sequence.num_output:  # it ran before: what it finds are its own blocks
                self.counters.own_hit_tokens += allocation.cached_tokens
            else:
                self.counters.hit_tokens += allocation.cached_tokens
                self.counters.queried_tokens += len(sequence.token_ids)

    def _seat(self, request: Request, rooms: list[int]) -> None:
        alive = request.alive
        width = request.params.num_sequences if not request.forked else len(alive)
        slots = self.batch.reserve(width)
        request.slots.extend(slots[len(alive) :])
        seed = self.seed_of(request)
        for sequence, slot, room in zip(alive, slots, rooms, strict=False):
            sequence.status = Status.RUNNING
            self.batch.put(sequence, slot, room, seed)
            self.batch.set_table(slot, self.manager.table(sequence.seq_id))
            self.log("admit", sequence, sequence.computed)
        insort(self.running, request, key=self.rank)
        self._num_groups += request.params.num_sequences > 1
        self._order = None

    def _take_tokens(self, draft: Draft, alive: list[Sequence]) -> None:
        """Schedule what a returning or new request may compute now."""
        slots = np.array([s.slot for s in alive], np.int64)
        need = self.batch.total[slots] - self.batch.computed[slots]
        take = groups.lockstep(need, draft.budget)
        ends = self.batch.computed[slots] + take
        for i in np.flatnonzero(ends > self.batch.room[slots]).tolist():
            if not self._extend(draft, slots[i : i + 1], ends[i : i + 1]):
                take[i] = 0
        chosen = take > 0
        if chosen.any():
            draft.slots.append(slots[chosen])
            draft.takes.append(take[chosen])
            draft.budget -= int(take.sum())

    def fork(self, parent: Sequence, slot: int, index: int) -> Sequence:
        """A child that shares the parent's blocks and takes a reserved slot."""
        batch, request = self.batch, parent.request
        computed = int(batch.computed[parent.slot])
        self.mark(parent, computed)
        self.manager.truncate(parent.seq_id, computed)
        batch.room[parent.slot] = computed
        child = self.new_sequence(request, list(parent.token_ids), index=index, parent=parent.seq_id)
        child.cumulative_logprob = parent.cumulative_logprob
        child.logprobs = list(parent.logprobs)
        child.num_cached = parent.num_cached
        child.computed = child.marked = computed
        self.manager.fork(parent.seq_id, child.seq_id)
        child.status = Status.RUNNING
        request.sequences.append(child)
        batch.put(child, slot, computed, self.seed_of(request))
        batch.set_table(slot, self.manager.table(child.seq_id))
        self._order = None
        return child

    # ---- leaving

    def _preempt(self, draft: Draft, request: Request) -> None:
        """Take a request's blocks: to the host where that is wanted and possible, else to be computed anew."""
        draft.preempted = True
        self.counters.preemptions += 1
        alive = request.alive
        num_tokens = 0
        for sequence in alive:
            draft.copies.pop(sequence.seq_id, None)
            computed = int(self.batch.computed[sequence.slot])
            self.manager.truncate(sequence.seq_id, computed)
            num_tokens += computed
        ids = [s.seq_id for s in alive]
        pairs = None
        blocks = {block for i in ids for block in self.manager.table(i)}
        for sequence in alive:
            self.log("preempt", sequence, int(self.batch.computed[sequence.slot]))
        if wants_swap(self.config, self.cost, len(blocks), num_tokens):
            pairs = self.manager.swap_out(ids)
        for sequence in alive:
            self.unseat(sequence)
            if pairs is None:
                self.manager.free(sequence.seq_id)
                sequence.computed = sequence.marked = 0
                sequence.status = Status.WAITING
            else:
                sequence.status = Status.SWAPPED
        self.batch.give_back(request.slots)
        request.slots.clear()
        self._leave_running(request)
        if pairs is None:
            self.waiting.push(request)
        else:
            self.counters.swaps += 1
            draft.swap_outs.extend(pairs)
            self.swapped.push(request)

    def end(self, sequence: Sequence, reason: str) -> None:
        """A sequence has ended: its blocks, slot and place in the queues are free again."""
        request = sequence.request
        kind = {"abort": "abort", "pruned": "prune"}.get(reason, "finish")
        self.log(kind, sequence, sequence.num_output, reason)
        held = sequence.status in (Status.RUNNING, Status.SWAPPED)
        if sequence.slot >= 0:
            self.unseat(sequence)
        if held:
            self.manager.free(sequence.seq_id)
        sequence.status = Status.FINISHED
        sequence.finish_reason = reason
        del self.sequences[sequence.seq_id]
        if request.finished:
            self._retire(request)

    def _retire(self, request: Request) -> None:
        for queue in (self.waiting, self.swapped):
            if request in queue:
                queue.remove(request)
        self.batch.give_back(request.slots)
        request.slots.clear()
        if self.requests.pop(request.request_id, None) is not None:
            self._leave_running(request)

    def _leave_running(self, request: Request) -> None:
        if request in self.running:
            self.running.remove(request)
            self._num_groups -= request.params.num_sequences > 1
            self._order = None

    def unseat(self, sequence: Sequence) -> None:
        """Take a sequence out of the batch; what it was doing is kept in the sequence."""
        self.batch.remove(sequence)
        sequence.left_at = self._launched
        self._order = None

    # ---- who they are

    def new_sequence(self, request: Request, token_ids: list[int], *, index: int = 0, parent: int = -1) -> Sequence:
        """A sequence with the next number."""
        sequence = Sequence(self._next_seq_id, request, token_ids, index=index, parent=parent)
        self._next_seq_id += 1
        self.sequences[sequence.seq_id] = sequence
        return sequence

    def seed_of(self, request: Request) -> int:
        """The request's own seed, or one of its arrival under the engine's seed."""
        if request.params.seed is not None:
            return request.params.seed
        return (self.config.seed * 0x9E3779B1 + request.arrival * 0x85EBCA77) % 2**63

    def order(self) -> npt.NDArray[np.int64]:
        """The running slots in serving order."""
        if self._order is None:
            self._order = np.array([s.slot for r in self.running for s in r.sequences if s.slot >= 0], np.int64)
        return self._order

    # ---- what happened

    def log(self, kind: str, sequence: Sequence, amount: int, detail: str = "") -> None:
        """Note an event after the block events that led to it."""
        self._events.extend(self.manager.take_events())
        self._events.append(SchedulerEvent(kind, sequence.seq_id, amount, detail, sequence))

    def take_events(self) -> list[SchedulerEvent | BlockEvent]:
        """What happened since the last call, in causal order."""
        events, self._events = self._events, []
        events.extend(self.manager.take_events())
        return events
