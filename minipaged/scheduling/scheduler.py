"""Which tokens the next step computes, and what the drawn tokens mean.

A sequence only ever moves from num_computed towards num_tokens: a prompt chunk and a decode are the same thing. `schedule` and `commit`
are the two halves of a step; a RunningSet holds the requests and their memory, commit.py takes in what was drawn. One thread owns it all.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from minipaged.config import EngineConfig, check_int
from minipaged.errors import InputError
from minipaged.memory.adapter import adapted
from minipaged.memory.types import Admission, BlockEvent
from minipaged.scheduling import sequence_groups
from minipaged.scheduling.beam import BeamSearch
from minipaged.scheduling.commit import TextStops, commit_draws, drawn_ids, note_prompt_logprobs
from minipaged.scheduling.plan import IntArray, StepPlan, StepTokens
from minipaged.scheduling.policies import PreemptionCost, ServiceKey, may_join
from minipaged.scheduling.request import Request, RequestOutput, Sequence
from minipaged.scheduling.running_set import RunningSet, SchedulerEvent, Slots
from minipaged.scheduling.step_builder import StepBuilder
from minipaged.scheduling.validation import Room, check_request

if TYPE_CHECKING:
    from minipaged.memory.block_manager import BlockManager
    from minipaged.memory.blocks import PrefixHit
    from minipaged.scheduling.runtime_settings import SettingChange


class Disk(Protocol):
    """Blocks on a disk (execution/disk_tier.py)."""

    def bring(self, hit: PrefixHit) -> int:
        """Read into host memory what the disk has of a prompt; returns the number of blocks."""
        ...

    def save(self, *, idle: bool) -> None:
        """Let the full blocks of steps that were launched be written. idle: nothing runs."""
        ...

    def close(self) -> None:
        """Write what waits."""
        ...


class Scheduler:
    """Continuous batching with chunked prefill, preemption, samples and beams over a block manager.

    config: the limits; manager: the block tables; block_size: as the manager's; cost: what a swap and a recompute take, for
    `preemption="auto"`. text_stops: who is asked whether a stop string ends a sequence; None: nobody reads text.
    """

    def __init__(
        self, config: EngineConfig, manager: BlockManager, block_size: int, cost: PreemptionCost | None = None
    ) -> None:
        manager = self.manager = adapted(manager)
        # Called once before the first step: from now on the manager expects end_step in each.
        manager.end_step()
        # Managers of another kind have no cache on the host.
        self._take_moves = getattr(manager, "take_moves", None)
        running_set = self.running_set = RunningSet(config, manager, block_size, cost)
        self.block_size = block_size
        self.text_stops: TextStops | None = None
        self.disk: Disk | None = None  # where blocks are kept beyond the host's memory
        # The running set's own, for those who look: they stay the same objects.
        self.batch, self.counters = running_set.batch, running_set.counters
        self.requests, self.sequences = running_set.requests, running_set.sequences
        self.running, self.waiting, self.swapped = running_set.running, running_set.waiting, running_set.swapped
        self.made_way = False  # the newest step sent somebody away: it may have had nothing else to do
        self._in_flight: deque[StepPlan] = deque()  # launched and not committed, oldest first
        self._ended: list[Request] = []  # ended outside a step's draws: reported by the next commit

    # ---- one step

    def schedule(self) -> StepPlan | None:
        """The next step, or None if nothing can be done before a step in flight is committed (or at all)."""
        running_set = self.running_set
        # Before the plan opens: a fork publishes what its parent has computed, and that is written, no promise of this step.
        for request in list(running_set.regrouping):
            running_set.fork_again(request)
        self.manager.begin_step()
        step = StepBuilder(budget=running_set.config.max_num_batched_tokens)
        # 1) Under the priority policy, less urgent ones make way for a request that waits. It comes in with the next step.
        if running_set.config.policy == "priority":
            self._make_way(step)
        # 2) Running requests come first, in order of service. Where the pool runs dry, the last of them make way. After that nobody
        #    leaves the step, so the blocks that it fills are published.
        self._schedule_running(step)
        # 3) Those on the host return, then new ones start: they share what the step writes for those before them. A step that sent
        #    somebody away lets nobody in.
        if len(self.requests) > len(self.running) and not step.preempted:
            self._let_in(step)
        # Until here a promise to write could be taken back; from here on what this step fills stays published.
        self.manager.end_step()
        if self._take_moves is not None:
            spills, fetches = self._take_moves()
            step.swap_outs.extend(spills)
            step.swap_ins.extend(fetches)
            self.counters.spilled_blocks += len(spills)
            self.counters.host_hit_tokens += len(fetches) * self.block_size
        # 4) The plan is built: its tokens count as computed, and what it draws as pending. The engine launches it next.
        plan = step.build(running_set.steps_launched, self.batch)
        self.made_way = step.preempted
        if plan is None:
            return None
        running_set.steps_launched += 1
        self.counters.copies += len(plan.copies)
        self.counters.computed_tokens += len(plan.token_ids)
        self._in_flight.append(plan)
        return plan

    def commit(self, plan: StepPlan, tokens: StepTokens) -> list[RequestOutput]:
        """Take in what a launched step drew, oldest first: append, fork and prune, stop, finish, free.

        Returns the outputs of every request that gained a token or ended. ValueError if `plan` is not the oldest in flight, or if these
        are no tokens of its draws; nothing is changed then.
        """
        if not self._in_flight or self._in_flight[0] is not plan:
            raise ValueError("commit takes the oldest plan in flight")
        ids = drawn_ids(plan, tokens)
        self._in_flight.popleft()
        running_set = self.running_set
        # Whoever left the batch before this step may be admitted again: no step in flight has it any more (_fits_batch).
        running_set.steps_committed = plan.step + 1
        # 1) What it computed besides.
        if tokens.prompt_logprobs:
            note_prompt_logprobs(running_set, plan, tokens.prompt_logprobs)
        # 2) What it drew: sequences gain a token, fork or end.
        outputs = commit_draws(running_set, plan, ids, tokens, self.text_stops)
        # 3) Blocks that the retention policy no longer keeps go back.
        if not running_set.retention.keeps_all:
            running_set.release_spare()
        # 4) Requests that ended since the last commit are reported with it.
        if self._ended:
            outputs.extend(output for output in self.take_ended() if output not in outputs)
        return outputs

    # ---- arrivals and departures

    def add(self, request: Request) -> None:
        """Queue a request. RequestError if it can never be served here; nothing is changed then."""
        self.check(request)
        self.enqueue(request)

    @property
    def room(self) -> Room:
        """How long a sequence can become here."""
        blocks = self.manager.usage().total if self.running_set.retention.keeps_all else None
        return Room(self.config.max_model_len, self.block_size, blocks)

    def check(self, request: Request) -> None:
        """Raise RequestError if the request can never be served by this engine, saying what would."""
        check_request(request, self.config, self.manager, self.room, self.requests)

    def enqueue(self, request: Request) -> None:
        """Queue a request that `check` has let pass."""
        params = request.params
        if params.beam_width is not None:
            request.beams = BeamSearch(
                params.beam_width, params.max_tokens, request.stop_ids, params.length_penalty, params.early_stopping
            )
        if params.prompt_logprobs is not None:
            request.prompt_logprobs.append(None)  # nothing comes before the first token
        self.running_set.enqueue(request)

    def abort(self, request_id: int) -> bool:
        """End a request wherever it is and give back all it holds; False if it has ended already or was never here."""
        check_int("request_id", request_id, 0)
        request = self.requests.get(request_id)
        if request is None:
            return False
        self._end_all(request, "abort")
        return True

    def give_up(self) -> None:
        """A step was lost on its way: end every request with `error`, and forget the steps in flight and the prefix cache."""
        self._in_flight.clear()
        self.running_set.steps_committed = self.running_set.steps_launched
        for request in list(self.requests.values()):
            self._end_all(request, "error")
        self.manager.reset_prefix_cache()

    def _end_all(self, request: Request, reason: str) -> None:
        for sequence in request.alive:
            self.running_set.end(sequence, reason)
        self._ended.append(request)

    def take_ended(self) -> list[RequestOutput]:
        """The requests that ended outside a step, each reported once."""
        ended, self._ended = self._ended, []
        return [request.output for request in ended]

    @property
    def has_work(self) -> bool:
        """Whether any request has not ended, or an end is still to be reported."""
        return bool(self.requests or self._ended or self._in_flight)

    # ---- running requests

    def _schedule_running(self, step: StepBuilder) -> None:
        batch, slots = self.batch, self.running_set.order()
        if not len(slots):
            return
        computed, pending = batch.num_computed[slots], batch.num_with_pending[slots]
        need = pending - computed
        # Those that draw their last token in a step in flight, or go on by what it draws, wait for its commit.
        need[(pending >= batch.max_length[slots]) | batch.awaiting_result[slots]] = 0
        if batch.results_come_late:  # the stages of a pipeline share the running requests
            need[sequence_groups.of_later_steps(self.running, need > 0, self.config.depth + 1)] = 0
        take = self._share_budget(step.budget, need)
        ends = computed + take
        short = (ends > batch.num_reserved[slots]).nonzero()[0]
        served = self.running_set.reserve(step, slots[short], ends[short]) if len(short) else 0
        if served < len(short):
            for i in short[served:].tolist():
                if take[i]:
                    self._make_room(step, slots, take, ends, i)
            ends = computed + take
        self.running_set.publish_full_blocks(slots, ends)
        step.add(slots, take)

    def _share_budget(self, budget: int, need: IntArray) -> IntArray:
        """Tokens for each running slot: all it needs, first come first served."""
        if int(need.sum()) <= budget and not self.running_set.regrouping:
            return need
        if self.running_set.num_groups:
            return sequence_groups.share_budget(self.running, budget, need)
        return sequence_groups.in_turn(need, budget)

    def _make_room(self, step: StepBuilder, slots: Slots, take: IntArray, ends: IntArray, i: int) -> None:
        """Find room for slots[i] up to ends[i]; the last of the running make way until there is, or will be in the next step."""
        sequence = self.batch.sequences[int(slots[i])]
        if sequence is None:
            return
        request = sequence.request
        mine = np.isin(slots, [s.slot for s in request.alive])
        others_made_room = bool(step.swap_outs) and step.room_for is not request
        step.room_for = request
        while not self.running_set.reserve(step, slots[i : i + 1], ends[i : i + 1]):
            victim = self._choose_victim(step)
            # Blocks that are swapped out are handed out from the next step on. Where they are enough, or come from one who left for
            # somebody else, nobody else need go; too few of them would cost another step in which nothing is computed.
            if step.swap_outs and (
                others_made_room
                or victim is None
                or victim is request
                or self._lacking(slots[mine], ends[mine]) <= self.manager.usage().free
            ):
                take[mine] = 0
                return
            if victim is None:
                take[i] = 0  # all wait for a step in flight
                return
            take[np.isin(slots, [s.slot for s in victim.alive])] = 0
            self._preempt(step, victim)
            if victim is request:
                return

    def _lacking(self, slots: Slots, ends: IntArray) -> int:
        """Blocks that these sequences need to reach `ends`, counting a copy for each that is in the middle of a block."""
        gone = self.batch.num_left_out[slots]
        room, ends = self.batch.num_reserved[slots] - gone, ends - gone
        return int((-(-np.maximum(-(-ends // self.block_size) * self.block_size - room, 0) // self.block_size)).sum())

    def _choose_victim(self, step: StepBuilder) -> Request | None:
        """Of the running requests that may leave and await no result of a step in flight, the one served last."""
        awaiting, can_leave = self.batch.awaiting_result, self.running_set.can_leave
        return next((r for r in reversed(self.running) if not awaiting[r.alive[0].slot] and can_leave(r, step)), None)

    def _preempt(self, step: StepBuilder, request: Request) -> None:
        """Send a running request away, and take what it was given out of the step."""
        step.preempted = True
        # Its copies of this step go with it: their destinations are free again, and may be somebody else's before the step runs.
        for sequence in request.alive:
            step.copies.pop(sequence.seq_id, None)
        step.swap_outs.extend(self.running_set.preempt(request) or ())

    def _make_way(self, step: StepBuilder) -> None:
        """Send the least urgent of the running requests away, as many as it takes, if the first of those that wait is more urgent, finds no
        room, and would find some then. Arrival does not count: equals wait for each other.
        """
        first, swapped, awaiting = self.waiting.peek(), self.swapped.peek(), self.batch.awaiting_result
        if first is None or self.config.batching != "continuous":
            return
        if swapped is not None and self.service_key(swapped) < self.service_key(first):
            return
        victims = [
            r for r in self.running if r.params.priority > first.params.priority and not awaiting[r.alive[0].slot]
        ]
        if not victims or self._can_start(step, first) or not self._would_help(first, victims):
            return
        if not self.running_set.can_stay(first):
            return
        while victims and not self._can_start(step, first):
            # Blocks that are swapped out are handed out from the next step on (law L52): they count, though nobody can have them yet.
            if step.swap_outs and self._will_start(step, first):
                return
            victim = victims.pop()
            if self.running_set.can_leave(victim, step):
                self._preempt(step, victim)

    def _can_start(self, step: StepBuilder, request: Request) -> bool:
        """Whether a waiting request would find slots, budget and blocks now."""
        if not self._fits_batch(step, request):
            return False
        _, end, hit = self._first_tokens(step, request)
        return self.manager.can_admit(end, hit=hit) is Admission.OK

    def _will_start(self, step: StepBuilder, request: Request) -> bool:
        """Whether a waiting request finds slots and blocks in the next step, when what this one swaps out is free."""
        found, end, hit = self._first_tokens(step, request)
        need = -(-end // self.block_size) - found // self.block_size + getattr(hit, "num_on_host", 0)
        return need <= self.manager.usage().free and self.running_set.width(request) <= self.batch.num_free

    def _would_help(self, request: Request, victims: list[Request]) -> bool:
        """Whether the request could start if all of these left: they may share their blocks with others that stay."""
        running_set, table = self.running_set, self.manager.table
        if any(s.left_at > running_set.steps_committed for s in request.alive):
            return False
        leaving = {id(victim) for victim in victims}
        held: dict[bool, set[int]] = {True: set(), False: set()}
        for other in self.running:
            for sequence in other.alive:
                if sequence.slot >= 0:
                    held[id(other) in leaving].update(table(sequence.seq_id))
        blocks = self.manager.usage().free + len(held[True] - held[False])
        slots = self.batch.num_free + sum(running_set.width(victim) for victim in victims)
        tokens, chunk = len(request.alive[0].token_ids), self.config.max_num_batched_tokens
        need = running_set.retention.most_blocks(tokens, self.block_size, chunk)
        return need <= blocks and running_set.width(request) <= slots

    # ---- those who come in

    def _let_in(self, step: StepBuilder) -> None:
        """Swapped requests return before new ones start (under priority the two are one queue); the head blocks the line."""
        while step.budget > 0:
            swapped, waiting = self.swapped.peek(), self.waiting.peek()
            if swapped is None and waiting is None:
                return
            swapped_first = swapped is not None and (
                waiting is None
                or self.config.policy == "fcfs"
                or self.service_key(swapped) < self.service_key(waiting)
                or not self.running_set.can_stay(waiting)
            )
            if swapped_first and swapped is not None:
                if not self._resume(step, swapped):
                    return
            elif waiting is None or not self._admit(step, waiting):
                return

    def _fits_batch(self, step: StepBuilder, request: Request) -> bool:
        """Whether slots and token budget are left for every sequence of the request, and no step that has it is in flight."""
        alive, running_set = request.alive, self.running_set
        return (
            running_set.width(request) <= self.batch.num_free
            and len(alive) <= step.budget
            and all(s.left_at <= running_set.steps_committed for s in alive)
        )

    def _resume(self, step: StepBuilder, request: Request) -> bool:
        """Bring a request back from the host, if there is room."""
        if not self._fits_batch(step, request):
            return False
        alive = request.alive
        pairs = self.manager.swap_in([s.seq_id for s in alive])
        if pairs is None:
            return False
        step.swap_ins.extend(pairs)
        self.swapped.pop()
        self.running_set.enter(request, [s.num_computed for s in alive])
        self._take_tokens(step, request)
        return True

    def _admit(self, step: StepBuilder, request: Request) -> bool:
        """Start a request, or start it again after a recompute, if there is room: as much of its prompt as the budget allows.

        One that had several sequences comes back as its first; the others are forked again from it.
        """
        if not self._fits_batch(step, request) or not may_join(self.config.batching, request, self.running):
            return False
        first, params, manager = request.alive[0], request.params, self.manager
        found, end, hit = self._first_tokens(step, request)
        if manager.can_admit(end, hit=hit) is not Admission.OK or not self.running_set.can_stay(request):
            return False
        if request.to_fork:
            end = found  # some may be forked at once: blocks for more are reserved after that
        allocation = manager.allocate(
            first.seq_id,
            first.token_ids,
            num_tokens=end,
            salt=params.cache_salt,
            read_cache=hit is not None,
            hit=request.prefix,
        )
        if allocation is None:
            return False
        # From here on it runs. [0, cached_tokens) is computed by others, [cached_tokens, end) is reserved for it.
        self.waiting.pop()
        request.prefix = None
        self._note_hits(first, allocation.cached_tokens)
        self.running_set.enter(request, [end])
        self.running_set.fork_again(request)
        self._take_tokens(step, request)
        return True

    def _first_tokens(self, step: StepBuilder, request: Request) -> tuple[int, int, PrefixHit | None]:
        """Of a waiting request: tokens that it would find in the cache, where its first chunk would end, and what it finds; None where it
        may not read the cache.
        """
        first, params = request.alive[0], request.params
        if request.prefix is None:  # once, however long it waits
            request.prefix = self.manager.lookup(first.token_ids, salt=params.cache_salt)
            if self.disk is not None and params.prompt_logprobs is None:
                self.counters.disk_hit_tokens += self.disk.bring(request.prefix) * self.block_size
            sequence_groups.plan_forks(request)
        hit = request.prefix if params.prompt_logprobs is None else None
        found = hit.num_tokens if hit is not None else 0
        # Its first tokens are those up to where the next sequence is forked from it, or all of them.
        goal = min((s.forks_at for s in request.to_fork if s.forks_at > found), default=len(first.token_ids))
        return found, min(goal, found + step.budget), hit

    def _note_hits(self, sequence: Sequence, num_tokens: int) -> None:
        """A sequence starts behind so many tokens that the prefix cache has given it."""
        sequence.restart(num_tokens)
        sequence.num_cached = num_tokens
        if sequence.request.num_cached_tokens is None:
            sequence.request.num_cached_tokens = num_tokens
        if sequence.num_output:  # it ran before: what it finds are its own blocks
            self.counters.own_hit_tokens += num_tokens
        else:
            self.counters.hit_tokens += num_tokens
            self.counters.queried_tokens += len(sequence.token_ids)

    def _take_tokens(self, step: StepBuilder, request: Request) -> None:
        """Schedule what a returning or new request may compute now."""
        batch = self.batch
        slots = np.array([s.slot for s in request.sequences if s.slot >= 0], np.int64)
        computed = batch.num_computed[slots]
        need = batch.num_with_pending[slots] - computed
        take = sequence_groups.share_of(request, step.budget, need)
        ends = computed + take
        for i in np.flatnonzero(ends > batch.num_reserved[slots]).tolist():
            if not self.running_set.reserve(step, slots[i : i + 1], ends[i : i + 1]):
                take = np.minimum(take, np.maximum(need - 1, 0))  # nobody draws before all of them can
                take[i] = 0
        self.running_set.publish_full_blocks(slots, computed + take)
        step.add(slots, take)

    # ---- settings

    @property
    def config(self) -> EngineConfig:
        """The settings as they are now."""
        return self.running_set.config

    def check_setting(self, change: SettingChange) -> None:
        """InputError if this engine cannot change that setting."""
        if change.name == "watermark" and not hasattr(self.manager, "set_watermark"):
            raise InputError("this engine's block manager has no watermark to change")

    def apply(self, change: SettingChange) -> None:
        """Change a setting, from the next `schedule()` on."""
        name, value = change.name, change.value
        if name == "watermark":
            self.manager.set_watermark(float(value))
        elif name == "temperature":
            self._set_temperature(float(value))
        else:
            self.running_set.configure(replace(self.config, **{name: value}))  # type: ignore[arg-type]

    def _set_temperature(self, temperature: float) -> None:
        for request in self.requests.values():
            if request.params.beam_width is None:  # a beam search does not sample
                request.params = replace(request.params, temperature=temperature)
                for sequence in request.alive:
                    if sequence.slot >= 0:
                        self.batch.set_sampling(sequence)

    # ---- looking

    def service_key(self, request: Request) -> ServiceKey:
        """The smaller is served first."""
        return self.running_set.service_key(request)

    def order(self) -> Slots:
        """The running slots in serving order."""
        return self.running_set.order()

    def take_events(self) -> list[SchedulerEvent | BlockEvent]:
        """What happened since the last call, in causal order."""
        return self.running_set.take_events()
