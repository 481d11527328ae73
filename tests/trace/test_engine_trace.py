"""The trace of a real engine on the toy model: the fold says at every step what the engine's own block manager says."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from minipaged.api import LLM
from minipaged.config import SamplingParams
from minipaged.engine import Engine
from minipaged.errors import TraceError
from minipaged.execution.runner import Pending, Runner
from minipaged.lab.measure.trace_cost import decoding_engine
from minipaged.scheduling.plan import StepPlan, StepTokens
from minipaged.trace import packing
from minipaged.trace.codec import decode_delta, encode_delta
from minipaged.trace.player import Player
from minipaged.trace.records import StepDelta
from minipaged.trace.rows import EventRows, SequenceRows
from minipaged.trace.snapshot import Snapshot, fold
from minipaged.trace.sources import FileSource
from minipaged.trace.stream import StreamWriter, header_of, open_recorder

SHARED = "An operating system keeps memory in pages. "
LONG = SamplingParams(max_tokens=40)
RUNS = {
    "sharing": (
        {"num_blocks": 64},
        (SamplingParams(n=3, max_tokens=12, temperature=0.9, seed=1), SamplingParams(max_tokens=20)),
    ),
    "beams": ({"num_blocks": 64}, (SamplingParams(n=2, beam_width=4, max_tokens=10), SamplingParams(max_tokens=6))),
    "recompute": ({"num_blocks": 30, "preemption": "recompute"}, (LONG, LONG, SamplingParams(max_tokens=30))),
    "swap": (
        {"num_blocks": 42, "num_host_blocks": 64, "preemption": "swap"},
        (LONG, SamplingParams(n=2, max_tokens=30, temperature=0.8, seed=2), LONG),
    ),
}


def check(engine: Engine, snapshot: Snapshot) -> None:
    """Tables, counts, free blocks and texts, against the engine's own."""
    manager, scheduler = engine.scheduler.manager, engine.scheduler
    usage = manager.usage()
    stats = snapshot.stats
    assert (stats.total_blocks, stats.free_blocks, stats.cached_blocks) == (usage.total, usage.free, usage.cached)
    assert stats.host_free == usage.host_free
    assert int((snapshot.device.refs > 0).sum()) == usage.referenced
    for block in range(1, usage.total):
        assert snapshot.device.refs[block] == manager.ref_count(block), block
    alive = [sequence for request in scheduler.requests.values() for sequence in request.alive]
    for sequence in alive:
        try:
            table, host = manager.table(sequence.seq_id), manager.host_table(sequence.seq_id)
        except KeyError:
            table, host = (), ()
        assert snapshot.tables.get((sequence.seq_id, 0), ()) == table
        assert snapshot.host_tables.get((sequence.seq_id, 0), ()) == host
        state = snapshot.sequences[sequence.seq_id]
        assert tuple(state.token_ids) == tuple(sequence.token_ids)
        assert state.status == sequence.status.value
        # all of the text, since nothing here has a stop string
        assert state.text.decode() == f"{sequence.request.prompt}{sequence.text}"
        assert state.num_computed == sequence.num_computed
    assert sum(map(len, snapshot.host_tables.values())) == int(snapshot.host.refs.sum())
    assert {seq for seq, _ in snapshot.tables} <= {sequence.seq_id for sequence in alive}
    assert int(snapshot.device.fill[snapshot.device.refs > 0].sum()) == stats.token_slots


