"""Historical bugs of schedulers, each put into the real one. The docstring is the bug; the spec must find every one.

A mutant changes one method, or what goes in and out of it, and leaves the rest alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from minipaged.errors import RequestError
from minipaged.scheduling.plan import IntArray, StepPlan
from minipaged.scheduling.request import Request, Sequence
from minipaged.scheduling.running_set import RunningSet
from minipaged.scheduling.scheduler import Scheduler
from minipaged.scheduling.step_builder import StepBuilder
from tests.mutants.killing_schedulers import in_running_set

Slots = npt.NDArray[np.int64]


class VictimKeepsItsBudget(Scheduler):
    """A victim that was scheduled already in this step keeps its tokens in it."""

    def _make_room(self, step: StepBuilder, slots: Slots, take: IntArray, ends: IntArray, i: int) -> None:
        before, last = take.copy(), {int(s): self.batch.seq_id[s] for s in slots}
        super()._make_room(step, slots, take, ends, i)
        for k, slot in enumerate(slots.tolist()):
            if before[k] and not take[k] and self.batch.sequences[slot] is None:
                take[k] = before[k]
                self.batch.seq_id[slot] = last[slot]


class VictimKeepsItsCopies(Scheduler):
    """A victim's copies stay in the step, though their destinations are free again."""

    def _preempt(self, step: StepBuilder, request: Request) -> None:
        copies = dict(step.copies)
        super()._preempt(step, request)
        step.copies.update(copies)


class VictimKeepsItsRoom(Scheduler):
    """A victim that leaves by swap takes the room along that it was given for this step."""

    def _preempt(self, step: StepBuilder, request: Request) -> None:
        truncate = self.manager.truncate
        self.manager.truncate = lambda *_: None  # type: ignore[method-assign]
        super()._preempt(step, request)
        self.manager.truncate = truncate  # type: ignore[method-assign]


class NeverFitsIsQueued(Scheduler):
    """A request that can never fit is let in, and stays at the head of the queue."""

    def check(self, request: Request) -> None:
        try:
            super().check(request)
        except RequestError as error:
            if "the pool has" not in str(error):
                raise


class RequeuedInReverse(Scheduler):
    """Victims go back to the queue in the order in which they left: the latest first."""

    def _preempt(self, step: StepBuilder, request: Request) -> None:
        arrival = request.arrival
        request.arrival = -arrival
        super()._preempt(step, request)


class RequeuedAtTheEnd(Scheduler):
    """A victim goes to the end of the queue, behind those that arrived after it."""

    def _preempt(self, step: StepBuilder, request: Request) -> None:
        request.arrival = self.running_set._arrivals
        self.running_set._arrivals += 1
        super()._preempt(step, request)


@in_running_set
class AbortBetweenForkAndWriteLeaks(RunningSet):
    """A sequence that is aborted between its fork and its first own write keeps what it shares."""

    def end(self, sequence: Sequence, reason: str) -> None:
        child = reason == "abort" and sequence.parent >= 0 and sequence.slot >= 0
        if child and sequence.num_computed == len(sequence.token_ids) - 1:
            free = self.manager.free
            self.manager.free = lambda seq_id: None  # type: ignore[method-assign]
            super().end(sequence, reason)
            self.manager.free = free  # type: ignore[method-assign]
            return
        super().end(sequence, reason)


class CopiesAfterWrites(Scheduler):
    """A step's copies are told with the next step, when what they were to protect has been written over."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._late: tuple[tuple[int, int], ...] = ()

    def schedule(self) -> StepPlan | None:
        plan = super().schedule()
        if plan is None:
            return None
        late, self._late = self._late, plan.copies
        plan = replace(plan, copies=late)
        self._in_flight[-1] = plan
        return plan


@in_running_set
class HitOnALaterStepsBlock(RunningSet):
    """A whole prompt can be found when its request is let in: others find blocks that only a later step's chunk writes."""

    def enter(self, request: Request, reserved: list[int]) -> None:
        super().enter(request, reserved)
        for sequence, end in zip(request.alive, reserved, strict=False):
            later = len(sequence.token_ids) - end
            if (
                later > 0
                and request.params.num_sequences == 1
                and self.manager.append(sequence.seq_id, later) is not None
            ):
                self.batch.num_reserved[sequence.slot] = end + later
                self.batch.set_table(sequence.slot, self.manager.table(sequence.seq_id))
                self.publish(sequence, end + later)


