"""`minipaged bench engine`: output tokens per second of whole engines on the workloads that every contender runs.

Each contender is a process of its own (contender.py) that gets a job and writes a line for every pass, so one that is
not installed, fails or takes too long is left out with a note and the others go on. Token ids in and out, random
weights, lengths as drawn; a first pass, which meets everything for the first time, then the median of the repeats. This
module imports no torch: its process must take nothing of the GPU's memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from minipaged.config import KV_CACHE_DTYPES, WEIGHTS, Progress, check_choice, check_int, check_real
from minipaged.errors import InputError
from minipaged.lab.simulation.workloads import ENGINE_REQUESTS, TimedRequest, engine_requests

OURS = "minipaged"
PEERS = ("vllm", "transformers")
CONTENDERS = (OURS, "minipaged-plain", *PEERS)
CONTEXTS = (2048, 4096)  # tokens that every contender has to expect: the first that holds the job's longest request
LAST_LINES = 3  # of the log of a contender that failed, for the note


@dataclass(frozen=True)
class Job:
    """What a contender is asked to do, and in how many seconds at most."""

    model: str
    workloads: tuple[str, ...]
    repeats: int = 3  # of batch:N
    long_repeats: int = 3  # of the others
    max_num_seqs: int = 256
    limit_seconds: float = 900.0
    device: str = "auto"
    weights: str = "auto"  # of minipaged
    kv_cache_dtype: str = "auto"  # of minipaged
    tensor_parallel: int = 1
    pipeline_parallel: int = 1

    def __post_init__(self) -> None:
        check_int("repeats", self.repeats, 1)
        check_int("long_repeats", self.long_repeats, 1)
        check_int("max_num_seqs", self.max_num_seqs, 1)
        check_choice("weights", self.weights, WEIGHTS)
        check_int("tensor_parallel", self.tensor_parallel, 1)
        check_int("pipeline_parallel", self.pipeline_parallel, 1)
        check_real("limit_seconds", self.limit_seconds, 1.0)
        check_choice("kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES)
        if not self.workloads:
            raise InputError(f"workload names nothing; there are {KNOWN}, with commas between them")
        for workload in self.workloads:
            requests_of(workload)

    def repeats_of(self, workload: str) -> int:
        """Timed passes over that workload."""
        return self.repeats if workload.startswith("batch:") else self.long_repeats

    @property
    def context(self) -> int:
        """Tokens of the longest sequence that the engine is to expect."""
        longest = max(len(prompt) + n for workload in self.workloads for prompt, n in requests_of(workload).requests)
        return next(context for context in CONTEXTS if longest <= context)

    @property
    def prefix_caching(self) -> bool:
        """Whether the engine keeps a prefix cache. It is one engine for all workloads, so `measure` keeps apart those that differ."""
        return any(requests_of(workload).prefix_caching for workload in self.workloads)

    def split(self) -> list[Job]:
        """A job for each way to start an engine: the workloads without a prefix cache, then those with one."""
        kinds = {False: list[str](), True: list[str]()}
        for workload in self.workloads:
            kinds[requests_of(workload).prefix_caching].append(workload)
        return [replace(self, workloads=tuple(names)) for names in kinds.values() if names]


@dataclass(frozen=True)
class Asked:
    """What a workload asks for. requests: (prompt token ids, output length) each."""

    requests: list[TimedRequest]
    temperature: float = 0.0
    top_p: float = 1.0
    prefix_caching: bool = False


SAMPLING: dict[str, dict[str, Any]] = {
    "nano": {"temperature": 0.6},
    "chat": {"temperature": 0.8, "top_p": 0.95},
    "prefix": {"prefix_caching": True},
}
KNOWN = ", ".join(ENGINE_REQUESTS) + " and batch:N"


@cache
def requests_of(workload: str) -> Asked:
    """The requests of a workload, and how they are drawn. InputError for an unknown name."""
    name, _, number = workload.partition(":")
    if name == "batch" and number.isdecimal():
        return Asked(engine_requests(f"b{check_int('batch', int(number), 1, 4096)}"))
    if workload not in ENGINE_REQUESTS:
        raise InputError(f"workload must be {KNOWN}, not {workload!r}")
    return Asked(engine_requests(workload), **SAMPLING.get(workload, {}))


Answer = Callable[[str, Asked], int]
"""answer(workload, asked): generate every request to its length; returns the output tokens."""


class ContenderMissingError(Exception):
    """This contender cannot run here; the text says why."""


class Runs:
    """What a contender can do. answer: see Answer; forget: empties the prefix cache; most_requests: of a workload, None for all;
    repeats: None for the job's."""

    def __init__(
        self,
        answer: Answer,
        *,
        forget: Callable[[], object] = lambda: None,
        most_requests: int | None = None,
        repeats: int | None = None,
    ) -> None:
        self.answer = answer
        self.forget = forget
        self.most_requests = most_requests
        self.repeats = repeats


