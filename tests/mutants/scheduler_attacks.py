"""Bugs found by reading the real scheduler as an attacker would. The docstring is the bug; the spec must find every one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from minipaged.memory.types import Admission, Allocation
from minipaged.scheduling.plan import IntArray, StepPlan, StepTokens
from minipaged.scheduling.request import Request, RequestOutput, Sequence, Status
from minipaged.scheduling.running_set import RunningSet
from minipaged.scheduling.scheduler import Scheduler
from minipaged.scheduling.step_builder import StepBuilder
from tests.mutants.killing_schedulers import in_running_set

Slots = npt.NDArray[np.int64]


class PlanChanged(Scheduler):
    """A scheduler whose plans are changed by `change` on their way out."""

    def change(self, plan: StepPlan) -> StepPlan:
        """Change a plan."""
        raise NotImplementedError

    def schedule(self) -> StepPlan | None:
        plan = super().schedule()
        if plan is None:
            return None
        plan = self.change(plan)
        self._in_flight[-1] = plan
        return plan


class CopiesLost(PlanChanged):
    """The plan has no copies."""

    def change(self, plan: StepPlan) -> StepPlan:
        return replace(plan, copies=())


class SwapOutsLost(PlanChanged):
    """The plan does not say what is swapped out."""

    def change(self, plan: StepPlan) -> StepPlan:
        return replace(plan, swap_outs=())


class SwapInsLost(PlanChanged):
    """The plan does not say what is swapped in."""

    def change(self, plan: StepPlan) -> StepPlan:
        return replace(plan, swap_ins=())


class SwapsCrossed(PlanChanged):
    """Two blocks that are swapped in exchange their places."""

    def change(self, plan: StepPlan) -> StepPlan:
        ins = plan.swap_ins
        if len(ins) < 2:
            return plan
        return replace(plan, swap_ins=((ins[0][0], ins[1][1]), (ins[1][0], ins[0][1]), *ins[2:]))


class BudgetByOne(Scheduler):
    """A step may have one token more than its budget."""

    def _share_budget(self, budget: int, need: IntArray) -> IntArray:
        return super()._share_budget(budget + 1, need)


class GroupsForFree(Scheduler):
    """The budget counts the first sequence of a request only."""

    def _schedule_running(self, step: StepBuilder) -> None:
        budget = step.budget
        super()._schedule_running(step)
        slots = step.slots[-1] if step.slots else np.zeros(0, np.int64)
        first = [s for s in slots.tolist() if (q := self.batch.sequences[s]) and q.index == 0]
        step.budget = budget - len(first)


class SamplesDrift(Scheduler):
    """The samples of a request are served one by one, as if they were strangers: some draw before the others."""

    def _share_budget(self, budget: int, need: IntArray) -> IntArray:
        before = np.cumsum(need) - need
        return np.clip(budget - before, 0, need).astype(np.int32)


class OneSequenceTooMany(Scheduler):
    """Samples that are not born yet are given no seats: more sequences run than the limit allows."""

    def _fits_batch(self, step: StepBuilder, request: Request) -> bool:
        return bool(self.batch.num_free) and len(request.alive) <= step.budget


class ComesBackInFlight(Scheduler):
    """Whoever was sent away may come back while steps that have it are still in flight."""

    def _fits_batch(self, step: StepBuilder, request: Request) -> bool:
        for sequence in request.alive:
            sequence.left_at = 0
        return super()._fits_batch(step, request)


class NewBeforeSwapped(Scheduler):
    """Under fcfs new requests start before swapped ones return."""

    def _let_in(self, step: StepBuilder) -> None:
        while step.budget > 0 and (waiting := self.waiting.peek()) is not None and self._admit(step, waiting):
            pass
        super()._let_in(step)


class SwappedFirstWhateverTheRank(Scheduler):
    """Under priority, swapped requests return before more urgent ones that wait."""

    def _let_in(self, step: StepBuilder) -> None:
        while step.budget > 0 and (swapped := self.swapped.peek()) is not None:
            if not self._resume(step, swapped):
                return
        super()._let_in(step)


class HeadIsOvertaken(Scheduler):
    """Where the head of the queue finds no room, the one behind it is let in."""

    def _let_in(self, step: StepBuilder) -> None:
        super()._let_in(step)
        head = self.waiting.peek()
        if head is not None and len(self.waiting) > 1 and step.budget > 0 and self.swapped.peek() is None:
            self.waiting.pop()
            second = self.waiting.peek()
            if second is not None:
                self._admit(step, second)
            self.waiting.push(head)


class LatestFirstAmongEquals(Scheduler):
    """Of two requests with the same priority the later is served first."""

    def enqueue(self, request: Request) -> None:
        super().enqueue(request)
        self.waiting.remove(request)
        if self.config.policy == "priority":
            request.arrival = -request.arrival
        self.waiting.push(request)


class LessUrgentFirst(Scheduler):
    """The larger number is taken for the more urgent."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        key_of = self.running_set._service_key
        self.running_set._service_key = turned = lambda request: (-key_of(request)[0], key_of(request)[1])
        for queue in (self.waiting, self.swapped):
            queue.reorder(turned)


