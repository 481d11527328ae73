"""A fast simulation of one system on one workload: a second, short scheduler on a virtual clock.

Why a second scheduler. The engine itself, run on the simulated runner (engine_run.py, `--system engine`), decides token
by token. On one processor that takes 0.7 ms a request with Alpaca, 6 ms with ShareGPT and 14 ms with four beams; this loop
takes 30 to 240 times less, because it jumps to the next event and counts blocks without naming them. Fig. 12 of the paper
searches for sustained rates in 415 runs of 1.6 million requests in all: 23 s here; at the rates above the engine would need
between twenty minutes and three hours. The loop also charges what some systems waste in time and the engine does not do:
padded prompts, ended rows that are computed on, caches that are copied at every step.

What keeps it honest: tests/lab/test_loop_equals_engine.py runs the same workload in both, for paging and for every
system whose memory the engine can use. Every request must enter and end at the same femtosecond, with as many steps and
preemptions, and the pool breakdown over time must agree within half a percent of the pool. Where the samples of a
request share blocks, saved blocks must agree within two percent and the makespan within one. Two things are simplified
and not held: a prefix that all requests share is there from the start, and the beams of beam search live and die by a
random tree (beams.py).

It is given requests, a memory (simulated_memory.py) and step times (roofline.py); simulate.py chooses them by a system's name. Time is in
whole femtoseconds.

One step is: room for one more token in every decoding row (where there is none, the latest arrival leaves, to be
computed anew); admissions in order of arrival, whose head blocks the line; one forward pass over decoding rows and
prompt chunks. While nobody is admitted or computes a prompt, decode steps are regular, and with `jump` the loop
takes as many at once as there are until the next finish or arrival: in closed form where the memory is steady, by a
short loop where blocks are taken on demand. The outcome is the same to the last digit.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np

from minipaged.lab.simulation.roofline import FEMTO, Roofline
from minipaged.lab.simulation.simulated_memory import SimulatedMemory
from minipaged.lab.simulation.time_average import Sample, TimeAverages
from minipaged.lab.simulation.workloads import FloatColumn, Workload


@dataclass(frozen=True, slots=True)
class SystemBehaviour:
    """How a system computes, apart from what it holds."""

    max_rows: int = 256  # sequences that run side by side
    token_budget: int = 2048  # tokens a step; a batch that nobody joins computes all its prompts in one pass
    max_len: int = 2048
    padded: bool = False  # prompts are padded to the longest of the batch, and read so
    ended_rows_run: bool = False  # a row that ended computes on until its batch ends
    copies_each_step: bool = False  # every decode step writes the whole cache anew, one slot longer
    copies_on_merge: bool = False  # a request that joins makes the whole cache be written anew


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What happened to each request, and to the pool over time."""

    first_token: FloatColumn  # [requests] seconds since the start; nan if refused
    finish: FloatColumn  # [requests] as above
    refused: int
    preemptions: int
    steps: int
    makespan: float  # seconds
    averages: TimeAverages
    samples: tuple[Sample, ...]


@dataclass(slots=True)
class Prefill:
    """A request whose known tokens are being computed."""

    index: int
    total: int  # tokens to compute: the prompt, and every row's answer so far if it was preempted
    computed: int


