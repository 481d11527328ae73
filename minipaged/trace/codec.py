"""The trace's values as columns, and back. packing.py turns columns into bytes.

The bytes may come from anybody: every value is checked here, once, so that no reader has to. `Body` is the only way to
a value of a record, and each of its methods names the values that it lets through; anything else is a TraceError.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np

from minipaged.errors import TraceError
from minipaged.memory.types import PoolBreakdown, Run
from minipaged.text.safe import one_line
from minipaged.trace.events import (
    NO_LONGS,
    Event,
    Longs,
    Progress,
    Queues,
    SequencePatch,
    ShadowDelta,
    Stats,
    StepDelta,
    StepEvents,
)
from minipaged.trace.packing import Columns, Head, pack, unpack
from minipaged.trace.snapshot import COLUMNS, MAX_BLOCKS, NO_HOST_BLOCK, Pool, SequenceState, Snapshot, Tables

MAX_SLOTS = 1 << 40  # of another system's pool
MAX_NUMBER = (1 << 63) - 1
MAX_SEQUENCE = (1 << 31) - 1
MAX_WORD = 64  # characters of a status, a kind of event, a system's name
MAX_ROWS = 1 << 22  # of a column
MAX_TOKEN_BYTES = 1 << 10

# The columns of each table; their values on the wire are named prefix.name.
_EVENT_COLUMNS = ("id", "kind", "cause", "sequence", "block", "other", "amount")
_PATCH_COLUMNS = ("sequence", "request", "parent", "status", "num_cached", "num_prompt")
_PROGRESS_COLUMNS = ("sequence", "num_computed", "num_scheduled", "num_new")
_RUN_COLUMNS = ("start", "length", "kind", "sequence")
_MOST = {
    "sequence": MAX_SEQUENCE,
    "block": MAX_BLOCKS,
    "total_blocks": MAX_BLOCKS,
    "host_total": MAX_BLOCKS,
    "block_size": 1 << 20,
}


class Body:
    """The head and the columns of a record that may say anything."""

    def __init__(self, body: bytes) -> None:
        self.head, self.columns = unpack(body)

    def number(self, name: str, *, least: int = 0, most: int = MAX_NUMBER, within: Any = None) -> int:
        """A whole number of the head, or of the mapping `within`; 0 where it is missing."""
        mapping = self.head if within is None else within
        if not isinstance(mapping, dict):
            raise TraceError(f"a trace record's {name} has no place to stand")
        value = mapping.get(name, 0)
        if type(value) is not int or not least <= value <= most:
            raise TraceError(f"a trace record's {name} is {value!r:.40}, not a whole number from {least} to {most}")
        return value

    def words(self, name: str) -> list[str]:
        """A list of short texts, safe to print."""
        found = self.head.get(name, [])
        if not isinstance(found, list) or not all(isinstance(word, str) and len(word) <= MAX_WORD for word in found):
            raise TraceError(f"a trace record's {name} are not a list of words")
        return [one_line(word) for word in found]

    def ints(self, name: str, *, least: int = -1, most: int = MAX_NUMBER, length: int | None = None) -> Longs:
        """A column of whole numbers; none where it is missing. length: how many they must be."""
        column = self.columns.get(name, NO_LONGS)
        if column.dtype.kind not in "iu":
            raise TraceError(f"a trace record's column {name} holds no whole numbers")
        if len(column) > MAX_ROWS:
            raise TraceError(f"a trace record's column {name} has {len(column)} rows, more than {MAX_ROWS}")
        if length is not None and len(column) != length:
            raise TraceError(f"a trace record's columns differ in length: {name} has {len(column)} rows, not {length}")
        if len(column):
            # Of a few values Python's own minimum is found sooner: a trace is read record by record, and most columns are short.
            values = column.tolist() if len(column) < 100 else (np.minimum.reduce(column), np.maximum.reduce(column))
            if min(values) < least or max(values) > most:
                raise TraceError(f"a trace record's column {name} has values outside {least} to {most}")
        return column.astype(np.int64, copy=False)

    def table(self, prefix: str, names: Iterable[str], *, codes: int = 0) -> dict[str, Longs]:
        """Columns of one length. codes: how many words the column `kind` or `status` chooses from."""
        found: dict[str, Longs] = {}
        length: int | None = None
        for name in names:
            most = codes - 1 if name in ("kind", "status") else _MOST.get(name, MAX_NUMBER)
            found[name] = self.ints(f"{prefix}.{name}", most=most, length=length)
            length = len(found[name])
        return found

    def parts(self, lengths: str, values: str, most: int) -> tuple[Longs, Longs]:
        """A column of lengths, and the values that they cut into parts."""
        counts = self.ints(lengths, least=0, most=1 << 31)
        found = self.ints(values, most=most)
        if int(counts.sum()) != len(found):
            raise TraceError(f"a trace record's {values} are not as many as its {lengths} say")
        return counts, found

    def texts(self, lengths: str, values: str) -> list[bytes]:
        """A column of lengths, and the bytes that they cut into texts."""
        counts, data = self.parts(lengths, values, 255)
        if len(counts) and int(counts.max()) > MAX_TOKEN_BYTES:
            raise TraceError(f"a trace record's {lengths} are of texts longer than any token's")
        stops = np.cumsum(counts).tolist()
        text = data.astype(np.uint8).tobytes()
        return [text[a:b] for a, b in zip([0, *stops], stops, strict=False)]

    def floats(self, name: str, length: int) -> list[float]:
        """A column of numbers, one a row."""
        column = self.columns.get(name)
        if column is None:
            column = np.zeros(0)
        if column.dtype.kind != "f" or len(column) != length:
            raise TraceError(f"a trace record's column {name} is not a number for each of {length} rows")
        return column.tolist()


def _ints(values: Iterable[int]) -> Longs:
    return np.fromiter(values, np.int64)


def _columns(prefix: str, names: Sequence[str], rows: Sequence[tuple[int, ...]]) -> Columns:
    """Rows of whole numbers, turned."""
    if not rows:
        return {}
    return {f"{prefix}.{name}": column for name, column in zip(names, np.array(rows, np.int64).T, strict=True)}


# ---- events: all but the appends, which are the progress's rows seen as events


def _put_events(events: Sequence[Event], head: Head, columns: Columns) -> None:
    first = events.first if isinstance(events, StepEvents) else events
    if isinstance(events, StepEvents):
        head["next_id"] = events.next_id
    kinds = sorted({event.kind for event in first})
    code = {kind: index for index, kind in enumerate(kinds)}
    head["kinds"] = kinds
    columns.update(_columns("e", _EVENT_COLUMNS, [(e[0], code[e[1]], *e[2:]) for e in first]))


def _take_events(body: Body, progress: Progress) -> Sequence[Event]:
    kinds = body.words("kinds")
    found = body.table("e", _EVENT_COLUMNS, codes=len(kinds))
    ids, codes, *rest = (column.tolist() for column in found.values())
    first = tuple(map(Event._make, zip(ids, map(kinds.__getitem__, codes), *rest, strict=True)))
    scheduled = progress.num_scheduled > 0
    if "next_id" not in body.head:
        return first
    next_id = body.number("next_id")
    return StepEvents(first, next_id, progress.sequence[scheduled], progress.num_scheduled[scheduled])


# ---- sequences and what they gained


def _put_sequences(patches: Sequence[SequencePatch], head: Head, columns: Columns) -> None:
    if not patches:
        return
    statuses = sorted({patch.status for patch in patches})
    code = {status: index for index, status in enumerate(statuses)}
    rows = [(p.sequence, p.request, p.parent, code[p.status], p.num_cached, p.num_prompt) for p in patches]
    columns.update(_columns("s", _PATCH_COLUMNS, rows))
    columns["s.score"] = np.array([patch.score for patch in patches], np.float64)
    head["statuses"], head["reasons"] = statuses, [patch.finish_reason for patch in patches]


def _take_sequences(body: Body) -> tuple[SequencePatch, ...]:
    statuses, reasons = body.words("statuses"), body.words("reasons")
    found = body.table("s", _PATCH_COLUMNS, codes=len(statuses))
    count = len(found["sequence"])
    scores = body.floats("s.score", count) if count else []
    if len(reasons) != count:
        raise TraceError("a trace record's finish reasons are not as many as its sequences")
    if count and int(found["status"].min()) < 0:
        raise TraceError("a trace record has a sequence without a status")
    rows = zip(*(column.tolist() for column in found.values()), scores, reasons, strict=True)
    return tuple(SequencePatch._make((*row[:3], statuses[row[3]], *row[4:])) for row in rows)


def _put_progress(progress: Progress, columns: Columns) -> None:
    columns.update({f"p.{name}": getattr(progress, name) for name in (*_PROGRESS_COLUMNS, "token_ids")})


def _take_progress(body: Body) -> Progress:
    found = body.table("p", _PROGRESS_COLUMNS)
    _, token_ids = body.parts("p.num_new", "p.token_ids", MAX_NUMBER)
    if len(found["num_computed"]) and int(found["num_computed"].min()) < 0:
        raise TraceError("a trace record's num_computed is below 0")
    return Progress._make((*found.values(), token_ids))


def _put_token_bytes(token_bytes: Iterable[tuple[int, bytes]], columns: Columns) -> None:
    pairs = list(token_bytes)
    if pairs:
        columns["w.ids"] = _ints(token for token, _ in pairs)
        columns["w.lengths"] = _ints(len(data) for _, data in pairs)
        columns["w.bytes"] = np.frombuffer(b"".join(data for _, data in pairs), np.uint8)


def _take_token_bytes(body: Body) -> dict[int, bytes]:
    if "w.ids" not in body.columns:
        return {}
    texts = body.texts("w.lengths", "w.bytes")
    return dict(zip(body.ints("w.ids", length=len(texts)).tolist(), texts, strict=True))


# ---- queues and stats


def _put_queues(queues: Queues, columns: Columns) -> None:
    columns.update({f"q.{name}": _ints(getattr(queues, name)) for name in Queues._fields})


def _take_queues(body: Body) -> Queues:
    return Queues(*(tuple(body.ints(f"q.{name}").tolist()) for name in Queues._fields))


def _take_stats(body: Body) -> Stats:
    """Unknown counters of a newer minor version are left out; missing ones are 0."""
    record = body.head.get("stats", {})
    return Stats(*(body.number(name, most=_MOST.get(name, MAX_NUMBER), within=record) for name in Stats._fields))


def encode_delta(delta: StepDelta, *, level: int = 1) -> bytes:
    """A StepDelta as a body. level: zlib's; 0 for a stream that goes no farther than to another process."""
    head: Head = {"t_ns": delta.t_ns, "stats": {n: v for n, v in zip(Stats._fields, delta.stats, strict=True) if v}}
    columns: Columns = {}
    _put_events(delta.events, head, columns)
    _put_sequences(delta.sequences, head, columns)
    _put_progress(delta.progress, columns)
    _put_token_bytes(delta.token_bytes.items(), columns)
    _put_queues(delta.queues, columns)
    return pack(head, columns, level=level)


