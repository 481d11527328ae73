"""What a failing property leaves behind, step by step: enough to draw it on the screen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from minipaged.memory.types import BlockEvent, PoolUsage

if TYPE_CHECKING:
    from tests.spec.watch import Watch


@dataclass(frozen=True)
class LineRecord:
    """A sequence at the end of a step."""

    seq_id: int
    parent: int
    swapped: bool
    tokens: tuple[int, ...]
    written: int
    table: tuple[int, ...]
    host_table: tuple[int, ...]


@dataclass(frozen=True)
class StepRecord:
    """The world at the end of a step, and the block events that led there."""

    block_size: int
    events: tuple[BlockEvent, ...]
    lines: tuple[LineRecord, ...]
    counts: tuple[int, ...]
    cached: frozenset[int]
    pinned: frozenset[int]
    copied: frozenset[int]
    usage: PoolUsage

    @classmethod
    def of(cls, watch: Watch) -> StepRecord:
        """The watch's step as it stands."""
        view = watch.view
        lines = tuple(
            LineRecord(
                seq,
                line.parent,
                line.swapped,
                tuple(line.tokens),
                line.written,
                view.tables.get(seq, ()),
                view.host_tables.get(seq, ()),
            )
            for seq, line in watch.lines.items()
        )
        return cls(
            watch.block_size,
            tuple(watch.step_events),
            lines,
            view.counts,
            frozenset(watch.found.key_of),
            frozenset(watch.pins),
            frozenset(destination for _, destination in watch.copies()),
            view.usage,
        )