class OneSampleStaysBehind(Scheduler):
    """A request that is preempted leaves its first sample running."""

    def _preempt(self, step: StepBuilder, request: Request) -> None:
        alive = request.alive
        super()._preempt(step, request)
        if len(alive) > 1 and request in self.waiting:
            self.waiting.remove(request)
            self._seat_one(alive[0], request)

    def _seat_one(self, sequence: Sequence, request: Request) -> None:
        if self.manager.allocate(sequence.seq_id, sequence.token_ids) is not None:
            [slot] = self.batch.take_slots(1)
            self.batch.put(sequence, slot, len(sequence.token_ids), self.running_set.seed_of(request))
            self.batch.set_table(slot, self.manager.table(sequence.seq_id))
            sequence.status = Status.RUNNING
        self.waiting.push(request)


class FullHostStopsAll(Scheduler):
    """Where the host has no room, the victim keeps its seat and waits for it."""

    def _preempt(self, step: StepBuilder, request: Request) -> None:
        usage, table = self.manager.usage(), self.manager.table(request.alive[0].seq_id)
        if usage.host_total and usage.host_free < len(table):
            step.preempted = True
            return
        super()._preempt(step, request)


@in_running_set
class RecomputeDrawsAnew(RunningSet):
    """A request that comes back draws from another stream."""

    def seed_of(self, request: Request) -> int:
        return super().seed_of(request) + self.counters.preemptions


@in_running_set
class HitsReachTooFar(RunningSet):
    """One token more than was found is taken as computed."""

    def enter(self, request: Request, reserved: list[int]) -> None:
        for sequence in request.alive:
            if sequence.num_cached and sequence.num_cached < len(sequence.token_ids) - 1:
                sequence.restart(sequence.num_computed + 1)
        super().enter(request, reserved)


class ChunksSkipAToken(Scheduler):
    """A prompt that is cut in chunks loses the token at the cut."""

    def schedule(self) -> StepPlan | None:
        plan = super().schedule()
        slots = plan.slots if plan is not None else np.zeros(0, np.int32)
        cut = slots[self.batch.num_computed[slots] < self.batch.num_with_pending[slots] - 1]
        self.batch.num_computed[cut] += 1
        return plan


class SaltForgotten(Scheduler):
    """Requests with a salt are admitted without it."""

    def _admit(self, step: StepBuilder, request: Request) -> bool:
        params, request.params = request.params, replace(request.params, cache_salt=None)
        try:
            return super()._admit(step, request)
        finally:
            request.params = params


