"""The batch's columns and tables: slots taken, left and taken again."""

from __future__ import annotations

import numpy as np

from minipaged.config import SamplingParams
from minipaged.memory.block_manager import BlockManager
from minipaged.scheduling.batch import NO_TOKEN, Batch
from minipaged.scheduling.plan import IN_FLIGHT
from minipaged.scheduling.request import Request, Sequence
from tests.laws.token_world import Asked, World
from tests.scheduling.drawer import Drawer, scheduler_of


def test_many_slots_tables_and_removals() -> None:
    """Tables wider than the batch's first width; a queue that loses most of its members from the middle keeps its order."""
    world = World(BlockManager, num_blocks=300, block_size=1)
    outputs = world.run(
        [Asked((1,) * 30, SamplingParams(max_tokens=30, ignore_eos=True)), Asked((2,), SamplingParams(max_tokens=3))]
    )
    assert len(outputs[0].outputs[0].token_ids) == 30
    scheduler = scheduler_of(max_num_seqs=1)
    for i in range(200):
        scheduler.add(Request(i, (1, 2), SamplingParams(max_tokens=1)))
    for i in range(200):
        if i % 10:
            assert scheduler.abort(i)
    assert len(scheduler.waiting) == 20
    assert [r.request_id for r in scheduler.waiting] == list(range(0, 200, 10))
    scheduler.take_ended()
    order = []
    while scheduler.has_work:
        plan = scheduler.schedule()
        assert plan is not None
        order += [o.request_id for o in scheduler.commit(plan, Drawer().answer(plan))]
    assert order == list(range(0, 200, 10))


def test_no_rows_have_no_tables() -> None:
    """A step that only swaps has tables of no rows and no columns."""
    batch = Batch(4)
    assert batch.table_rows(np.zeros(0, np.int64)).shape == (0, 0)


def test_a_seat_that_was_left_looks_like_one_never_taken() -> None:
    """It names nobody, by a number that no sequence has; the marks in the columns are no tokens, and are told apart."""
    batch = Batch(2)
    sequence = Sequence(5, Request(0, (1, 2), SamplingParams()), [1, 2])
    [slot] = batch.reserve(1)
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
