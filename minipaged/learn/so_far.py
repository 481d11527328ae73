"""The block manager as it stands after lesson 8, which lesson 9 builds on: tables, reference counts, fork, copy-on-write.

A slot holds one number here, which stands for the keys and values of a token: a test can read a text back through its table, and
sees whether another sequence wrote into it. `tests/tutorials` runs lesson 8's tests on this class too.
"""

from __future__ import annotations

from collections import deque


class OutOfBlocks(Exception):  # noqa: N818  # the name that the lessons use
    """No block is free."""


class Manager:
    """Blocks 1 .. num_blocks - 1, shared among sequences by reference counts. Block 0 is the null block."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self.free_blocks = deque(range(1, num_blocks))
        self.ref_counts = [0] * num_blocks
        self.contents: list[list[int | None]] = [[None] * block_size for _ in range(num_blocks)]
        self.tables: dict[str, list[int]] = {}
        self.lengths: dict[str, int] = {}
        self.copied = 0  # blocks copied since the start

    def take(self) -> int:
        """A free block, held once from now on. OutOfBlocks if there is none."""
        if not self.free_blocks:
            raise OutOfBlocks
        block = self.free_blocks.popleft()
        self.ref_counts[block] = 1
        return block

    def drop(self, block: int) -> None:
        """One holder less; free when it was the last."""
        self.ref_counts[block] -= 1
        if self.ref_counts[block] == 0:
            self.free_blocks.append(block)

    def add(self, sequence: str) -> None:
        """A new sequence without tokens."""
        self.tables[sequence], self.lengths[sequence] = [], 0

    def fork(self, parent: str, child: str) -> None:
        """A child that shares all blocks of its parent."""
        for block in self.tables[parent]:
            self.ref_counts[block] += 1
        self.tables[child] = list(self.tables[parent])
        self.lengths[child] = self.lengths[parent]

    def append(self, sequence: str, token: int) -> None:
        """Write one token. OutOfBlocks, and nothing changed, if it needs a block and none is free."""
        table, length = self.tables[sequence], self.lengths[sequence]
        entry, place = divmod(length, self.block_size)
        if entry == len(table):
            table.append(self.take())
        elif self.ref_counts[table[entry]] > 1:
            copy = self.take()
            self.contents[copy] = list(self.contents[table[entry]])
            self.drop(table[entry])
            table[entry] = copy
            self.copied += 1
        self.contents[table[entry]][place] = token
        self.lengths[sequence] = length + 1

    def free(self, sequence: str) -> None:
        """The sequence is gone. KeyError if it is unknown."""
        for block in reversed(self.tables.pop(sequence)):
            self.drop(block)
        del self.lengths[sequence]

    def read(self, sequence: str) -> list[int | None]:
        """The sequence's tokens, through its table."""
        tokens = [token for block in self.tables[sequence] for token in self.contents[block]]
        return tokens[: self.lengths[sequence]]
