"""Mutated traces: a clean refusal, or what is right up to where it ends with a word. At most a second and 200 MB each.

Some mutants are raw bytes, whose check sums tell; in others the values of a record are changed and its check sum made right.
"""

from __future__ import annotations

import io
import random
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripted import sharing_scene

from minipaged.api import LLM
from minipaged.config import SamplingParams
from minipaged.errors import TraceError
from minipaged.memory.types import PoolBreakdown, Run
from minipaged.trace import packing
from minipaged.trace.events import ShadowDelta, StepDelta
from minipaged.trace.file import Header, Kind, Record, StreamWriter, read_header, read_record
from minipaged.trace.player import Player
from minipaged.trace.snapshot import Snapshot
from minipaged.trace.sources import FileSource

SECONDS, MEGABYTES = 1.0, 200
VALUES: tuple[Any, ...] = (
    *(0, -1, 1, 2, 7, 255, 1 << 31, (1 << 62) + 1, -(1 << 63), 1 << 80, 0.5, float("inf"), float("nan"), True, None),
    *("", "x", "\x1b]2;owned\x07", "x" * 5000, [], [[]], {}, {"a": 1}, ["alloc"], "free"),
)


def trace_of(deltas: list[StepDelta]) -> bytes:
    """A file with a keyframe every five steps, and another system's record behind each."""
    out = io.BytesIO()
    writer = StreamWriter(out, Header("m", 7, {"block_size": 4}), keyframe_every=5)
    for delta in deltas:
        writer.delta(delta)
        runs = (Run(0, 32, "token", 0), Run(32, 9, "reserved", 1))
        writer.shadow(ShadowDelta(delta.step, "orca-pow2", runs, PoolBreakdown(10, 20, 0, 98, 0, 0)))
    writer.finish()
    return out.getvalue()


def engine_deltas() -> list[StepDelta]:
    """Samples that share, are swapped and end."""
    llm = LLM("toy", device="cpu", block_size=4, num_blocks=14, num_host_blocks=32, preemption="swap", watermark=0.0)
    deltas: list[StepDelta] = []
    llm.engine.trace.subscribe(deltas.append)
    for n, prompt in ((2, "one two"), (1, "three four"), (1, "one two")):
        llm.engine.submit(prompt, SamplingParams(n=n, max_tokens=10, temperature=0.9, seed=1, ignore_eos=True))
    while llm.engine.has_work:
        llm.engine.step()
    assert {"fork", "swap_out", "swap_in", "finish"} <= {event.kind for delta in deltas for event in delta.events}
    return deltas


class Original:
    """A trace, and its state at each position."""

    def __init__(self, deltas: list[StepDelta]) -> None:
        self.data = trace_of(deltas)
        self.states = [Snapshot()]
        for delta in deltas:
            state = self.states[-1].copy()
            state.apply(delta)
            self.states.append(state)
        stream = io.BytesIO(self.data)
        self.header = read_header(stream)
        self.records: list[Record] = []
        while (record := read_record(stream)) is not None and record.kind != Kind.INDEX:
            self.records.append(record)


@pytest.fixture(scope="module")
def originals() -> list[Original]:
    return [Original(sharing_scene().deltas), Original(engine_deltas())]