class PromiseKeptAfterAWithdrawal(Scheduler):
    """What a victim was to write in the step that it leaves can still be found."""

    def _preempt(self, step: StepBuilder, request: Request) -> None:
        for sequence in request.alive:
            if request.params.num_sequences == 1:
                end = min(len(sequence.token_ids), int(self.batch.num_reserved[sequence.slot]))
                self.running_set.publish(sequence, end)
        self.manager.end_step()
        super()._preempt(step, request)


@in_running_set
class GroupResumesOneByOne(RunningSet):
    """After a recompute each sequence of a request computes all of its tokens in blocks of its own."""

    def _come_back(self, parent: Sequence, sequence: Sequence) -> None:
        if self.manager.allocate(sequence.seq_id, sequence.token_ids, num_tokens=0, read_cache=False) is not None:
            self._run(sequence, 0)


class PrefixesMadeTwice(Scheduler):
    """A step's blocks can be found once it is committed: those who start with it compute the same again."""

    def schedule(self) -> StepPlan | None:
        running_set = self.running_set
        publish, running_set.publish_full_blocks = running_set.publish_full_blocks, lambda slots, ends: None  # type: ignore[method-assign]
        plan = super().schedule()
        del running_set.publish_full_blocks
        for sequence in [s for r in self.running for s in r.alive if s.slot >= 0]:
            publish(np.array([sequence.slot]), np.array([sequence.num_computed]))
        return plan


@in_running_set
class FullHitComputesNothing(RunningSet):
    """What was found in the cache is taken to the last token: nothing is left to compute, so the first draw is lost."""

    def enter(self, request: Request, reserved: list[int]) -> None:
        for sequence in request.alive:
            if sequence.num_cached and sequence.num_cached + self.block_size >= len(sequence.token_ids):
                sequence.restart(len(sequence.token_ids) - 1)
        super().enter(request, reserved)


class LateBoundary(Scheduler):
    """Room for the next block is asked for one token after it is needed."""

    def _schedule_running(self, step: StepBuilder) -> None:
        slots = self.order()
        self.batch.num_reserved[slots] += 1
        super()._schedule_running(step)
        slots = np.array([s for s in slots if self.batch.sequences[int(s)] is not None], np.int64)
        self.batch.num_reserved[slots] -= 1


class AdmitsAfterPreempting(Scheduler):
    """A step that has just sent somebody away lets the next one in."""

    def _schedule_running(self, step: StepBuilder) -> None:
        super()._schedule_running(step)
        step.preempted = False


class NewcomersFirst(Scheduler):
    """Whoever waits is let in before the running ones have been served."""

    def _schedule_running(self, step: StepBuilder) -> None:
        before = self.order()
        self._let_in(step)
        self.running_set._order = before
        super()._schedule_running(step)
        self.running_set._order = None


class EarliestMakesWay(Scheduler):
    """The victim is the earliest of the running requests."""

    def _choose_victim(self, step: StepBuilder) -> Request | None:
        return next((r for r in self.running if not self.batch.awaiting_result[r.alive[0].slot]), None)


class LatestMakesWayWhateverItsPriority(Scheduler):
    """The victim is the latest arrival, also where it is the most urgent."""

    def _choose_victim(self, step: StepBuilder) -> Request | None:
        latest_first = sorted(self.running, key=lambda request: -request.arrival)
        return next((r for r in latest_first if not self.batch.awaiting_result[r.alive[0].slot]), None)


class NobodyLeaves(Scheduler):
    """The victim is told to leave and keeps its seat: the step looks for room for ever."""

    def _preempt(self, step: StepBuilder, request: Request) -> None:
        step.preempted = True


