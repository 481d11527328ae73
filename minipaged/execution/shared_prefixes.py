"""Which decodes of a step begin with the same blocks, so that attention can read these once for many of them.

Found in the block tables, whatever the reason: a system prompt, samples of one request, beams. One level: rows are grouped by their first
block, and share as many as all of the group have in common.
"""

from __future__ import annotations

import numpy as np

from minipaged.kernels.attention.decode_shared import TILE_ROWS
from minipaged.scheduling.plan import StepPlan

# Where it pays (measured, kernels/README.md): the tokens that rows have in common, and those that a group is saved from reading again.
# Below, the extra launch and the join cost more; the pages come from L2 anyway.
FEWEST_COMMON = 768
FEWEST_TOKENS = 32768


def tile_room(rows: int) -> int:
    """Tiles that a graph of so many decodes has room for: twice what one group of all of them needs, at least two."""
    return max(2, 2 * rows // TILE_ROWS)


def shared_groups(plan: StepPlan, block_size: int) -> list[tuple[list[int], int]]:
    """(rows, the leading tokens that all of them share), those that save most first, in no more tiles than there is room for.

    Empty unless the step is of decodes alone, one a row.
    """
    rows, width = plan.tables.shape
    if len(plan.token_ids) != rows or rows * width * block_size < FEWEST_TOKENS:
        return []
    first, owner, counts = np.unique(plan.tables[:, 0], return_inverse=True, return_counts=True)
    found: list[tuple[list[int], int]] = []
    for group in np.flatnonzero((counts > 1) & (first > 0)):  # block 0 is the null block: nothing is there
        members = np.flatnonzero(owner == group)
        tables = plan.tables[members]
        differs = (tables != tables[0]).any(axis=0)
        blocks = int(differs.argmax()) if differs.any() else width
        # A row's newest token is its own: it is being written.
        tokens = min(blocks, int(plan.starts[members].min()) // block_size) * block_size
        if tokens >= FEWEST_COMMON and (len(members) - 1) * tokens >= FEWEST_TOKENS:
            found.append((members.tolist(), tokens))
    found.sort(key=lambda group: (1 - len(group[0])) * group[1])
    room, kept = tile_room(rows), list[tuple[list[int], int]]()
    for group_rows, tokens in found:
        room -= -(-len(group_rows) // TILE_ROWS)
        if room < 0:
            break
        kept.append((group_rows, tokens))
    return kept