class EventLoop:
    """Made for one run. `progress`, if given, is called now and then with how many requests are done, and how many
    there are.
    """

    def __init__(
        self,
        load: Workload,
        memory: SimulatedMemory,
        clock: Roofline,
        behaviour: SystemBehaviour,
        *,
        jump: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.memory, self.clock, self.behaviour, self.progress = memory, clock, behaviour, progress
        self.jump = jump and memory.regular
        self.n = load.samples
        self.count = len(load)
        self.arrivals = [round(t * FEMTO) for t in load.arrivals.tolist()]
        self.prompts, self.outputs = load.prompts.tolist(), load.outputs.tolist()
        self.drawn = [0] * self.count  # tokens of the answer known when the request last waited
        self.first, self.finish = [-1] * self.count, [-1] * self.count
        self.now = self.head = self.arrived = self.done = 0
        self.refused = self.preemptions = self.steps = self.turn = 0
        self.again: list[int] = []  # preempted requests, a heap: all of them arrived before the head
        self.prefills: list[Prefill] = []
        self.pending = 0  # tokens that they have still to compute
        self.ends: list[tuple[int, int]] = []  # heap of (turn of the last token, index); some are stale
        self.end_of: dict[int, int] = {}  # decoding requests -> that turn
        self.latest: list[int] = []  # heap of -index; entries of those that left are stale
        self.rows = 0  # decoding rows whose answers are wanted
        self.context = 0  # tokens written in them, each row's own count
        self.written = 0  # distinct slots written, prompts under way included
        self.ended_rows = 0  # rows that ended in a batch that still runs
        self.ended_context = 0  # tokens in them, and left padding
        self.averages = TimeAverages(warm=min(self.count // 10, 2000))
        self.samples: list[Sample] = []
        self.sample_every = max(1, self.count // 400)

    def run(self) -> Outcome:
        """All requests, from time 0 to the last finish."""
        arrivals, count = self.arrivals, self.count
        while self.done < count:
            while self.arrived < count and arrivals[self.arrived] <= self.now:
                self.arrived += 1
            preempted = self._make_room()
            if not preempted:
                self._admit()
            if self.prefills:
                self._mixed_step()
            elif self.rows:
                self._decode_steps(one=preempted or not self.jump)
            elif self.arrived < count and not self.waiting:
                self.now = arrivals[self.arrived]
        return Outcome(
            _seconds(self.first),
            _seconds(self.finish),
            self.refused,
            self.preemptions,
            self.steps,
            self.now / FEMTO,
            self.averages,
            tuple(self.samples),
        )

    @property
    def waiting(self) -> bool:
        """Whether a request waits for room."""
        return self.head < self.arrived or bool(self.again)

    # ---- who runs

    def _make_room(self) -> bool:
        """Room for the next token of every decoding row; True if somebody had to leave for it."""
        preempted = False
        while self.rows and not self.memory.take_step():
            preempted = True
            self._preempt()
        return preempted

    def _preempt(self) -> None:
        """The latest arrival of all that run leaves; what it held is computed anew when it returns."""
        under_way = {p.index: p for p in self.prefills}
        index = -heappop(self.latest)
        while index not in self.end_of and index not in under_way:
            index = -heappop(self.latest)
        self.preemptions += 1
        if index in under_way:
            prefill = under_way[index]
            self.prefills.remove(prefill)
            self.pending -= prefill.total - prefill.computed
            self.written -= prefill.computed - self.memory.cached
            self.memory.leave(index, self.prompts[index] + self.drawn[index], decoding=False)
        else:
            self.drawn[index] = self.outputs[index] - (self.end_of[index] - self.turn)
            self._leave(index, self.prompts[index] + self.drawn[index] - 1)
        heappush(self.again, index)

    def _leave(self, index: int, written: int) -> None:
        del self.end_of[index]
        self.rows -= self.n
        self.context -= self.n * written
        self.written -= self.memory.slots(index, written)
        self.memory.leave(index, written)

    def _admit(self) -> None:
        behaviour, memory = self.behaviour, self.memory
        budget = behaviour.token_budget - self.rows
        running = len(self.end_of) + len(self.prefills)
        entered = False
        while self.again or self.head < self.arrived:
            if (memory.joins and self.pending >= budget) or (running + 1) * self.n > behaviour.max_rows:
                break
            index = self.again[0] if self.again else self.head
            prompt, drawn = self.prompts[index], self.drawn[index]
            fits = prompt + self.outputs[index] <= behaviour.max_len
            taken = fits and memory.admit(index, prompt + drawn)
            if not taken and fits and running:
                break
            if self.again:
                heappop(self.again)
            else:
                self.head += 1
            if not taken:  # too long, or too large even for an empty pool
                self.refused += 1
                self.done += 1
                continue
            entered = True
            running += 1
            total = prompt + self.n * drawn
            self.prefills.append(Prefill(index, total, memory.cached))
            self.pending += total - memory.cached
            heappush(self.latest, -index)
        if entered:
            memory.close()

    # ---- steps

    def _mixed_step(self) -> None:
        """One forward pass over the decoding rows and as much of the prompts as the budget holds."""
        clock, behaviour = self.clock, self.behaviour
        grown, copied = self.memory.step_slots(self.rows) if self.rows else (0, 0)
        tokens = draws = self.rows + self.ended_rows
        pairs = reads = self.context + self.ended_context + tokens
        if behaviour.copies_on_merge or (behaviour.copies_each_step and tokens):
            copied += reads - tokens
        left = behaviour.token_budget - self.rows if self.memory.joins else self.pending
        ready: list[Prefill] = []
        longest = max(p.total for p in self.prefills) if behaviour.padded else 0
        for prefill in self.prefills:
            start = prefill.computed
            take = min(prefill.total - start, left)
            if take <= 0:
                break
            left -= take
            self.pending -= take
            self.written += take
            prefill.computed += take
            span = longest or take
            tokens += span
            reads += start + span
            pairs += span * start + span * (span + 1) // 2
            if prefill.computed == prefill.total:
                draws += self.n
                ready.append(prefill)
                self.ended_context += (span - take) * self.n
        self.turn += 1
        self.context += self.rows
        self.written += grown
        self.ended_context += self.ended_rows
        del self.prefills[: len(ready)]
        for prefill in ready:
            copied += self._start(prefill)
        self._spend(clock.step(tokens, draws, reads, pairs) + copied * clock.copy_fs)
        for prefill in ready:
            if self.first[prefill.index] < 0:
                self.first[prefill.index] = self.now
        self._finish()

    def _start(self, prefill: Prefill) -> int:
        """The next token of a computed request is drawn: its rows decode from here on. Returns the slots copied for
        that.
        """
        index = prefill.index
        known = self.prompts[index] + self.drawn[index]
        end = self.turn + self.outputs[index] - self.drawn[index] - 1
        self.end_of[index] = end
        heappush(self.ends, (end, index))
        self.rows += self.n
        self.context += self.n * known
        self.written += self.memory.slots(index, known) - (prefill.total - self.memory.cached)
        return self.memory.start(index, known)

    def _decode_steps(self, *, one: bool) -> None:
        """Decode steps until the next finish or arrival; only one, if so wanted. Room for the first was taken."""
        while self.end_of.get(self.ends[0][1]) != self.ends[0][0]:
            heappop(self.ends)
        most = 1 if one else self.ends[0][0] - self.turn
        call = self.arrivals[self.arrived] if not self.waiting and self.arrived < self.count else None
        if self.memory.steady and not one:
            self._leap(most, call)
        else:
            for step in range(most):
                if step and ((call is not None and self.now >= call) or not self.memory.take_step()):
                    break
                grown, copied = self.memory.step_slots(self.rows)
                all_rows = self.rows + self.ended_rows
                reads = self.context + self.ended_context + all_rows
                if self.behaviour.copies_each_step:
                    copied += reads - all_rows
                self._advance(1, grown)
                self._spend(
                    self.clock.decode_base(all_rows) + self.clock.decode_slope() * reads + copied * self.clock.copy_fs
                )
        self._finish()

    def _leap(self, most: int, call: int | None) -> None:
        """`most` decode steps at once, or as many as bring the clock to `call`; the memory holds the same
        throughout.
        """
        all_rows, rows = self.rows + self.ended_rows, self.rows
        first = self.context + self.ended_context + all_rows  # tokens read by the first step
        slope = self.clock.decode_slope()
        base = self.clock.decode_base(all_rows)
        if self.behaviour.copies_each_step:
            slope += self.clock.copy_fs
            base -= self.clock.copy_fs * all_rows
        step = base + slope * first  # femtoseconds of the first step
        more = slope * all_rows  # what each next one adds

        def elapsed(k: int) -> int:
            return k * step + more * (k * (k - 1) // 2)

        k = most
        if call is not None and self.now + elapsed(most) >= call:
            k = max(1, bisect_left(range(most), call - self.now, key=elapsed))
        before = self.written
        self._advance(k, k * rows)
        self.now += elapsed(k)
        self.steps += k
        # Step i lasts step + i * more and ends with before + (i + 1) * rows slots written; the breakdown is linear in them.
        ones, squares = k * (k - 1) // 2, (k - 1) * k * (2 * k - 1) // 6
        slots = step * (k * (before + rows) + rows * ones) + more * ((before + rows) * ones + rows * squares)
        waiting = self.waiting
        empty, full = self.memory.breakdown(0, waiting=waiting), self.memory.breakdown(1, waiting=waiting)
        average = self.averages.span(self.done, waiting)
        average.add(elapsed(k), len(self.end_of), rows, empty, (0, 0))
        for i, (low, high) in enumerate(zip(empty, full, strict=True)):
            average.pool[i] += (high - low) * slots

    def _advance(self, steps: int, grown: int) -> None:
        self.turn += steps
        self.context += steps * self.rows
        self.ended_context += steps * self.ended_rows
        self.written += grown

    def _spend(self, elapsed: int) -> None:
        """Let time pass in the state that the step leaves."""
        self.now += elapsed
        self.steps += 1
        waiting = self.waiting
        self.averages.span(self.done, waiting).add(
            elapsed,
            len(self.end_of) + len(self.prefills),
            self.rows,
            self.memory.breakdown(self.written, waiting=waiting),
            self.memory.blocks(),
        )

    def _finish(self) -> None:
        """Requests whose last token was just drawn leave."""
        ends = self.ends
        while ends and ends[0][0] <= self.turn:
            end, index = heappop(ends)
            if self.end_of.get(index) != end:
                continue
            if self.done % self.sample_every == 0:
                self._sample()
            written = self.prompts[index] + self.outputs[index] - 1
            self._leave(index, written)
            self.finish[index] = self.now
            self.done += 1
            if self.behaviour.ended_rows_run:
                self.ended_rows += self.n
                self.ended_context += self.n * written
        if not self.rows:
            self.ended_rows = self.ended_context = 0

    def _sample(self) -> None:
        pool = self.memory.breakdown(self.written, waiting=self.waiting)
        self.samples.append(Sample(self.now / FEMTO, len(self.end_of), self.rows, pool))
        if self.progress is not None:
            self.progress(self.done, self.count)


def _seconds(times: list[int]) -> FloatColumn:
    """Femtoseconds as seconds; nan where nothing happened."""
    return np.array([t / FEMTO if t >= 0 else np.nan for t in times])
