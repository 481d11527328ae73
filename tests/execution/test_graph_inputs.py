"""What a graph is given says what the plan says: read back by hand, for decodes alone and among prompt chunks, padding included."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minipaged.execution import graph_inputs
from minipaged.execution.graph_inputs import (
    CHUNK_BUCKETS,
    MOST_TOKENS,
    Shape,
    bucket_of,
    fill,
    shape_of,
    size_of,
    views,
)
from minipaged.scheduling.plan import IN_FLIGHT, PromptQuery, StepPlan

WIDTH, PARKING, STALE = 40, 99, 77


def plan_of(rows: list[tuple[int, int]], *, block_size: int = 4, draws: list[int] | None = None) -> StepPlan:
    """rows: (start, tokens) of each; every row draws, or those of `draws`."""
    starts, lengths = (np.array(column, np.int32) for column in zip(*rows, strict=True))
    ends = starts + lengths
    blocks = -(-ends // block_size)
    tables = np.zeros((len(rows), int(blocks.max())), np.int32)
    free = iter(np.random.default_rng(0).permutation(10_000) + 1)
    for row, count in enumerate(blocks.tolist()):
        tables[row, :count] = [next(free) for _ in range(count)]
    total = int(lengths.sum())
    chosen = list(range(len(rows))) if draws is None else draws
    slots = np.arange(len(rows), dtype=np.int32)[::-1].copy()
    token_ids = np.arange(500, 500 + total, dtype=np.int32)
    token_ids[::3] = IN_FLIGHT
    return StepPlan(
        step=1,
        swap_outs=(),
        swap_ins=(),
        copies=(),
        seq_ids=np.arange(len(rows)),
        slots=slots,
        starts=starts,
        lengths=lengths,
        token_ids=token_ids,
        tables=tables,
        draw_rows=np.array(chosen, np.int32),
        draw_slots=np.array([50 + i for i in range(len(chosen))], np.int32),
        sampling=None,
    )


rows = st.tuples(st.integers(0, 40), st.integers(1, 9))


@settings(deadline=None)
@given(st.lists(rows, min_size=1, max_size=12), st.integers(1, 5))
def test_every_token_is_where_the_plan_has_it(asked: list[tuple[int, int]], block_size: int) -> None:
    plan = plan_of(asked, block_size=block_size)
    shape = shape_of(plan)
    assert shape is not None
    buffer = np.full(size_of(shape, WIDTH * 4), STALE, np.int32)
    inputs = views(buffer, shape, WIDTH * 4)
    used = fill(inputs, plan, block_size, PARKING)
    single = [row for row, (_, count) in enumerate(asked) if count == 1]
    chunks = [row for row, (_, count) in enumerate(asked) if count > 1]
    assert used == len(single)
    begins = np.cumsum(plan.lengths) - plan.lengths
    at = 0
    last = {}
    for row in single + chunks:  # decodes first
        start, count = asked[row]
        for i in range(count):
            position = start + i
            block = plan.tables[row, position // block_size]
            slot = block * block_size + position % block_size
            expected = [plan.token_ids[begins[row] + i], position, slot, plan.slots[row]]
            assert inputs.tokens[:, at].tolist() == expected
            at += 1
        last[row] = at - 1
    assert (inputs.tokens[:, at:] == np.array([0, 0, -1, PARKING])[:, None]).all()
    for i, row in enumerate(single):
        blocks = -(-(asked[row][0] + 1) // block_size)
        assert inputs.lengths[i] == asked[row][0] + 1
        assert inputs.tables[i, :blocks].tolist() == plan.tables[row, :blocks].tolist()
    assert not inputs.lengths[len(single) :].any()
    if not shape.chunks:
        return
    starts = inputs.chunk_starts.tolist()
    for i, row in enumerate(chunks):
        start, count = asked[row]
        blocks = -(-(start + count) // block_size)
        assert (starts[i], starts[i + 1] - starts[i]) == (last[row] - count + 1, count)
        assert inputs.chunk_lengths[i] == start + count
        assert inputs.chunk_tables[i, :blocks].tolist() == plan.tables[row, :blocks].tolist()
    assert set(starts[len(chunks) :]) == {plan.num_tokens}, "what follows has no queries"
    assert not inputs.chunk_lengths[len(chunks) :].any()
    assert inputs.draws[0, : len(asked)].tolist() == [last[row] for row in range(len(asked))]
    assert inputs.draws[1, : len(asked)].tolist() == plan.draw_slots.tolist()
    assert (inputs.draws[1, len(asked) :] == PARKING).all()


def test_draws_name_the_token_of_their_row_whatever_their_order() -> None:
    plan = plan_of([(8, 3), (5, 1), (0, 2)], draws=[2, 1, 1])
    shape = shape_of(plan)
    assert shape is not None
    inputs = views(np.zeros(size_of(shape, WIDTH), np.int32), shape, WIDTH)
    fill(inputs, plan, 4, PARKING)
    assert inputs.draws[0, :3].tolist() == [5, 0, 0]  # tokens: the decode, three of the first chunk, two of the last
    assert inputs.draws[1, :3].tolist() == [50, 51, 52]


def test_decodes_have_a_shape_of_their_own_and_large_steps_none() -> None:
    assert shape_of(plan_of([(3, 1)] * 5)) == Shape(8, 8, 0)
    assert shape_of(plan_of([(3, 1)] * 5 + [(0, 40)])) == Shape(64, 16, 4)
    assert shape_of(plan_of([(3, 1)] * 20 + [(0, 300)])) == Shape(384, 64, 4)
    assert shape_of(plan_of([(3, 1)] * 100 + [(0, 2)])) == Shape(256, 256, 4)
    assert shape_of(plan_of([(0, 10)] * 5)) == Shape(64, 16, 32)
    assert shape_of(plan_of([(0, MOST_TOKENS + 1)])) is None
    assert shape_of(plan_of([(0, 2)] * (CHUNK_BUCKETS[-1] + 1))) is None
    queried = plan_of([(0, 5)])
    object.__setattr__(queried, "prompt_queries", (PromptQuery(0, (1,), 0),))
    assert shape_of(queried) is None


@pytest.mark.parametrize("sequences", [1, 20, 256, 1024, 2000])
def test_no_shape_needs_more_room_than_the_largest(sequences: int) -> None:
    largest = graph_inputs.largest_shapes(sequences)
    room, most = max(size_of(shape, WIDTH) for shape in largest), max(shape.rows for shape in largest)
    for decodes in {1, 9, sequences // 2 or 1, sequences}:
        alone = Shape(bucket_of(decodes), bucket_of(decodes), 0)
        assert size_of(alone, WIDTH) <= room
        assert alone.rows <= most
        mixed = shape_of(plan_of([(0, 1)] * (decodes - 1) + [(0, 600)]))
        assert mixed is None or (size_of(mixed, WIDTH) <= room and mixed.rows <= most)
