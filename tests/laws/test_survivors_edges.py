"""What the automatic mutation run (seed 2027) found untested in scheduling: ties, first times, empty steps, and who comes back."""

from __future__ import annotations

import gc
import weakref
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given

from minipaged.config import SamplingParams
from minipaged.scheduling.batch import NO_TOKEN, Batch
from minipaged.scheduling.beam import BeamSearch
from minipaged.scheduling.plan import IN_FLIGHT, StepPlan
from minipaged.scheduling.queue import RequestQueue
from minipaged.scheduling.request import Request, Sequence
from tests.laws.test_scheduler_laws import ran, tight, workloads
from tests.laws.test_survivors_scheduling import Drawer, run, scheduler_of
from tests.laws.token_world import Asked, World


def beam_search_with_two_ended(scores: list[float]) -> tuple[BeamSearch, Any]:
    """Width 2, no length penalty: two hypotheses have ended with scores -2 and -3; then beams with these scores go on. That step."""
    search = BeamSearch(2, 10, frozenset({0}), 0.0, False)
    ids = np.array([[0, 1, 2, 3]] * 2, np.int32)
    first = np.array([[-2.0, -2.5, -2.75, -9.0], [-3.0, -2.625, -2.875, -9.0]], np.float32)
    step = search.advance([0.0, 0.0], ids, first, 0)
    assert [score for score, _ in step.ended] == [-2.0]
    second = np.array([[-0.5, -0.375, -9.0, -9.0], [-9.0, -0.5, -9.0, -9.0]], np.float32)
    step = search.advance([-2.5, -2.625], ids, second, 1)
    assert [score for score, _ in step.ended] == [-3.0]
    assert not step.done
    third = np.array([[-50.0, 0.0, -9.0, -9.0], [-50.0, 0.0, -9.0, -9.0]], np.float32)
    return search, search.advance(scores, ids, third, 2)


@pytest.mark.parametrize(
    ("scores", "done"),
    [([-2.5, -4.0], False), ([-2.999, -3.5], False), ([-3.0, -3.5], True), ([-3.5, -4.0], True)],
)
def test_beams_go_on_while_the_best_can_still_enter(scores: list[float], done: bool) -> None:
    """The best survivor against the worst that ended; a tie cannot push it out."""
    _, step = beam_search_with_two_ended(scores)
    assert step.done is done


def test_no_rows_have_no_tables() -> None:
    """A step that only swaps has tables of no rows and no columns."""
    batch = Batch(4)
    assert batch.table_rows(np.zeros(0, np.int64)).shape == (0, 0)


def test_a_seat_that_was_left_looks_like_one_never_taken() -> None:
    """It names nobody, by a number that no sequence has; the marks in the columns are no tokens, and are told apart."""
    batch = Batch(2)
    sequence = Sequence(5, Request(0, (1, 2), SamplingParams()), [1, 2])
    [slot] = batch.take_slots(1)
    batch.put(sequence, slot, 2, 0)
    assert batch.seq_id[slot] == 5
    batch.remove(sequence)
    assert batch.seq_id[0] == batch.seq_id[1] < 0
    assert batch.sequences == [None, None]
    assert NO_TOKEN < 0 > IN_FLIGHT != NO_TOKEN


def test_tables_widen_seldom() -> None:
    """A table that grows block by block is moved a few times, not at every block."""
    batch = Batch(2)
    widths = set()
    for block in range(1, 1000):
        batch.extend_table(0, (block,))
        widths.add(batch.tables.shape[1])
    assert len(widths) <= 8
    assert batch.tables[0, :999].tolist() == list(range(1, 1000))


def test_a_seat_taken_again_shows_no_blocks_of_the_one_before() -> None:
    """Rows of tables are 0 past their ends, also where a longer table stood before."""
    batch = Batch(2)
    batch.set_table(0, tuple(range(1, 41)))
    batch.set_table(1, (50, 51, 52))
    batch.set_table(0, (60,))
    batch.extend_tables(np.array([1, 0]), [53, 61])
    assert batch.table_rows(np.array([0, 1])).tolist() == [[60, 61, 0, 0], [50, 51, 52, 53]]


