"""The host's blocks: where swapped sequences wait. Counts of table entries and a stack of free blocks; no null block, no cache.

A host block that this step reads or writes is not handed out again before the next one: the step's swaps run as one batch, in which no
block may be written twice or be both source and destination.
"""

from __future__ import annotations


class HostPool:
    """Blocks 0 .. num_blocks - 1 of the host tier."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.refs: dict[int, int] = {}  # block -> table entries that name it
        self._fresh = 0
        self._free: list[int] = []
        self._touched: set[int] = set()  # in this step
        self._held_back: list[int] = []  # free, and touched in this step

    @property
    def num_available(self) -> int:
        """Blocks that can be handed out now."""
        return len(self._free) + self.num_blocks - self._fresh

    @property
    def num_free(self) -> int:
        """Blocks that no host table names."""
        return self.num_blocks - len(self.refs)

    def take(self) -> int:
        """Hand out a block with count 0; the caller shares it for each entry. IndexError if none is available."""
        if self._free:
            block = self._free.pop()
        elif self._fresh < self.num_blocks:
            block = self._fresh
            self._fresh += 1
        else:
            raise IndexError("the host pool is full")
        self.refs[block] = 0
        self._touched.add(block)
        return block

    def touch(self, block: int) -> None:
        """This step reads the block."""
        self._touched.add(block)

    def share(self, block: int) -> None:
        """One more table entry names the block."""
        self.refs[block] += 1

    def drop(self, block: int) -> None:
        """One table entry less."""
        self.refs[block] -= 1
        if not self.refs[block]:
            del self.refs[block]
            (self._held_back if block in self._touched else self._free).append(block)

    def begin_step(self) -> None:
        """The swaps of the step before are done."""
        if self._touched:
            self._touched.clear()
            self._free.extend(self._held_back)
            self._held_back.clear()
