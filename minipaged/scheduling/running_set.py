"""The requests that have not ended: those that run, with the memory and the slots that they hold, and those that wait.

The scheduler owns one and decides. The running set does what was decided: it reserves memory, and lets requests enter the batch, fork,
leave it and end.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from minipaged.config import EngineConfig
from minipaged.memory.retention import KEEP_ALL, Retention
from minipaged.memory.types import Allocation, BlockEvent
from minipaged.scheduling.batch import Batch
from minipaged.scheduling.plan import IntArray
from minipaged.scheduling.policies import PreemptionCost, RequestQueue, ServiceKey, service_key_of, wants_swap
from minipaged.scheduling.request import Request, Sequence, Status
from minipaged.scheduling.step_builder import StepBuilder

if TYPE_CHECKING:
    from minipaged.memory.block_manager import BlockManager

Slots = npt.NDArray[np.int64]
SwapPairs = list[tuple[int, int]]


class SchedulerEvent(NamedTuple):
    """A thing that happened to a request: submit admit rejoin preempt prune finish refuse abort. `amount` is tokens; `detail` a word.

    rejoin: after a recompute, a further sequence of a request that runs already runs again, beside the one it is forked from.
    """

    kind: str
    seq_id: int
    amount: int
    detail: str
    sequence: Sequence | None


@dataclass
class Counters:
    """What happened since the start."""

    copies: int = 0
    hit_tokens: int = 0
    queried_tokens: int = 0
    host_hit_tokens: int = 0  # of those found, the resumed requests' own too: brought back from the host's cache
    disk_hit_tokens: int = 0  # read from the disk into the host's cache
    spilled_blocks: int = 0  # that went to it
    own_hit_tokens: int = 0  # a resumed request's hits on blocks it left behind; not in hit_tokens
    preemptions: int = 0
    swaps: int = 0
    generated_tokens: int = 0  # draws that were taken in; one for a sequence that has ended meanwhile is not
    computed_tokens: int = 0


class RunningSet:
    """`running` requests (in the batch, in order of service), `waiting` ones and `swapped` ones.

    config: the limits; manager: the block tables; block_size: as the manager's; cost: what a swap and a recompute take, for
    `preemption="auto"`.
    """

    def __init__(
        self, config: EngineConfig, manager: BlockManager, block_size: int, cost: PreemptionCost | None = None
    ) -> None:
        self.config = config
        self.manager = manager
        self.block_size = block_size
        self.retention: Retention = getattr(manager, "retention", KEEP_ALL)  # other systems' managers keep all
        self.cost = cost or PreemptionCost()
        # The first stage of a pipeline computes the next step before the last one has drawn this step's tokens.
        self.batch = Batch(
            config.max_num_seqs,
            results_come_late=config.pipeline_parallel > 1,
            retention=self.retention,
            block_size=block_size,
        )
        self.counters = Counters()
        self.running: list[Request] = []  # in order of service
        self._service_key = service_key_of(config.policy)
        self.waiting = RequestQueue(self._service_key)
        self.swapped = RequestQueue(self._service_key)
        self.requests: dict[int, Request] = {}  # all that have not ended
        self.sequences: dict[int, Sequence] = {}  # theirs, those that have ended left out
        self.num_groups = 0  # running requests with several sequences
        self.regrouping: list[Request] = []  # running ones of which some sequences are still to be forked again
        self.steps_launched = self.steps_committed = 0
        self._order: Slots | None = np.zeros(0, np.int64)  # running slots in serving order; None: out of date
        self._next_seq_id = 0
        self._arrivals = 0
        self._events: list[SchedulerEvent | BlockEvent] = []

    def service_key(self, request: Request) -> ServiceKey:
        """The smaller is served first."""
        return self._service_key(request)

    def configure(self, config: EngineConfig) -> None:
        """Other choices from the next step on: order, preemption, batching. The limits stay: buffers were made for them."""
        self.config = config
        self._service_key = service_key_of(config.policy)
        self.running.sort(key=self._service_key)
        self.waiting.reorder(self._service_key)
        self.swapped.reorder(self._service_key)
        self._order = None

    def order(self) -> Slots:
        """The running slots in serving order."""
        if self._order is None:
            self._order = np.array([s.slot for r in self.running for s in r.sequences if s.slot >= 0], np.int64)
        return self._order

    # ---- who they are

    def enqueue(self, request: Request) -> None:
        """A new request waits."""
        request.arrival = self._arrivals
        self._arrivals += 1
        request.sequences.append(self.new_sequence(request, list(request.prompt_token_ids)))
        self.requests[request.request_id] = request
        self.waiting.push(request)
        self.log("submit", request.sequences[0], request.num_prompt)

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

    # ---- memory

    def reserve(self, step: StepBuilder, slots: Slots, ends: IntArray) -> int:
        """Reserve memory for positions below ends[i] of slots[i], up to the end of a block: the manager is asked once a block, not once
        a token. Returns how many got it: the first for whom there is none ends the round.
        """
        batch, append = self.batch, self.manager.append
        gone = batch.num_left_out[slots]  # ends of blocks are counted without them
        goals = -(-(ends - gone) // self.block_size) * self.block_size + gone
        allocations: list[Allocation] = []
        for seq_id, count in zip(
            batch.seq_id[slots].tolist(), (goals - batch.num_reserved[slots]).tolist(), strict=True
        ):
            allocation = append(seq_id, count)
            if allocation is None:
                break
            allocations.append(allocation)
        # [num_computed, num_reserved) of these is theirs alone now, also the part that this step does not write yet.
        served = slots[: len(allocations)]
        batch.num_reserved[served] = goals[: len(allocations)]
        self._note_allocations(step, served, allocations)
        return len(allocations)

    def _note_allocations(self, step: StepBuilder, slots: Slots, allocations: list[Allocation]) -> None:
        """Take what the manager gave to each of these slots into the step and the tables."""
        batch = self.batch
        blocks = [new[0] for _, new, copies in allocations if len(new) == 1 and not copies]
        if len(blocks) == len(allocations):  # as in a step of plain decodes
            batch.extend_tables(slots, blocks)
            return
        for slot, (_, new_blocks, copies) in zip(slots.tolist(), allocations, strict=True):
            if copies:
                seq_id = int(batch.seq_id[slot])
                step.add_copies(seq_id, copies)
                batch.set_table(slot, self.manager.table(seq_id))
            else:
                batch.extend_table(slot, new_blocks)

    def publish(self, sequence: Sequence, upto: int) -> None:
        """Give the manager token_ids[:upto]: their KV is written, or the step being planned writes it."""
        published = sequence.num_published
        if upto > published:
            self.manager.mark_computed(sequence.seq_id, sequence.token_ids[published:upto])
            self.batch.num_published[sequence.slot] = upto

    def publish_full_blocks(self, slots: Slots, ends: IntArray) -> None:
        """Publish the blocks of these running sequences that are full of known tokens below `ends`."""
        batch, size, mark = self.batch, self.block_size, self.manager.mark_computed
        # Tokens that a step in flight draws are not known, so they fill no block yet.
        full = np.minimum(ends, batch.num_tokens[slots]) // size * size
        rows = (full > batch.num_published[slots]).nonzero()[0]
        if not len(rows):
            return
        slots, full = slots[rows], full[rows]
        seq_ids, token_ids = batch.seq_id[slots].tolist(), batch.token_ids[slots].tolist()
        starts = batch.num_published[slots].tolist()
        for seq_id, tokens, start, end in zip(seq_ids, token_ids, starts, full.tolist(), strict=True):
            if seq_id >= 0:  # else it was sent away while the step was planned
                mark(seq_id, tokens[start:end])
        batch.num_published[slots] = full

    def release_spare(self) -> None:
        """Give back the blocks that no later step of the running sequences reads.

        A step in flight may read them still. That is safe: whoever gets them next writes in a later launch.
        """
        batch, size, slots = self.batch, self.block_size, self.order()
        if self.retention.heavy:
            self._release_compacted(slots)
            return
        front = self.retention.front(size)
        ends = self.retention.spare_until(batch.num_computed[slots], size)
        ends = np.minimum(ends, batch.num_published[slots] // size)  # the manager releases what it knows to be full
        starts = front + batch.num_left_out[slots] // size
        rows = (ends > starts).nonzero()[0]
        for slot, start, end in zip(slots[rows].tolist(), starts[rows].tolist(), ends[rows].tolist(), strict=True):
            sequence = batch.sequences[slot]
            if sequence is None:
                continue
            # After a recompute, others are still to be forked from it further back, and read on from there.
            forks = [s.forks_at // size * size for s in sequence.request.to_fork if s.forks_from is sequence]
            if forks:
                end = min(end, self.retention.spare_until(min(forks), size))
            if end > start:
                self.manager.release(sequence.seq_id, range(start, end))
                batch.release_entries(slot, front, end - start)

    def _release_compacted(self, slots: Slots) -> None:
        """Give back the blocks beyond the heavy hitters' budget of those whose prompt has been computed."""
        batch, most = self.batch, -(-self.retention.budget // self.block_size)
        for slot in slots[(batch.num_left_out[slots] > 0) & (batch.table_len[slots] > most)].tolist():
            sequence = batch.sequences[slot]
            if sequence is not None:
                self._keep_tokens(sequence, int(batch.num_left_out[slot]) + most * self.block_size)

    def _keep_tokens(self, sequence: Sequence, end: int) -> None:
        """Give back what a running sequence has reserved for positions from `end` on. The manager counts the tokens in its table."""
        batch, slot = self.batch, sequence.slot
        self.manager.truncate(sequence.seq_id, end - (int(batch.num_left_out[slot]) if self.retention.heavy else 0))
        batch.num_reserved[slot] = end
        batch.set_table(slot, self.manager.table(sequence.seq_id))

    # ---- heavy hitters: a sequence some of whose tokens have gone cannot be computed anew

    def can_stay(self, request: Request) -> bool:
        """Whether a request may be let in, since none that has been let in ever needs to be computed anew: the pool holds all of them to
        their ends, or the host does.
        """
        if self.retention.shares:
            return True
        others = [r for r in (*self.running, *self.swapped) if r is not request]
        most, usage = sum(map(self._most_blocks, (*others, request))), self.manager.usage()
        return most <= max(usage.total - usage.null, usage.host_total)

    def _most_blocks(self, request: Request) -> int:
        """Blocks that a request may still come to hold."""
        params, num_prompt = request.params, request.num_prompt
        longest = num_prompt + params.max_tokens
        if all(sequence.num_computed >= num_prompt for sequence in request.alive):
            num_prompt = min(num_prompt, self.retention.budget)
        return self.retention.most_blocks_of_request(
            num_prompt, longest - num_prompt, params.num_sequences, self.block_size
        )

    def can_leave(self, request: Request, step: StepBuilder) -> bool:
        """Whether a running request may be sent away: if not by recompute, then if the host has room for it, and no copy of its blocks is
        still to be made.
        """
        if self.retention.shares:
            return True
        if any(sequence.seq_id in step.copies for sequence in request.alive):
            return False
        blocks = {block for s in request.alive if s.slot >= 0 for block in self.manager.table(s.seq_id)}
        return len(blocks) <= self.manager.usage().host_free

    # ---- coming in

    def enter(self, request: Request, reserved: list[int]) -> None:
        """The request runs: its sequences get slots, and slots are kept for those that will be forked.

        reserved: positions of each sequence that have a place in its block table.
        """
        present = [s for s in request.alive if s.forks_from is None]
        slots = self.batch.take_slots(self.width(request))
        request.reserved_slots.extend(slots[len(present) :])
        seed = self.seed_of(request)
        for sequence, slot, num_reserved in zip(present, slots, reserved, strict=False):
            sequence.status = Status.RUNNING
            self.batch.put(sequence, slot, num_reserved, seed)
            self.batch.set_table(slot, self.manager.table(sequence.seq_id))
            self.log("admit", sequence, sequence.num_computed)
        if len(present) < len(request.alive):
            self.regrouping.append(request)
        insort(self.running, request, key=self._service_key)
        self.num_groups += request.params.num_sequences > 1
        self._order = None

    @staticmethod
    def width(request: Request) -> int:
        """Slots that the request needs to run: of all its sequences, those still to be forked included."""
        return len(request.alive) if request.forked else request.params.num_sequences

    def fork(self, parent: Sequence, index: int) -> Sequence:
        """A child that shares the parent's blocks and takes a slot that its request has reserved."""
        request = parent.request
        child = self.new_sequence(request, list(parent.token_ids), index=index, parent=parent.seq_id)
        child.cumulative_logprob = parent.cumulative_logprob
        child.logprobs = list(parent.logprobs)
        child.num_cached = parent.num_cached
        request.sequences.append(child)
        self._share_blocks(parent, child, parent.num_computed)
        return child

    def fork_again(self, request: Request) -> None:
        """A request that came back from a recompute as one sequence: fork those whose parents are where the tokens of both part."""
        for sequence in request.to_fork:
            parent = sequence.forks_from
            if parent is not None and parent.slot >= 0 and parent.num_computed >= sequence.forks_at:
                self._come_back(parent, sequence)
                sequence.forks_from = None
                self.log("rejoin", sequence, sequence.num_computed)
        if not request.to_fork and request in self.regrouping:
            self.regrouping.remove(request)

    def _come_back(self, parent: Sequence, sequence: Sequence) -> None:
        """Let `sequence` run again, sharing with `parent` what both agree on, and with the cache what that still has of it."""
        manager, params, size = self.manager, sequence.request.params, self.block_size
        shared = sequence.forks_at
        # Where the parent has computed more, its block at the end holds other tokens: only the full blocks before it are shared.
        if parent.num_computed > shared:
            shared = shared // size * size
        hit = manager.lookup(sequence.token_ids, salt=params.cache_salt)
        if params.prompt_logprobs is None and hit.num_tokens > shared:
            allocation = manager.allocate(
                sequence.seq_id, sequence.token_ids, num_tokens=hit.num_tokens, salt=params.cache_salt, hit=hit
            )
            common = shared // size
            if allocation is not None:
                if manager.table(sequence.seq_id)[:common] == manager.table(parent.seq_id)[:common]:
                    self.counters.own_hit_tokens += allocation.cached_tokens
                    self._run(sequence, allocation.cached_tokens)
                    return
                manager.free(sequence.seq_id)  # equal blocks that somebody else has made: the parent's are to be shared
        self._share_blocks(parent, sequence, shared)

    def _share_blocks(self, parent: Sequence, child: Sequence, num_tokens: int) -> None:
        """Let `child`, which holds nothing, run with the parent's blocks of its first `num_tokens` tokens."""
        # The manager forks a sequence whose reserved places are all computed, so: publish what is, give the rest back, fork.
        computed = parent.num_computed
        self.publish(parent, computed)
        self._keep_tokens(parent, computed)
        self.manager.fork(parent.seq_id, child.seq_id)
        if num_tokens < computed:
            self.manager.truncate(child.seq_id, num_tokens)
        self._run(child, num_tokens)

    def _run(self, sequence: Sequence, num_computed: int) -> None:
        """Give a sequence that has its blocks a slot that its request has reserved."""
        slot = sequence.request.reserved_slots.pop(0)
        sequence.restart(num_computed)
        sequence.status = Status.RUNNING
        self.batch.put(sequence, slot, num_computed, self.seed_of(sequence.request))
        self.batch.set_table(slot, self.manager.table(sequence.seq_id))
        self._order = None

    # ---- leaving

    def preempt(self, request: Request) -> SwapPairs | None:
        """Take a running request's memory and slots. Returns the swaps of its blocks to the host where that is wanted and possible;
        None: it is to be computed anew.
        """
        self.counters.preemptions += 1
        present = [s for s in request.alive if s.slot >= 0]
        # What this step reserved for it goes first: only computed tokens are worth a swap.
        for sequence in present:
            self._keep_tokens(sequence, sequence.num_computed)
        num_blocks = len({block for s in present for block in self.manager.table(s.seq_id)})
        num_tokens = sum(s.num_computed for s in present)
        for sequence in present:
            self.log("preempt", sequence, sequence.num_computed)
        pairs = None
        by_swap_alone = num_blocks > 0 and not self.retention.shares
        if by_swap_alone or (
            wants_swap(self.config, self.cost, num_blocks, num_tokens) and request not in self.regrouping
        ):
            pairs = self.manager.swap_out([s.seq_id for s in present])
        if pairs is None and by_swap_alone:
            raise RuntimeError(f"request {request.request_id} was sent away, and the host has no room for it")
        for sequence in present:
            self.remove(sequence)
            sequence.status = Status.WAITING if pairs is None else Status.SWAPPED
            if pairs is None:
                self.manager.free(sequence.seq_id)
                sequence.restart(0)
        self._return_reserved_slots(request)
        self._leave_running(request)
        if pairs is None:
            self.waiting.push(request)
        else:
            self.counters.swaps += 1
            self.swapped.push(request)
        return pairs

    def end(self, sequence: Sequence, reason: str) -> None:
        """A sequence has ended: its blocks, slot and place in the queues are free again."""
        request = sequence.request
        kind = {"abort": "abort", "pruned": "prune"}.get(reason, "finish")
        self.log(kind, sequence, sequence.num_output, reason)
        held = sequence.status in (Status.RUNNING, Status.SWAPPED)
        if sequence.slot >= 0:
            self.remove(sequence)
        # A step in flight may still write into these blocks. That is safe: whoever gets them next writes in a later launch.
        if held:
            self.manager.free(sequence.seq_id)
        sequence.finish_reason = reason  # first: who sees that it has ended may ask why
        sequence.status = Status.FINISHED
        del self.sequences[sequence.seq_id]
        request.prefix = None
        if request.finished:
            self._retire(request)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out of the batch; its blocks stay."""
        self.batch.remove(sequence)
        sequence.left_at = self.steps_launched
        self._order = None

    def hand_over_slot(self, sequence: Sequence) -> None:
        """Take a sequence out of the batch; its request keeps a slot for one that is to be forked."""
        self.remove(sequence)
        sequence.request.reserved_slots.extend(self.batch.take_slots(1))

    def _retire(self, request: Request) -> None:
        for queue in (self.waiting, self.swapped):
            if request in queue:
                queue.remove(request)
        self._return_reserved_slots(request)
        if self.requests.pop(request.request_id, None) is not None:
            self._leave_running(request)

    def _return_reserved_slots(self, request: Request) -> None:
        self.batch.return_slots(request.reserved_slots)
        request.reserved_slots.clear()

    def _leave_running(self, request: Request) -> None:
        if request in self.regrouping:
            self.regrouping.remove(request)
        if request in self.running:
            self.running.remove(request)
            self.num_groups -= request.params.num_sequences > 1
            self._order = None

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