def decode_delta(step: int, body: bytes) -> StepDelta:
    """The StepDelta of a body. Raises TraceError."""
    record = Body(body)
    progress = _take_progress(record)
    return StepDelta(
        step=step,
        t_ns=record.number("t_ns"),
        events=_take_events(record, progress),
        sequences=_take_sequences(record),
        progress=progress,
        token_bytes=_take_token_bytes(record),
        queues=_take_queues(record),
        stats=_take_stats(record),
    )


# ---- other systems


def _shadow_columns(prefix: str, shadows: Sequence[ShadowDelta]) -> tuple[Head, Columns]:
    kinds = sorted({run.kind for shadow in shadows for run in shadow.runs})
    code = {kind: index for index, kind in enumerate(kinds)}
    rows = [(r.start, r.length, code[r.kind], r.sequence) for shadow in shadows for r in shadow.runs]
    columns = _columns(prefix, _RUN_COLUMNS, rows)
    columns[f"{prefix}.step"] = _ints(shadow.step for shadow in shadows)
    columns[f"{prefix}.num_runs"] = _ints(len(shadow.runs) for shadow in shadows)
    columns[f"{prefix}.breakdown"] = _ints(chain.from_iterable(shadow.stats for shadow in shadows))
    return {"systems": [shadow.system for shadow in shadows], "run_kinds": kinds}, columns


