"""The trace of a real engine on the toy model: the fold says at every step what the engine's own block manager says."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from minipaged.api import LLM
from minipaged.config import SamplingParams
from minipaged.engine import Engine
from minipaged.errors import TraceError
from minipaged.lab.measure.trace_cost import decoding_engine
from minipaged.scheduling.plan import Pending, Runner, StepPlan, StepTokens
from minipaged.text.safe import clean_bytes
from minipaged.trace import packing
from minipaged.trace.codec import decode_delta, encode_delta
from minipaged.trace.events import StepDelta, StepEvents
from minipaged.trace.file import StreamWriter, header_of, open_recorder
from minipaged.trace.player import Player
from minipaged.trace.snapshot import Snapshot, fold
from minipaged.trace.sources import FileSource

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
    assert not snapshot.misfit
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
        assert snapshot.tables.get(sequence.seq_id, ()) == table
        assert snapshot.host_tables.get(sequence.seq_id, ()) == host
        state = snapshot.sequences[sequence.seq_id]
        assert tuple(state.token_ids) == tuple(sequence.token_ids)
        assert state.status == sequence.status.value
        # All of the text, since nothing here has a stop string; its end may be a part of a character that the engine holds back.
        shown, text = state.text.decode(errors="replace"), f"{sequence.request.prompt}{sequence.text}"
        assert shown.rstrip("\ufffd") == text.rstrip("\ufffd")
        assert bytes(state.text[: state.prompt_bytes]).decode() == sequence.request.prompt
        for index, block in enumerate(table):
            assert snapshot.device.fill[block] >= min(4, state.num_computed - 4 * index), "written by this one at least"
        assert state.num_computed == sequence.num_computed
    assert sum(map(len, snapshot.host_tables.values())) == int(snapshot.host.refs.sum())
    assert set(snapshot.tables) <= {sequence.seq_id for sequence in alive}
    assert int(snapshot.device.fill[snapshot.device.refs > 0].sum()) == stats.token_slots
    entries = [block for table in snapshot.tables.values() for block in table if block]
    assert stats.shared_saved_blocks == len(entries) - len(set(entries))
    assert stats.tail_slots == usage.referenced * 4 - stats.token_slots
    for block in range(1, usage.total):
        holders = [seq for seq, table in snapshot.tables.items() if block in table]
        assert sorted(snapshot.device.holders(block)) == sorted(holders)


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
    assert all(token in snapshot.token_bytes for state in snapshot.sequences.values() for token in state.token_ids)
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


def test_plain_decodes_are_columns() -> None:
    """No object a sequence is made by the engine, a fold or a recorder; whoever looks finds the same as in a record that was read."""
    engine = decoding_engine(8)
    deltas: list[StepDelta] = []
    engine.trace.subscribe(deltas.append)
    for _ in range(40):
        engine.step()
    first, _, *steps = deltas
    assert len(first.sequences) == 8, "who comes later is told at once what there is"
    writer = StreamWriter(io.BytesIO(), header_of(engine))
    snapshot = Snapshot()
    for delta in deltas:
        writer.delta(delta)
        snapshot.apply(delta)
    for delta in steps:
        events = delta.events
        assert isinstance(events, StepEvents)
        assert events._made is None
        assert not delta.sequences
        assert delta.progress.num_new.tolist() == delta.progress.num_scheduled.tolist() == [1] * 8
        assert events == tuple(events)
        assert tuple(events) == events
        assert events[-1] == events[-1:][0]
        assert len(events) == len(tuple(events))
    for sequence, token in zip(
        engine.scheduler.sequences.values(), deltas[-1].progress.token_ids.tolist(), strict=True
    ):
        assert token == sequence.token_ids[-1]
        state = snapshot.sequences[sequence.seq_id]
        assert state.token_ids == sequence.token_ids
        assert state.text.decode() == " ".join(map(str, sequence.token_ids))
    named = [token for delta in deltas for token in delta.token_bytes]
    assert len(named) == len(set(named)), "what a token reads is told once"


def test_who_listens_later_sees_the_same_and_disturbs_nobody() -> None:
    """A late listener's fold, an early one's, and the engine agree; swapped and shared blocks included."""
    llm = LLM("toy", block_size=4, num_blocks=44, num_host_blocks=64, preemption="swap", watermark=0.0)
    engine = llm.engine
    for number in range(3):
        params = SamplingParams(max_tokens=40, n=1 + number % 2, temperature=0.9, seed=3, ignore_eos=True)
        engine.submit(SHARED + "xyz"[number], params)
    folds: list[Snapshot] = []
    seen: set[str] = set()
    while engine.has_work:
        if len(folds) < 30:
            folds.append(Snapshot())
            engine.trace.subscribe(folds[-1].apply)
        engine.step()
        seen |= {event.kind for event in folds[0].events}
        for snapshot in folds:
            check(engine, snapshot)
            assert snapshot.host.refs.tolist() == folds[0].host.refs.tolist()
            assert snapshot.device.owner.tolist() == folds[0].device.owner.tolist()
    assert {"swap_out", "swap_in", "fork"} <= seen


def test_a_listener_comes_and_goes() -> None:
    """Where nobody listened for a while, the next one starts from what the engine holds then."""
    engine = decoding_engine(4)
    for _ in range(3):
        snapshot = Snapshot()
        leave = engine.trace.subscribe(snapshot.apply)
        engine.step()
        leave()
        engine.step()
        engine.step()
        sent = [len(state.token_ids) + 2 for state in snapshot.sequences.values()]
        assert sent == [len(sequence.token_ids) for sequence in engine.scheduler.sequences.values()]


def test_columns_come_back_as_columns_and_damaged_ones_are_refused() -> None:
    """A reader makes no object a sequence either; rows that do not fit their tokens are no record."""
    engine = decoding_engine(8)
    deltas: list[StepDelta] = []
    engine.trace.subscribe(deltas.append)
    for _ in range(3):
        engine.step()
    body = encode_delta(deltas[-1])
    read = decode_delta(2, body)
    assert isinstance(read.events, StepEvents)
    assert read.events._made is None
    assert read.events == deltas[-1].events
    assert [c.tolist() for c in read.progress] == [c.tolist() for c in deltas[-1].progress]
    assert decode_delta(2, packing.recompress(encode_delta(deltas[-1], level=0))).events == read.events
    head, columns = packing.unpack(body)
    spoiled = [
        ({"next_id": -1}, {}),
        ({"next_id": "8"}, {}),
        ({}, {"p.token_ids": columns["p.token_ids"][1:]}),
        ({}, {"p.num_new": columns["p.num_new"] * 2}),
        ({}, {"p.num_new": -columns["p.num_new"]}),
        ({}, {"p.num_computed": columns["p.num_computed"][1:]}),
        ({}, {"p.num_computed": columns["p.num_computed"].astype(np.float64)}),
    ]
    for change, other in spoiled:
        with pytest.raises(TraceError):
            decode_delta(2, packing.pack({**head, **change}, {**columns, **other}))


def test_parts_of_characters_become_whole() -> None:
    """Bytes of one character a token: the fold puts them together."""
    text = "aé€b😀c"
    llm = LLM("toy", block_size=4, num_blocks=64, device="cpu", dtype="float32")
    engine = llm.engine
    data = text.encode()
    runner = _Scripted(engine.runner, data)
    engine.runner = runner
    snapshot = Snapshot()
    engine.trace.subscribe(snapshot.apply)
    engine.submit("x", SamplingParams(max_tokens=len(data), ignore_eos=True))
    seen = set()
    while engine.has_work:
        engine.step()
        seen.add(clean_bytes(snapshot.sequences[0].text))
    assert snapshot.sequences[0].text.decode() == "x" + text
    assert seen == {"xa", "xaé", "xaé€", "xaé€b", "xaé€b□", "xaé€b□c"}, "a screen shows whole characters"


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
