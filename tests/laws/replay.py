"""From a failing run's records to a trace file that `minipaged tui --replay` opens at the counterexample's last step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from minipaged.trace.records import (
    FLAG_CACHED,
    FLAG_COPIED,
    FLAG_NULL,
    FLAG_PINNED,
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
from minipaged.trace.stream import Header, StreamWriter
from tests.laws.records import LineRecord, StepRecord


def write_replay(path: Path, records: Iterable[StepRecord], finding: str) -> str:
    """Write the trace of a run whose last record shows `finding`. Returns the command that shows it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as out:
        writer = StreamWriter(out, Header(model="the spec", finding=finding))
        for delta in deltas(records):
            writer.delta(delta)
        writer.finish()
    return f"minipaged tui --replay {path}"


def deltas(records: Iterable[StepRecord]) -> list[StepDelta]:
    """One delta for each record."""
    found: list[StepDelta] = []
    before: dict[int, LineRecord] = {}
    next_event = copies = swaps = 0
    for step, record in enumerate(records):
        events = tuple(
            Event(next_event + i, event.kind, -1, event.seq_id, event.block, event.other, event.index)
            for i, event in enumerate(record.events)
        )
        next_event += len(events)
        copies += sum(event.kind == "copy" for event in events)
        swaps += len({event.sequence for event in events if event.kind == "swap_out"})
        lines = {line.seq_id: line for line in record.lines}
        gone = [line for seq, line in before.items() if seq not in lines]
        found.append(
            StepDelta(
                step=step,
                t_ns=step * 1_000_000,
                events=events,
                blocks=_blocks(record),
                tables=tuple(_tables(before, lines)),
                sequences=(
                    *(_sequence(line, before.get(line.seq_id), "") for line in record.lines),
                    *(_sequence(line, line, "stop") for line in gone),
                ),
                queues=Queues(
                    running=tuple(line.seq_id for line in record.lines if not line.swapped),
                    swapped=tuple(line.seq_id for line in record.lines if line.swapped),
                ),
                stats=_stats(record, copies, swaps),
            )
        )
        before = lines
    return found


def _fills(record: StepRecord) -> dict[int, int]:
    """Written slots of each block that a table names."""
    fills: dict[int, int] = {}
    for line in record.lines:
        for index, block in enumerate(line.table):
            fill = max(0, min(record.block_size, line.written - index * record.block_size))
            fills[block] = max(fills.get(block, 0), fill)
    fills.pop(0, None)
    return fills


def _blocks(record: StepRecord) -> BlockPatch:
    n = len(record.counts)
    owner, fill, flags = np.full(n, -1, np.int32), np.zeros(n, np.int32), np.zeros(n, np.uint8)
    flags[0] = FLAG_NULL
    for line in reversed(record.lines):  # the earliest holder stands last
        for block in line.table:
            if block:
                owner[block] = line.seq_id
    for block, written in _fills(record).items():
        fill[block] = written
    for blocks, flag in ((record.cached, FLAG_CACHED), (record.pinned, FLAG_PINNED), (record.copied, FLAG_COPIED)):
        for block in blocks:
            flags[block] |= flag
    for block in record.cached:
        fill[block] = record.block_size
    counts = np.array(record.counts, np.int32)
    return BlockPatch(
        np.arange(n, dtype=np.int32), owner, counts, fill, flags, np.zeros(n, np.uint8), np.zeros(n, np.int32)
    )


def _tables(before: dict[int, LineRecord], after: dict[int, LineRecord]) -> Iterable[TablePatch]:
    for seq in sorted({*before, *after}):
        old, new = before.get(seq), after.get(seq)
        for tier, name in ((TIER_DEVICE, "table"), (TIER_HOST, "host_table")):
            was, now = getattr(old, name, ()), getattr(new, name, ())
            if was != now:
                yield TablePatch(seq, 0, 0, now, tier)


def _sequence(line: LineRecord, told: LineRecord | None, reason: str) -> SequencePatch:
    added = line.tokens[len(told.tokens) if told is not None else 0 :]
    return SequencePatch(
        sequence=line.seq_id,
        request=line.seq_id,
        parent=line.parent,
        status="finished" if reason else "swapped" if line.swapped else "running",
        num_computed=line.written,
        num_cached=0,
        num_prompt=0,
        token_ids=added,
        text="".join(map(str, added)).encode(),
        score=math.nan,
        finish_reason=reason,
    )


def _stats(record: StepRecord, copies: int, swaps: int) -> Stats:
    usage, written = record.usage, sum(_fills(record).values())
    entries = [block for line in record.lines for block in line.table if block]
    return Stats(
        total_blocks=usage.total,
        free_blocks=usage.free,
        cached_blocks=usage.cached,
        host_total=usage.host_total,
        host_free=usage.host_free,
        block_size=record.block_size,
        token_slots=written,
        tail_slots=usage.referenced * record.block_size - written,
        shared_saved_blocks=len(entries) - len(set(entries)),
        copies=copies,
        swaps=swaps,
    )