def _take_shadows(body: Body, prefix: str) -> list[ShadowDelta]:
    kinds, systems = body.words("run_kinds"), body.words("systems")
    found = body.table(prefix, _RUN_COLUMNS, codes=len(kinds))
    if len(found["kind"]) and min(int(found[name].min()) for name in ("start", "length", "kind")) < 0:
        raise TraceError("a trace record has a run of slots that is none")
    rows = zip(*(column.tolist() for column in found.values()), strict=True)
    runs = [Run(start, length, kinds[kind], sequence) for start, length, kind, sequence in rows]
    steps = body.ints(f"{prefix}.step", length=len(systems)).tolist()
    counts = body.ints(f"{prefix}.num_runs", least=0, length=len(systems)).tolist()
    width = len(PoolBreakdown._fields)
    slots = body.ints(f"{prefix}.breakdown", least=0, most=MAX_SLOTS, length=width * len(systems)).tolist()
    if sum(counts) != len(runs):
        raise TraceError("a trace record's runs are not those of its systems")
    made, at = [], 0
    for number, (step, system, count) in enumerate(zip(steps, systems, counts, strict=True)):
        breakdown = PoolBreakdown(*slots[width * number : width * (number + 1)])
        made.append(ShadowDelta(step, system, tuple(runs[at : at + count]), breakdown))
        at += count
    return made


