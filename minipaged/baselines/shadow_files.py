"""Recorded traces in, traces with shadows out. Knows trace files; knows nothing of systems."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from minipaged.baselines.shadows import shadow_deltas
from minipaged.errors import InputError
from minipaged.trace.events import StepDelta
from minipaged.trace.file import StreamWriter
from minipaged.trace.sources import FileSource


def read_deltas(path: Path) -> list[StepDelta]:
    """Every step of a trace file. Raises TraceError if it is none."""
    source = FileSource(path)
    try:
        return [source.delta(i) for i in range(len(source))]
    finally:
        source.close()


def write_with_shadows(path: Path, out: Path, systems: Sequence[str], *, max_len: int) -> None:
    """Write the trace at `path` again with a ShadowDelta of every system behind each step."""
    if out.exists() and out.samefile(path):
        raise InputError(f"{out} is the trace itself: write to another file")
    source = FileSource(path)
    try:
        deltas = [source.delta(i) for i in range(len(source))]
        try:
            file = out.open("wb")
        except OSError as error:
            raise InputError(f"cannot write {out}: {error.strerror}") from None
        with file:
            writer = StreamWriter(file, source.header)
            for delta, shadows in shadow_deltas(deltas, systems, max_len=max_len, runs=True):
                writer.delta(delta)
                for shadow in shadows:
                    writer.shadow(shadow)
            writer.finish()
    finally:
        source.close()
