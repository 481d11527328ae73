"""One contender of `minipaged bench engine`, in a process of its own: `python -m minipaged.lab.measure.contender NAME
FILE < JOB`.

Loads the engine, then makes the passes of each workload, and appends a JSON line to FILE for each of them. The first pass meets every
shape for the first time, and is told apart.
The job and the clock are here; each engine's own calls are in contender_*.py.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from minipaged.errors import InputError
from minipaged.lab.measure.engine import ContenderMissingError, Job, Pass, Runs, requests_of
from minipaged.lab.simulation.workloads import TimedRequest
from minipaged.model.loading.shapes import SHAPES, shape

PR_SET_PDEATHSIG = 1  # linux/prctl.h
MODULES = {
    "minipaged": "minipaged.lab.measure.contender_minipaged",
    "minipaged-plain": "minipaged.lab.measure.contender_minipaged",
    "vllm": "minipaged.lab.measure.contender_vllm",
    "transformers": "minipaged.lab.measure.contender_transformers",
}


def compete(name: str, job: Job, tell: Callable[[dict[str, Any]], None]) -> None:
    """Load the contender and run the job."""
    _check_room(job)
    started = time.perf_counter()
    runs: Runs = importlib.import_module(MODULES[name]).load(name, job)
    tell({"kind": "ready", "seconds": time.perf_counter() - started, "device": _device()})
    for workload in job.workloads:
        asked = requests_of(workload)
        asked = replace(asked, requests=_within(asked.requests, job.model)[: runs.most_requests])
        expected = sum(n for _, n in asked.requests)
        for number in range(1 + (runs.repeats or job.repeats_of(workload))):
            runs.forget()
            started = time.perf_counter()
            tokens = runs.answer(workload, asked)
            seconds = time.perf_counter() - started
            if tokens != expected:
                raise RuntimeError(f"{workload}: {tokens} tokens were generated instead of {expected}")
            run = Pass(len(asked.requests), tokens, seconds)
            tell({"kind": "pass", "workload": workload, "first": number == 0, **asdict(run)})


def _check_room(job: Job) -> None:
    """Every contender draws the same weights: InputError, before any is drawn, where they do not fit on the device."""
    if job.model.startswith("random:"):
        from minipaged.model.loading.placement import choose_device, choose_dtype
        from minipaged.model.loading.zoo import check_weights

        place = choose_device(job.device)
        held = shape(job.model)
        if job.tensor_parallel * job.pipeline_parallel > 1:
            from minipaged.model.split import Part

            held = Part(0, job.tensor_parallel, 0, job.pipeline_parallel).share(held)
        check_weights(job.model, held, choose_dtype("auto", place), place, fixed_dtype=True)


def _within(asked: list[TimedRequest], model: str) -> list[TimedRequest]:
    """The draws with token ids that a small vocabulary has too; those of the known shapes hold all of them."""
    config = SHAPES.get(model.removeprefix("random:"))
    if config is None:
        return asked
    return [([token % config.vocab_size for token in prompt], n) for prompt, n in asked]


def _device() -> str:
    from minipaged.lab.measure.results import device_name

    return device_name()


def die_with_parent() -> None:
    """On Linux: end as soon as the process that started this one ends, however it does. An orphan would hold the GPU."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main(arguments: list[str]) -> int:
    """The process; 0 if the job was done."""
    die_with_parent()
    name, path = arguments
    told = json.load(sys.stdin)
    job = Job(**{**told, "workloads": tuple(told["workloads"])})
    with Path(path).open("a", encoding="utf-8") as file:

        def tell(words: dict[str, Any]) -> None:
            file.write(json.dumps(words) + "\n")
            file.flush()

        try:
            compete(name, job, tell)
        except (ContenderMissingError, InputError) as error:
            tell({"kind": "missing", "why": str(error)})
            return 1
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # engines leave threads and child processes behind; what was told is written