@pytest.mark.parametrize("name", list(RUNS))
def test_the_fold_follows_the_engine(name: str, tmp_path: Path) -> None:
    settings, asked = RUNS[name]
    llm = LLM("toy", block_size=4, device="cpu", dtype="float32", watermark=0.0, **settings)  # type: ignore[arg-type]
    engine = llm.engine
    path = tmp_path / "run.mpt"
    recorder = open_recorder(path, engine)
    deltas: list[StepDelta] = []
    snapshot = Snapshot()
    engine.trace.subscribe(deltas.append)
    engine.trace.subscribe(recorder.write)
    for number, params in enumerate(asked):
        engine.submit(SHARED + "abc"[number] * 3, params)
    while engine.has_work:
        engine.step()
        snapshot.apply(deltas[-1])
        check(engine, snapshot)
        read = decode_delta(deltas[-1].step, encode_delta(deltas[-1]))
        assert read.events == deltas[-1].events
        assert repr(read.sequences) == repr(deltas[-1].sequences)  # repr: nan equals itself here
    recorder.close()
    kinds = {event.kind for delta in deltas for event in delta.events}
    assert {"sharing": "copy", "beams": "prune", "recompute": "preempt", "swap": "swap_in"}[name] in kinds
    source = FileSource(path)
    assert Player(source, len(source)).snapshot == snapshot == fold(deltas)
    assert source.header.engine["block_size"] == 4
    assert all(token in source.pieces for state in snapshot.sequences.values() for token in state.token_ids)
    for state in snapshot.sequences.values():
        text = bytes(state.text).decode(errors="replace")
        assert text.startswith(SHARED)
        assert text.count(SHARED) == 1, "nothing is told twice"


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_the_queue_is_shown_in_serving_order(policy: str) -> None:
    """Who waits is listed as it will be served: under fcfs a priority moves nobody."""
    llm = LLM("toy", block_size=4, num_blocks=64, max_num_seqs=1, policy=policy)  # type: ignore[arg-type]
    deltas: list[StepDelta] = []
    llm.engine.trace.subscribe(deltas.append)
    for priority in (0, 5, -3, 1):
        llm.engine.submit([1, 2, 3], SamplingParams(max_tokens=3, priority=priority))
    while llm.engine.has_work:
        llm.engine.step()
        expected = [s.seq_id for request in llm.engine.scheduler.waiting for s in request.alive]
        assert list(deltas[-1].queues.waiting) == expected
    longest = max((d.queues.waiting for d in deltas), key=len)
    assert len(longest) == 3
    assert (list(longest) == sorted(longest)) is (policy == "fcfs")


def test_plain_decodes_are_columns_that_read_as_patches() -> None:
    """No object a sequence is made by the engine, a fold or a recorder; whoever looks finds the same as in a record that was read."""
    engine = decoding_engine(8)
    deltas: list[StepDelta] = []
    engine.trace.subscribe(deltas.append)
    for _ in range(40):
        engine.step()
    sink = io.BytesIO()
    writer = StreamWriter(sink, header_of(engine))
    by_columns, by_patches = Snapshot(), Snapshot()
    for delta in deltas:
        rows, events = delta.sequences, delta.events
        assert isinstance(rows, SequenceRows)
        assert isinstance(events, EventRows)
        assert len(rows.plain.sequence) == (0 if delta is deltas[0] else 8)
        writer.delta(delta)
        by_columns.apply(delta)
        assert rows._made is None
        assert events._made is None
        by_patches.apply(replace(delta, sequences=tuple(rows), events=tuple(events)))
        assert by_columns == by_patches
        assert rows == tuple(rows)
        assert tuple(rows) == rows
        assert rows[-1] == rows[-1:][0]
        assert len(rows) == len(tuple(rows))
        assert len(events) == len(tuple(events))
    patches = [replace(delta, sequences=tuple(delta.sequences)) for delta in deltas]
    assert fold(deltas[5:]) == fold(patches[5:]), "a fold may begin in the middle"
    for sequence, patch in zip(engine.scheduler.sequences.values(), deltas[-1].sequences, strict=True):
        assert patch.token_ids == (sequence.token_ids[-1],)
        assert patch.text == f" {sequence.token_ids[-1]}".encode()


