"""The transport: an engine in a child process, one step a permit, and no process left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from scripted import failing_engine, scripted_engine

from minipaged.config import SamplingParams
from minipaged.serving.live import EngineProcess
from minipaged.trace.codec import encode_delta
from minipaged.trace.player import Player
from minipaged.trace.snapshot import fold
from minipaged.trace.sources import FileSource, ListSource

PARAMS = SamplingParams(max_tokens=30)


def gone(pid: int, seconds: float = 10.0) -> bool:
    """Whether the process ends (a zombie of ours has ended)."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def test_one_permit_is_one_step() -> None:
    with EngineProcess(scripted_engine) as engine:
        source = engine.source
        source.submit("hello", PARAMS)
        source.permit(1)
        assert source.wait(lambda: len(source) == 1)
        assert source.notes[0] == {"kind": "status", "text": "loading weights… 25 %"}
        assert source.header.model == "scripted"
        source.permit(2)
        assert source.wait(lambda: len(source) == 3)
        assert not source.wait(lambda: len(source) > 3, timeout_seconds=0.3)
        source.run()
        assert source.wait(lambda: source.idle)
        source.pause()
        steps = len(source)
        source.submit("again", PARAMS)
        assert not source.wait(lambda: len(source) > steps, timeout_seconds=0.3), "paused: a new prompt waits"
        source.permit(1)
        assert source.wait(lambda: len(source) == steps + 1)
        pid = engine.pid
    assert gone(pid)
    assert not engine.log_path.exists()


def test_one_trace_through_live_file_and_list(tmp_path: Path) -> None:
    path = tmp_path / "run.mpt"
    with EngineProcess(scripted_engine, {"num_blocks": 64}, recording=path) as engine:
        live = engine.source
        live.run()
        for prompt in ("The cache is split", "Once upon a time"):
            live.submit(prompt, PARAMS)
        assert live.wait(lambda: live.idle and len(live) > 10)
    deltas = [live.delta(position) for position in range(len(live))]
    file = FileSource(path)
    assert not file.damage
    assert file.header == live.header
    assert Player(file, len(file)).snapshot.token_bytes == Player(live, len(live)).snapshot.token_bytes
    assert Player(live, len(live)).snapshot.token_bytes[ord("T")] == b"T"
    listed = ListSource(deltas)
    for position in (0, 3, len(live) // 2, len(live), 1):
        snapshots = [Player(source, position).snapshot for source in (live, file, listed)]
        assert snapshots[0] == snapshots[1] == snapshots[2] == fold(deltas[:position])


def test_whoever_keeps_a_live_trace_makes_its_keyframes_and_makes_it_small(tmp_path: Path) -> None:
    """The engine's end sends deltas as they are; the screen's end compresses them, and every 128 puts a state to seek from."""
    path = tmp_path / "run.mpt"
    long = SamplingParams(max_tokens=300)
    with EngineProcess(scripted_engine, {"num_blocks": 400}, recording=path) as engine:
        live = engine.source
        live.run()
        live.submit("abc" * 100, long)
        assert live.wait(lambda: live.idle and len(live) > 260)
        live.pause()
        deltas = [live.delta(position) for position in range(len(live))]
        assert [live.keyframe(position)[0] for position in (0, 127, 128, len(live))] == [0, 0, 128, 256]
        assert live.keyframe(128)[1] == fold(deltas[:128])
        for position in (3, len(live) - 1):
            assert live._record(live._delta_numbers.view[position]).body == encode_delta(deltas[position])
    assert FileSource(path).keyframe(300)[0] == 256


def test_bad_requests_come_back_as_words_and_the_others_go_on() -> None:
    with EngineProcess(scripted_engine) as engine:
        source = engine.source
        source.run()
        source.submit("", PARAMS)
        source.submit("fine", PARAMS)
        assert source.wait(lambda: source.idle and len(source) > 2)
        kinds = {note["kind"]: note["text"] for note in source.notes}
        assert "empty" in kinds["refused"]
        assert "submitted" in kinds


def test_a_factory_that_fails_says_why() -> None:
    with EngineProcess(failing_engine) as engine:
        engine.source.wait(lambda: bool(engine.source.ended))
        assert engine.source.ended
        assert engine.source.notes[-1]["kind"] == "failed"
        assert "unknown model" in engine.source.notes[-1]["text"]
        assert engine.source.notes[-1]["input_error"] is True


def test_an_engine_that_raises_says_so(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    with EngineProcess(scripted_engine, {"die_at": 2, "echo_stdout": True}, log_path=log) as engine:
        source = engine.source
        source.run()
        source.submit("hello", PARAMS)
        assert source.wait(lambda: bool(source.ended))
        assert len(source) == 2
        assert "die here" in source.notes[-1]["text"]
    assert "noise that must not reach the terminal" in log.read_text()
    assert "die here" in engine.last_words()


def test_abort() -> None:
    with EngineProcess(scripted_engine) as engine:
        source = engine.source
        source.submit("hello hello", PARAMS)
        source.permit(3)
        assert source.wait(lambda: len(source) == 3)
        source.abort(0)
        source.permit(1)
        assert source.wait(lambda: len(source) == 4)
        assert Player(source, 4).snapshot.sequences[0].status == "aborted"


def test_a_killed_engine_ends_the_source() -> None:
    with EngineProcess(scripted_engine) as engine:
        source = engine.source
        assert source.wait(lambda: source.ready)
        os.kill(engine.pid, signal.SIGKILL)
        source.wait(lambda: bool(source.ended))
        assert "ended" in source.ended or "broke off" in source.ended
        source.run()  # a dead engine takes commands without a fuss
        source.submit("x", PARAMS)


PARENT = """
import sys
sys.path[:0] = {path!r}
from scripted import scripted_engine
from minipaged.trace.codec import encode_delta
from minipaged.serving.live import EngineProcess
engine = EngineProcess(scripted_engine)
engine.source.wait(lambda: engine.source.ready)
print(engine.pid, flush=True)
input()
"""


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_a_killed_parent_leaves_no_process(sign: signal.Signals) -> None:
    code = PARENT.format(path=[str(Path(__file__).parent), str(Path(__file__).parents[2])])
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.send_signal(sign)
        parent.wait(10)
    assert gone(child)
