"""Tiny dense tensors in plain Python: what each slot of each block holds, and how a step moves it.

The "KV" of a position is one number made from all tokens up to it, as a real model's is: the same token behind another prefix has another
value, so a wrong block, a stale copy or a lost swap is seen when a table is read back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

POISON = -1  # in every slot of a block that is handed out without content
Pairs = Iterable[tuple[int, int]]


def kv_of(tokens: Sequence[int]) -> list[int]:
    """The value of each position."""
    values, value = [], 0
    for token in tokens:
        value = (value * 1_000_003 + token + 1) % (2**61 - 1)
        values.append(value)
    return values


class DenseMemory:
    """Slots of the device and of the host."""

    def __init__(self, num_blocks: int, num_host_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.device = [[POISON] * block_size for _ in range(num_blocks)]
        self.host = [[POISON] * block_size for _ in range(num_host_blocks)]

    def poison(self, blocks: Iterable[int]) -> None:
        """These blocks were handed out: whatever they held is gone."""
        for block in blocks:
            self.device[block] = [POISON] * self.block_size

    def run(self, swap_outs: Pairs, swap_ins: Pairs, copies: Pairs) -> None:
        """One step's transfers in their order. Each kind is one batch: all its sources are read before anything is written."""
        for source, target, pairs in (
            (self.device, self.host, swap_outs),
            (self.host, self.device, swap_ins),
            (self.device, self.device, copies),
        ):
            for destination, values in [(there, list(source[here])) for here, there in pairs]:
                target[destination] = values

    def write(self, table: Sequence[int], position: int, value: int) -> None:
        """Position `position` of the sequence with this table is computed."""
        self.device[table[position // self.block_size]][position % self.block_size] = value

    def read(self, table: Sequence[int], start: int, end: int) -> list[int]:
        """Positions [start, end) through the table."""
        size = self.block_size
        return [self.device[table[p // size]][p % size] for p in range(start, end)]