def encode_shadow(shadow: ShadowDelta) -> bytes:
    """A ShadowDelta as a body."""
    return pack(*_shadow_columns("r", [shadow]))


def decode_shadow(step: int, body: bytes) -> ShadowDelta:
    """The ShadowDelta of a body. Raises TraceError."""
    found = _take_shadows(Body(body), "r")
    if len(found) != 1 or found[0].step != step:
        raise TraceError("a trace record of another system is not of one system at its step")
    return found[0]


# ---- keyframes


def encode_keyframe(snapshot: Snapshot) -> bytes:
    """A whole Snapshot as a body."""
    head: Head = {"t_ns": snapshot.t_ns, "stats": snapshot.stats._asdict()}
    columns: Columns = {}
    states = list(snapshot.sequences.values())
    events = snapshot.events
    if isinstance(events, StepEvents):
        columns["a.sequence"], columns["a.amount"] = events.sequences, events.amounts
    _put_events(events, head, columns)
    _put_sequences([state.patch() for state in states], head, columns)
    columns["s.label"] = _ints(state.label for state in states)
    columns["p.num_computed"] = _ints(state.num_computed for state in states)
    columns["p.num_new"] = _ints(len(state.token_ids) for state in states)
    columns["p.token_ids"] = _ints(chain.from_iterable(state.token_ids for state in states))
    _put_token_bytes(snapshot.token_bytes.items(), columns)
    _put_queues(snapshot.queues, columns)
    for tier, pool, tables in _tiers(snapshot):
        columns.update({f"{tier}.{name}": getattr(pool, name) for name in COLUMNS})
        columns[f"{tier}.shared"] = _ints(pool.sharers)
        columns[f"{tier}.num_sharers"] = _ints(map(len, pool.sharers.values()))
        columns[f"{tier}.sharers"] = _ints(chain.from_iterable(pool.sharers.values()))
        columns[f"{tier}.tables"] = _ints(tables)
        columns[f"{tier}.lengths"] = _ints(map(len, tables.values()))
        columns[f"{tier}.entries"] = _ints(chain.from_iterable(tables.values())).astype(np.int32)
    shadow_head, shadow_columns = _shadow_columns("r", list(snapshot.shadows.values()))
    return pack({**head, **shadow_head}, {**columns, **shadow_columns})


