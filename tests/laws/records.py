"""What a failing property leaves behind, step by step: enough to draw it on the screen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from minipaged.memory.types import BlockEvent, PoolUsage
from tests.laws.model import Line, View


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
    usage: PoolUsage

    @classmethod
    def of(
        cls,
        view: View,
        lines: Mapping[int, Line],
        block_size: int,
        events: Iterable[BlockEvent],
    ) -> StepRecord:
        """A step as it stands: what is seen of the manager, the sequences, and what the events said."""
        given = tuple(
            LineRecord(
                seq,
                line.parent,
                line.swapped,
                tuple(line.tokens),
                line.written,
                view.tables.get(seq, ()),
                view.host_tables.get(seq, ()),
            )
            for seq, line in lines.items()
        )
        return cls(block_size, tuple(events), given, view.counts, view.usage)
