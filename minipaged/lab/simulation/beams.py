"""How many blocks a beam search holds: a tree of beams that fork and die, block by block.

No model is asked who survives. At each token a beam lives on with probability `persistence`; otherwise a copy of one of the
beams, drawn evenly, takes its place (a Wright-Fisher population with inertia).
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from typing import NamedTuple

import numpy as np

PERSISTENCE = 0.87  # one value for all widths, chosen so that the savings of the paper's Fig. 15 come out


class BeamTree(NamedTuple):
    """One search of `width` beams behind a prompt that left `offset` tokens in its last block. Entry g: after g
    tokens of answer.
    """

    blocks: tuple[int, ...]  # distinct blocks past the prompt's full ones
    slots: tuple[int, ...]  # written slots in them, each physical slot once
    copies: tuple[int, ...]  # blocks copied by that token's writes


@lru_cache(maxsize=256)
def beam_tree(width: int, offset: int, block_size: int, length: int, persistence: float = PERSISTENCE) -> BeamTree:
    """Grow the tree for `length` tokens. Deterministic: seeded by its own shape. Cost O(width * length)."""
    rng = np.random.default_rng([width, offset, block_size])
    moves = rng.random((length, width)) >= persistence
    parents = np.where(moves, rng.integers(0, width, (length, width)), np.arange(width)).tolist()
    fresh = 1
    tables: list[tuple[int, ...]] = [(0,) if offset else ()] * width
    held = Counter({0: width}) if offset else Counter[int]()
    fill = {0: offset} if offset else {}
    blocks, slots, copies = [len(held)], [sum(fill.values())], [0]
    for g in range(length):
        tables = [tables[parent] for parent in parents[g]]
        held = Counter(block for table in tables for block in table)
        copied = 0
        at = (offset + g) % block_size
        for i, table in enumerate(tables):
            if at == 0:
                tables[i] = (*table, fresh)
            elif held[table[-1]] > 1:
                held[table[-1]] -= 1
                tables[i] = (*table[:-1], fresh)
                copied += 1
            else:
                fill[table[-1]] = at + 1
                continue
            held[fresh] = 1
            fill[fresh] = at + 1
            fresh += 1
        fill = {block: fill[block] for block in held if held[block]}
        blocks.append(len(fill))
        slots.append(sum(fill.values()))
        copies.append(copied)
    return BeamTree(tuple(blocks), tuple(slots), tuple(copies))