def _tiers(snapshot: Snapshot) -> tuple[tuple[str, Pool, Tables], ...]:
    return ("device", snapshot.device, snapshot.tables), ("host", snapshot.host, snapshot.host_tables)


def decode_keyframe(step: int, body: bytes) -> Snapshot:
    """The Snapshot of a body. Raises TraceError."""
    record = Body(body)
    snapshot = Snapshot()
    snapshot.step, snapshot.t_ns = step, record.number("t_ns")
    snapshot.stats, snapshot.queues = _take_stats(record), _take_queues(record)
    sequences = record.ints("a.sequence")
    amounts = record.ints("a.amount", length=len(sequences))
    snapshot.events = _take_events(record, Progress(sequences, NO_LONGS, amounts, NO_LONGS, NO_LONGS))
    snapshot.token_bytes = _take_token_bytes(record)
    _take_states(record, snapshot)
    sizes = []
    for tier, _, _ in _tiers(snapshot):
        sizes.append(len(record.ints(f"{tier}.owner", most=MAX_NUMBER)))
        if sizes[-1] > MAX_BLOCKS:
            raise TraceError(f"a trace of {sizes[-1]} blocks cannot be shown")
        if tier == "host":
            snapshot.resize(sizes[0], sizes[1])
    for (tier, pool, tables), size in zip(_tiers(snapshot), sizes, strict=True):
        _take_pool(record, tier, pool, size)
        _take_tables(record, tier, tables, size)
    snapshot.recount()
    for shadow in _take_shadows(record, "r"):
        snapshot.apply_shadow(shadow)
    return snapshot


def _take_states(record: Body, snapshot: Snapshot) -> None:
    patches = _take_sequences(record)
    count = len(patches)
    labels = record.ints("s.label", least=0, most=1 << 31, length=count).tolist()
    computed = record.ints("p.num_computed", least=0, length=count).tolist()
    lengths, token_ids = record.parts("p.num_new", "p.token_ids", MAX_NUMBER)
    if len(lengths) != count:
        raise TraceError("a keyframe's tokens are not those of its sequences")
    tokens, at = token_ids.tolist(), 0
    for patch, label, num_computed, length in zip(patches, labels, computed, lengths.tolist(), strict=True):
        state = SequenceState(*patch, label=label, token_bytes=snapshot.token_bytes, num_computed=num_computed)
        state.token_ids = tokens[at : at + length]
        snapshot.sequences[patch.sequence] = state
        at += length


def _take_pool(record: Body, tier: str, pool: Pool, size: int) -> None:
    for name in COLUMNS:
        most = 255 if name == "flags" else (1 << 31) - 1
        getattr(pool, name)[:] = record.ints(f"{tier}.{name}", most=most, length=size)
    shared = record.ints(f"{tier}.shared", least=0, most=size - 1).tolist()
    counts, holders = record.parts(f"{tier}.num_sharers", f"{tier}.sharers", MAX_NUMBER)
    if len(counts) != len(shared) or (len(counts) and int(counts.min()) < 2):
        raise TraceError("a keyframe's shared blocks are not those of their holders")
    found, at = holders.tolist(), 0
    for block, count in zip(shared, counts.tolist(), strict=True):
        pool.sharers[block] = tuple(found[at : at + count])
        at += count


def _take_tables(record: Body, tier: str, tables: Tables, size: int) -> None:
    sequences = record.ints(f"{tier}.tables").tolist()
    lengths, entries = record.parts(f"{tier}.lengths", f"{tier}.entries", size - 1)
    if len(lengths) != len(sequences):
        raise TraceError("a keyframe's tables are not those of its sequences")
    if tier == "device" and len(entries) and int(entries.min()) <= NO_HOST_BLOCK:
        raise TraceError("a keyframe's table names a block that no pool has")
    found, at = entries.tolist(), 0
    for sequence, length in zip(sequences, lengths.tolist(), strict=True):
        tables[sequence] = tuple(found[at : at + length])
        at += length
