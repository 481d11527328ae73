"""Plans of steps, written by hand."""

from __future__ import annotations

import numpy as np

from minipaged.scheduling.plan import IN_FLIGHT, StepPlan


def plan_of(
    rows: list[tuple[int, int]],
    *,
    block_size: int = 4,
    draws: list[int] | None = None,
    tables: list[list[int]] | None = None,
    token_ids: list[int] | None = None,
) -> StepPlan:
    """rows: (start, tokens) of each; every row draws, or those of `draws`.

    Tables and tokens may be left out: then every row has blocks of its own, and every third token is in flight.
    """
    starts, lengths = (np.array(column, np.int32) for column in zip(*rows, strict=True))
    blocks = -(-(starts + lengths) // block_size)
    if tables is None:
        free = iter(np.random.default_rng(0).permutation(10_000) + 1)
        tables = [[next(free) for _ in range(count)] for count in blocks.tolist()]
    padded = np.zeros((len(rows), max(map(len, tables))), np.int32)
    for row, table in enumerate(tables):
        padded[row, : len(table)] = table
    if token_ids is None:
        token_ids = [IN_FLIGHT if i % 3 == 0 else 500 + i for i in range(int(lengths.sum()))]
    chosen = list(range(len(rows))) if draws is None else draws
    return StepPlan(
        step=1,
        swap_outs=(),
        swap_ins=(),
        copies=(),
        seq_ids=np.arange(len(rows)),
        slots=np.arange(len(rows), dtype=np.int32)[::-1].copy(),
        starts=starts,
        lengths=lengths,
        token_ids=np.array(token_ids, np.int32),
        tables=padded,
        draw_rows=np.array(chosen, np.int32),
        draw_slots=np.array([50 + i for i in range(len(chosen))], np.int32),
        sampling=None,
    )
