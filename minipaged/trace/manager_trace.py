"""A bare block manager's life as StepDeltas: for lessons, and for the trace of a failing property.

There is no engine here: whoever drives the manager calls `step` after each thing worth seeing. Knows the manager's public face
only; compares all it can see with the step before, so it is for small pools.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from minipaged.memory.types import BlockEvent, PoolUsage
from minipaged.trace.records import (
    FLAG_CACHED,
    FLAG_COPIED,
    FLAG_NULL,
    TIER_DEVICE,
    TIER_HOST,
    BlockPatch,
    Event,
    Queues,
    SequencePatch,
    Stats,
    StepDelta,
    TablePatch,
)

Row = tuple[int, int, int, int]  # owner, refs, fill, flags


class Manager(Protocol):
    """What is asked of a block manager."""

    def table(self, seq_id: int) -> tuple[int, ...]:
        """Its device blocks."""
        ...

    def host_table(self, seq_id: int) -> tuple[int, ...]:
        """Its host blocks."""
        ...

    def ref_count(self, block_id: int) -> int:
        """Table entries and pins that name the block."""
        ...

    def usage(self) -> PoolUsage:
        """Blocks by state."""
        ...

    def take_events(self) -> tuple[BlockEvent, ...]:
        """What happened since the last call."""
        ...


@dataclass(slots=True)
class Actor:
    """A sequence as its driver knows it."""

    parent: int = -1
    status: str = "running"
    token_ids: list[int] = field(default_factory=list)
    text: bytes = b""
    num_prompt: int = 0
    num_computed: int = 0
    told: int = 0  # tokens already in a delta
    text_told: int = 0


class ManagerTrace:
    """Deltas of one manager. The driver keeps `actors` up to date; `step` compares and returns the delta, which joins `deltas`."""

    def __init__(self, manager: Manager, block_size: int) -> None:
        self.manager = manager
        self.block_size = block_size
        self.actors: dict[int, Actor] = {}
        self.deltas: list[StepDelta] = []
        self._rows: dict[int, Row] = {}
        self._tables: dict[tuple[int, int], tuple[int, ...]] = {}
        self._plain: dict[int, tuple[object, ...]] = {}
        self._cached: set[int] = set()
        self._copies = self._next_event = 0

    def step(self) -> StepDelta:
        """What changed since the last one."""
        raw = self.manager.take_events()
        copied = {event.other for event in raw if event.kind == "copy"}
        self._copies += len(copied)
        self._cached |= {event.block for event in raw if event.kind == "publish"}
        self._cached -= {event.block for event in raw if event.kind == "evict"}
        tables = self._table_patches()
        delta = StepDelta(
            step=len(self.deltas),
            t_ns=len(self.deltas) * 1_000_000,
            events=tuple(self._event(event) for event in raw),
            blocks=self._block_patch(copied),
            tables=tables,
            sequences=self._sequence_patches(),
            queues=Queues(
                *(tuple(s for s, a in self.actors.items() if a.status == q) for q in ("running", "waiting", "swapped"))
            ),
            stats=self._stats(),
        )
        self.deltas.append(delta)
        return delta

    def _event(self, event: BlockEvent) -> Event:
        self._next_event += 1
        return Event(self._next_event - 1, event.kind, -1, event.seq_id, event.block, event.other, event.index)

    def _table(self, seq: int, tier: int) -> tuple[int, ...]:
        try:
            return self.manager.table(seq) if tier == TIER_DEVICE else self.manager.host_table(seq)
        except KeyError:
            return ()

    def _table_patches(self) -> tuple[TablePatch, ...]:
        patches = []
        for seq in self.actors:
            for tier in (TIER_DEVICE, TIER_HOST):
                new, old = self._table(seq, tier), self._tables.get((seq, tier), ())
                if new != old:
                    patches.append(TablePatch(seq, 0, 0, new, tier))
                    self._tables[(seq, tier)] = new
        return tuple(patches)

    def _block_rows(self, copied: set[int]) -> dict[int, Row]:
        holders: dict[int, list[tuple[int, int]]] = {}
        for (seq, tier), table in self._tables.items():
            for index, block in enumerate(table if tier == TIER_DEVICE else ()):
                holders.setdefault(block, []).append((seq, index))
        rows: dict[int, Row] = {0: (-1, 0, 0, FLAG_NULL)}
        for block in range(1, self.manager.usage().total):
            held = sorted(holders.get(block, []))
            flags = FLAG_CACHED * (block in self._cached) | FLAG_COPIED * (block in copied)
            fill = max(
                (self._fill(seq, index) for seq, index in held), default=self.block_size * (block in self._cached)
            )
            rows[block] = (held[0][0] if held else -1, self.manager.ref_count(block), fill, flags)
        return rows

    def _fill(self, seq: int, index: int) -> int:
        return max(0, min(self.block_size, self.actors[seq].num_computed - index * self.block_size))

    def _block_patch(self, copied: set[int]) -> BlockPatch:
        rows = self._block_rows(copied)
        changed = {block: row for block, row in rows.items() if self._rows.get(block) != row}
        self._rows = rows
        ids = np.fromiter(changed, np.int32)
        owner, refs, fill, flags = np.array(list(changed.values()), np.int32).reshape(-1, 4).T
        none = np.zeros(len(ids), np.uint8)
        return BlockPatch(ids, owner, refs, fill, flags.astype(np.uint8), none, none.astype(np.int32))

    def _sequence_patches(self) -> tuple[SequencePatch, ...]:
        patches = []
        for seq, actor in self.actors.items():
            tokens, text = actor.token_ids[actor.told :], actor.text[actor.text_told :]
            plain = (actor.status, actor.num_computed)
            if not tokens and not text and self._plain.get(seq) == plain:
                continue
            self._plain[seq] = plain
            actor.told, actor.text_told = len(actor.token_ids), len(actor.text)
            reason = "stop" if actor.status == "finished" else ""
            patches.append(
                SequencePatch(
                    seq,
                    seq,
                    actor.parent,
                    actor.status,
                    actor.num_computed,
                    0,
                    actor.num_prompt,
                    tuple(tokens),
                    text,
                    math.nan,
                    reason,
                )
            )
        return tuple(patches)

    def _stats(self) -> Stats:
        usage = self.manager.usage()
        held = [row for block, row in self._rows.items() if row[1] > 0 and block]
        entries = sum(len(table) for (_, tier), table in self._tables.items() if tier == TIER_DEVICE)
        slots = sum(row[2] for row in held)
        return Stats(
            total_blocks=usage.total,
            free_blocks=usage.free,
            cached_blocks=usage.cached,
            host_total=usage.host_total,
            host_free=usage.host_free,
            block_size=self.block_size,
            token_slots=slots,
            tail_slots=len(held) * self.block_size - slots,
            shared_saved_blocks=entries - len(held),
            copies=self._copies,
        )
