"""The trace's values as columns, and back. Knows what each column means; packing.py knows how columns are bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np

from minipaged.errors import TraceError
from minipaged.memory.types import PoolBreakdown, Run
from minipaged.trace.packing import Array, Columns, Head, pack, unpack
from minipaged.trace.records import (
    TIER_DEVICE,
    TIER_HOST,
    BlockPatch,
    Event,
    Queues,
    SequencePatch,
    ShadowDelta,
    Stats,
    StepDelta,
    TablePatch,
)
from minipaged.trace.rows import EventRows, PlainColumns, SequenceRows
from minipaged.trace.snapshot import COLUMNS, Pool, SequenceState, Snapshot

MAX_BLOCKS = 1 << 24
_EVENT_COLUMNS = ("e.id", "e.kind", "e.cause", "e.sequence", "e.block", "e.other", "e.amount")
_NO_INT = np.zeros(0, np.int32)
_NO_BYTE = np.zeros(0, np.uint8)


def _ints(values: Iterable[int]) -> Array:
    return np.fromiter(values, np.int64)


def _event_columns(events: Sequence[Event]) -> tuple[Head, Columns]:
    """The head's `appends` says how many rows at the end are appends numbered one by one: a reader may keep them as columns."""
    appends = events if isinstance(events, EventRows) else None
    first: Sequence[Event] = appends.first if appends is not None else events
    if not len(events):
        return {}, {}
    names = {event.kind for event in first}
    kinds = sorted(names | {"append"} if len(events) > len(first) else names)
    code = {kind: index for index, kind in enumerate(kinds)}
    table = np.full((len(_EVENT_COLUMNS), len(events)), -1, np.int64)
    if first:
        rows = [(e.id, code[e.kind], e.cause, e.sequence, e.block, e.other, e.amount) for e in first]
        table[:, : len(first)] = np.array(rows, np.int64).T
    columns = dict(zip(_EVENT_COLUMNS, table, strict=True))
    if appends is not None and len(events) > len(first):
        rest = slice(len(first), None)
        columns["e.id"][rest] = np.arange(appends.next_id, appends.next_id + len(appends.seq_ids))
        columns["e.kind"][rest] = code["append"]
        columns["e.sequence"][rest], columns["e.amount"][rest] = appends.seq_ids, appends.lengths
    return {"kinds": kinds, "appends": len(events) - len(first)}, columns


def _events(head: Head, columns: Columns) -> Sequence[Event]:
    if "e.id" not in columns:
        return ()
    kinds = head["kinds"]
    end = _end_of_first(head.get("appends", 0), [columns[name] for name in _EVENT_COLUMNS])
    lists = [columns[name][:end].tolist() for name in _EVENT_COLUMNS]
    first = tuple(Event(row[0], kinds[row[1]], *row[2:]) for row in zip(*lists, strict=True))
    if end == len(columns["e.id"]):
        return first
    return EventRows(first, int(columns["e.id"][end]), columns["e.sequence"][end:], columns["e.amount"][end:])


def _end_of_first(rest: object, columns: list[Array]) -> int:
    """Rows before the last `rest`, which may stay columns. Raises TraceError unless there are as many and the columns are of one length."""
    total = len(columns[0])
    if any(len(column) != total for column in columns) or not isinstance(rest, int) or not 0 <= rest <= total:
        raise TraceError("a trace record's columns differ in length")
    return total - rest


def _queue_columns(queues: Queues) -> Columns:
    return {f"q.{name}": _ints(getattr(queues, name)) for name in Queues._fields}


def _queues(columns: Columns) -> Queues:
    return Queues(*(tuple(columns[f"q.{n}"].tolist()) if f"q.{n}" in columns else () for n in Queues._fields))


def _stats(head: Head) -> Stats:
    """Unknown counters of a newer minor version are left out; missing ones are 0."""
    told = head.get("stats", {})
    stats = Stats(**{name: int(told[name]) for name in Stats._fields if name in told})
    if not (0 <= stats.total_blocks <= MAX_BLOCKS and 0 <= stats.host_total <= MAX_BLOCKS and stats.block_size >= 0):
        raise TraceError(f"a trace of {stats.total_blocks} blocks of {stats.block_size} cannot be shown")
    return stats


