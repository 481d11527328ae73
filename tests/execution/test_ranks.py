"""Several processes over gloo: one rank's text, whatever the engine does; and an end with a word, whatever happens to a rank."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed import TCPStore

from minipaged import LLM, InputError, SamplingParams
from minipaged.errors import RankError
from minipaged.execution.ranks import ALIVE, Place, Ranks, _interrupted_later, _store, check_order, start_ranks
from minipaged.scheduling.request import RequestOutput
from tests.execution.plans import plan_of
from tests.model.tiny import CONFIGS, drawn_tokens, save_folder

ROOT = Path(__file__).resolve().parents[2]
# Few blocks and few tokens a step: prompts are read in chunks, and requests make way.
TIGHT: dict[str, Any] = {
    "device": "cpu",
    "block_size": 4,
    "num_blocks": 40,
    "max_num_batched_tokens": 24,
    "max_num_seqs": 16,
}
GREEDY = SamplingParams(max_tokens=24, ignore_eos=True)
GROUP = SamplingParams(max_tokens=24, n=4, temperature=0.9, seed=5, ignore_eos=True)
BEAMS = SamplingParams(max_tokens=12, beam_width=3, n=2, ignore_eos=True)
LOOKED_AT = SamplingParams(max_tokens=12, logprobs=2, prompt_logprobs=1, temperature=0.8, top_k=30, top_p=0.95, seed=1)
ADJUSTED = SamplingParams(max_tokens=12, repetition_penalty=1.3, logit_bias={7: 2.0}, ignore_eos=True)


def answers(llm: LLM) -> list[RequestOutput]:
    """Requests of every kind together, the beginnings of some alike; then one whose prompt is cached."""
    limit = llm.model_config.vocab_size
    start = drawn_tokens(13, limit, seed=1)
    prompts = [start + drawn_tokens(2 + 3 * i, limit, seed=2 + i) for i in range(6)]
    asked = [GREEDY, GROUP, BEAMS, LOOKED_AT, ADJUSTED, GREEDY]
    told = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], asked)
    return told + llm.generate({"prompt_token_ids": prompts[0]}, GREEDY)


def assert_same(found: list[RequestOutput], expected: list[RequestOutput]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.error is None
        assert [o.token_ids for o in one.outputs] == [o.token_ids for o in other.outputs]
        assert [o.text for o in one.outputs] == [o.text for o in other.outputs]
        for a, b in zip(one.outputs, other.outputs, strict=True):
            if b.logprobs is not None:
                assert a.cumulative_logprob == pytest.approx(b.cumulative_logprob, abs=1e-3)
        assert len(one.prompt_logprobs or ()) == len(other.prompt_logprobs or ())


def compare(model: str, tensor: int, stages: int = 1, **settings: Any) -> LLM:
    """One rank's answers and those of several; returns the LLM of several, closed."""
    alone = LLM(model, **TIGHT, **settings)
    together = LLM(model, **TIGHT, **settings, tensor_parallel=tensor, pipeline_parallel=stages)
    try:
        assert_same(answers(together), answers(alone))
    finally:
        together.close()
    if stages == 1:  # else there are other steps
        assert together.engine.scheduler.counters == alone.engine.scheduler.counters
    return together


def test_L73_two_ranks_say_what_one_says_with_swaps() -> None:
    counters = compare("toy", 2, num_host_blocks=40, preemption="swap").engine.scheduler.counters
    assert min(counters.swaps, counters.copies, counters.hit_tokens) > 0


def test_L73_two_ranks_say_what_one_says_with_recomputed_requests(tmp_path: Path) -> None:
    save_folder(CONFIGS["qwen 3 biased"], tmp_path)
    counters = compare(str(tmp_path), 2, preemption="recompute", overlap=1).engine.scheduler.counters
    assert min(counters.preemptions, counters.copies, counters.hit_tokens) > 0


def test_L62_L73_two_stages_say_what_one_rank_says(tmp_path: Path) -> None:
    save_folder(CONFIGS["llama 3 rope"], tmp_path)
    counters = compare(str(tmp_path), 1, 2, num_host_blocks=40, preemption="swap").engine.scheduler.counters
    assert min(counters.preemptions, counters.copies, counters.hit_tokens) > 0


@pytest.mark.slow
@pytest.mark.parametrize(("tensor", "stages"), [(2, 1), (1, 2)])
def test_L70_L73_prefixes_come_back_from_every_ranks_host(tensor: int, stages: int) -> None:
    """Four prompts in a pool that holds two: the second time they are found in host memory, of which each rank has its part."""
    settings: dict[str, Any] = {"device": "cpu", "block_size": 4, "num_blocks": 30}
    prompts = [{"prompt_token_ids": drawn_tokens(40, 250, seed=seed)} for seed in range(4)]
    short = SamplingParams(max_tokens=6, ignore_eos=True)
    told = []
    for more in ({}, {"num_host_blocks": 100, "tensor_parallel": tensor, "pipeline_parallel": stages}):
        with LLM("toy", **settings, **more) as llm:
            told.append([llm.generate(prompt, short)[0] for prompt in prompts * 2])
            hits = llm.engine.scheduler.counters.host_hit_tokens
    assert_same(told[1], told[0])
    assert hits == 4 * 36