def test_a_queue_lets_go_of_those_that_left() -> None:
    """Requests that leave from the middle are not kept in memory until the queue's head comes to them."""
    queue = RequestQueue(lambda request: request.rank)
    requests = [Request(i, (1,), SamplingParams(), arrival=i) for i in range(1000)]
    for request in requests:
        queue.push(request)
    left = [weakref.ref(request) for request in requests[1:-5]]
    for request in requests[1:-5]:
        queue.remove(request)
    del requests, request
    gc.collect()
    assert sum(one() is not None for one in left) <= 64
    assert [one.request_id for one in queue] == [0, 995, 996, 997, 998, 999]


def test_whoever_comes_back_to_a_queue_stands_once_at_its_new_place() -> None:
    queue = RequestQueue(lambda request: request.rank)
    requests = [Request(i, (1,), SamplingParams(), arrival=i) for i in range(3)]
    for request in requests:
        queue.push(request)
    queue.remove(requests[0])
    requests[0].arrival = 9
    queue.push(requests[0])
    assert [one.request_id for one in queue] == [1, 2, 0]
    assert [queue.pop().request_id for _ in range(3)] == [1, 2, 0]
    assert queue.peek() is None


def test_seeds_that_differ_give_streams_that_differ() -> None:
    """Also where they differ in their highest bit only."""
    seeds = [0, 1, 2, 2**31, 2**61, 2**62, 2**62 + 1]
    request = Request(0, (1,), SamplingParams(temperature=1.0), arrival=0)
    assert len({scheduler_of(seed=seed).running_set.seed_of(request) for seed in seeds}) == len(seeds)


def test_who_waits_has_found_nothing_yet() -> None:
    scheduler = scheduler_of()
    scheduler.add(Request(0, (1, 2, 3), SamplingParams()))
    [sequence] = scheduler.sequences.values()
    assert (sequence.num_cached, sequence.num_computed, sequence.index) == (0, 0, 0)
    assert Sequence(7, sequence.request, [1]).index == 0


def test_a_prompt_is_admitted_by_what_is_left_of_it() -> None:
    """L08: five blocks are held by a request with the same beginning; one more (and the watermark's) is enough for the second."""
    scheduler, drawer = scheduler_of(num_blocks=8), Drawer()
    prompt = tuple(range(16))
    scheduler.add(Request(0, (*prompt, 20), SamplingParams(max_tokens=3, ignore_eos=True)))
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.commit(plan, drawer.answer(plan))
    scheduler.add(Request(1, (*prompt, 21), SamplingParams(max_tokens=3, ignore_eos=True)))
    plan = scheduler.schedule()
    assert plan is not None
    assert plan.seq_ids.tolist() == [0, 1]
    assert plan.starts.tolist() == [17, 16]


def test_samples_wait_for_each_other_from_the_first_group_on() -> None:
    """L51: a budget of three, one of it spent on an earlier request: three samples draw all at once, when it has ended, or not at all."""
    scheduler, drawer = scheduler_of(max_num_batched_tokens=3), Drawer()
    scheduler.add(Request(0, (1,), SamplingParams(max_tokens=8, ignore_eos=True)))
    group = Request(1, (2,), SamplingParams(max_tokens=4, n=3, temperature=1.0, ignore_eos=True))
    scheduler.add(group)

    def look(plan: StepPlan) -> None:
        if group.forked:
            drawing = {s.seq_id for s in group.sequences} & set(plan.seq_ids[plan.draw_rows].tolist())
            assert len(drawing) in (0, 3)

    run(scheduler, drawer, look)
    assert [s.num_output for s in group.sequences] == [4, 4, 4]


def test_all_that_fit_come_back_in_one_step() -> None:
    """Two requests that were swapped out return together once the pool is empty."""
    scheduler, drawer = scheduler_of(num_blocks=14, preemption="swap"), Drawer()
    requests = [
        Request(i, (i, 1, 2), SamplingParams(max_tokens=n, ignore_eos=True)) for i, n in enumerate((46, 40, 40))
    ]
    for request in requests:
        scheduler.add(request)
    out = {1, 2}
    for _ in range(200):
        if {r.request_id for r in scheduler.swapped} == out:
            break
        plan = scheduler.schedule()
        assert plan is not None
        scheduler.commit(plan, drawer.answer(plan))
    assert {r.request_id for r in scheduler.swapped} == out
    scheduler.abort(0)
    plan = scheduler.schedule()
    assert plan is not None
    assert len(plan.seq_ids) == 2
    assert len(scheduler.swapped) == 0


