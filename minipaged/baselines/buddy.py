"""The buddy allocator: chunks are powers of two, split in halves on demand and merged again when both halves are free.

Source: Knowlton, "A fast storage allocator", CACM 1965. A pool
that is no power of two starts as whole chunks of the largest size and the binary remainder: 15,728 slots are 7 x
2048 + 1024 + 256 + 64 + 32 + 16.
"""

from __future__ import annotations

from heapq import heappop, heappush

from minipaged.config import check_int
from minipaged.errors import InputError


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n` (1 for n below 2)."""
    return 1 << max(0, n - 1).bit_length()


class BuddyAllocator:
    """Hands out runs of 2**k slots, lowest address first. O(log size) a call.

    Chunks lie in order of falling size, so each start is a multiple of its size and the buddy of a run is start XOR
    size. Halves merge up to the chunk that they were split from and never across two chunks.
    """

    def __init__(self, total: int, largest: int = 2048) -> None:
        check_int("total", total, 1)
        check_int("largest", largest, 1)
        if largest & (largest - 1):
            raise InputError(f"largest must be a power of two, not {largest}")
        self.total = total
        self.largest = largest
        self.free_slots = total
        self.chunks: tuple[tuple[int, int], ...] = _initial_chunks(total, largest)  # (start, size)
        self._top = dict(self.chunks)
        self._live: dict[int, int] = {}  # start -> size
        self._free: dict[int, set[int]] = {1 << k: set() for k in range(largest.bit_length())}  # size -> starts
        self._order: dict[int, list[int]] = {size: [] for size in self._free}  # heaps; may hold starts that are gone
        for start, size in self.chunks:
            self._put(start, size)

    def allocate(self, slots: int) -> int | None:
        """The start of a run of next_power_of_two(slots) slots, or None where no run is free (then nothing changed)."""
        want = next_power_of_two(check_int("slots", slots, 1))
        size = want
        while size <= self.largest and not self._free[size]:
            size *= 2
        if size > self.largest:
            return None
        start = self._take(size)
        while size > want:
            size //= 2
            self._put(start + size, size)
        self._live[start] = size
        self.free_slots -= size
        return start

    def free(self, start: int) -> None:
        """Give a run back and merge it with its free buddies. Raises KeyError if no run starts there."""
        size = self._live.pop(start)
        self.free_slots += size
        while self._top.get(start) != size:
            buddy = start ^ size
            if buddy not in self._free[size]:
                break
            self._free[size].remove(buddy)
            start, size = min(start, buddy), size * 2
        self._put(start, size)

    def size_of(self, start: int) -> int:
        """Slots of the live run at `start`. Raises KeyError if there is none."""
        return self._live[start]

    def free_runs(self) -> list[tuple[int, int]]:
        """(start, size) of every free run, by address."""
        return sorted((start, size) for size, starts in self._free.items() for start in starts)

    def _put(self, start: int, size: int) -> None:
        self._free[size].add(start)
        heappush(self._order[size], start)

    def _take(self, size: int) -> int:
        starts, order = self._free[size], self._order[size]
        while True:
            start = heappop(order)
            if start in starts:
                starts.remove(start)
                return start


def _initial_chunks(total: int, largest: int) -> tuple[tuple[int, int], ...]:
    chunks: list[tuple[int, int]] = []
    start, size = 0, largest
    while start < total:
        while size > total - start:
            size //= 2
        chunks.append((start, size))
        start += size
    return tuple(chunks)