@pytest.mark.slow
def test_L73_four_ranks_say_what_one_says(tmp_path: Path) -> None:
    """Two KV heads on four ranks."""
    save_folder(CONFIGS["biased"], tmp_path)
    compare(str(tmp_path), 4, num_host_blocks=40, preemption="swap")
    compare("toy", 4)


@pytest.mark.slow
@pytest.mark.parametrize(("tensor", "stages", "overlap"), [(1, 3, 0), (1, 2, 1), (2, 2, 0)])
def test_L62_L73_stages_of_several_ranks_say_what_one_says(
    tensor: int, stages: int, overlap: int, tmp_path: Path
) -> None:
    save_folder(CONFIGS["smollm 3"], tmp_path)  # five layers, some without rope; tied
    compare(str(tmp_path), tensor, stages, num_host_blocks=40, preemption="swap", overlap=overlap)


# ---- agreement

PEER = """
import sys, torch
from minipaged.execution.ranks import start_ranks
ranks = start_ranks(2, torch.device("cpu"), {})
print(ranks.least(int(sys.argv[1])), ranks.least(5), file=sys.stderr)
ranks.wait_for_end()
"""


def test_L61_the_pool_is_the_smallest_of_the_ranks() -> None:
    ranks = start_ranks(2, torch.device("cpu"), {}, command=(sys.executable, "-c", PEER, "7"))
    try:
        assert (ranks.least(9), ranks.least(4)) == (7, 4)
    finally:
        ranks.close()


def test_L61_a_plan_names_only_blocks_that_every_rank_has() -> None:
    """A rank whose pool is larger than agreed would hand out what the others lack."""
    plan = plan_of([(0, 3)], tables=[[5]])
    check_order(plan, None, num_blocks=6)
    with pytest.raises(RankError, match="names block 5, and this rank's pool has 5"):
        check_order(plan, None, num_blocks=5)


def test_a_plan_out_of_order_ends_the_run() -> None:
    plan = plan_of([(0, 3)], tables=[[5]])
    check_order(plan, plan.step, 9)
    for expected in (plan.step + 1, plan.step - 1):
        with pytest.raises(RankError, match=f"came where step {expected} was due: the ranks are out of step"):
            check_order(plan, expected, 9)


# ---- ends


def pid_of_peer(llm: LLM) -> int:
    ranks = llm._parts.ranks
    assert isinstance(ranks, Ranks)
    return ranks._children[1].pid