def _sequence_columns(rows: Sequence[SequencePatch]) -> tuple[Head, Columns]:
    """The head's `plain` says how many rows at the end are plain decodes: a reader may keep them as columns."""
    if not len(rows):
        return {}, {}
    plain = rows.plain if isinstance(rows, SequenceRows) else None
    first = rows.first if isinstance(rows, SequenceRows) else rows
    names = {row.status for row in first}
    statuses = sorted(names | {"running"} if len(rows) > len(first) else names)
    code = {status: index for index, status in enumerate(statuses)}
    table = np.empty((len(_SEQUENCE_COLUMNS), len(rows)), np.int64)
    score = np.full(len(rows), np.nan)
    if first:
        table[:, : len(first)] = np.array([_numbers(row, code[row.status]) for row in first], np.int64).T
        score[: len(first)] = [row.score for row in first]
    token_ids = list(chain.from_iterable(row.token_ids for row in first))
    texts = [row.text for row in first]
    if plain is not None and len(rows) > len(first):
        rest = table[:, len(first) :]
        running, num_bytes = code["running"], np.zeros_like(plain.num_tokens)
        num_bytes[plain.num_tokens == 1] = list(map(len, plain.texts))
        told = (
            *plain[:3],
            running,
            plain.num_computed,
            plain.num_cached,
            plain.num_prompt,
            plain.num_tokens,
            num_bytes,
        )
        for row, column in zip(rest, told, strict=True):
            row[:] = column
        token_ids += plain.token_ids
        texts += plain.texts
    columns: Columns = dict(zip(_SEQUENCE_COLUMNS, table, strict=True))
    columns["s.token_ids"] = _ints(token_ids)
    columns["s.text"] = np.frombuffer(b"".join(texts), np.uint8)
    columns["s.score"] = score
    reasons = [row.finish_reason for row in first] + [""] * (len(rows) - len(first))
    return {"statuses": statuses, "reasons": reasons, "plain": len(rows) - len(first)}, columns


def _numbers(row: SequencePatch, status: int) -> tuple[int, ...]:
    """A patch's part of the columns of whole numbers."""
    told = row.sequence, row.request, row.parent, status, row.num_computed, row.num_cached, row.num_prompt
    return (*told, len(row.token_ids), len(row.text))


_SEQUENCE_COLUMNS = (
    "s.sequence",
    "s.request",
    "s.parent",
    "s.status",
    "s.num_computed",
    "s.num_cached",
    "s.num_prompt",
    "s.num_tokens",
    "s.num_bytes",
)


def _sequences(head: Head, columns: Columns) -> Sequence[SequencePatch]:
    if "s.sequence" not in columns:
        return ()
    end = _end_of_first(head.get("plain", 0), [columns[name] for name in _SEQUENCE_COLUMNS])
    lists = [columns[name][:end].tolist() for name in _SEQUENCE_COLUMNS]
    tokens = columns.get("s.token_ids", _NO_INT).tolist()
    text = columns.get("s.text", _NO_BYTE).tobytes()
    scores = columns["s.score"][:end].tolist()
    patches, token_at, byte_at = [], 0, 0
    for row, score, reason in zip(zip(*lists, strict=True), scores, head["reasons"][:end], strict=True):
        sequence, request, parent, status, computed, cached, prompt, num_tokens, num_bytes = row
        patches.append(
            SequencePatch(
                sequence,
                request,
                parent,
                head["statuses"][status],
                computed,
                cached,
                prompt,
                tuple(tokens[token_at : token_at + num_tokens]),
                text[byte_at : byte_at + num_bytes],
                score,
                reason,
            )
        )
        token_at, byte_at = token_at + num_tokens, byte_at + num_bytes
    if end == len(columns["s.sequence"]):
        return tuple(patches)
    return SequenceRows(tuple(patches), _plain(columns, end, tokens[token_at:], text[byte_at:]))


def _plain(columns: Columns, end: int, tokens: list[int], text: bytes) -> PlainColumns:
    """The rows from `end` on, and the tokens and text that are theirs."""
    sequence, request, parent, _, computed, cached, prompt, num_tokens, num_bytes = (
        columns[name][end:] for name in _SEQUENCE_COLUMNS
    )
    ends = np.cumsum(num_bytes[num_tokens == 1])
    fits = len(tokens) == len(ends) == int(num_tokens.sum()) and int(num_bytes.sum()) == len(text)
    if not fits or num_tokens.min() < 0 or num_bytes.min() < 0 or (len(ends) and int(ends[-1]) != len(text)):
        raise TraceError("a trace record's tokens and texts are not those of its sequences")
    stops = ends.tolist()
    texts = [text[a:b] for a, b in zip([0, *stops], stops, strict=False)]
    return PlainColumns(sequence, request, parent, computed, cached, prompt, num_tokens, tokens, texts)


