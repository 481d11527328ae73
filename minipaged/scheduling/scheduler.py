"""Who computes which tokens in the next step, and what the drawn tokens mean.

Every sequence only ever moves from `computed` towards `total`; a prompt chunk and a decode are the same thing. Running sequences
come first, in order of rank; when the pool runs dry, the last of them leaves. Knows sequences, budgets and the block manager; knows
nothing of tensors or text. One thread owns it.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from minipaged.config import EngineConfig
from minipaged.errors import RequestError
from minipaged.memory.block_manager import BlockManager
from minipaged.memory.types import Admission, Allocation, BlockEvent
from minipaged.scheduling import groups
from minipaged.scheduling.batch import Batch
from minipaged.scheduling.beam import BeamSearch
from minipaged.scheduling.plan import LongArray, StepPlan, StepTokens
from minipaged.scheduling.planner import build_plan, draws_of
from minipaged.scheduling.policies import PreemptionCost, rank_of, wants_swap
from minipaged.scheduling.queue import RequestQueue
from minipaged.scheduling.request import Request, RequestOutput, Sequence, Status


class SchedulerEvent(NamedTuple):
    """A thing that happened to a request: submit admit preempt prune finish refuse abort. `amount` is tokens; `detail` a word."""

    kind: str
    seq_id: int
    amount: int = 0
    detail: str = ""
    sequence: Sequence | None = None


class Flight(NamedTuple):
    """A plan that was launched, with the sequences its draws belong to."""

    plan: StepPlan
    draws: list[Sequence]
    draw_ids: LongArray


@dataclass
class Counters:
    """What happened since the start."""

    copies: int = 0
    hit_tokens: int = 0
    queried_tokens: int = 0
    own_hit_tokens: int = 0  # a resumed request's hits on blocks it left behind; not in hit_tokens
    preemptions: int = 0
    swaps: int = 0
    generated_tokens: int = 0
    computed_tokens: int = 0


@dataclass
class Draft:
    """A step while it is being put together."""

    slots: list[npt.NDArray[np.int64]] = field(default_factory=list)
    takes: list[npt.NDArray[np.int64]] = field(default_factory=list)
    copies: dict[int, tuple[tuple[int, int], ...]] = field(default_factory=dict)  # by sequence
    swap_outs: list[tuple[int, int]] = field(default_factory=list)
    swap_ins: list[tuple[int, int]] = field(default_factory=list)
    budget: int = 0
    preempted: bool = False


class Scheduler:
    """Continuous batching with chunked prefill, preemption, groups and beams over a block manager.

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
        rank = rank_of(config.policy)
        self._rank = rank
        self.waiting = RequestQueue(rank)
        self.swapped = RequestQueue(rank)
        self.requests: dict[int, Request] = {}  # all that have not ended
        self.sequences: dict[int, Sequence] = {}  # theirs, those that have ended left out
        self._flights: deque[Flight] = deque()
        self._order: npt.NDArray[np.int64] | None = np.zeros(
            0, np.int64
        )  # running slots in serving order; None: out of date
        self._num_groups = 0
        self._next_seq_id = 0
        self._arrivals = 0
        self._step = 0
        self._touched: list[Request] = []  # ended outside a step's draws: reported by the next commit
        self._events: list[SchedulerEvent | BlockEvent] = []

    # ---- arrivals and departures

    def add(self, request: Request) -> None:
        """Queue a request. RequestError if it can never be served here; nothing is changed then."""
        self.check(request)
        request.arrival = self._arrivals
        self._arrivals += 1
        params = request.params
        if params.beam_width is not None:
            request.beams = BeamSearch(
                params.beam_width, params.max_tokens, request.stop_ids, params.length_penalty, params.early_stopping
            )
        if params.prompt_logprobs is not None:
            request.prompt_logprobs.append(None)  # nothing comes before the first token
        request.sequences.append(self.new_sequence(request, list(request.prompt_token_ids)))
        self.requests[request.request_id] = request
        self.waiting.push(request)
        self.log("submit", request.sequences[0], request.num_prompt)

    def check(self, request: Request) -> None:
        """Raise RequestError if the request can never be served by this engine, saying what would."""
        request.check()
        config, params = self.config, request.params
        if params.beam_width is not None:
            for name, without in (("stop", ()), ("min_tokens", 0), ("repetition_penalty", 1.0)):
                if getattr(params, name) != without:
                    raise RequestError(
                        f"{name} must keep its default with beam_width: beams are chosen by their scores alone"
                    )
        width, longest = params.num_sequences, request.num_prompt + params.max_tokens
        if request.request_id in self.requests:
            raise RequestError(f"request id {request.request_id} is in use")
        if request.num_prompt >= config.max_model_len:
            raise RequestError(
                f"the prompt has {request.num_prompt} tokens; this engine's context holds {config.max_model_len}, "
                f"at least one of them for the answer"
            )
        if longest > config.max_model_len:
            raise RequestError(
                f"prompt ({request.num_prompt}) + max_tokens ({params.max_tokens}) = {longest} tokens exceed the context of "
                f"{config.max_model_len}: max_tokens may be at most {config.max_model_len - request.num_prompt}"
            )
        for name in ("max_num_seqs", "max_num_batched_tokens"):
            if width > getattr(config, name):
                raise RequestError(f"{width} sequences at once exceed {name} ({getattr(config, name)})")
        if self.manager.can_admit(request.num_prompt, params.max_tokens, num_sequences=width) is Admission.NEVER:
            blocks = -(-longest // self.block_size) * width
            usable = self.manager.usage().total - 1
            raise RequestError(
                f"the request may need {blocks} blocks ({width} x {longest} tokens, {self.block_size} a block); "
                f"the pool has {usable}: shorten it, lower n, or raise num_blocks"
            )

    def abort(self, request_id: int) -> bool:
        """End a request wherever it is and give back all it holds; False if it has ended already or was never here."""
        request = self.requests.get(request_id)
        if request is None:
            return False
        for sequence in request.alive:
            self.end(sequence, "abort")
        self._touched.append(request)
        return True

    def give_up(self) -> None:
        """A step was lost on its way: end every request with `error`, and forget the steps in flight and the prefix cache."""
        self._flights.clear()
        for request in list(self.requests.values()):
            for sequence in request.alive:
                self.end(sequence, "error")
            self._touched.append(request)
        self.manager.reset_prefix_cache()

    def take_ended(self) -> list[RequestOutput]:
        """The requests that ended outside a step, each reported once."""
        ended, self._touched = self._touched, []
        return [request.output for request in ended]

    def finish(self, sequence: Sequence, reason: str) -> None:
        """End one sequence from outside (a stop string); does nothing if it has ended."""
        if sequence.status is not Status.FINISHED:
            self.end(sequence, reason)

    @property
    def has_work(self) -> bool:
        """Whether any request has not ended, or an end is still to be reported."""
        return bool(self.requests or self._touched or self._flights)

    # ---- one step

    def schedule(self) -> StepPlan | None:
        """The next step, or None if nothing can be done before a step in flight is committed (or at all)."""
        self.manager.begin_step()
        draft = Draft(budget=self.config.max_num_batched_tokens)
        self._schedule_running(draft)
        if not draft.preempted:
            self._resume_and_admit(draft)
        if not draft.slots and not draft.swap_outs and not draft.swap_ins:
            return None
        slots = np.concatenate(draft.slots) if draft.slots else np.zeros(0, np.int64)
        takes = np.concatenate(draft.takes) if draft.takes else np.zeros(0, np.int64)
        return self._launch(draft, slots, takes)

    def _schedule_running(self, draft: Draft) -> None:
        batch = self.batch
        slots = self.order()
        if not len(slots):
            return
        computed, total = batch.computed[slots], batch.total[slots]
        need = total - computed
        need[(total >= batch.limit[slots]) | batch.busy[slots]] = 0  # only a step in flight is missing
        take = self._share_budget(draft.budget, slots, need)
        ends = computed + take
        for i in np.flatnonzero(ends > batch.room[slots]).tolist():
            if take[i]:
                self._make_room(draft, slots, take, i, int(ends[i]))
        chosen = take > 0
        if not chosen.all():
            slots, take = slots[chosen], take[chosen]
        if len(slots):
            draft.slots.append(slots)
            draft.takes.append(take)
            draft.budget -= int(take.sum())

    def _share_budget(
        self, budget: int, slots: npt.NDArray[np.int64], need: npt.NDArray[np.int32]
    ) -> npt.NDArray[np.int64]:
        """Tokens for each running slot: all it needs, first come first served."""
        if self._num_groups:
            return groups.share_budget(self.batch, self.running, budget, slots, need)
        before = np.cumsum(need) - need
        take: npt.NDArray[np.int64] = np.clip(budget - before, 0, need)
        return take

    def _make_room(
        self, draft: Draft, slots: npt.NDArray[np.int64], take: npt.NDArray[np.int64], i: int, end: int
    ) -> None:
        """Find room for slots[i] up to position `end`; the last of the running make way until there is, or will be in the next step."""
        sequence = self.batch.sequences[int(slots[i])]
        if sequence is None:
            return
        while not self._extend(draft, sequence, end):
            if draft.swap_outs:  # the blocks of whoever left are handed out from the next step on: nobody else need go
                take[np.isin(slots, [s.slot for s in sequence.request.alive])] = 0
                return
            victim = next((r for r in reversed(self.running) if not self.batch.busy[r.alive[0].slot]), None)
            if victim is None:
                take[i] = 0  # all wait for a step in flight
                return
            gone = [s.slot for s in victim.alive]
            take[np.isin(slots, gone)] = 0
            self._preempt(draft, victim)
            if victim is sequence.request:
                return

    def _extend(self, draft: Draft, sequence: Sequence, end: int) -> bool:
        """Room for positions below `end`, promised to the end of its block: the manager is asked once a block, not once a token."""
        batch, slot = self.batch, sequence.slot
        goal = -(-end // self.block_size) * self.block_size
        allocation = self.manager.append(sequence.seq_id, goal - int(batch.room[slot]))
        if allocation is None:
            return False
        batch.room[slot] = goal
        self._note_allocation(draft, sequence, allocation)
        return True

    def _note_allocation(self, draft: Draft, sequence: Sequence, allocation: Allocation) -> None:
        if allocation.copies:
            draft.copies[sequence.seq_id] = draft.copies.get(sequence.seq_id, ()) + allocation.copies
            self.batch.set_table(sequence.slot, self.manager.table(sequence.seq_id))
        elif allocation.new_blocks:
            self.batch.extend_table(sequence.slot, allocation.new_blocks)

    # ---- leaving and coming back

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

    def _resume_and_admit(self, draft: Draft) -> None:
        """Swapped requests return before new ones start (under priority the two are one queue); the head blocks the line."""
        while draft.budget > 0:
            swapped, waiting = self.swapped.peek(), self.waiting.peek()
            if swapped is None and waiting is None:
                return
            swapped_first = swapped is not None and (
                waiting is None or self.config.policy == "fcfs" or self._rank(swapped) < self._rank(waiting)
            )
            if swapped_first and swapped is not None:
                if not self._resume(draft, swapped):
                    return
            elif waiting is None or not self._admit(draft, waiting):
                return

    def _fits_batch(self, draft: Draft, request: Request) -> bool:
        """Whether slots and token budget are left for every sequence of the request, and no draw of it is in flight."""
        alive = request.alive
        width = request.params.num_sequences if not request.forked else len(alive)
        return width <= self.batch.num_free and len(alive) <= draft.budget and all(s.in_flight == 0 for s in alive)

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
        if not self._fits_batch(draft, request):
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
        insort(self.running, request, key=self._rank)
        self._num_groups += request.params.num_sequences > 1
        self._order = None

    def _take_tokens(self, draft: Draft, alive: list[Sequence]) -> None:
        """Schedule what a returning or new request may compute now."""
        slots = np.array([s.slot for s in alive], np.int64)
        need = self.batch.total[slots] - self.batch.computed[slots]
        take = groups.lockstep(need, draft.budget)
        for i, sequence in enumerate(alive):
            end = int(self.batch.computed[slots[i]] + take[i])
            if end > self.batch.room[slots[i]] and not self._extend(draft, sequence, end):
                take[i] = 0
        chosen = take > 0
        if chosen.any():
            draft.slots.append(slots[chosen])
            draft.takes.append(take[chosen])
            draft.budget -= int(take.sum())

    # ---- the plan

    def _launch(self, draft: Draft, slots: npt.NDArray[np.int64], takes: npt.NDArray[np.int64]) -> StepPlan:
        batch = self.batch
        draws = draws_of(batch, slots, takes)
        copies = tuple(pair for pairs in draft.copies.values() for pair in pairs) if draft.copies else ()
        plan = build_plan(self._step, batch, slots, takes, draws, tuple(draft.swap_outs), tuple(draft.swap_ins), copies)
        self._step += 1
        self.counters.copies += len(copies)
        self.counters.computed_tokens += plan.num_tokens
        batch.computed[slots] += takes
        owners = slots[draws.rows[draws.first]]
        batch.draw_pending(owners)
        batch.busy[owners] = draws.parting
        sequences = batch.sequences
        drawn: list[Sequence] = [sequences[s] for s in slots[draws.rows].tolist()]
        self._flights.append(Flight(plan, drawn, batch.seq_id[slots[draws.rows]]))
        return plan

    def commit(self, plan: StepPlan, tokens: StepTokens) -> list[RequestOutput]:
        """Take in what a launched step drew, oldest first: append, publish full blocks, fork and prune, finish, free.

        Returns the outputs of every request that gained a token or ended. ValueError if `plan` is not the oldest in flight.
        """
        if not self._flights or self._flights[0].plan is not plan:
            raise ValueError("commit takes the oldest plan in flight")
        flight = self._flights.popleft()
        batch = self.batch
        self._mark_full_blocks(plan)
        ids = np.asarray(tokens.token_ids, np.int32)
        if tokens.prompt_logprobs:
            groups.note_prompt_logprobs(self, plan, tokens.prompt_logprobs)
        slots = plan.slots[plan.draw_rows]  # of the rows that drew; samples not born yet have none of their own
        outputs: list[RequestOutput]
        touched, self._touched = self._touched, []
        if bool((batch.seq_id[slots] == flight.draw_ids).all()) and not batch.watched[slots].any():
            self._append_plain(flight.draws, slots, ids)
            outputs = [sequence.request.output for sequence in flight.draws]
        else:
            seen = groups.commit_draws(self, flight, ids, tokens)
            outputs = [request.output for request in seen]
            touched = [r for r in touched if r not in seen]
        self.counters.generated_tokens += len(ids)
        if touched:
            outputs.extend(request.output for request in touched)
        return outputs

    def _append_plain(
        self, sequences: list[Sequence], slots: npt.NDArray[np.int32], ids: npt.NDArray[np.int32]
    ) -> None:
        """One token for each of these running sequences, none of which asks for more than the token."""
        batch = self.batch
        for sequence, token in zip(sequences, ids.tolist(), strict=True):
            sequence.token_ids.append(token)
        known = batch.known[slots] + 1
        batch.known[slots] = known
        batch.busy[slots] = False
        newest = known == batch.total[slots]
        batch.last[slots[newest]] = ids[newest]
        at_limit = known >= batch.limit[slots]
        stopped = (ids == batch.stop[slots]) & (known >= batch.stop_from[slots])
        for i in np.flatnonzero(at_limit | stopped).tolist():
            self.end(sequences[i], "stop" if stopped[i] else "length")

    def _mark_full_blocks(self, plan: StepPlan) -> None:
        """Report to the manager the tokens whose blocks this step has filled."""
        batch, slots = self.batch, plan.slots
        done = plan.starts + plan.lengths
        filled = done // self.block_size > batch.marked[slots] // self.block_size
        filled &= batch.seq_id[slots] == plan.seq_ids
        for i in np.flatnonzero(filled).tolist():
            sequence = batch.sequences[int(slots[i])]
            if sequence is not None:
                self.mark(sequence, int(done[i]))

    # ---- for groups and beams

    def mark(self, sequence: Sequence, upto: int) -> None:
        """Tell the manager that the KV of token_ids[:upto] is written."""
        marked = int(self.batch.marked[sequence.slot])
        if upto > marked:
            self.manager.mark_computed(sequence.seq_id, sequence.token_ids[marked:upto])
            self.batch.marked[sequence.slot] = upto

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
        child.text = parent.text
        child.num_cached = parent.num_cached
        child.computed = child.marked = computed
        self.manager.fork(parent.seq_id, child.seq_id)
        child.status = Status.RUNNING
        request.sequences.append(child)
        batch.put(child, slot, computed, self.seed_of(request))
        batch.set_table(slot, self.manager.table(child.seq_id))
        self._order = None
        return child

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
        self._order = None

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

    def log(self, kind: str, sequence: Sequence, amount: int = 0, detail: str = "") -> None:
        """Note an event after the block events that led to it."""
        self._events.extend(self.manager.take_events())
        self._events.append(SchedulerEvent(kind, sequence.seq_id, amount, detail, sequence))

    def take_events(self) -> list[SchedulerEvent | BlockEvent]:
        """What happened since the last call, in causal order."""
        events, self._events = self._events, []
        events.extend(self.manager.take_events())
        return events
