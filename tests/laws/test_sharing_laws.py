"""Laws L29, L65, L67 and L68: what a scheduler makes of a block manager that shares. Watched in a world of tokens (token_world.py)."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipaged.config import SamplingParams
from minipaged.errors import RequestError
from minipaged.memory.types import BlockEvent
from tests.laws.test_scheduler_laws import blocks_of, of_kind, params, ran, tight, workloads
from tests.laws.token_world import Asked, World

# ---- L29: no hit before the step that writes the block is scheduled


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("budget", [3, 4, 5])
def test_L29_a_prompt_given_up_between_two_chunks_is_found_as_far_as_it_came(
    block_manager_class: type, scheduler_class: type, budget: int, depth: int
) -> None:
    """Its twin finds the full blocks of the steps that were scheduled, and none that a later step would have written."""
    params, prompt = SamplingParams(max_tokens=2, ignore_eos=True), tuple(range(30))
    for steps in range(1, 7):
        limits = {"max_num_batched_tokens": budget, "depth": depth}
        world = World(block_manager_class, scheduler_class, limits=limits)
        twins = [Asked(prompt, params, aborted=steps), Asked(prompt, params, arrives=steps)]
        outputs = world.run(twins)
        assert outputs[1].request.sequences[0].num_cached == min(steps * budget, 29) // 4 * 4


# ---- L65: equal prefixes are computed once


@pytest.mark.parametrize("later", [False, True], ids=["at once", "a step later"])
@pytest.mark.parametrize("budget", [7, 2048])
@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("samples", [1, 3])
def test_L65_sixteen_prompts_with_one_beginning(
    block_manager_class: type, scheduler_class: type, samples: int, depth: int, budget: int, later: bool
) -> None:
    """100 tokens in common and 9 of their own, in one call: the common full blocks are computed by the first alone."""
    settings = SamplingParams(max_tokens=1, n=samples, temperature=float(samples > 1), seed=1)
    common = tuple(i % 40 for i in range(100))
    workload = [
        Asked((*common, *(number + i for i in range(9))), settings, arrives=int(later and number > 0))
        for number in range(16)
    ]
    limits = {"depth": depth, "max_num_batched_tokens": budget}
    world = World(block_manager_class, scheduler_class, block_size=16, limits=limits)
    outputs = world.run(workload)
    assert [o.request.sequences[0].num_cached for o in outputs] == [0] + [96] * 15
    assert world.control.counters.computed_tokens == 109 + 15 * 13
    assert max(len(of_kind(step, "admit")) for step in world.steps) == (16 - later if budget == 2048 else 1)


def common_blocks(one: tuple[int, ...], other: tuple[int, ...], block_size: int) -> int:
    """Full blocks at the beginning of `other`, its last token left out, that `one` has as well."""
    most = min(len(one), len(other) - 1) // block_size
    return next((i for i in range(most) if one[: (i + 1) * block_size] != other[: (i + 1) * block_size]), most)


@given(
    workload=workloads(least=2),
    block_size=st.sampled_from([1, 2, 4]),
    budget=st.sampled_from([4, 7, 500]),
    data=st.data(),
)
def test_L65_equal_prefixes_are_computed_once(
    block_manager_class: type,
    scheduler_class: type,
    workload: list[Asked],
    block_size: int,
    budget: int,
    data: st.DataObject,
) -> None:
    """Whoever is scheduled in the same step or later finds every full block that an earlier request's prompt has in common with its own,
    with any number of steps in flight."""
    depth = data.draw(st.sampled_from([0, 1, 3]))
    world = World(
        block_manager_class,
        scheduler_class,
        block_size=block_size,
        limits={"depth": depth, "max_num_batched_tokens": budget},
    )
    outputs = world.run(workload)
    prompts = {output.request_id: output.prompt_token_ids for output in outputs}
    before: list[tuple[int, ...]] = []  # of those that were admitted earlier
    for step in world.history():
        for event in of_kind(step, "admit"):
            assert event.sequence is not None
            prompt = prompts[event.sequence.request.request_id]
            seen = [common_blocks(other, prompt, block_size) for other in before]
            assert event.amount >= max(seen, default=0) * block_size
            before.append(prompt)
    assert len(before) == len(prompts)


# ---- L67: a group that was recomputed shares again what it shared


def held(world: World) -> dict[tuple[int, tuple[int, ...]], int]:
    """Distinct blocks with what each forked request has computed, by the request and the lengths of its sequences."""
    found = {}
    for request in world.control.running:
        present = [s for s in request.alive if s.slot >= 0]
        if request.forked and len(present) == len(request.alive):
            tables = [world.manager.table(s.seq_id)[: -(-s.num_computed // world.block_size)] for s in present]
            blocks = {block for table in tables for block in table}
            found[request.request_id, tuple(len(s.token_ids) for s in present)] = len(blocks)
    return found


class Watched(World):
    """Keeps what every forked request holds after each step: the most, by its sequences' lengths."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.most: dict[tuple[int, tuple[int, ...]], int] = {}

    def step(self) -> Any:
        done = super().step()
        for key, count in held(self).items():
            self.most[key] = max(count, self.most.get(key, 0))
        return done


