"""Blocks that nobody holds, in the order they are handed out again.

Push, pop and removal from the middle are O(1), and a pool of a million blocks is made by two allocations of zeros.

First come blocks without content: the last one put back, then those never used, by number. Then the cached ones, the least recently used
first, so that no content is lost while an empty block is left.

The cached ones form a doubly linked list inside two arrays. Block 0 is never free, so entry 0 stands for the list's two ends,
and arrays of zeros are an empty list. Knows block numbers only.
"""

from __future__ import annotations

from array import array


class FreeList:
    """Blocks 1 .. num_blocks - 1, all empty at first."""

    def __init__(self, num_blocks: int) -> None:
        self._empty: list[int] = []  # a stack
        self._fresh = 1  # blocks from here on were never handed out
        self._num_blocks = num_blocks
        self._next = array("i", bytes(4 * num_blocks))
        self._previous = array("i", bytes(4 * num_blocks))
        self._num_cached = 0

    def __len__(self) -> int:
        return len(self._empty) + self._num_blocks - self._fresh + self._num_cached

    @property
    def num_cached(self) -> int:
        """How many of them still hold content that can be found."""
        return self._num_cached

    def push_empty(self, block: int) -> None:
        """Put back a block whose content nobody can find: it is the next to go."""
        self._empty.append(block)

    def push_cached(self, block: int) -> None:
        """Put back a block whose content can be found: it is the last to go."""
        last = self._previous[0]
        self._next[last] = block
        self._previous[block] = last
        self._next[block] = 0
        self._previous[0] = block
        self._num_cached += 1

    def remove_cached(self, block: int) -> None:
        """Take a cached block out, wherever it stands."""
        before, after = self._previous[block], self._next[block]
        self._next[before] = after
        self._previous[after] = before
        self._num_cached -= 1

    def pop(self) -> int:
        """Take the next block. IndexError if there is none."""
        if self._empty:
            return self._empty.pop()
        if self._fresh < self._num_blocks:
            self._fresh += 1
            return self._fresh - 1
        block = self.first_cached()
        if not block:
            raise IndexError("pop from an empty free list")
        self.remove_cached(block)
        return block

    def first_cached(self) -> int:
        """The least recently used of the cached blocks; 0 if there is none."""
        return self._next[0]
