"""A world without tensors in which a scheduler's laws can be watched.

The "model" draws each token from a hash of all tokens that the block table leads to, so a wrong block, a stale copy, a lost swap or a token
computed twice changes the text. Everything a step did is kept, so that a law can look at the whole history.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from minipaged.config import EngineConfig, SamplingParams
from minipaged.engine import Engine
from minipaged.memory.types import BlockEvent
from minipaged.scheduling.plan import IN_FLIGHT, StepPlan, StepTokens
from minipaged.scheduling.request import RequestOutput
from minipaged.scheduling.running_set import SchedulerEvent
from minipaged.scheduling.scheduler import Scheduler

VOCAB = 40
EOS = 5
UNWRITTEN = -7
STUCK = 400  # steps in which no sequence gets further than it ever was: more than the largest workload here computes anew in a row
MOST_CALLS = 500  # of the block manager within one step


class TokenRunner:
    """Executes plans on one integer a slot: the token whose keys and values would lie there."""

    def __init__(self, num_blocks: int, block_size: int, num_host_blocks: int) -> None:
        self.slots = np.full((num_blocks, block_size), UNWRITTEN, np.int64)
        self.host = np.full((max(1, num_host_blocks), block_size), UNWRITTEN, np.int64)
        self.block_size = block_size
        self.newest: dict[int, int] = {}

    def num_blocks(self) -> int:
        return len(self.slots)

    def launch(self, plan: StepPlan) -> TokenPending:
        outs = [h for _, h in plan.swap_outs]
        assert len(set(outs)) == len(outs), "two blocks swapped to one host block"
        self.host[outs] = self.slots[[d for d, _ in plan.swap_outs]]
        ins = [d for _, d in plan.swap_ins]
        self.slots[ins] = self.host[[h for h, _ in plan.swap_ins]]
        sources, targets = {a for a, _ in plan.copies}, [b for _, b in plan.copies]
        assert len(set(targets)) == len(targets), "two copies into one block"
        assert not sources & set(targets), "a copy's destination is another's source"
        for source, target in plan.copies:
            self.slots[target] = self.slots[source]
        contexts = self._write(plan)
        drawn = [self._draw(plan, d, contexts[int(row)]) for d, row in enumerate(plan.draw_rows)]
        for slot, token in zip(plan.draw_slots.tolist(), drawn, strict=True):
            self.newest[slot] = token
        ids = np.array(drawn, np.int32)
        top_ids = top_values = None
        if plan.top_logprobs > 0:
            both = [_ranking(contexts[int(row)]) for row in plan.draw_rows]
            top_ids = np.array([b[0] for b in both], np.int32).reshape(-1, VOCAB)[:, : plan.top_logprobs]
            top_values = np.array([b[1] for b in both], np.float32).reshape(-1, VOCAB)[:, : plan.top_logprobs]
        zeros, ones = np.zeros(len(ids), np.float32), np.ones(len(ids), np.int32)
        return TokenPending(StepTokens(ids, zeros, ones, top_ids, top_values))

    def _write(self, plan: StepPlan) -> list[tuple[int, ...]]:
        contexts, at = [], 0
        for row, (start, length) in enumerate(zip(plan.starts.tolist(), plan.lengths.tolist(), strict=True)):
            tokens = plan.token_ids[at : at + length].tolist()
            at += length
            if tokens[-1] == IN_FLIGHT:
                tokens[-1] = self.newest[int(plan.slots[row])]
            table = plan.tables[row]
            for i, token in enumerate(tokens):
                block, offset = divmod(start + i, self.block_size)
                assert table[block] > 0, "a write into the null block"
                self.slots[table[block], offset] = token
        for row, (start, length) in enumerate(zip(plan.starts.tolist(), plan.lengths.tolist(), strict=True)):
            table = plan.tables[row]
            context = tuple(
                int(self.slots[table[i // self.block_size], i % self.block_size]) for i in range(start + length)
            )
            assert UNWRITTEN not in context, "a read of what nobody wrote"
            contexts.append(context)
        return contexts

    @staticmethod
    def _draw(plan: StepPlan, draw: int, context: tuple[int, ...]) -> int:
        chance = 0
        if plan.sampling is not None and plan.sampling.temperature[draw] > 0:
            chance = int(plan.sampling.uniform[draw] * 2**40)
        changed = plan.adjustments[draw] if plan.adjustments else None
        if changed is not None:  # what is done to the logits changes the draw
            return _hash((*context, changed), chance) % VOCAB
        return _hash(context, chance) % VOCAB


@dataclass
class TokenPending:
    """What a launched step drew."""

    drawn: StepTokens

    def tokens(self) -> StepTokens:
        return self.drawn


def _hash(context: tuple[object, ...], chance: int = 0) -> int:
    return int.from_bytes(hashlib.blake2b(repr((context, chance)).encode(), digest_size=6).digest(), "little")


def _ranking(context: tuple[int, ...]) -> tuple[list[int], list[float]]:
    """All tokens with made-up log-probabilities, the most likely first."""
    generator = np.random.default_rng(_hash(context))
    return generator.permutation(VOCAB).tolist(), sorted((-3.0 * generator.random(VOCAB)).tolist(), reverse=True)


@dataclass(frozen=True)
class Asked:
    """One request of a workload, and the step before which it arrives or is aborted."""

    prompt: tuple[int, ...]
    params: SamplingParams
    arrives: int = 0
    aborted: int | None = None


@dataclass
class Step:
    """What one engine step did, and how things stood after it."""

    plan: StepPlan | None
    events: list[SchedulerEvent | BlockEvent]
    outputs: list[RequestOutput]
    running: list[int]  # request ids in serving order, after the step; ids are given in the order of arrival
    waiting: list[int]
    swapped: list[int]
    rows: dict[int, int]  # request -> rows of the plan
    finished: set[int]
    dry: bool  # whether somebody asked for room and found none


class Progress:
    """L43, watched while a world runs: a step that goes round in circles, or steps that get nowhere, end the run at once."""

    def __init__(self, manager: Any) -> None:
        self._furthest: dict[int, int] = {}  # sequence -> the position up to which it was ever computed
        self._idle = self._calls = 0
        self.dry = False
        for name in ("append", "can_admit", "swap_in"):
            setattr(manager, name, self._counted(getattr(manager, name)))

    def _counted(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self._calls += 1
            assert self._calls < MOST_CALLS, "L43: one step asks the block manager again and again and does not end"
            answer = method(*args, **options)
            self.dry |= answer is None
            return answer

        return call

    def begin(self) -> None:
        """Before a step."""
        self._calls, self.dry = 0, False

    def look(self, step: Step) -> None:
        """After a step: did anything get further?"""
        moved = bool(step.finished)
        if step.plan is not None:
            ends = (step.plan.starts + step.plan.lengths).tolist()
            for seq_id, end in zip(step.plan.seq_ids.tolist(), ends, strict=True):
                if end > self._furthest.get(seq_id, 0):
                    self._furthest[seq_id] = end
                    moved = True
        self._idle = 0 if moved else self._idle + 1
        assert self._idle < STUCK, "L43: step after step computes only what was computed before"


@dataclass
class World:
    """An engine on the token runner, and the history of what it did."""

    block_manager: Any
    scheduler: Any = Scheduler
    num_blocks: int = 400
    block_size: int = 4
    num_host_blocks: int = 0
    watermark: float = 0.0
    prefix_caching: bool = True
    limits: dict[str, Any] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    outputs: list[RequestOutput] = field(default_factory=list)
    workload: list[Asked] = field(default_factory=list)
    judged: int | None = None  # steps up to the one that a law looks at; None: it looks at all of them
    last: ClassVar[World | None] = None  # the one that was run last, to be shown if its law fails

    def __post_init__(self) -> None:
        self.manager = self.block_manager(
            self.num_blocks,
            self.block_size,
            num_host_blocks=self.num_host_blocks,
            prefix_caching=self.prefix_caching,
            watermark=self.watermark,
        )
        config = EngineConfig(**{"max_model_len": 300, **self.limits})
        self.config = config
        self._progress = Progress(self.manager)
        self.control = self.scheduler(config, self.manager, self.block_size)
        self.runner = TokenRunner(self.num_blocks, self.block_size, self.num_host_blocks)
        self.engine = Engine(self.control, self.runner, eos_token_ids=(EOS,))
        self._noted: list[SchedulerEvent | BlockEvent] = []
        take, launch = self.control.take_events, self.runner.launch
        self._plan: StepPlan | None = None

        def noting_take() -> list[SchedulerEvent | BlockEvent]:
            events = take()
            self._noted.extend(events)
            return events  # type: ignore[no-any-return]

        def noting_launch(plan: StepPlan) -> TokenPending:
            self._plan = plan
            self._check_plan(plan)
            return launch(plan)

        self.control.take_events = noting_take
        self.runner.launch = noting_launch  # type: ignore[method-assign]

    def step(self) -> Step:
        """One engine step."""
        self._plan, self._noted = None, []
        self._progress.begin()
        outputs = self.engine.step()
        control = self.control
        owners = {s.seq_id: s.request.request_id for r in control.requests.values() for s in r.sequences}
        for event in self._noted:
            if isinstance(event, SchedulerEvent) and event.sequence is not None:
                owners[event.seq_id] = event.sequence.request.request_id
        rows: dict[int, int] = {}
        if self._plan is not None:
            for seq_id in self._plan.seq_ids.tolist():
                rows[owners[seq_id]] = rows.get(owners[seq_id], 0) + 1
        done = Step(
            plan=self._plan,
            events=self._noted,
            outputs=outputs,
            running=[r.request_id for r in control.running],
            waiting=[r.request_id for r in control.waiting],
            swapped=[r.request_id for r in control.swapped],
            rows=rows,
            finished={o.request_id for o in outputs if o.finished},
            dry=self._progress.dry,
        )
        self.steps.append(done)
        self._progress.look(done)
        self._check_swapped()
        return done

    def _check_plan(self, plan: StepPlan) -> None:
        """L45: what a step copies or swaps to belongs to somebody; nothing goes to the block of a victim that has left.
        L29: what a row reads was written by earlier steps, or is written by a row of this one. L13: what it writes into is its own, but
        for those who share the block once this step has filled it.
        """
        size = self.block_size
        fresh = [b for _, b in plan.copies] + [d for _, d in plan.swap_ins]
        for target in fresh:
            assert self.manager.ref_count(target) > 0, f"the step writes to block {target}, which nobody holds"
        rows = list(zip(plan.seq_ids.tolist(), plan.tables, plan.starts.tolist(), plan.lengths.tolist(), strict=True))
        written: dict[tuple[int, int], int] = {}  # (block, its slot) -> the token that a row of this step writes there
        new_tokens = iter(plan.token_ids.tolist())
        for seq_id, table, start, length in rows:
            for position in range(start, start + length):
                place = int(table[position // size]), position % size
                assert place not in written, f"two rows write to slot {place}"
                written[place] = next(new_tokens)
            for index in range(start // size, (start + length - 1) // size + 1):
                block, end = int(table[index]), (index + 1) * size
                if self.manager.ref_count(block) > 1:
                    assert start + length >= end, f"sequence {seq_id} writes into block {block}, which is shared"
                    for other in self.control.sequences.values():
                        if other.seq_id != seq_id and other.slot >= 0 and block in self.manager.table(other.seq_id):
                            begins = next((s for i, _, s, _ in rows if i == other.seq_id), other.num_computed)
                            assert begins >= end, f"{other} does not share all of block {block}, which {seq_id} writes"
        for seq_id, table, start, _ in rows:
            tokens = self.control.sequences[seq_id].token_ids[:start]
            for position, token in enumerate(tokens):
                place = int(table[position // size]), position % size
                if place[0] not in fresh:
                    there = written.get(place, self.runner.slots[place])
                    assert there == token, f"sequence {seq_id} counts on slot {place}, which no step has written"

    def _check_swapped(self) -> None:
        """L45: a victim on the host holds what it has computed, and no room that it was given for the step in which it left."""
        for request in self.control.swapped:
            for sequence in request.alive:
                held = self.manager.host_table(sequence.seq_id)
                assert len(held) == -(-sequence.num_computed // self.block_size), (
                    f"{sequence} left with {len(held)} blocks"
                )

    def run(self, workload: list[Asked], limit: int = 5000, most_steps: int | None = None) -> list[RequestOutput]:
        """Feed a workload in and run it to the end, or for so many steps."""
        World.last, self.workload = self, workload
        outputs: dict[int, RequestOutput] = {}
        left = dict(enumerate(workload))
        aborts = {i: a.aborted for i, a in left.items() if a.aborted is not None}
        number = 0
        while (left or self.engine.has_work) and (most_steps is None or len(self.steps) < most_steps):
            for i in [i for i, asked in left.items() if asked.arrives <= number]:
                asked = left.pop(i)
                outputs[i] = self.engine.ask(asked.prompt, asked.params)
            for i in [i for i, when in aborts.items() if when <= number and i in outputs]:
                del aborts[i]
                self.engine.abort(outputs[i].request_id)
            if self.engine.has_work:
                self.step()
            number += 1
            assert number < limit, "the workload does not come to an end"
        return [outputs[i] for i in range(len(workload)) if i in outputs]

    def history(self) -> Iterator[Step]:
        """The steps, one after another. Where a law fails at one of them, its replay ends there."""
        World.last = self
        for number, step in enumerate(self.steps, 1):
            self.judged = number
            yield step
        self.judged = None

    def texts(self, outputs: list[RequestOutput]) -> list[list[tuple[list[int], str]]]:
        """Tokens and finish reason of every answer."""
        return [[(o.token_ids, o.finish_reason) for o in output.outputs] for output in outputs]

    def assert_nothing_is_held(self) -> None:
        """Every block is free again, on the device and on the host."""
        usage = self.manager.usage()
        assert usage.referenced == 0
        assert usage.free + usage.null == usage.total
        assert usage.host_free == usage.host_total
        assert self.control.batch.num_free == self.config.max_num_seqs
