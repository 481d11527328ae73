"""The trace of a real engine on the toy model: the fold says at every step what the engine's own block manager says."""

from __future__ import annotations

from pathlib import Path

import pytest

from minipaged.config import SamplingParams
from minipaged.engine import Engine
from minipaged.llm import LLM
from minipaged.trace.player import Player
from minipaged.trace.records import StepDelta
from minipaged.trace.snapshot import Snapshot, fold
from minipaged.trace.sources import FileSource
from minipaged.trace.stream import open_recorder

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