@given(workload=workloads(groups=False, most=5), arrangement=tight)
def test_a_draw_for_whoever_was_sent_away_changes_no_neighbour(
    block_manager_class: type, scheduler_class: type, workload: list[Asked], arrangement: dict[str, Any]
) -> None:
    """L55 with two seats, both taken, and a step in flight: what is drawn for a victim goes to the victim alone."""
    plain = [
        Asked(a.prompt, SamplingParams(max_tokens=a.params.max_tokens + 6, ignore_eos=True), a.arrives)
        for a in workload
    ]
    calm = ran(block_manager_class, scheduler_class, plain, {})
    settings = {**arrangement, "limits": {**arrangement["limits"], "max_num_seqs": 2}}
    tense = ran(block_manager_class, scheduler_class, plain, settings, depth=1, max_num_seqs=2)
    assert tense.texts(tense.outputs) == calm.texts(calm.outputs)


def test_a_group_that_runs_dry_takes_its_copies_back(block_manager_class: type, scheduler_class: type) -> None:
    """L45, L14: three samples part beside a long request in pools of every size: some run dry between one sample's copy and the next's."""
    dry = 0
    for size, prompt, host in product(range(9, 13), range(13, 26), (0, 40)):
        world = World(block_manager_class, scheduler_class, num_blocks=1 + size, num_host_blocks=host)
        long = Asked(tuple(range(prompt)), SamplingParams(max_tokens=33 - prompt, ignore_eos=True))
        params = SamplingParams(n=3, temperature=1.0, seed=1, max_tokens=6, ignore_eos=True)
        outputs = world.run([long, Asked((30, 31, 32, 33, 34, 35), params, arrives=1)])
        assert [len(answer.token_ids) for answer in outputs[1].outputs] == [6, 6, 6]
        dry += any(step.dry for step in world.steps)
        world.assert_nothing_is_held()
    assert dry > 20


def test_L25_a_salt_and_L27_prompt_logprobs_at_admission(block_manager_class: type, scheduler_class: type) -> None:
    """What a request finds: nothing under another salt, nothing if it needs its prompt's log-probabilities, else all that is there."""
    world = World(block_manager_class, scheduler_class)
    prompt = tuple(range(12))
    found = []
    for salt, logprobs in (("a", None), ("b", None), ("a", None), (None, None), ("a", 1), (None, 1), (None, None)):
        params = SamplingParams(max_tokens=2, cache_salt=salt, prompt_logprobs=logprobs)
        [output] = world.run([Asked(prompt, params)])
        found.append(output.request.sequences[0].num_cached)
    assert found == [0, 0, 8, 0, 0, 0, 8]


def test_L25_L27_filled_without_being_read(block_manager_class: type, scheduler_class: type) -> None:
    """L27: a request that does not read the cache fills it, under its own salt."""
    world = World(block_manager_class, scheduler_class)
    for salt, logprobs, expected in (("a", 0, 0), ("a", None, 8), (None, None, 0)):
        params = SamplingParams(max_tokens=2, cache_salt=salt, prompt_logprobs=logprobs)
        [output] = world.run([Asked(tuple(range(12)), params)])
        assert output.request.sequences[0].num_cached == expected


def test_samples_differ_and_reruns_do_not(block_manager_class: type, scheduler_class: type) -> None:
    """Each sample has a stream of its own, the same in every run; another seed has others."""
    texts = []
    for seed in (1, 1, 2):
        world = World(block_manager_class, scheduler_class)
        params = SamplingParams(n=4, temperature=1.0, seed=seed, max_tokens=12, ignore_eos=True)
        [output] = world.run([Asked((1, 2, 3), params)])
        texts.append([tuple(answer.token_ids) for answer in output.outputs])
        for step in world.steps:
            if step.plan is not None and step.plan.sampling is not None:
                assert len(set(step.plan.sampling.uniform.tolist())) == len(step.plan.draw_rows) == 4
    assert texts[0] == texts[1]
    assert len({*texts[0], *texts[2]}) == 8
