"""Laws L37-L55: what a scheduler over paged memory must obey, watched in a world of tokens (token_world.py)."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from minipaged.config import SamplingParams
from minipaged.errors import RequestError
from minipaged.memory.types import BlockEvent
from minipaged.scheduling.running_set import SchedulerEvent
from tests.laws.token_world import EOS, Asked, Step, World


@st.composite
def params(draw: st.DrawFn, *, groups: bool = True) -> SamplingParams:
    kind = draw(
        st.sampled_from(["greedy", "greedy", "sampled", "several", "beams"] if groups else ["greedy", "sampled"])
    )
    common: dict[str, Any] = {"max_tokens": draw(st.integers(1, 24)), "priority": draw(st.integers(-2, 2))}
    common["ignore_eos"] = draw(st.booleans())
    if kind == "beams":
        return SamplingParams(beam_width=draw(st.integers(1, 3)), early_stopping=draw(st.booleans()), **common)
    if kind == "several":
        return SamplingParams(n=draw(st.integers(2, 4)), temperature=1.0, seed=draw(st.integers(0, 9)), **common)
    if kind == "sampled":
        return SamplingParams(temperature=1.0, seed=draw(st.integers(0, 9)), **common)
    return SamplingParams(**common)


@st.composite
def crowds(draw: st.DrawFn) -> list[Asked]:
    """Many requests at once that all grow for long: whatever pool just holds the largest of them, most will be sent away."""
    return [
        Asked(asked.prompt, replace(asked.params, max_tokens=draw(st.integers(12, 24)), ignore_eos=True), asked.arrives)
        for asked in draw(workloads(least=6, most=10))
    ]


@st.composite
def workloads(draw: st.DrawFn, *, groups: bool = True, least: int = 1, most: int = 7) -> list[Asked]:
    """Requests with a few common beginnings, so that the prefix cache has something to find."""
    stems = draw(st.lists(st.lists(st.integers(0, 39), min_size=1, max_size=14), min_size=1, max_size=3))
    asked = []
    for _ in range(draw(st.integers(least, most))):
        tail = draw(st.lists(st.integers(0, 39), max_size=12))
        prompt = tuple(draw(st.sampled_from(stems)) + tail)
        asked.append(Asked(prompt, draw(params(groups=groups)), arrives=draw(st.integers(0, 12))))
    return asked


tight = st.fixed_dictionaries(
    {
        "slack": st.integers(0, 12),  # blocks beyond what the largest request may need
        "block_size": st.sampled_from([2, 3, 4]),
        "num_host_blocks": st.sampled_from([0, 10, 60]),
        "watermark": st.sampled_from([0.0, 0.1]),
        "prefix_caching": st.booleans(),
        "limits": st.fixed_dictionaries(
            {
                "preemption": st.sampled_from(["recompute", "swap", "auto"]),
                "max_num_batched_tokens": st.sampled_from([4, 9, 500]),
                "max_num_seqs": st.sampled_from([4, 6, 32]),
            }
        ),
    }
)


def blocks_of(num_prompt: int, params: SamplingParams, block_size: int) -> int:
    """Blocks that a request may need: its prompt's full ones are held once, the rest by each of its sequences."""
    shared = num_prompt // block_size
    return shared + params.num_sequences * (-(-(num_prompt + params.max_tokens) // block_size) - shared)


def most_blocks(workload: list[Asked], block_size: int) -> int:
    """Blocks that the largest request of the workload may need."""
    return max(blocks_of(len(asked.prompt), asked.params, block_size) for asked in workload)


def ran(kind: type, scheduler: type, workload: list[Asked], arrangement: dict[str, Any], **limits: Any) -> World:
    """A world in which the workload was run to its end: a tight pool, or a roomy one if the arrangement names no slack."""
    settings = {**arrangement, "limits": {**arrangement.get("limits", {}), **limits}}
    slack = settings.pop("slack", None)
    if slack is not None:
        settings["num_blocks"] = 1 + most_blocks(workload, settings["block_size"]) + slack
    shown, calm = World.last, not arrangement and not limits
    world = World(kind, scheduler, **settings)
    world.outputs = world.run(workload)
    if calm and shown is not None:
        World.last = shown  # what is compared with a calm run is worth looking at, not that run
    return world


def of_kind(step: Step, *kinds: str) -> list[SchedulerEvent]:
    return [e for e in step.events if isinstance(e, SchedulerEvent) and e.kind in kinds]


@given(workload=workloads(), arrangement=tight)
def test_L37_budget_and_sequence_limit(
    block_manager_class: type, scheduler_class: type, workload: list[Asked], arrangement: dict[str, Any]
) -> None:
    """The tokens of a step never exceed the token budget; running sequences never exceed their limit."""
    world = ran(block_manager_class, scheduler_class, workload, arrangement)
    for step in world.history():
        if step.plan is not None:
            assert step.plan.num_tokens <= world.config.max_num_batched_tokens
            assert len(step.plan.seq_ids) == len(set(step.plan.seq_ids.tolist())) <= world.config.max_num_seqs
            assert step.plan.lengths.min(initial=1) >= 1


@given(workload=workloads(), budget=st.sampled_from([4, 5, 9, 64]))
def test_L38_any_chunking_gives_the_same_output(
    block_manager_class: type, scheduler_class: type, workload: list[Asked], budget: int
) -> None:
    """Progress is only num_computed towards num_tokens; any chunking of the prompt gives the same output."""
    whole = ran(block_manager_class, scheduler_class, workload, {})
    chunked = ran(block_manager_class, scheduler_class, workload, {}, max_num_batched_tokens=budget)
    assert chunked.texts(chunked.outputs) == whole.texts(whole.outputs)
    done: dict[int, int] = {}
    for step in chunked.history():
        for event in of_kind(step, "admit", "rejoin"):
            done[event.seq_id] = event.amount
        if step.plan is not None:
            for seq_id, start, length in zip(step.plan.seq_ids, step.plan.starts, step.plan.lengths, strict=True):
                assert done.get(int(seq_id), int(start)) == start, "tokens were skipped or computed twice"
                done[int(seq_id)] = int(start + length)


@given(workload=workloads(), arrangement=tight, policy=st.sampled_from(["fcfs", "priority"]))
def test_L39_running_before_waiting(
    block_manager_class: type, scheduler_class: type, workload: list[Asked], arrangement: dict[str, Any], policy: str
) -> None:
    """Running sequences come before waiting ones; a step that preempted admits nobody."""
    world = ran(block_manager_class, scheduler_class, workload, arrangement, policy=policy)
    before: set[int] = set()
    for step in world.history():
        admitted = {e.seq_id for e in of_kind(step, "admit")}
        came = {e.sequence.request.request_id for e in of_kind(step, "admit") if e.sequence is not None}
        for event in of_kind(step, "rejoin"):  # forked again in a request that runs already, or that has just come back
            assert event.sequence is not None
            assert event.sequence.request.request_id in before | came, "forked again in a request that does not run"
            if event.sequence.request.request_id in came:
                admitted.add(event.seq_id)
        if of_kind(step, "preempt"):
            assert not admitted, f"a step that preempted admitted {sorted(admitted)}"
        if step.plan is not None and admitted:
            rows = [int(i) in admitted for i in step.plan.seq_ids]
            assert rows == sorted(rows), "a newcomer stands before a running sequence"
        before = set(step.running)
    assert not before


@given(workload=workloads(), arrangement=tight)
def test_L40_the_latest_arrival_makes_way(
    block_manager_class: type, scheduler_class: type, workload: list[Asked], arrangement: dict[str, Any]
) -> None:
    """Under fcfs the victim is the latest arrival; several victims re-queue in arrival order. Nobody makes way while there is room."""
    world = ran(block_manager_class, scheduler_class, workload, arrangement, policy="fcfs")
    running: list[int] = []
    for step in world.history():
        left = list(running)
        for event in of_kind(step, "preempt"):
            assert event.sequence is not None
            assert step.dry, "somebody makes way, and everybody found room"
            victim = event.sequence.request.request_id
            if victim in left:
                assert victim == max(left)
                left.remove(victim)
        assert step.waiting == sorted(step.waiting)
        assert step.running == sorted(step.running)
        running = step.running


@given(workload=workloads(), longest=st.integers(1, 200), width=st.integers(1, 4))
def test_L41_what_never_fits_is_refused_and_the_queue_moves_on(
    block_manager_class: type, scheduler_class: type, workload: list[Asked], longest: int, width: int
) -> None:
    """A request that can never fit is refused at submission with a clear error, and the queue moves on."""
    world = World(block_manager_class, scheduler_class, num_blocks=40, limits={"max_num_seqs": 16})
    assume(most_blocks(workload, world.block_size) < world.num_blocks)
    asked = SamplingParams(max_tokens=longest, n=width, temperature=1.0)
    if blocks_of(20, asked, world.block_size) <= world.num_blocks - 1:
        world.engine.submit(list(range(20)), asked)
    else:
        with pytest.raises(RequestError, match=r"pool has 39"):
            world.engine.submit(list(range(20)), asked)
        assert not world.engine.has_work
    with pytest.raises(RequestError, match=r"context"):
        world.engine.submit([1] * 300, SamplingParams(max_tokens=1))
    with pytest.raises(RequestError, match=r"empty"):
        world.engine.submit([], SamplingParams(max_tokens=1))
    for output in world.run(workload):
        assert output.finished
        assert output.error is None
    world.assert_nothing_is_held()


@given(watermark=st.floats(0.0, 0.5), workload=workloads(), arrangement=tight)
def test_L42_the_watermark_gates_admission_only(
    block_manager_class: type,
    scheduler_class: type,
    watermark: float,
    workload: list[Asked],
    arrangement: dict[str, Any],
) -> None:
    """The watermark gates admission, never growth; with nothing running it may not block."""
    world = ran(block_manager_class, scheduler_class, workload, {**arrangement, "watermark": watermark})
    for step in world.history():
        if not step.running and not step.finished and step.plan is None:
            assert not step.waiting, "nothing runs, and yet the watermark holds somebody back"
    assert all(o.finished for o in world.outputs)


PROMPT = (1, 31, 1, 0, 5, 8, 11, 31, 0, 5, 19, 0, 3, 36)
BEAMS_SHORT_OF_ROOM = [  # one that makes way for three beams holds fewer blocks than they need
    Asked(PROMPT, SamplingParams(max_tokens=7, temperature=0.0), arrives=3),
    Asked((*PROMPT, 0), SamplingParams(max_tokens=11, temperature=0.0), arrives=6),
    Asked(PROMPT, SamplingParams(max_tokens=1, temperature=0.0, priority=1), arrives=5),
    Asked((*PROMPT, 0, 2), SamplingParams(max_tokens=21, temperature=0.0, beam_width=3), arrives=5),
    Asked((*PROMPT, *[0] * 11), SamplingParams(max_tokens=5, temperature=0.0), arrives=6),
]
TEN_HOST_BLOCKS = {
    "slack": 1,
    "block_size": 4,
    "num_host_blocks": 10,
    "watermark": 0.0,
    "prefix_caching": False,
    "limits": {"preemption": "swap", "max_num_batched_tokens": 9, "max_num_seqs": 6},
}


@example(workload=BEAMS_SHORT_OF_ROOM, arrangement=TEN_HOST_BLOCKS, policy="priority")
@given(workload=workloads(), arrangement=tight, policy=st.sampled_from(["fcfs", "priority"]))
def test_L43_every_step_gets_somewhere(
    block_manager_class: type,
    scheduler_class: type,
    workload: list[Asked],
    arrangement: dict[str, Any],
    policy: str,
) -> None:
    """While any request is alive, every step schedules a token, or finishes or refuses a request."""
    world = ran(block_manager_class, scheduler_class, workload, arrangement, policy=policy)
    idle = 0
    for step in world.history():
        moved = (step.plan is not None and step.plan.num_tokens > 0) or step.finished
        idle = 0 if moved else idle + 1
        assert idle <= 1, "two steps in a row did nothing"
        if not moved:
            assert of_kind(step, "preempt"), "a step did nothing, and nobody made way in it"


@given(workload=workloads(), arrangement=tight)
def test_L44_the_earliest_is_never_preempted(
    block_manager_class: type, scheduler_class: type, workload: list[Asked], arrangement: dict[str, Any]
) -> None:
    """Under fcfs the earliest request is never preempted for a later one; each request finishes in bounded steps."""
    world = ran(block_manager_class, scheduler_class, workload, arrangement, policy="fcfs")
    alive: set[int] = set()
    for step in world.history():
        for event in of_kind(step, "submit", "preempt"):
            assert event.sequence is not None
            request_id = event.sequence.request.request_id
            alive.add(request_id)
            assert event.kind == "submit" or alive == {request_id} or request_id != min(alive)
        alive -= step.finished
    work = sum((len(a.prompt) + a.params.max_tokens) * a.params.num_sequences for a in workload)
    assert len(world.steps) <= 20 + work * (2 + len(workload))


@given(workload=workloads(), arrangement=tight)
def test_L45_priority(
    block_manager_class: type, scheduler_class: type, workload: list[Asked], arrangement: dict[str, Any]
) -> None:
    """Under priority the most urgent is visited first and the victim is the least urgent, latest arrival; what it was given in this step
    is given back."""
    world = ran(block_manager_class, scheduler_class, workload, arrangement, policy="priority")
    service_key = {
        o.request_id: (a.params.priority, o.request_id) for a, o in zip(workload, world.outputs, strict=True)
    }
    running: list[int] = []
    for step in world.history():
        for queue in (step.running, step.waiting, step.swapped):
            assert [service_key[r] for r in queue] == sorted(service_key[r] for r in queue)
        left, gone = list(running), set()
        for event in of_kind(step, "preempt"):
            assert event.sequence is not None
            victim = event.sequence.request.request_id
            urgent = any(service_key[r][0] < service_key[victim][0] for r in step.waiting)
            assert step.dry or urgent, "somebody makes way, and everybody found room"
            gone.add(event.seq_id)
            if victim in left:
                assert service_key[victim] == max(service_key[r] for r in left)
                left.remove(victim)
        if step.plan is not None:
            assert not gone & set(step.plan.seq_ids.tolist()), "a victim is still in the plan"
            copies = [e for e in step.events if isinstance(e, BlockEvent) and e.kind == "copy" and e.seq_id in gone]
            taken_back = {(e.block, e.other) for e in copies}
            assert not taken_back & set(step.plan.copies), "a victim's copy is still in the plan"
        running = step.running


@given(priorities=st.lists(st.integers(0, 3), min_size=3, max_size=3), urgent=st.integers(0, 3))
def test_L45_a_waiting_request_displaces_the_less_urgent(
    block_manager_class: type, scheduler_class: type, priorities: list[int], urgent: int
) -> None:
    """Three that hold all blocks, and one that arrives after them: the least urgent, latest arrival makes way if it is less urgent, and the
    new one comes in with the next step. Arrival alone displaces nobody."""
    everybody = [*priorities, urgent]
    workload = [
        Asked((number,) * 5, SamplingParams(max_tokens=8, priority=priority, ignore_eos=True), arrives=number)
        for number, priority in enumerate(everybody)
    ]
    limits = {"policy": "priority", "preemption": "recompute"}
    world = World(block_manager_class, scheduler_class, num_blocks=4, block_size=16, limits=limits)
    world.run(workload)
    less = [i for i in range(3) if priorities[i] > urgent]
    victim = max(less, key=lambda i: (priorities[i], i), default=None)
    stay = sorted({0, 1, 2} - {victim}, key=lambda i: (priorities[i], i))
    arrival = world.steps[3]
    left = [e.sequence.request.request_id for e in of_kind(arrival, "preempt") if e.sequence is not None]
    assert (left, arrival.running) == ([] if victim is None else [victim], stay)
    expected = stay if victim is None else sorted([*stay, 3], key=lambda i: (everybody[i], i))
    assert world.steps[4].running == expected


@given(workload=workloads(), arrangement=tight)
def test_L46_recompute_changes_no_text(
    block_manager_class: type, scheduler_class: type, workload: list[Asked], arrangement: dict[str, Any]
) -> None:
    """Preemption by recompute keeps the output and the sampler's state: the final text is unchanged."""
    calm = ran(block_manager_class, scheduler_class, workload, {})
    tense = ran(block_manager_class, scheduler_class, workload, arrangement, preemption="recompute")
    assert tense.texts(tense.outputs) == calm.texts(calm.outputs)


@given(workload=crowds(), arrangement=tight)
def test_L48_a_full_host_pool_falls_back_to_recompute(
    block_manager_class: type, scheduler_class: type, workload: list[Asked], arrangement: dict[str, Any]
) -> None:
    """Host pool full: that request falls back to recompute, alone."""
    calm = ran(block_manager_class, scheduler_class, workload, {})
    world = ran(
        block_manager_class, scheduler_class, workload, {**arrangement, "num_host_blocks": 6}, preemption="swap"
    )
    assert world.texts(world.outputs) == calm.texts(calm.outputs)
    for step in world.history():
        moved = {e.seq_id for e in step.events if isinstance(e, BlockEvent) and e.kind == "swap_out"}
        victims: dict[int, set[int]] = {}
        for event in of_kind(step, "preempt"):
            assert event.sequence is not None
            victims.setdefault(event.sequence.request.request_id, set()).add(event.seq_id)
        for request_id, sequences in victims.items():
            if not moved & sequences and request_id not in step.swapped:
                assert request_id in step.waiting or request_id in step.finished
        assert not set(step.waiting) & set(step.swapped)
    world.assert_nothing_is_held()


@given(workload=crowds(), arrangement=tight)
def test_L50_swapped_return_before_new_ones_start(
    block_manager_class: type, scheduler_class: type, workload: list[Asked], arrangement: dict[str, Any]
) -> None:
    """Under fcfs swapped requests return before new ones are admitted; under priority both are one queue, in order of service."""
    for policy in ("fcfs", "priority"):
        world = ran(
            block_manager_class,
            scheduler_class,
            workload,
            {**arrangement, "slack": arrangement["slack"] // 4, "num_host_blocks": 200},
            policy=policy,
            preemption="swap",
        )
        turn = {
            o.request_id: (a.params.priority if policy == "priority" else 0, o.request_id)
            for a, o in zip(workload, world.outputs, strict=True)
        }
        swapped: list[int] = []
        for step in world.history():
            admitted = [e.sequence.request.request_id for e in of_kind(step, "admit") if e.sequence is not None]
            returned = [r for r in admitted if r in swapped]
            entered = [r for r in admitted if r not in swapped]
            if policy == "fcfs":
                queues = [(returned, step.swapped), (entered, step.waiting)]
                assert not (entered and step.swapped), "a new request starts before a swapped one has returned"
            else:
                queues = [(admitted, step.swapped + step.waiting)]
            for came, left in queues:
                order = [turn[r] for r in dict.fromkeys(came)]
                assert order == sorted(order)
                assert all(turn[one] > order[-1] for one in left if order), "the head of the queue was overtaken"
            swapped = step.swapped


@given(workload=workloads(), arrangement=tight)
def test_L51_a_request_stays_together(
    block_manager_class: type, scheduler_class: type, workload: list[Asked], arrangement: dict[str, Any]
) -> None:
    """The sequences of one request are scheduled, swapped and resumed together; the budget counts all of them."""
    world = ran(block_manager_class, scheduler_class, workload, arrangement)
    ended: set[int] = set()
    for step in world.history():
        assert not set(step.running) & set(step.swapped)
        assert not set(step.running) & set(step.waiting)
        born = {e.seq_id for e in step.events if isinstance(e, BlockEvent) and e.kind == "fork"}
        if step.plan is not None:
            drawing = set(step.plan.seq_ids[step.plan.draw_rows].tolist())
            for output in world.outputs:
                if output.request.beams is None:
                    lines = {s.seq_id for s in output.request.sequences} - ended - born
                    assert lines & drawing in (set(), lines), "some samples draw before the others"
        ended |= {e.seq_id for e in of_kind(step, "finish", "abort")}


@given(workload=workloads(), arrangement=tight)
def test_L52_a_source_is_not_handed_out_in_its_step(
    block_manager_class: type, scheduler_class: type, workload: list[Asked], arrangement: dict[str, Any]
) -> None:
    """A block that a step copies or swaps from is not handed out again within that step."""
    world = ran(block_manager_class, scheduler_class, workload, {**arrangement, "num_host_blocks": 60})
    for step in world.history():
        plan = step.plan
        if plan is None:
            continue
        written = {b for _, b in plan.copies} | {d for _, d in plan.swap_ins}
        for table, start, length in zip(plan.tables, plan.starts.tolist(), plan.lengths.tolist(), strict=True):
            written |= set(table[start // world.block_size : (start + length - 1) // world.block_size + 1].tolist())
        copied_from, swapped_from = {a for a, _ in plan.copies}, {d for d, _ in plan.swap_outs}
        assert not copied_from & {b for _, b in plan.copies}
        assert not swapped_from & written
        assert not {h for h, _ in plan.swap_ins} & {h for _, h in plan.swap_outs}
        for source in copied_from & written:  # its other owner may write on in its own slots: one writer only
            owners = [t for t in plan.tables if source in t.tolist()]
            assert len(owners) == 1


@given(workload=crowds(), arrangement=tight, data=st.data(), depth=st.sampled_from([0, 1, 3]))
def test_L53_abort_in_any_state_returns_everything(
    block_manager_class: type,
    scheduler_class: type,
    workload: list[Asked],
    arrangement: dict[str, Any],
    data: st.DataObject,
    depth: int,
) -> None:
    """Abort in any state (waiting, running, swapped, between chunks, between fork and write, in flight) returns everything."""
    marked = [
        Asked(a.prompt, a.params, a.arrives, data.draw(st.none() | st.integers(a.arrives, a.arrives + 40)))
        for a in workload
    ]
    calm = ran(block_manager_class, scheduler_class, workload, {})
    crowded = {**arrangement, "slack": arrangement["slack"] // 4, "num_host_blocks": 2 * arrangement["num_host_blocks"]}
    world = ran(block_manager_class, scheduler_class, marked, crowded, depth=depth)
    world.assert_nothing_is_held()
    assert not world.control.requests
    assert not world.control.sequences
    ends = Counter(request_id for step in world.steps for request_id in step.finished)
    assert ends == Counter(output.request_id for output in world.outputs), "an end is reported once"
    for asked, ended, whole in zip(marked, world.outputs, calm.outputs, strict=True):
        reasons = {s.finish_reason for s in ended.request.sequences}
        if "abort" not in reasons:
            assert [o.token_ids for o in ended.outputs] == [o.token_ids for o in whole.outputs]
        else:
            assert asked.aborted is not None


@given(workload=workloads(), arrangement=tight)
def test_L54_the_same_seed_gives_the_same_run(
    block_manager_class: type, scheduler_class: type, workload: list[Asked], arrangement: dict[str, Any]
) -> None:
    """The same seed and the same arrivals give identical block ids, schedule and event log."""
    runs = [ran(block_manager_class, scheduler_class, workload, arrangement) for _ in range(2)]
    first, second = ([_log(step) for step in world.steps] for world in runs)
    assert first == second


def _log(step: Step) -> Any:
    plan = step.plan
    events = [tuple(e)[:4] if isinstance(e, SchedulerEvent) else e for e in step.events]
    if plan is None:
        return events
    rows = (plan.seq_ids.tolist(), plan.starts.tolist(), plan.lengths.tolist(), plan.tables.tolist())
    return events, rows, plan.copies, plan.swap_outs, plan.swap_ins


@given(
    workload=workloads(),
    arrangement=tight,
    depth=st.sampled_from([0, 1, 3]),
    policy=st.sampled_from(["fcfs", "priority"]),
)
def test_L55_outputs_do_not_depend_on_the_schedule(
    block_manager_class: type,
    scheduler_class: type,
    workload: list[Asked],
    arrangement: dict[str, Any],
    depth: int,
    policy: str,
) -> None:
    """Greedy and seeded text is the same alone, batched, chunked, preempted, swapped, and with steps in flight."""
    together = ran(block_manager_class, scheduler_class, workload, arrangement, depth=depth, policy=policy)
    for asked, output in zip(workload, together.outputs, strict=True):
        alone = ran(block_manager_class, scheduler_class, [Asked(asked.prompt, asked.params)], {})
        assert alone.texts(alone.outputs) == together.texts([output])
        for answer in output.outputs if asked.params.beam_width is None else []:
            stops = [i for i, token in enumerate(answer.token_ids) if token == EOS and not asked.params.ignore_eos]
            length = stops[0] + 1 if stops else asked.params.max_tokens
            assert (len(answer.token_ids), answer.finish_reason) == (length, "stop" if stops else "length")
    together.assert_nothing_is_held()


@given(
    prompts=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), min_size=1, max_size=4),
    penalty=st.sampled_from(["repetition_penalty", "presence_penalty", "frequency_penalty"]),
    depth=st.sampled_from([1, 3]),
    temperature=st.sampled_from([0.0, 1.0]),
)
def test_L55_a_penalty_knows_all_of_the_answer(
    block_manager_class: type,
    scheduler_class: type,
    prompts: list[list[int]],
    penalty: str,
    depth: int,
    temperature: float,
) -> None:
    """With steps in flight as without: who is penalized for what it has drawn waits until that is known. Neighbours do not."""
    asked = SamplingParams(max_tokens=7, ignore_eos=True, seed=3, temperature=temperature, **{penalty: 1.5})  # type: ignore[arg-type]
    plain = SamplingParams(max_tokens=7, ignore_eos=True)
    workload = [Asked(tuple(p), plain if i % 3 == 2 else asked) for i, p in enumerate(prompts)]
    ahead = ran(block_manager_class, scheduler_class, workload, {}, depth=depth)
    calm = ran(block_manager_class, scheduler_class, workload, {})
    assert ahead.texts(ahead.outputs) == calm.texts(calm.outputs)
    if not calm.outputs[2:]:
        return
    neighbour = [step.rows.get(2, 0) for step in ahead.steps if step.plan is not None]
    assert sum(neighbour[:7]) == 7, "one that reads nothing draws in each step"
