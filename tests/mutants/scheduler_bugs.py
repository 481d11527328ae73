"""Historical bugs of schedulers, each put into the real one. The docstring is the bug; the spec must find every one.

A mutant changes one method, or what goes in and out of it, and leaves the rest alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from minipaged.errors import RequestError
from minipaged.scheduling.plan import StepPlan
from minipaged.scheduling.records import Draft
from minipaged.scheduling.request import Request, Sequence
from minipaged.scheduling.scheduler import Scheduler

Slots = npt.NDArray[np.int64]


class VictimKeepsItsBudget(Scheduler):
    """A victim that was scheduled already in this step keeps its tokens in it."""

    def _make_room(self, draft: Draft, slots: Slots, take: Slots, ends: Slots, i: int) -> None:
        before, last = take.copy(), {int(s): self.batch.seq_id[s] for s in slots}
        super()._make_room(draft, slots, take, ends, i)
        for k, slot in enumerate(slots.tolist()):
            if before[k] and not take[k] and self.batch.sequences[slot] is None:
                take[k] = before[k]
                self.batch.seq_id[slot] = last[slot]


class VictimKeepsItsCopies(Scheduler):
    """A victim's copies stay in the step, though their destinations are free again."""

    def _preempt(self, draft: Draft, request: Request) -> None:
        copies = dict(draft.copies)
        super()._preempt(draft, request)
        draft.copies.update(copies)


class VictimKeepsItsRoom(Scheduler):
    """A victim that leaves by swap takes the room along that it was given for this step."""

    def _preempt(self, draft: Draft, request: Request) -> None:
        truncate = self.manager.truncate
        self.manager.truncate = lambda *_: None  # type: ignore[method-assign]
        super()._preempt(draft, request)
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

    def _preempt(self, draft: Draft, request: Request) -> None:
        arrival = request.arrival
        request.arrival = -arrival
        super()._preempt(draft, request)


class RequeuedAtTheEnd(Scheduler):
    """A victim goes to the end of the queue, behind those that arrived after it."""

    def _preempt(self, draft: Draft, request: Request) -> None:
        request.arrival = self._arrivals
        self._arrivals += 1
        super()._preempt(draft, request)


class AbortBetweenForkAndWriteLeaks(Scheduler):
    """A sequence that is aborted between its fork and its first own write keeps what it shares."""

    def end(self, sequence: Sequence, reason: str) -> None:
        child = reason == "abort" and sequence.parent >= 0 and sequence.slot >= 0
        if child and int(self.batch.computed[sequence.slot]) == len(sequence.token_ids) - 1:
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
        self._flights[-1] = plan
        return plan


class HitBeforeWrite(Scheduler):
    """A prompt's blocks are reported computed when its request is let in: others of the same step find them before they are written."""

    def _seat(self, request: Request, rooms: list[int]) -> None:
        super()._seat(request, rooms)
        for sequence, room in zip(request.alive, rooms, strict=True):
            self.mark(sequence, min(room, len(sequence.token_ids)))


class FullHitComputesNothing(Scheduler):
    """What was found in the cache is taken to the last token: nothing is left to compute, so the first draw is lost."""

    def _seat(self, request: Request, rooms: list[int]) -> None:
        for sequence in request.alive:
            if sequence.num_cached and sequence.num_cached + self.block_size >= len(sequence.token_ids):
                sequence.computed = len(sequence.token_ids) - 1
        super()._seat(request, rooms)


class LateBoundary(Scheduler):
    """Room for the next block is asked for one token after it is needed."""

    def _schedule_running(self, draft: Draft) -> None:
        slots = self.order()
        self.batch.room[slots] += 1
        super()._schedule_running(draft)
        slots = np.array([s for s in slots if self.batch.sequences[int(s)] is not None], np.int64)
        self.batch.room[slots] -= 1


class AdmitsAfterPreempting(Scheduler):
    """A step that has just sent somebody away lets the next one in."""

    def _schedule_running(self, draft: Draft) -> None:
        super()._schedule_running(draft)
        draft.preempted = False


class NewcomersFirst(Scheduler):
    """Whoever waits is let in before the running ones have been served."""

    def _schedule_running(self, draft: Draft) -> None:
        before = self.order()
        self._resume_and_admit(draft)
        self._order = before
        super()._schedule_running(draft)
        self._order = None


class EarliestMakesWay(Scheduler):
    """The victim is the earliest of the running requests."""

    def _make_room(self, draft: Draft, slots: Slots, take: Slots, ends: Slots, i: int) -> None:
        self.running.reverse()
        super()._make_room(draft, slots, take, ends, i)
        self.running.reverse()


class LatestMakesWayWhateverItsPriority(Scheduler):
    """The victim is the latest arrival, also where it is the most urgent."""

    def _make_room(self, draft: Draft, slots: Slots, take: Slots, ends: Slots, i: int) -> None:
        ranked = self.running
        self.running = sorted(ranked, key=lambda request: request.arrival)
        super()._make_room(draft, slots, take, ends, i)
        self.running = [request for request in ranked if request in self.running]


class NobodyLeaves(Scheduler):
    """The victim is told to leave and keeps its seat: the step looks for room for ever."""

    def _preempt(self, draft: Draft, request: Request) -> None:
        draft.preempted = True


class PreemptsForNewcomers(Scheduler):
    """While somebody waits, the last of the running makes way, and is the next to be let in: they chase each other for ever."""

    def _schedule_running(self, draft: Draft) -> None:
        if len(self.waiting) and self.running and not self.batch.busy.any():
            self._preempt(draft, self.running[-1])
        super()._schedule_running(draft)


class SwapDuplicatesShared(Scheduler):
    """The sequences of a request are swapped out one by one: what they share is copied once for each."""

    def _preempt(self, draft: Draft, request: Request) -> None:
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
        super()._preempt(draft, request)
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
    (HitBeforeWrite, "L37"),
    (FullHitComputesNothing, "L55"),
    (LateBoundary, "L55"),
    (AdmitsAfterPreempting, "L39"),
    (NewcomersFirst, "L39"),
    (EarliestMakesWay, "L44"),
    (LatestMakesWayWhateverItsPriority, "L45"),
    (NobodyLeaves, "L43"),
    (PreemptsForNewcomers, "L43"),
    (SwapDuplicatesShared, "L48"),
]
