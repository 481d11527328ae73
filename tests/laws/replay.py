"""From a failing run's records to a trace file that `minipaged tui --replay` opens at the counterexample's last step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from minipaged.trace.events import Queues, SequencePatch, StepDelta
from minipaged.trace.file import Header, StreamWriter
from minipaged.trace.observed import Line, ObservedSteps, pool_stats
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
    """One delta for each record: what the events said, what the tables hold, and the counts that the manager gives."""
    observed = ObservedSteps()
    alive: dict[int, LineRecord] = {}
    copies = swaps = 0
    for record in records:
        copies += sum(event.kind == "copy" for event in record.events)
        swaps += len({event.seq_id for event in record.events if event.kind == "swap_out"})
        lines = {line.seq_id: line for line in record.lines}
        gone = [line for seq, line in alive.items() if seq not in lines]
        observed.add(
            lines=[*(_line(line) for line in record.lines), *(_line(line, ended=True) for line in gone)],
            stats=pool_stats(record.usage, record.block_size)._replace(copies=copies, swaps=swaps),
            queues=Queues(
                running=tuple(line.seq_id for line in record.lines if not line.swapped),
                swapped=tuple(line.seq_id for line in record.lines if line.swapped),
            ),
            tables={line.seq_id: line.table for line in record.lines},
            host_tables={line.seq_id: line.host_table for line in record.lines if line.host_table},
            reported=[(e.kind, e.seq_id, e.block, e.other, e.index) for e in record.events],
            counts=record.counts,
            token_bytes=lambda token: str(token).encode(),
        )
        alive = lines
    return observed.deltas


def _line(line: LineRecord, *, ended: bool = False) -> Line:
    status = "finished" if ended else "swapped" if line.swapped else "running"
    patch = SequencePatch(line.seq_id, line.seq_id, line.parent, status, 0, 0, math.nan, "stop" if ended else "")
    return Line(patch, line.written, line.tokens)
