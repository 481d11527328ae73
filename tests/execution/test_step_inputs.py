"""A step's inputs say what its plan says: read back by hand, for decodes alone and among prompt chunks, padding included."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minipaged.execution.graphs import CHUNK_BUCKETS, MOST_TOKENS, bucket_of, largest_shapes, shape_of
from minipaged.execution.step_inputs import Shape, StepInputs, fill, inputs_of, size_of, views
from minipaged.scheduling.plan import PromptQuery, StepPlan
from tests.execution.plans import plan_of

WIDTH, DUMMY, STALE = 40, 99, 77
VIEWS = StepInputs._fields[: StepInputs._fields.index("longest_chunk")]  # of the buffer; what follows is no part of it

rows = st.tuples(st.integers(0, 40), st.integers(1, 9))


@settings(deadline=None)
@given(st.lists(rows, min_size=1, max_size=12), st.integers(1, 5))
def test_every_token_is_where_the_plan_has_it(asked: list[tuple[int, int]], block_size: int) -> None:
    """In a graph's buffer, which holds what an earlier step left there, and in one that is made for the step."""
    plan = plan_of(asked, block_size=block_size)
    shape = shape_of(plan)
    assert shape is not None
    inputs = views(np.full(size_of(shape, WIDTH * 4), STALE, np.int32), shape, WIDTH * 4)
    assert fill(inputs, plan, block_size, DUMMY) == int((plan.lengths == 1).sum())
    check(inputs, plan, asked, block_size)
    assert inputs.longest_chunk >= plan.lengths.max()
    own = inputs_of(plan, block_size, torch.device("cpu"))
    check(own._replace(**{name: getattr(own, name).numpy() for name in VIEWS}), plan, asked, block_size)
    assert (len(own.token_ids), len(own.draw_tokens)) == (plan.num_tokens, len(plan.draw_rows))
    assert len(own.decode_lengths) + len(own.chunk_lengths) == len(asked)
    assert own.longest_chunk == max((count for _, count in asked if count > 1), default=0)