def has_ended(pid: int, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    ("sent", "words"), [(signal.SIGKILL, "rank 1 was killed by SIGKILL"), (signal.SIGSTOP, "rank 1 hangs")]
)
def test_L73_a_rank_that_dies_or_hangs_ends_the_run_with_a_word(
    sent: signal.Signals, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minipaged.execution.ranks.SILENT_SECONDS", 3.0)
    llm = LLM("toy", device="cpu", num_blocks=100, tensor_parallel=2)
    try:
        stream, pid = llm.stream("hello", SamplingParams(max_tokens=1500, ignore_eos=True)), pid_of_peer(llm)
        next(stream)
        os.kill(pid, sent)
        started = time.monotonic()
        with pytest.raises(RankError, match=words):
            list(stream)
        assert time.monotonic() - started < 10
        assert has_ended(pid)
        with pytest.raises(RankError, match=words):  # and it stays so
            llm.generate("again", GREEDY)
    finally:
        llm.close()


def test_L73_a_rank_that_hangs_is_noticed_while_a_long_plan_is_sent_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minipaged.execution.ranks.SILENT_SECONDS", 2.0)
    llm = LLM("toy", device="cpu", num_blocks=100, tensor_parallel=2)
    ranks = llm._parts.ranks
    assert isinstance(ranks, Ranks)
    try:
        os.kill(pid_of_peer(llm), signal.SIGSTOP)
        started = time.monotonic()
        ranks._send_all(ALIVE + bytes(64 << 20))  # more than any socket holds
        with pytest.raises(RankError, match="rank 1 hangs"):
            llm.generate("hello", GREEDY)
        assert time.monotonic() - started < 15
    finally:
        llm.close()


@pytest.mark.parametrize("said", [b"", b"no challenge", b"#CHALLENGE#{sha256}" + bytes(20)])
def test_a_stranger_on_the_ranks_socket_is_sent_away(said: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minipaged.execution.ranks.SILENT_SECONDS", 1.0)
    store = _store(None, 2)
    assert isinstance(store, TCPStore)
    listening = f"0100007F:{store.port:04X} 00000000:0000 0A"
    assert listening in Path("/proc/net/tcp").read_text(), "on this host alone"
    joined = Ranks(Place(0, 2, 0), torch.device("cpu"), store)
    accepting = threading.Thread(target=joined._accept, daemon=True)
    accepting.start()
    of_others = TCPStore("127.0.0.1", store.port, 2, is_master=False, wait_for_workers=False)
    host, port, _ = json.loads(of_others.get("plans"))
    stranger = socket.create_connection((host, port))
    if said:
        stranger.sendall(len(said).to_bytes(4, "big") + said)
        stranger.recv(1 << 10)
    other = Ranks(Place(1, 2, 1), torch.device("cpu"), of_others)
    other._connect()
    accepting.join(10)
    assert not accepting.is_alive()
    assert list(joined._connections) == [1]
    for ranks in (joined, other):
        ranks._connections.popitem()[1].close()
    stranger.close()


@pytest.mark.slow
def test_L73_all_ranks_hear_which_one_died(capfd: pytest.CaptureFixture[str]) -> None:
    llm = LLM("toy", device="cpu", num_blocks=100, tensor_parallel=2, pipeline_parallel=2)
    ranks = llm._parts.ranks
    assert isinstance(ranks, Ranks)
    pids = [child.pid for child in ranks._children.values()]
    try:
        stream = llm.stream("hello", SamplingParams(max_tokens=1500, ignore_eos=True))
        next(stream)
        os.kill(pids[1], signal.SIGKILL)
        with pytest.raises(RankError, match="rank 2 was killed by SIGKILL"):
            list(stream)
        assert all(has_ended(pid) for pid in pids)
        told = capfd.readouterr().err
        assert all(f"minipaged rank {rank} ends: rank 2 was killed by SIGKILL" in told for rank in (1, 3))
    finally:
        llm.close()


MAIN = """
import os, sys
from minipaged import LLM, SamplingParams
llm = LLM("toy", device="cpu", num_blocks=64, tensor_parallel=2)
print(llm.generate("hello", SamplingParams(max_tokens=8))[0].outputs[0].token_ids, flush=True)
sys.stdin.read()
"""


def started(port: int, **settings: str) -> subprocess.Popen[str]:
    """MAIN as torchrun starts it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", **settings}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", MAIN], text=True, env=environment, **pipes)  # type: ignore[call-overload, no-any-return]


def test_L73_ranks_that_torchrun_starts_and_the_death_of_the_first() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    first, second = (started(port, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2))
    try:
        expected = LLM("toy", device="cpu", num_blocks=64).generate("hello", SamplingParams(max_tokens=8))
        assert first.stdout is not None
        assert first.stdout.readline().strip() == str(expected[0].outputs[0].token_ids)
        first.kill()
        _, words = second.communicate(timeout=10)
        assert "minipaged rank 1 ends: rank 0 has ended" in words
        assert second.returncode == 1
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()


def test_a_rank_that_dies_before_it_joins() -> None:
    with pytest.raises(InputError, match="rank 1 ended with code 3 before it could join"):
        start_ranks(2, torch.device("cpu"), {}, command=(sys.executable, "-c", "raise SystemExit(3)"))
    assert not torch.distributed.is_initialized()


def test_a_model_that_cannot_be_split_is_refused_and_leaves_nothing_behind() -> None:
    with pytest.raises(InputError, match="tensor_parallel=2 does not divide smollm2-135m's num_heads, 9"):
        LLM("random:smollm2-135m", device="cpu", num_blocks=8, tensor_parallel=2)
    assert not torch.distributed.is_initialized()
    children = subprocess.run(["ps", "-o", "args=", "--ppid", str(os.getpid())], capture_output=True, text=True).stdout
    assert "minipaged.rank_process" not in children


def test_too_few_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match=r"2 ranks need 2 GPUs on this host, and torch sees 1"):
        start_ranks(2, torch.device("cuda"), {})
    with pytest.raises(InputError, match=r"each rank takes a GPU of its own"):
        start_ranks(2, torch.device("cuda", 0), {})


def test_another_number_of_ranks_than_were_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(InputError, match="4 ranks were started, but tensor_parallel x pipeline_parallel asks for 2"):
        start_ranks(2, torch.device("cpu"), {})


def test_a_port_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        for name, value in (place | {"MASTER_PORT": str(taken.getsockname()[1])}).items():
            monkeypatch.setenv(name, value)
        begun = time.monotonic()
        where = f"rank 0 cannot meet the others at 127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(InputError, match=re.escape(where) + ".*EADDRINUSE"):
            start_ranks(2, torch.device("cpu"), {})
        assert time.monotonic() - begun < 10


def test_ctrl_c_waits_until_the_step_is_on_all_ranks() -> None:
    done = []

    def step() -> None:
        with _interrupted_later():
            os.kill(os.getpid(), signal.SIGINT)
            done.append(np.arange(3).sum())

    with pytest.raises(KeyboardInterrupt):
        step()
    assert done == [3]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