class PromptLogprobsReadTheCache(Scheduler):
    """A request that needs the log-probabilities of its prompt starts behind what is cached."""

    def _admit(self, step: StepBuilder, request: Request) -> bool:
        params, request.params = request.params, replace(request.params, prompt_logprobs=None)
        try:
            return super()._admit(step, request)
        finally:
            request.params = params


@in_running_set
class AbortLeavesItQueued(RunningSet):
    """A request that is aborted while it waits stays in the queue."""

    def _retire(self, request: Request) -> None:
        waits = request in self.waiting
        super()._retire(request)
        if waits:
            self.waiting.push(request)


@in_running_set
class AbortedSwapsLeak(RunningSet):
    """A request that is aborted while it is swapped out keeps its host blocks."""

    def end(self, sequence: Sequence, reason: str) -> None:
        if sequence.status is Status.SWAPPED:
            sequence.status = Status.WAITING
        super().end(sequence, reason)


@in_running_set
class UnbornSeatsLeak(RunningSet):
    """The seats of samples that were not born yet are lost when their request leaves."""

    def _retire(self, request: Request) -> None:
        request.reserved_slots.clear()
        super()._retire(request)


class AbortUntold(Scheduler):
    """An aborted request is never reported as ended."""

    def abort(self, request_id: int) -> bool:
        done = super().abort(request_id)
        self._ended.clear()
        return done


class DrawsGoToTheSlot(Scheduler):
    """What a step did goes to whoever sits in the slot by now."""

    def commit(self, plan: StepPlan, tokens: StepTokens) -> list[RequestOutput]:
        seated = self.batch.seq_id[plan.slots]
        changed = replace(plan, seq_ids=np.where(seated >= 0, seated, plan.seq_ids))
        self._in_flight[0] = changed
        return super().commit(changed, tokens)


@in_running_set
class ForksBeforeTheTokens(RunningSet):
    """A child does not know what its parent has computed: it computes it again in the shared blocks."""

    def fork(self, parent: Sequence, index: int) -> Sequence:
        child = super().fork(parent, index)
        self.batch.num_computed[child.slot] = max(0, child.num_computed - 1)
        return child


@in_running_set
class SamplesShareAStream(RunningSet):
    """Every sample of a request draws from the first one's stream."""

    def fork(self, parent: Sequence, index: int) -> Sequence:
        child = super().fork(parent, index)
        child.index = self.batch.sample_index[child.slot] = 0
        return child


@in_running_set
class OneSampleEndsAll(RunningSet):
    """The first sample that stops ends its request."""

    def end(self, sequence: Sequence, reason: str) -> None:
        super().end(sequence, reason)
        if reason == "stop" and sequence.request.beams is None:
            for other in sequence.request.alive:
                super().end(other, reason)


@in_running_set
class OneTokenMore(RunningSet):
    """An answer may have one token more than was asked for."""

    def enter(self, request: Request, reserved: list[int]) -> None:
        super().enter(request, reserved)
        for sequence in request.alive:
            self.batch.max_length[sequence.slot] += 1


@in_running_set
class StopsUnseen(RunningSet):
    """A sequence goes on past its stop token."""

    def enter(self, request: Request, reserved: list[int]) -> None:
        super().enter(request, reserved)
        for sequence in request.alive:
            self.batch.stop_token[sequence.slot] = -2
            self.batch.needs_slow_path[sequence.slot] = False


class RefusedAndCounted(Scheduler):
    """A request that is refused has been taken in all the same."""

    def check(self, request: Request) -> None:
        try:
            super().check(request)
        except Exception:
            self.requests[request.request_id] = request
            raise


