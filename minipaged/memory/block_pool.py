"""Physical blocks: who holds each (a count), and what may be handed out.

A block's count is the number of table entries and pins that name it. At 0 it is free: it goes to the free list, as an eviction
candidate if its content can still be found by its key. A block that this step copies or swaps from (or swaps in to) is guarded:
it may become free, yet is not handed out before the next step begins. Knows blocks; knows nothing of sequences or tokens.
"""

from __future__ import annotations

from minipaged.memory.free_list import FreeList
from minipaged.memory.prefix_index import PrefixIndex


class BlockPool:
    """Blocks 0 .. num_blocks - 1; block 0 is the null block, which is never handed out, counted or freed."""

    def __init__(self, num_blocks: int, index: PrefixIndex) -> None:
        self.num_blocks = num_blocks
        self.refs = [0] * num_blocks
        self.pins: dict[int, int] = {}  # block -> how many pins
        self._index = index
        self._free = FreeList(num_blocks)
        self._guards: dict[int, int] = {}  # block -> copies and swaps of this step that read it
        self._held_back: dict[
            int, None
        ] = {}  # free, guarded: on no list until the step is over; in the order they became free

    @property
    def num_available(self) -> int:
        """Blocks that can be handed out now."""
        return len(self._free)

    @property
    def num_free(self) -> int:
        """Blocks with count 0."""
        return len(self._free) + len(self._held_back)

    @property
    def num_cached(self) -> int:
        """Blocks with count 0 whose content can be found."""
        return self._free.num_cached + sum(block in self._index for block in self._held_back)

    def is_available(self, block: int) -> bool:
        """Whether the block is one of those that can be handed out now."""
        return not self.refs[block] and block not in self._held_back

    def take(self) -> int:
        """Hand out a block: its count is 1, and the caller erases its key. IndexError if none is available."""
        block = self._free.pop()
        self.refs[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more holder. The block has one already, or its content was found."""
        if not self.refs[block]:
            if block in self._held_back:
                del self._held_back[block]
            else:
                self._free.remove_cached(block)
        self.refs[block] += 1

    def drop(self, block: int) -> None:
        """One holder less. ValueError if the block has none: a double free is never absorbed."""
        refs = self.refs[block]
        if refs <= 0:
            raise ValueError(f"block {block} is free already")
        self.refs[block] = refs - 1
        if refs == 1:
            if block in self._guards:
                self._held_back[block] = None
            else:
                self._push(block)

    def guard(self, block: int) -> None:
        """Something in this step reads the block: it is not handed out again before the next step."""
        self._guards[block] = self._guards.get(block, 0) + 1

    def unguard(self, block: int) -> None:
        """One such reader was given up."""
        self._guards[block] -= 1
        if not self._guards[block]:
            del self._guards[block]
            if block in self._held_back:
                del self._held_back[block]
                self._push(block)

    def begin_step(self) -> None:
        """The reads of the step before are done."""
        if self._guards:
            self._guards.clear()
            for block in self._held_back:
                self._push(block)
            self._held_back.clear()

    def clear_cached(self) -> None:
        """Every free block is an empty one now. The caller has erased the keys."""
        for _ in range(self._free.num_cached):
            block = self._free.first_cached()
            self._free.remove_cached(block)
            self._free.push_empty(block)

    def _push(self, block: int) -> None:
        if block in self._index:
            self._free.push_cached(block)
        else:
            self._free.push_empty(block)