def raw_mutant(data: bytes, rng: random.Random) -> bytes:
    """Bytes flipped, cut out, put in, moved, or the end cut off."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        at, size = rng.randrange(len(found)), rng.choice((1, 1, 4, 60, 700))
        match rng.randrange(5):
            case 0:
                found[at] ^= 1 << rng.randrange(8)
            case 1:
                del found[at : at + size]
            case 2:
                found[at:at] = rng.randbytes(size)
            case 3:
                found[at : at + size] = found[: len(found[at : at + size])]
            case _:
                del found[max(20, at) :]
    return bytes(found)


def with_other_values(record: Record, rng: random.Random) -> Record:
    """The record with a value of its head or a column changed, and a check sum that is right."""
    try:
        head, columns = packing.unpack(record.body)
    except TraceError:  # it was changed before
        return record
    if columns and rng.random() < 0.6:
        name = rng.choice(sorted(columns))
        columns[name] = other_column(columns[name], rng)
        if rng.random() < 0.2:
            del columns[name]
    elif head:
        place: Any = head
        while isinstance(place, (dict, list)) and place:
            key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
            if not isinstance(place[key], (dict, list)) or not place[key] or rng.random() < 0.3:
                place[key] = rng.choice(VALUES)
                break
            place = place[key]
    return record._replace(body=packing.pack(head, columns), step=rng.choice((record.step,) * 9 + (-5,)))


def other_column(column: packing.Array, rng: random.Random) -> packing.Array:
    """One value changed, or the column's length or type."""
    found = column.astype(np.int64) if column.dtype.kind in "iu" else column.copy()
    match rng.randrange(6):
        case 0:
            return found[1:]
        case 1:
            return np.concatenate([found, found])
        case 2:
            return found.astype(np.float64) / 2
        case 3:
            return found[::-1].copy()
        case _:
            found[rng.randrange(len(found))] = rng.choice((-1, -2, 0, 1, 2, 9, 40, 1 << 23, 1 << 40, (1 << 62) + 5))
            return found


def valued_mutant(original: Original, rng: random.Random) -> bytes:
    """A file whose check sums are right and some of whose values are not. It has no index: that would tell of the lengths."""
    records = list(original.records)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(records))
        match rng.randrange(8):
            case 0:
                del records[at]
            case 1:
                records.insert(at, rng.choice(records))
            case _:
                records[at] = with_other_values(records[at], rng)
        if not records:
            break
    return original.header.to_bytes() + b"".join(record.to_bytes() for record in records)


def refused(error: TraceError) -> bool:
    """It did not open, and says so in one line."""
    assert str(error)
    assert "\n" not in str(error)
    return False


def judge(path: Path, original: Original, *, exact: bool) -> bool:
    """Open and go about; whether it opened. exact: what is shown must be the original's, as far as it goes."""
    try:
        source = FileSource(path)
        player = Player(source, 0)
    except TraceError as error:
        return refused(error)
    for position in (len(source), 3, len(source)):
        try:
            player.seek(position)
        except TraceError as error:  # no whole keyframe is left
            return refused(error)
        if exact and player.position < len(original.states):
            expected = original.states[player.position].copy()
            expected.shadows = player.snapshot.shadows
            assert player.snapshot == expected
    assert player.position == len(source)
    if len(source) < len(original.states) - 1:
        assert source.damage, "a shorter trace says why"
        assert "\n" not in source.damage
    source.close()
    return True


def fuzz(tmp_path: Path, originals: list[Original], count: int) -> None:
    rng = random.Random(13)
    path, opened = tmp_path / "mutant.mpt", 0
    for number in range(count):
        original, raw = originals[number % 2], number % 4 < 2
        data = raw_mutant(original.data, rng) if raw else valued_mutant(original, rng)
        path.write_bytes(data)
        try:
            # Twice: whoever follows each allocation takes several times as long.
            started = time.thread_time()
            opened += judge(path, original, exact=raw)
            spent = time.thread_time() - started
            tracemalloc.start()
            judge(path, original, exact=raw)
            peak = tracemalloc.get_traced_memory()[1]
        except Exception as error:
            error.add_note(f"mutant {number}")
            raise
        finally:
            tracemalloc.stop()
        assert spent < SECONDS, f"mutant {number}"
        assert peak < MEGABYTES * 1e6 + len(data), f"mutant {number}"
    assert opened > count // 4, "most mutants are shown up to their damage"


def test_mutated_traces(tmp_path: Path, originals: list[Original]) -> None:
    fuzz(tmp_path, originals, 200)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_mutated_traces(tmp_path: Path, originals: list[Original]) -> None:
    fuzz(tmp_path, originals, 2000)