@dataclass(frozen=True)
class Pass:
    """One timed pass. requests: how many of the workload's it ran."""

    requests: int
    tokens: int
    seconds: float


@dataclass
class Outcome:
    """What a contender's process reported. note: "" if it did all that was asked."""

    contender: str
    device: str | None = None
    startup_seconds: float | None = None
    first: dict[str, Pass] = field(default_factory=dict)
    passes: dict[str, list[Pass]] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class EngineRow:
    """One contender on one workload: the median pass, and the first one, which is not among `passes`. ratio, in a peer's row: our tokens
    per second over the peer's."""

    contender: str
    model: str
    workload: str
    requests: int
    output_tokens: int
    seconds: float
    tokens_per_second: float
    passes: tuple[float, ...]  # seconds of each
    startup_seconds: float | None
    first_seconds: float | None = None
    ratio: float | None = None

    def as_json(self) -> dict[str, Any]:
        """For the results file."""
        return asdict(self)


def check_contenders(names: tuple[str, ...], model: str) -> None:
    """InputError for a peer that does not exist, or a model that only this project can run."""
    for name in names:
        check_choice("against", name, PEERS)
    if names and not model.startswith("random:"):
        raise InputError(f"against needs a model that every engine can draw, such as random:llama-7b, not {model!r}")


def run_contender(name: str, job: Job, *, command: tuple[str, ...] | None = None) -> Outcome:
    """Run one contender to its end, or to its limit. command: the process, for tests."""
    with tempfile.TemporaryDirectory(prefix="minipaged-bench-") as folder:
        told, log = Path(folder, "told"), Path(folder, "log")
        told.touch()
        words = command or (sys.executable, "-m", "minipaged.lab.measure.contender")
        with log.open("wb") as out:
            process = subprocess.Popen(
                [*words, name, str(told)],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # it and all its children can be ended at once
            )
        try:
            process.communicate(json.dumps(asdict(job)).encode(), timeout=job.limit_seconds)
        except subprocess.TimeoutExpired:
            return _outcome(name, told, f"ended after its limit of {job.limit_seconds:g} s")
        except BrokenPipeError:
            process.wait()  # it ended before it read its job; the log says why
        finally:
            _end(process)
        return _outcome(name, told, _why(process.returncode, log))


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process and those it started; the next contender needs the GPU for itself."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _why(code: int, log: Path) -> str:
    if code == 0:
        return ""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"ended with code {code}: " + (" / ".join(lines[-LAST_LINES:])[:500] or "it said nothing")


def _outcome(name: str, told: Path, trouble: str) -> Outcome:
    outcome = Outcome(name, note=trouble)
    for line in told.read_text(encoding="utf-8").splitlines():
        try:
            words = json.loads(line)
        except ValueError:
            continue  # the line that was being written when it was ended
        match words["kind"]:
            case "ready":
                outcome.device, outcome.startup_seconds = words["device"], words["seconds"]
            case "pass":
                run = Pass(words["requests"], words["tokens"], words["seconds"])
                if words["first"]:
                    outcome.first[words["workload"]] = run
                else:
                    outcome.passes.setdefault(words["workload"], []).append(run)
            case "missing":
                outcome.note = words["why"]
    return outcome


def rows_of(outcome: Outcome, model: str, ours: dict[str, EngineRow]) -> Iterator[EngineRow]:
    """A row for each workload that was passed at least once."""
    for workload, passes in outcome.passes.items():
        seconds = statistics.median(run.seconds for run in passes)
        speed = passes[0].tokens / seconds
        yield EngineRow(
            outcome.contender,
            model,
            workload,
            passes[0].requests,
            passes[0].tokens,
            seconds,
            speed,
            tuple(run.seconds for run in passes),
            outcome.startup_seconds,
            outcome.first[workload].seconds if workload in outcome.first else None,
            ours[workload].tokens_per_second / speed if workload in ours else None,
        )


def measure(
    contenders: tuple[str, ...],
    job: Job,
    note: Callable[[str], None],
    *,
    run: Callable[[str, Job], Outcome] = run_contender,
    progress: Progress = lambda what, done, total: None,
) -> Iterator[tuple[Outcome, list[EngineRow]]]:
    """Every contender in turn, ours first: a process for each way that its workloads start an engine (Job.split). note: called with
    what is left out, and why. progress: with who runs now.
    """
    ours: dict[str, EngineRow] = {}
    turns = [(name, part) for name in contenders for part in job.split()]
    for i, (name, part) in enumerate(turns):
        progress(f"{name} on {part.model}: {', '.join(part.workloads)}", i, len(turns))
        outcome = run(name, part)
        rows = list(rows_of(outcome, part.model, ours))
        if name == OURS:
            ours |= {row.workload: row for row in rows}
        missing = [workload for workload in part.workloads if workload not in outcome.passes]
        if outcome.note or missing:
            lacking = f"; not measured: {', '.join(missing)}" if missing else ""
            note(f"{name}: {outcome.note or 'told nothing of some workloads'}{lacking}")
        yield outcome, rows
