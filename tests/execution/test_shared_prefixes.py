"""Which decodes are found to share their first blocks, and how they reach the kernel."""

from __future__ import annotations

import numpy as np
import pytest

from minipaged.execution import shared_prefixes
from minipaged.execution.graphs import shape_of
from minipaged.execution.shared_prefixes import shared_groups, tile_room
from minipaged.execution.step_inputs import fill, size_of, views
from minipaged.kernels.attention.decode_shared import TILE_ROWS
from minipaged.scheduling.plan import StepPlan
from tests.execution.plans import plan_of


@pytest.fixture(autouse=True)
def any_saving(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_prefixes, "FEWEST_TOKENS", 1)
    monkeypatch.setattr(shared_prefixes, "FEWEST_COMMON", 1)


def decodes(tables: list[list[int]], starts: list[int]) -> StepPlan:
    return plan_of([(start, 1) for start in starts], block_size=4, tables=tables)


def test_rows_share_what_all_of_their_group_have() -> None:
    tables = [[1, 2, 3, 9], [5, 6], [1, 2, 3, 4, 8], [5, 7], [1, 2, 6, 10], [11, 12]]
    assert shared_groups(decodes(tables, [14, 6, 17, 7, 13, 5]), 4) == [([0, 2, 4], 8), ([1, 3], 4)]


def test_a_block_that_is_written_is_nobodys_else() -> None:
    """Nor are zeros behind the tables, nor what a window gave back."""
    assert shared_groups(decodes([[1, 2], [1, 2]], [5, 7]), 4) == [([0, 1], 4)]
    assert shared_groups(decodes([[1], [1]], [2, 3]), 4) == []
    assert shared_groups(decodes([[0, 2, 3], [0, 2, 3]], [9, 9]), 4) == []


def test_prompts_and_small_savings_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    together = [[1, 2, 3], [1, 2, 4], [1, 2, 5]]
    assert shared_groups(plan_of([(8, 1), (8, 1), (8, 2)], block_size=4, tables=together), 4) == []
    monkeypatch.setattr(shared_prefixes, "FEWEST_TOKENS", 16)
    assert shared_groups(decodes(together, [8, 8, 8]), 4) == [([0, 1, 2], 8)]
    monkeypatch.setattr(shared_prefixes, "FEWEST_TOKENS", 17)
    assert shared_groups(decodes(together, [8, 8, 8]), 4) == []
    monkeypatch.setattr(shared_prefixes, "FEWEST_TOKENS", 16)
    monkeypatch.setattr(shared_prefixes, "FEWEST_COMMON", 9)
    assert shared_groups(decodes(together, [8, 8, 8]), 4) == []


def test_there_is_room_for_those_that_save_most() -> None:
    """Pairs of rows, each with a beginning of its own, ever longer; a graph has not room for a tile each."""
    pairs = 20
    tables = [
        [*range(1 + 100 * pair, 3 + 100 * pair + pair), 5000 + 2 * pair + i] for pair in range(pairs) for i in (0, 1)
    ]
    plan = decodes(tables, [4 * len(table) - 1 for table in tables])
    groups = shared_groups(plan, 4)
    assert len(groups) == tile_room(2 * pairs) == 5
    assert [tokens for _, tokens in groups] == [4 * (2 + pair) for pair in (19, 18, 17, 16, 15)]


def test_tiles_reach_the_buffer_and_stale_ones_go() -> None:
    count = TILE_ROWS + 3
    plan = decodes([[1, 2, 10 + row] for row in range(count)] + [[90, 91, 92]], [9] * (count + 1))
    groups = shared_groups(plan, 4)
    shape = shape_of(plan, shared=True)
    assert shape is not None
    inputs = views(np.full(size_of(shape, 3), 77, np.int32), shape, 3)
    fill(inputs, plan, 4, 0, groups)
    shared = inputs.shared
    assert shared is not None
    assert shared.rows[0].tolist() == list(range(TILE_ROWS))
    assert shared.rows[1].tolist() == [TILE_ROWS, TILE_ROWS + 1, TILE_ROWS + 2] + [-1] * (TILE_ROWS - 3)
    assert shared.tile_tokens.tolist() == [8, 8] + [0] * (shape.tiles - 2)
    assert shared.row_tokens.tolist() == [8] * count + [0] * (shape.decodes - count)
    plain = shape_of(plan)
    assert plain is not None
    assert views(np.zeros(size_of(plain, 3), np.int32), plain, 3).shared is None
