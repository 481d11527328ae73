"""The engine benchmark: jobs, processes that fail or hang, ratios; and this project's own contender end to end on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minipaged.errors import InputError
from minipaged.lab.measure.engine import Job, Outcome, Pass, check_contenders, measure, requests_of, run_contender
from minipaged.model.loading.hf_config import read_config
from minipaged.model.loading.hub_shape import hub_config
from minipaged.model.loading.shapes import SHAPES, SIMULATED_ONLY

JOB = Job("random:toy", ("batch:2",), device="cpu", limit_seconds=100)
READY = '{"kind": "ready", "seconds": 2.5, "device": "a GPU"}\n'
PASSED = '{"kind": "pass", "workload": "batch:2", "first": %s, "requests": 2, "tokens": 512, "seconds": %s}\n'


def script(text: str) -> tuple[str, ...]:
    """A process that runs `text` with the contender's name and file as arguments, the job on its standard input."""
    return (sys.executable, "-c", "import sys, json, os, time\n" + text)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (
            {"workloads": ("nana",)},
            "workload must be nano, sharegpt, chat, long, context, prefix and batch:N, not 'nana'",
        ),
        ({"workloads": ("batch:0",)}, "batch must be"),
        ({"workloads": ("batch:two",)}, "not 'batch:two'"),
        ({"workloads": ()}, "workload names nothing"),
        ({"repeats": 0}, "repeats must be"),
        ({"long_repeats": 0}, "long_repeats must be"),
        ({"max_num_seqs": 0}, "max_num_seqs must be"),
        ({"limit_seconds": 0.0}, "limit_seconds must be"),
    ],
)
def test_a_job_that_cannot_be_run_is_refused(words: dict[str, object], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        replace(JOB, **words)  # type: ignore[arg-type]


def test_peers_need_a_model_that_they_can_draw() -> None:
    check_contenders((), "smollm2-135m")
    check_contenders(("vllm", "transformers"), "random:llama-7b")
    with pytest.raises(InputError, match=r"against must be one of .*vllm"):
        check_contenders(("sglang",), "random:llama-7b")
    with pytest.raises(InputError, match=r"such as random:llama-7b, not 'smollm2-135m'"):
        check_contenders(("vllm",), "smollm2-135m")


def test_workloads_are_the_same_for_all() -> None:
    def lengths(workload: str) -> list[tuple[int, int]]:
        return [(len(prompt), n) for prompt, n in requests_of(workload).requests]

    assert lengths("batch:3") == [(128, 256)] * 3
    assert lengths("long") == [(3000, 256)] * 48
    assert lengths("context") == [(3900, 16)] * 32
    assert lengths("prefix") == [(1560, 128)] * 128
    assert len({tuple(prompt[:1500]) for prompt, _ in requests_of("prefix").requests}) == 1
    assert len({prompt[1500] for prompt, _ in requests_of("prefix").requests}) > 100
    assert len(requests_of("sharegpt").requests) == len(requests_of("chat").requests) == 256
    assert max(sum(pair) for pair in lengths("chat")) > 2048
    assert [requests_of(name).temperature for name in ("batch:3", "nano", "chat")] == [0.0, 0.6, 0.8]
    assert [requests_of(name).top_p for name in ("nano", "chat")] == [1.0, 0.95]


def test_an_engine_is_started_for_each_kind_of_workload() -> None:
    """One process has one engine: with a prefix cache, a workload repeated would find all of its prompts there."""
    plain, cached = replace(JOB, workloads=("prefix", "nano", "long")).split()
    assert (plain.workloads, plain.prefix_caching, plain.context) == (("nano", "long"), False, 4096)
    assert (cached.workloads, cached.prefix_caching, cached.context) == (("prefix",), True, 2048)
    assert JOB.split() == [JOB]


def test_what_a_contender_tells_is_read() -> None:
    told = READY + PASSED % ("true", 8.0) + PASSED % ("false", 2.0) + PASSED % ("false", 4.0) + '{"kin'
    text = f"open(sys.argv[2], 'a').write({told!r})"
    outcome = run_contender("vllm", JOB, command=script(text))
    first, passes = {"batch:2": Pass(2, 512, 8.0)}, {"batch:2": [Pass(2, 512, 2.0), Pass(2, 512, 4.0)]}
    assert outcome == Outcome("vllm", "a GPU", 2.5, first, passes, "")


def test_the_job_arrives_whole() -> None:
    check = "job = json.load(sys.stdin); assert job['model'] == 'random:toy' and job['workloads'] == ['batch:2'], job"
    assert run_contender("vllm", JOB, command=script(check)).note == ""


def test_a_contender_that_fails_says_its_last_words() -> None:
    outcome = run_contender(
        "vllm", JOB, command=script(f"open(sys.argv[2], 'a').write({READY!r}); print('a'); sys.exit('no memory')")
    )
    assert outcome.note == "ended with code 1: a / no memory"
    assert outcome.startup_seconds == 2.5
    assert "it said nothing" in run_contender("vllm", JOB, command=script("os._exit(3)")).note


def test_a_contender_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    """What it told before counts; nothing of it lives on."""
    ids = tmp_path / "ids"
    text = (
        "import subprocess\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(ids)!r}, 'w').write(str(child.pid))\n"
        f"open(sys.argv[2], 'a').write({READY!r} + {PASSED % ('false', 2.0)!r})\n"
        "time.sleep(600)\n"
    )
    outcome = run_contender("vllm", replace(JOB, limit_seconds=4.0), command=script(text))
    assert outcome.note == "ended after its limit of 4 s"
    assert outcome.passes == {"batch:2": [Pass(2, 512, 2.0)]}
    wait_for(lambda: not is_alive(int(ids.read_text())))


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own way of it is Linux's")
def test_a_contender_does_not_outlive_the_benchmark() -> None:
    """Even one that is killed: nobody is left to hold the GPU."""
    words = ("bench", "engine", "--model", "random:toy", "--workload", "sharegpt", "--device", "cpu")
    benchmark = subprocess.Popen([sys.executable, "-m", "minipaged", *words], stdout=subprocess.DEVNULL)
    contender = wait_for(lambda: next((pid for pid in children_of(benchmark.pid) if pid), None))
    wait_for(
        lambda: b"lab.measure.contender" in Path(f"/proc/{contender}/cmdline").read_bytes() and is_importing(contender)
    )
    benchmark.kill()
    benchmark.wait()
    wait_for(lambda: not is_alive(contender))


def children_of(parent: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def is_importing(pid: int) -> bool:
    """Whether it has come as far as torch, so past its first lines."""
    return "libtorch" in Path(f"/proc/{pid}/maps").read_text()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    """What `condition` gives once it holds."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.05)
    return found


def test_ratios_are_ours_over_theirs_and_gaps_are_told() -> None:
    told = {
        "minipaged": Outcome(
            "minipaged",
            "a GPU",
            1.0,
            {"batch:2": Pass(2, 512, 20.0)},
            {"batch:2": [Pass(2, 512, s) for s in (1.0, 2.0, 9.0)]},
        ),
        "vllm": Outcome("vllm", "a GPU", 60.0, {}, {"batch:2": [Pass(2, 512, 3.0)]}, "ended after its limit of 9 s"),
        "transformers": Outcome("transformers", note="transformers cannot be imported: no"),
    }
    said: list[str] = []
    job = replace(JOB, workloads=("batch:2", "nano"))
    found = list(measure(tuple(told), job, said.append, run=lambda name, _: told[name]))
    rows = [row for _, rows in found for row in rows]
    assert [(row.contender, row.tokens_per_second, row.ratio) for row in rows] == [
        ("minipaged", 256.0, None),
        ("vllm", 512 / 3, 1.5),
    ]
    assert rows[0].passes == (1.0, 2.0, 9.0)
    assert [row.first_seconds for row in rows] == [20.0, None]
    assert said == [
        "minipaged: told nothing of some workloads; not measured: nano",
        "vllm: ended after its limit of 9 s; not measured: nano",
        "transformers: transformers cannot be imported: no; not measured: batch:2, nano",
    ]


def test_who_runs_is_told_before_it_runs() -> None:
    """A contender takes minutes: the line must name it from its start."""
    order: list[str] = []

    def run(name: str, job: Job) -> Outcome:
        order.append(f"{name} runs")
        return Outcome(name, note="no")

    def heard(what: str, done: int, total: int) -> None:
        order.append(f"{what} ({done} of {total})")

    list(measure(("minipaged", "vllm"), JOB, lambda note: None, run=run, progress=heard))
    assert order == [
        f"minipaged on {JOB.model}: batch:2 (0 of 2)", "minipaged runs",
        f"vllm on {JOB.model}: batch:2 (1 of 2)", "vllm runs",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["minipaged", "minipaged-plain"])
def test_our_own_contender_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    outcome = run_contender(name, replace(JOB, repeats=1))
    assert outcome.note == ""
    (run,) = outcome.passes["batch:2"]
    assert outcome.first["batch:2"].tokens == 512
    assert (run.requests, run.tokens) == (2, 512)
    assert outcome.device is not None
    assert outcome.device.startswith("CPU") or os.path.exists("/dev/nvidia0")


@pytest.mark.parametrize("name", ["vllm", "transformers"])
def test_a_contender_that_is_not_installed_says_so(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of that name that cannot be imported stands before any real one."""
    (tmp_path / f"{name}.py").write_text("raise ImportError('not here')\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, sys.path)]))
    outcome = run_contender(name, JOB)
    assert outcome.note == f"{name} cannot be imported: not here"
    assert not outcome.passes


@pytest.mark.slow
@pytest.mark.parametrize("workload", ["batch:2", "sharegpt"])
def test_transformers_runs(workload: str) -> None:
    pytest.importorskip("transformers")
    outcome = run_contender("transformers", replace(JOB, workloads=(workload,), limit_seconds=280))
    assert outcome.note == ""
    assert outcome.passes[workload][0].requests == (2 if workload == "batch:2" else 64)


@pytest.mark.parametrize("name", [name for name in SHAPES if name not in SIMULATED_ONLY])
def test_a_shape_in_the_hubs_words_reads_back(name: str, tmp_path: Path) -> None:
    import json

    folder = tmp_path / name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hub_config(SHAPES[name])))
    assert read_config(folder) == SHAPES[name]


def test_a_shape_that_no_family_has_is_refused() -> None:
    with pytest.raises(InputError, match="no family of the hub"):
        hub_config(replace(SHAPES["toy"], mlp_bias=True, qk_norm=True))