def test_samples_that_have_parted_are_plain_decodes() -> None:
    """Each of n samples grows alone once they have parted; one that ends is told in full, and its siblings are columns again."""
    llm = LLM("toy", block_size=4, num_blocks=64, device="cpu", dtype="float32")
    engine = llm.engine
    deltas: list[StepDelta] = []
    engine.trace.subscribe(deltas.append)
    engine.submit(SHARED, SamplingParams(n=3, max_tokens=12, temperature=0.9, seed=1, ignore_eos=True))
    engine.submit(SHARED, SamplingParams(max_tokens=6, stop_token_ids=(1, 2), ignore_eos=True))
    best = engine.submit(SHARED, SamplingParams(best_of=2, max_tokens=6, temperature=0.9, seed=1, ignore_eos=True))
    while engine.has_work:
        engine.step()
    plain = [set(d.sequences.plain.request.tolist()) for d in deltas if isinstance(d.sequences, SequenceRows)]
    assert {0, 1} <= set().union(*plain)
    assert best not in set().union(*plain), "its score is told in every step"
    whole = [d.sequences.plain.request.tolist().count(0) for d in deltas if isinstance(d.sequences, SequenceRows)]
    assert max(whole) == 3
    assert sum(count == 3 for count in whole) >= 8


def test_columns_come_back_as_columns_and_damaged_ones_are_refused() -> None:
    """A reader makes no object a sequence either; rows that do not fit their tokens and texts are no record."""
    engine = decoding_engine(8)
    deltas: list[StepDelta] = []
    engine.trace.subscribe(deltas.append)
    for _ in range(3):
        engine.step()
    body = encode_delta(deltas[-1])
    read = decode_delta(2, body)
    assert isinstance(read.sequences, SequenceRows)
    assert isinstance(read.events, EventRows)
    assert read.sequences.plain.token_ids == deltas[-1].sequences.plain.token_ids  # type: ignore[attr-defined]
    assert read.sequences == deltas[-1].sequences
    assert read.events == deltas[-1].events
    assert decode_delta(2, packing.recompress(encode_delta(deltas[-1], level=0))).sequences == read.sequences
    head, columns = packing.unpack(body)
    spoiled = [
        ({"plain": 9}, {}),
        ({"plain": -1}, {}),
        ({"appends": "8"}, {}),
        ({}, {"s.token_ids": columns["s.token_ids"][1:]}),
        ({}, {"s.text": columns["s.text"][1:]}),
        ({}, {"s.num_tokens": columns["s.num_tokens"] * 2}),
        ({}, {"s.num_bytes": -columns["s.num_bytes"]}),
        ({}, {"s.request": columns["s.request"][1:]}),
        ({}, {"e.amount": columns["e.amount"][1:]}),
    ]
    for change, other in spoiled:
        with pytest.raises(TraceError):
            decode_delta(2, packing.pack({**head, **change}, {**columns, **other}))


def test_parts_of_characters_wait_for_the_rest() -> None:
    """Bytes of one character a token: the trace tells whole characters, whichever way the sequence is told."""
    text = "aé€b😀c"
    llm = LLM("toy", block_size=4, num_blocks=64, device="cpu", dtype="float32")
    engine = llm.engine
    data = text.encode()
    runner = _Scripted(engine.runner, data)
    engine.runner = runner
    deltas: list[StepDelta] = []
    engine.trace.subscribe(deltas.append)
    engine.submit("x", SamplingParams(max_tokens=len(data), ignore_eos=True))
    while engine.has_work:
        engine.step()
    told = [patch.text for delta in deltas for patch in delta.sequences]
    assert b"".join(told).decode() == "x" + text
    for part in told:
        part.decode()  # each is whole
    columns = [delta.sequences.plain.texts for delta in deltas if isinstance(delta.sequences, SequenceRows)]
    assert [b"b"] in columns
    assert all(piece.isascii() for pieces in columns for piece in pieces)


class _Scripted:
    """A runner whose draws are replaced by given tokens, one a step."""

    def __init__(self, runner: Runner, tokens: bytes) -> None:
        self._runner = runner
        self._tokens = iter(tokens)

    def num_blocks(self) -> int:
        return self._runner.num_blocks()

    def launch(self, plan: StepPlan) -> Pending:
        return _ScriptedDraws([next(self._tokens) for _ in plan.draw_rows])


class _ScriptedDraws:
    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens

    def tokens(self) -> StepTokens:
        return StepTokens(np.array(self._tokens, np.int32))