def check(inputs: StepInputs, plan: StepPlan, asked: list[tuple[int, int]], block_size: int) -> None:
    single = [row for row, (_, count) in enumerate(asked) if count == 1]
    chunks = [row for row, (_, count) in enumerate(asked) if count > 1]
    begins = np.cumsum(plan.lengths) - plan.lengths
    at = 0
    last = {}
    for row in single + chunks:  # decodes first
        start, count = asked[row]
        for i in range(count):
            position = start + i
            block = plan.tables[row, position // block_size]
            assert inputs.token_ids[at] == plan.token_ids[begins[row] + i]
            assert inputs.positions[at] == position
            assert inputs.slot_mapping[at] == block * block_size + position % block_size
            assert inputs.batch_indices[at] == plan.slots[row]
            at += 1
        last[row] = at - 1
    assert not inputs.token_ids[at:].any()
    assert not inputs.positions[at:].any()
    assert (inputs.slot_mapping[at:] == -1).all()
    assert (inputs.batch_indices[at:] == DUMMY).all()
    for i, row in enumerate(single):
        blocks = -(-(asked[row][0] + 1) // block_size)
        assert inputs.decode_lengths[i] == asked[row][0] + 1
        assert inputs.decode_tables[i, :blocks].tolist() == plan.tables[row, :blocks].tolist()
    assert not inputs.decode_lengths[len(single) :].any()
    starts = inputs.chunk_starts.tolist()
    for i, row in enumerate(chunks):
        start, count = asked[row]
        blocks = -(-(start + count) // block_size)
        assert (starts[i], starts[i + 1] - starts[i]) == (last[row] - count + 1, count)
        assert inputs.chunk_lengths[i] == start + count
        assert inputs.chunk_tables[i, :blocks].tolist() == plan.tables[row, :blocks].tolist()
    assert not inputs.chunk_lengths[len(chunks) :].any()
    if chunks:
        assert set(starts[len(chunks) :]) == {plan.num_tokens}, "what follows has no queries"
    if len(inputs.draw_tokens):
        assert inputs.draw_tokens[: len(asked)].tolist() == [last[row] for row in range(len(asked))]
        assert inputs.draw_indices[: len(asked)].tolist() == plan.draw_slots.tolist()
        assert (inputs.draw_indices[len(asked) :] == DUMMY).all()
    else:
        assert not chunks, "only decodes may draw without being asked"


@pytest.mark.parametrize("width", [3, 4, WIDTH])
@pytest.mark.parametrize("asked", [[(8, 3), (5, 1), (0, 2)], [(7, 1)] * 3, [(0, 5)]], ids=str)
def test_every_part_begins_where_a_kernel_may_take_it_for_aligned(asked: list[tuple[int, int]], width: int) -> None:
    """A kernel is compiled anew for pointers that are no multiples of 16 bytes, in the middle of serving."""
    plan = plan_of(asked)
    graph = shape_of(plan)
    assert graph is not None
    for shape in (graph, Shape(plan.num_tokens, 1, 2, 3)):
        buffer = torch.zeros(size_of(shape, width), dtype=torch.int32)
        inputs = views(buffer, shape, width)
        assert not [part for part in inputs[: len(VIEWS)] if (part.data_ptr() - buffer.data_ptr()) % 16]
        assert all(part.is_contiguous() for part in inputs[: len(VIEWS)])


def test_draws_name_the_token_of_their_row_whatever_their_order() -> None:
    plan = plan_of([(8, 3), (5, 1), (0, 2)], draws=[2, 1, 1])
    shape = shape_of(plan)
    assert shape is not None
    inputs = views(np.zeros(size_of(shape, WIDTH), np.int32), shape, WIDTH)
    fill(inputs, plan, 4, DUMMY)
    assert inputs.draw_tokens[:3].tolist() == [5, 0, 0]  # tokens: the decode, three of the first chunk, two of the last
    assert inputs.draw_indices[:3].tolist() == [50, 51, 52]


def test_decodes_have_a_shape_of_their_own_and_large_steps_none() -> None:
    assert shape_of(plan_of([(3, 1)] * 5)) == Shape(8, 8, 0, 0)
    assert shape_of(plan_of([(3, 1)] * 5 + [(0, 40)])) == Shape(64, 16, 4, 16)
    assert shape_of(plan_of([(3, 1)] * 20 + [(0, 300)])) == Shape(384, 64, 4, 64)
    assert shape_of(plan_of([(3, 1)] * 100 + [(0, 2)])) == Shape(256, 256, 4, 256)
    assert shape_of(plan_of([(0, 10)] * 5)) == Shape(64, 16, 32, 16)
    assert shape_of(plan_of([(0, MOST_TOKENS + 1)])) is None
    assert shape_of(plan_of([(0, 2)] * (CHUNK_BUCKETS[-1] + 1))) is None
    queried = plan_of([(0, 5)])
    object.__setattr__(queried, "prompt_queries", (PromptQuery(0, (1,), 0),))
    assert shape_of(queried) is None


@pytest.mark.parametrize("sequences", [1, 20, 256, 1024, 2000])
def test_no_shape_needs_more_room_than_the_largest(sequences: int) -> None:
    largest = largest_shapes(sequences)
    room, most = max(size_of(shape, WIDTH) for shape in largest), max(shape.decodes for shape in largest)
    for decodes in {1, 9, sequences // 2 or 1, sequences}:
        alone = Shape(bucket_of(decodes), bucket_of(decodes), 0, 0)
        assert size_of(alone, WIDTH) <= room
        assert alone.decodes <= most
        mixed = shape_of(plan_of([(0, 1)] * (decodes - 1) + [(0, 600)]))
        assert mixed is None or (size_of(mixed, WIDTH) <= room and mixed.decodes <= most)
