"""Which sequences hold which blocks of an engine's pool, and how full each block is: kept up to date from what each step changed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from minipaged.memory.types import BlockEvent
from minipaged.scheduling.plan import StepPlan
from minipaged.scheduling.records import SchedulerEvent
from minipaged.scheduling.scheduler import Scheduler
from minipaged.trace.records import (
    FLAG_CACHED,
    FLAG_COPIED,
    FLAG_NULL,
    TIER_DEVICE,
    TIER_HOST,
    BlockPatch,
    TablePatch,
)


class PoolView:
    """Which sequences hold which blocks, and how full each block is, kept up to date from table differences."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        total = scheduler.manager.usage().total
        self._size = scheduler.block_size
        # By block, as last told:
        self._owner = np.full(total, -1, np.int32)
        self._refs = np.zeros(total, np.int32)
        self._fill = np.zeros(total, np.int32)
        self._flags = np.zeros(total, np.uint8)
        self._slots = np.zeros(total, np.int32)  # `fill` where a sequence holds the block
        self._num_holders = np.zeros(total, np.int32)  # up to date with the tables
        self._holders: dict[int, list[int]] = {}  # device block -> sequences, earliest first
        self._tables: dict[int, tuple[int, ...]] = {}
        self._host_tables: dict[int, tuple[int, ...]] = {}
        self._cached: set[int] = set()
        self._copied: set[int] = set()
        self._entries = 0
        self._everything = True
        self.token_slots = 0  # device slots that hold a live token's keys and values, each physical slot once

    @property
    def shared_saved(self) -> int:
        """Table entries less distinct blocks."""
        return self._entries - len(self._holders)

    def forget(self) -> None:
        """The next patch tells every block again."""
        self._tables.clear()
        self._host_tables.clear()
        self._holders.clear()
        self._num_holders[:] = 0
        self._slots[:] = 0
        self._entries = self.token_slots = 0
        self._everything = True

    def update_tables(self, named: set[int]) -> tuple[tuple[TablePatch, ...], set[int]]:
        """Compare the block tables of these sequences with what was told before. Returns the patches and the blocks concerned."""
        manager = self._scheduler.manager
        patches: list[TablePatch] = []
        dirty: set[int] = set()
        for seq_id in sorted(named):
            new, new_host = self._current(manager.table, seq_id), self._current(manager.host_table, seq_id)
            old, old_host = self._tables.get(seq_id, ()), self._host_tables.get(seq_id, ())
            if new != old:
                start = _first_difference(old, new)
                patches.append(TablePatch(seq_id, 0, start, new[start:]))
                self._move(seq_id, old[start:], new[start:], dirty)
                _store(self._tables, seq_id, new)
            if new_host != old_host:
                start = _first_difference(old_host, new_host)
                patches.append(TablePatch(seq_id, 0, start, new_host[start:], TIER_HOST))
                _store(self._host_tables, seq_id, new_host)
        return tuple(patches), dirty

    @staticmethod
    def _current(read: Callable[[int], tuple[int, ...]], seq_id: int) -> tuple[int, ...]:
        try:
            return read(seq_id)
        except KeyError:
            return ()

    def _move(self, seq_id: int, gone: tuple[int, ...], come: tuple[int, ...], dirty: set[int]) -> None:
        for block in gone:
            if block == 0:
                continue
            holders = self._holders[block]
            holders.remove(seq_id)
            self._num_holders[block] -= 1
            if not holders:
                del self._holders[block]
            dirty.add(block)
        for block in come:
            if block:
                self._holders.setdefault(block, []).append(seq_id)
                self._num_holders[block] += 1
                dirty.add(block)
        self._entries += sum(map(bool, come)) - sum(map(bool, gone))

    def patch(self, plan: StepPlan | None, raw: list[SchedulerEvent | BlockEvent], dirty: set[int]) -> BlockPatch:
        """The blocks that changed, as columns."""
        dirty |= self._copied
        self._copied = set()
        for event in raw:
            if not isinstance(event, BlockEvent):
                continue
            if event.tier == "device" and event.block > 0:
                dirty.add(event.block)
            if event.kind == "publish":
                self._cached.add(event.block)
            elif event.kind == "evict":
                self._cached.discard(event.block)
        if self._everything:
            self._everything = False
            dirty |= set(range(len(self._fill)))
        written = self._note_plan(plan, dirty) if plan is not None else np.zeros(0, np.int32)
        changed = np.array(sorted(dirty), np.int32)
        self._look_at(changed)
        if len(written):
            changed = np.union1d(changed, written)
        return self._columns(changed)

    def _note_plan(self, plan: StepPlan, dirty: set[int]) -> npt.NDArray[np.int32]:
        """The blocks that the plan writes: those of single tokens in one go and returned, the rest join `dirty`."""
        for _, destination in plan.copies:
            self._copied.add(destination)
            dirty.add(destination)
        size, tables = self._size, self._tables
        for row in np.flatnonzero(plan.lengths > 1).tolist():
            start, end = int(plan.starts[row]), int(plan.starts[row] + plan.lengths[row])
            table = tables.get(int(plan.seq_ids[row]), ())
            dirty.update(block for block in table[start // size : (end - 1) // size + 1] if block)
        rows = np.flatnonzero(plan.lengths == 1)
        batch, slots, index = self._scheduler.batch, plan.slots[rows], plan.starts[rows] // size
        blocks: npt.NDArray[np.int32] = plan.tables[rows, index]
        # A block that one sequence holds, as it did when it was last told, is as full as that sequence's tokens make it: nothing else about
        # it can have changed without an event or a table that names it. The others are looked at one by one.
        alone = (self._num_holders[blocks] == 1) & (self._owner[blocks] == plan.seq_ids[rows])
        alone &= (batch.seq_id[slots] == plan.seq_ids[rows]) & (self._flags[blocks] & FLAG_CACHED == 0)
        dirty.update(blocks[~alone & (blocks > 0)].tolist())
        blocks = blocks[alone]
        self._fill[blocks] = np.clip(batch.num_computed[slots[alone]] - index[alone] * size, 0, size)
        return blocks

    def _look_at(self, blocks: npt.NDArray[np.int32]) -> None:
        """Find out all about these blocks."""
        count = self._scheduler.manager.ref_count
        for block in blocks.tolist():
            holders = self._holders.get(block)
            owner, refs, fill, flags = -1, 0, 0, 0
            if holders:
                owner, refs = holders[0], count(block)
            if block in self._cached:
                flags, fill = FLAG_CACHED, self._size
            elif holders:
                fill = max([self._fill_of(seq_id, block) for seq_id in holders])
            if block in self._copied:
                flags |= FLAG_COPIED
            if block == 0:
                flags |= FLAG_NULL
            self._owner[block], self._refs[block], self._fill[block], self._flags[block] = owner, refs, fill, flags

    def _columns(self, ids: npt.NDArray[np.int32]) -> BlockPatch:
        """These blocks as they are told, and their part in `token_slots`."""
        fill, before = self._fill[ids], int(self._slots[ids].sum())
        self._slots[ids] = fill * (self._num_holders[ids] > 0)
        self.token_slots += int(self._slots[ids].sum()) - before
        tier, group = np.full(len(ids), TIER_DEVICE, np.uint8), np.zeros(len(ids), np.int32)
        return BlockPatch(ids, self._owner[ids], self._refs[ids], fill, self._flags[ids], tier, group)

    def _fill_of(self, seq_id: int, block: int) -> int:
        """Slots of the block that this sequence has written."""
        sequence = self._scheduler.sequences.get(seq_id)
        if sequence is None:
            return 0
        computed = sequence.num_computed
        table = self._tables[seq_id]
        last = (computed - 1) // self._size
        if computed and last < len(table) and table[last] == block:
            return computed - last * self._size
        index = table.index(block)
        return max(0, min(self._size, computed - index * self._size))


def _first_difference(old: tuple[int, ...], new: tuple[int, ...]) -> int:
    n = min(len(old), len(new))
    return next((i for i in range(n) if old[i] != new[i]), n)


def _store(tables: dict[int, tuple[int, ...]], seq_id: int, table: tuple[int, ...]) -> None:
    if table:
        tables[seq_id] = table
    else:
        tables.pop(seq_id, None)