def _table_columns(rows: Sequence[TablePatch]) -> Columns:
    if not rows:
        return {}
    plain = np.array([(row.sequence, row.group, row.start, len(row.ids), row.tier) for row in rows], np.int64)
    columns: Columns = {
        name: plain[:, i] for i, name in enumerate(("t.sequence", "t.group", "t.start", "t.length", "t.tier"))
    }
    columns["t.ids"] = _ints(chain.from_iterable(row.ids for row in rows)).astype(np.int32)
    return columns


def _tables(columns: Columns) -> tuple[TablePatch, ...]:
    if "t.sequence" not in columns:
        return ()
    lists = [columns[name].tolist() for name in ("t.sequence", "t.group", "t.start", "t.length", "t.tier")]
    column = columns.get("t.ids", _NO_INT)
    _check_ids(column, least=-1)  # -1 in a host table: an entry that was released before the swap
    ids = column.tolist()
    patches, at = [], 0
    for sequence, group, start, length, tier in zip(*lists, strict=True):
        patches.append(TablePatch(sequence, group, start, tuple(ids[at : at + length]), tier))
        at += length
    return tuple(patches)


def _check_ids(ids: Array, least: int = 0) -> None:
    if len(ids) and (ids.min() < least or ids.max() >= MAX_BLOCKS):
        raise TraceError("a trace record names a block that no pool has")


def encode_delta(delta: StepDelta, *, level: int = 1) -> bytes:
    """A StepDelta as a body. level: zlib's; 0 for a stream that goes no farther than to another process."""
    told, columns = _event_columns(delta.events)
    head: Head = {"t_ns": delta.t_ns, "stats": {n: v for n, v in zip(Stats._fields, delta.stats, strict=True) if v}}
    blocks = delta.blocks
    columns.update(
        {"b.ids": blocks.ids, "b.tier": blocks.tier, **{f"b.{name}": getattr(blocks, name) for name in COLUMNS}}
    )
    columns.update(_table_columns(delta.tables))
    more, sequence_columns = _sequence_columns(delta.sequences)
    return pack({**head, **told, **more}, {**columns, **sequence_columns, **_queue_columns(delta.queues)}, level=level)


def decode_delta(step: int, body: bytes, *, events: bool = True) -> StepDelta:
    """The StepDelta of a body; without its events, where only the state after it is wanted. Raises TraceError."""
    head, columns = unpack(body)
    try:
        ids = columns.get("b.ids", _NO_INT)
        _check_ids(ids)
        values = [columns.get(f"b.{name}", _NO_BYTE if name == "flags" else _NO_INT) for name in COLUMNS]
        tier = columns.get("b.tier", _NO_BYTE)
        if any(len(column) != len(ids) for column in [*values, tier]):
            raise TraceError("a trace record's block columns differ in length")
        owner, refs, fill, flags, group = values
        return StepDelta(
            step=step,
            t_ns=int(head["t_ns"]),
            events=_events(head, columns) if events else (),
            blocks=BlockPatch(ids, owner, refs, fill, flags, tier, group),
            tables=_tables(columns),
            sequences=_sequences(head, columns),
            queues=_queues(columns),
            stats=_stats(head),
        )
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise (
            error if isinstance(error, TraceError) else TraceError(f"a trace record cannot be read: {error!r}")
        ) from None


def encode_shadow(shadow: ShadowDelta) -> bytes:
    """A ShadowDelta as a body."""
    kinds = sorted({run.kind for run in shadow.runs})
    code = {kind: index for index, kind in enumerate(kinds)}
    plain = np.array([(r.start, r.length, code[r.kind], r.sequence) for r in shadow.runs], np.int64).reshape(-1, 4)
    columns: Columns = {name: plain[:, i] for i, name in enumerate(("r.start", "r.length", "r.kind", "r.sequence"))}
    return pack({"system": shadow.system, "kinds": kinds, "bands": shadow.stats._asdict()}, columns)