class WatermarkStopsTheOnlyOne(Scheduler):
    """Nobody is let in while less than a fifth of the pool is free, whoever runs."""

    def _admit(self, step: StepBuilder, request: Request) -> bool:
        usage = self.manager.usage()
        needed = -(-len(request.prompt_token_ids) // self.block_size)
        return usage.free - needed > usage.total // 5 and super()._admit(step, request)


@in_running_set
class GrowthNeedsTheWatermark(RunningSet):
    """A running request is given a block only where one would be admitted."""

    def reserve(self, step: StepBuilder, slots: Slots, ends: IntArray) -> int:
        if len(self.running) > 1 and self.manager.can_admit(self.block_size) is not Admission.OK:
            return 0
        return super().reserve(step, slots[:1], ends[:1])


@in_running_set
class TablesOneBlockBehind(RunningSet):
    """A block that was appended is not written into the sequence's row of the tables."""

    def _note_allocations(self, step: StepBuilder, slots: Slots, allocations: list[Allocation]) -> None:
        super()._note_allocations(step, slots, [a._replace(new_blocks=()) for a in allocations])


@in_running_set
class CopiedTableKept(RunningSet):
    """After a copy the row of the tables still names the block that was copied from."""

    def _note_allocations(self, step: StepBuilder, slots: Slots, allocations: list[Allocation]) -> None:
        for i, allocation in enumerate(allocations):
            if allocation.copies:
                step.copies[int(self.batch.seq_id[slots[i]])] = allocation.copies
                self.batch.extend_table(int(slots[i]), allocation.new_blocks)
            else:
                super()._note_allocations(step, slots[i : i + 1], [allocation])


@in_running_set
class SecondCopyForgotten(RunningSet):
    """A step knows one sequence's copies only: the last one's."""

    def _note_allocations(self, step: StepBuilder, slots: Slots, allocations: list[Allocation]) -> None:
        for i, allocation in enumerate(allocations):
            if allocation.copies:
                step.copies.clear()
            super()._note_allocations(step, slots[i : i + 1], [allocation])


class TheClockDecides(Scheduler):
    """What the scheduler does depends on the time of day."""

    def _share_budget(self, budget: int, need: IntArray) -> IntArray:
        import time

        return super()._share_budget(max(1, budget - time.perf_counter_ns() // 1000 % 3), need)


ATTACKS: list[tuple[type[Scheduler], str]] = [
    (CopiesLost, "L55"),
    (SwapOutsLost, "L50"),
    (SwapInsLost, "L50"),
    (SwapsCrossed, "L50"),
    (BudgetByOne, "L37"),
    (GroupsForFree, "L37"),
    (SamplesDrift, "L51"),
    (OneSequenceTooMany, "L37"),
    (ComesBackInFlight, "L55"),
    (NewBeforeSwapped, "L50"),
    (SwappedFirstWhateverTheRank, "L50"),
    (HeadIsOvertaken, "L50"),
    (LatestFirstAmongEquals, "L45"),
    (LessUrgentFirst, "L45"),
    (OneSampleStaysBehind, "L48"),
    (FullHostStopsAll, "L48"),
    (RecomputeDrawsAnew, "L46"),
    (HitsReachTooFar, "L38"),
    (ChunksSkipAToken, "L38"),
    (SaltForgotten, "L25_a_salt"),
    (PromptLogprobsReadTheCache, "L25_a_salt"),
    (AbortLeavesItQueued, "L53"),
    (AbortedSwapsLeak, "L53"),
    (UnbornSeatsLeak, "L53"),
    (AbortUntold, "L53"),
    (DrawsGoToTheSlot, "L53"),
    (ForksBeforeTheTokens, "L51"),
    (SamplesShareAStream, "samples_differ"),
    (OneSampleEndsAll, "L55"),
    (OneTokenMore, "L55"),
    (StopsUnseen, "L55"),
    (RefusedAndCounted, "L41"),
    (WatermarkStopsTheOnlyOne, "L42"),
    (GrowthNeedsTheWatermark, "L40"),
    (TablesOneBlockBehind, "the_columns_agree"),
    (CopiedTableKept, "the_columns_agree"),
    (SecondCopyForgotten, "a_group_that_runs_dry"),
    (TheClockDecides, "L54"),
]
