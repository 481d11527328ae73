"""Orca's memory (Yu et al., OSDI 2022): one contiguous run of slots a row, from admission to finish, from a buddy allocator.

The three variants are those of the PagedAttention paper (section 6.1). They differ in how much a row reserves: orca-max the
whole context, orca-pow2 its answer rounded up to a power of two, orca-oracle exactly what it will need. buddy.py then rounds each
reservation up to a power of two.
"""

from __future__ import annotations

from minipaged.baselines.buddy import BuddyAllocator, next_power_of_two
from minipaged.baselines.reservations import Reservations, Row


class Orca(Reservations):
    """Orca (Yu et al., OSDI 2022) with a buddy allocator: one contiguous run a row, from admission to finish."""

    def __init__(self, pool: int, *, max_len: int = 2048, block_size: int = 16) -> None:
        super().__init__(pool, max_len=max_len, block_size=block_size)
        self.buddy = BuddyAllocator(pool, next_power_of_two(max_len))

    def reserve(self, prompt: int, output: int) -> int:
        """Slots that a row asks for."""
        raise NotImplementedError

    def _place(self, prompt: int, output: int, max_new: int) -> Row | None:
        reserved = self.reserve(prompt, output)
        start = self.buddy.allocate(reserved)
        if start is None:
            return None
        return Row(prompt, output, max_new, reserved, self.buddy.size_of(start), start)

    def _leave(self, key: int, row: Row) -> None:
        self.buddy.free(row.start)


class OrcaMax(Orca):
    """Reserves the whole context."""

    name = "orca-max"

    def reserve(self, prompt: int, output: int) -> int:
        return self.max_len


class OrcaPow2(Orca):
    """Guesses the answer within a factor of two."""

    name = "orca-pow2"

    def reserve(self, prompt: int, output: int) -> int:
        return min(self.max_len, prompt + next_power_of_two(output))


class OrcaOracle(Orca):
    """Knows the answer's length: not buildable, the best that contiguous reservation can be."""

    name = "orca-oracle"

    def reserve(self, prompt: int, output: int) -> int:
        return prompt + output