def decode_shadow(step: int, body: bytes) -> ShadowDelta:
    """The ShadowDelta of a body. Raises TraceError."""
    head, columns = unpack(body)
    try:
        lists = [columns.get(name, _NO_INT).tolist() for name in ("r.start", "r.length", "r.kind", "r.sequence")]
        runs = tuple(
            Run(start, length, head["kinds"][kind], seq) for start, length, kind, seq in zip(*lists, strict=True)
        )
        bands = PoolBreakdown(**{name: int(head["bands"].get(name, 0)) for name in PoolBreakdown._fields})
        return ShadowDelta(step, str(head["system"]), runs, bands)
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise TraceError(f"a trace record cannot be read: {error!r}") from None


def encode_keyframe(snapshot: Snapshot) -> bytes:
    """A whole Snapshot as a body."""
    told, columns = _event_columns(snapshot.events)
    states = list(snapshot.sequences.values())
    rows = [
        SequencePatch(
            sequence=s.sequence,
            request=s.request,
            parent=s.parent,
            status=s.status,
            num_computed=s.num_computed,
            num_cached=s.num_cached,
            num_prompt=s.num_prompt,
            token_ids=tuple(s.token_ids),
            text=bytes(s.text),
            score=s.score,
            finish_reason=s.finish_reason,
        )
        for s in states
    ]
    more, sequence_columns = _sequence_columns(rows)
    columns.update(sequence_columns)
    columns["s.label"] = _ints(state.label for state in states)
    columns["s.prompt_bytes"] = _ints(state.prompt_bytes for state in states)
    tables = [TablePatch(seq, group, 0, ids, TIER_DEVICE) for (seq, group), ids in snapshot.tables.items()]
    tables += [TablePatch(seq, group, 0, ids, TIER_HOST) for (seq, group), ids in snapshot.host_tables.items()]
    columns.update(_table_columns(tables))
    columns.update(_queue_columns(snapshot.queues))
    for tier, pool in (("device", snapshot.device), ("host", snapshot.host)):
        columns.update({f"{tier}.{name}": getattr(pool, name) for name in COLUMNS})
    head: Head = {"t_ns": snapshot.t_ns, "stats": snapshot.stats._asdict(), **told, **more}
    head["shadows"] = [[s.step, s.system, s.runs, s.stats._asdict()] for s in snapshot.shadows.values()]
    return pack(head, columns)


def decode_keyframe(step: int, body: bytes) -> Snapshot:
    """The Snapshot of a body. Raises TraceError."""
    head, columns = unpack(body)
    try:
        snapshot = Snapshot()
        snapshot.step, snapshot.t_ns = step, int(head["t_ns"])
        snapshot.events, snapshot.stats, snapshot.queues = _events(head, columns), _stats(head), _queues(columns)
        for pool, tier in ((snapshot.device, "device"), (snapshot.host, "host")):
            _fill_pool(pool, tier, columns)
        snapshot.mark_copied()
        for table in _tables(columns):
            tables = snapshot.host_tables if table.tier == TIER_HOST else snapshot.tables
            tables[(table.sequence, table.group)] = table.ids
        labels, prompts = columns.get("s.label", _NO_INT).tolist(), columns.get("s.prompt_bytes", _NO_INT).tolist()
        for row, label, prompt_bytes in zip(_sequences(head, columns), labels, prompts, strict=True):
            state = SequenceState(
                *row[:7], label, list(row.token_ids), bytearray(row.text), prompt_bytes, row.score, row.finish_reason
            )
            snapshot.sequences[row.sequence] = state
        for shadow_step, system, runs, bands in head.get("shadows", []):
            known = PoolBreakdown(**{name: bands[name] for name in PoolBreakdown._fields})
            snapshot.apply_shadow(ShadowDelta(shadow_step, system, tuple(Run(*run) for run in runs), known))
        return snapshot
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise error if isinstance(error, TraceError) else TraceError(f"a keyframe cannot be read: {error!r}") from None


def _fill_pool(pool: Pool, tier: str, columns: Columns) -> None:
    size = len(columns.get(f"{tier}.owner", _NO_INT))
    if size > MAX_BLOCKS:
        raise TraceError(f"a trace of {size} blocks cannot be shown")
    pool.grow(size)
    for name in COLUMNS if size else ():
        column = columns[f"{tier}.{name}"]
        if len(column) != size:
            raise TraceError("a keyframe's block columns differ in length")
        getattr(pool, name)[:] = column