def one_by_one(world: World) -> list[int]:
    """Sequences of a returning group that began neither by a fork nor with what the cache had, beside the first."""
    wrong = []
    for step in world.history():
        helped = {
            e.seq_id for e in step.events if isinstance(e, BlockEvent) and e.kind in ("fork", "cache_hit", "swap_in")
        }
        came = of_kind(step, "admit", "rejoin")
        alone = [e.sequence for e in came if e.seq_id not in helped and e.sequence is not None]
        counts = Counter(sequence.request.request_id for sequence in alone)
        wrong += [request_id for request_id, count in counts.items() if count > 1]
    return wrong


@pytest.mark.parametrize("prefix_caching", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("budget", [9, 500])
@pytest.mark.parametrize(
    "asked",
    [
        SamplingParams(n=4, temperature=1.0, seed=1, max_tokens=30, ignore_eos=True),
        SamplingParams(beam_width=4, max_tokens=30, ignore_eos=True),
    ],
    ids=["samples", "beams"],
)
def test_L67_a_recomputed_group_holds_no_more_than_before(
    block_manager_class: type, scheduler_class: type, asked: SamplingParams, budget: int, prefix_caching: bool
) -> None:
    """A long prompt in several samples or beams beside a request that grows until they must go: they come back as one and part again."""
    prompt = tuple(i % 40 for i in range(42))
    workload = [
        Asked((39, 38, 37), SamplingParams(max_tokens=200, ignore_eos=True)),
        Asked(prompt, asked, arrives=145),
    ]
    limits = {"preemption": "recompute", "max_num_batched_tokens": budget}
    calm = Watched(block_manager_class, scheduler_class, prefix_caching=prefix_caching, limits=limits)
    expected = calm.texts(calm.run(workload))
    tense = Watched(block_manager_class, scheduler_class, num_blocks=57, prefix_caching=prefix_caching, limits=limits)
    assert tense.texts(tense.run(workload)) == expected
    assert tense.control.counters.preemptions > 0
    assert not one_by_one(tense)
    more = {key: (count, calm.most[key]) for key, count in tense.most.items() if count > calm.most[key]}
    assert not more, f"(request, lengths) -> blocks held, and without preemption: {more}"
    tense.assert_nothing_is_held()


@given(workload=workloads(), arrangement=tight)
def test_L67_any_group_that_returns(
    block_manager_class: type, scheduler_class: type, workload: list[Asked], arrangement: dict[str, Any]
) -> None:
    """Whatever made it leave, a group holds at no length more blocks than it would have without."""
    limits = {**arrangement["limits"], "preemption": "recompute"}
    size, caching = arrangement["block_size"], arrangement["prefix_caching"]
    calm = Watched(block_manager_class, scheduler_class, block_size=size, prefix_caching=caching, limits=limits)
    calm.run(workload)
    pool = 1 + max(blocks_of(len(a.prompt), a.params, size) for a in workload) + arrangement["slack"]
    tense = Watched(
        block_manager_class, scheduler_class, num_blocks=pool, block_size=size, prefix_caching=caching, limits=limits
    )
    tense.run(workload)
    assert not one_by_one(tense)
    more = {key: (count, calm.most[key]) for key, count in tense.most.items() if count > calm.most[key]}
    assert not more, f"(request, lengths) -> blocks held, and without preemption: {more}"


# ---- L68: what can be held is admitted


def test_L68_samples_that_fit_are_admitted(block_manager_class: type, scheduler_class: type) -> None:
    """A prompt of 25 blocks in four samples: 29 blocks at the peak, of a pool that could not hold four prompts."""
    asked = SamplingParams(n=4, temperature=1.0, max_tokens=16, ignore_eos=True)
    limits = {"max_model_len": 500}
    world = World(block_manager_class, scheduler_class, num_blocks=100, block_size=16, limits=limits)
    peak = 0
    output = world.engine.ask([1] * 400, asked)
    assert output.error is None
    while world.engine.has_work:
        world.step()
        peak = max(peak, world.manager.usage().referenced)
    assert [len(answer.token_ids) for answer in output.outputs] == [16] * 4
    assert peak == 29
    World(block_manager_class, scheduler_class, num_blocks=30, block_size=16, limits=limits).engine.submit(
        [1] * 400, asked
    )
    small = World(block_manager_class, scheduler_class, num_blocks=29, block_size=16, limits=limits)
    with pytest.raises(RequestError, match=r"may need 29 blocks .*, 16 a block\); the pool has 28"):
        small.engine.submit([1] * 400, asked)


@given(prompt=st.lists(st.integers(0, 39), min_size=1, max_size=20), asked=params(), arrangement=tight)
def test_L68_the_smallest_pool_that_holds_a_request_serves_it(
    block_manager_class: type,
    scheduler_class: type,
    prompt: list[int],
    asked: SamplingParams,
    arrangement: dict[str, Any],
) -> None:
    """A pool of exactly its blocks serves it, whatever the watermark and the budget; one block less and it is refused."""
    size = arrangement["block_size"]
    workload = [Asked(tuple(prompt), asked)]
    world = ran(block_manager_class, scheduler_class, workload, {**arrangement, "slack": 0})
    assert [output.finished for output in world.outputs] == [True]
    assert world.outputs[0].error is None
    world.assert_nothing_is_held()
    less = blocks_of(len(prompt), asked, size)
    if less >= 2:
        small = World(block_manager_class, scheduler_class, num_blocks=less, block_size=size)
        with pytest.raises(RequestError, match=f"may need {less} blocks"):
            small.engine.submit(prompt, asked)


def test_L68_a_prompt_that_waits_is_hashed_once(block_manager_class: type, scheduler_class: type) -> None:
    """The head of the queue is looked up when it is first tried, and not again in each step that finds no room for it."""
    world = World(block_manager_class, scheduler_class, num_blocks=11)
    manager, lookups = world.control.manager, 0
    lookup = manager.lookup

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal lookups
        lookups += 1
        return lookup(*args, **options)

    manager.lookup = manager.match_prefix = counted
    long = Asked(tuple(range(20)), SamplingParams(max_tokens=20, ignore_eos=True))
    late = Asked(tuple(range(20, 40)), SamplingParams(max_tokens=4, ignore_eos=True), arrives=2)
    outputs = world.run([long, late])
    assert sum(outputs[1].request_id in step.waiting for step in world.steps) > 10
    assert lookups == 2