class PreemptsForNewcomers(Scheduler):
    """While somebody waits, the last of the running makes way, and is the next to be let in: they chase each other for ever."""

    def _schedule_running(self, step: StepBuilder) -> None:
        if len(self.waiting) and self.running and not self.batch.awaiting_result.any():
            self._preempt(step, self.running[-1])
        super()._schedule_running(step)


class UrgentOnesWait(Scheduler):
    """However urgent, a request that waits displaces nobody: it waits until somebody leaves."""

    def _make_way(self, step: StepBuilder) -> None:
        pass


class ArrivalDecidesWhoMakesWay(Scheduler):
    """The latest arrival makes way for a more urgent request, also where others are less urgent."""

    def _make_way(self, step: StepBuilder) -> None:
        by_rank = list(self.running)
        self.running.sort(key=lambda request: request.arrival)
        super()._make_way(step)
        self.running.sort(key=by_rank.index)


class EqualsMakeWay(Scheduler):
    """Whoever waits displaces those that are as urgent as it is, and arrived earlier."""

    def _make_way(self, step: StepBuilder) -> None:
        first = self.waiting.peek()
        if first is None:
            return
        asked = first.params
        first.params = replace(asked, priority=asked.priority - 1)
        super()._make_way(step)
        first.params = asked


class PenaltiesDoNotWait(Scheduler):
    """With a step in flight, a penalized request draws its next token before it knows the last (`reads_answer` is forgotten)."""

    def schedule(self) -> StepPlan | None:
        self.batch.reads_answer[:] = False
        let_in = self._let_in

        def and_forget(step: StepBuilder) -> None:
            let_in(step)
            self.batch.reads_answer[:] = False

        self._let_in = and_forget  # type: ignore[method-assign]
        plan = super().schedule()
        del self._let_in  # type: ignore[method-assign]
        return plan


class SwapDuplicatesShared(Scheduler):
    """The sequences of a request are swapped out one by one: what they share is copied once for each."""

    def _preempt(self, step: StepBuilder, request: Request) -> None:
        swap_out = self.manager.swap_out

        def one_by_one(seq_ids: list[int]) -> list[tuple[int, int]] | None:
            pairs: list[tuple[int, int]] = []
            for done, seq_id in enumerate(seq_ids):
                some = swap_out([seq_id])
                if some is None and not done:
                    return None
                pairs.extend(some or [])
            return pairs

        self.manager.swap_out = one_by_one  # type: ignore[method-assign]
        super()._preempt(step, request)
        self.manager.swap_out = swap_out  # type: ignore[method-assign]


HISTORICAL: list[tuple[type[Scheduler], str]] = [
    (VictimKeepsItsBudget, "L45"),
    (VictimKeepsItsCopies, "a_group_that_runs_dry"),
    (VictimKeepsItsRoom, "a_group_that_runs_dry"),
    (NeverFitsIsQueued, "L41"),
    (RequeuedInReverse, "L40"),
    (RequeuedAtTheEnd, "L40"),
    (AbortBetweenForkAndWriteLeaks, "L53"),
    (CopiesAfterWrites, "L55"),
    (HitOnALaterStepsBlock, "L29"),
    (PromiseKeptAfterAWithdrawal, "L48"),
    (GroupResumesOneByOne, "L67"),
    (PrefixesMadeTwice, "L65"),
    (FullHitComputesNothing, "L55"),
    (LateBoundary, "L55"),
    (AdmitsAfterPreempting, "L39"),
    (NewcomersFirst, "L39"),
    (EarliestMakesWay, "L44"),
    (LatestMakesWayWhateverItsPriority, "L45"),
    (NobodyLeaves, "L43"),
    (PreemptsForNewcomers, "L43"),
    (UrgentOnesWait, "L45"),
    (ArrivalDecidesWhoMakesWay, "L45_a_waiting"),
    (EqualsMakeWay, "L45"),
    (PenaltiesDoNotWait, "L55_a_penalty"),
    (SwapDuplicatesShared, "L48"),
]
