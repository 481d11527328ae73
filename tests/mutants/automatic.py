"""The automatic mutation run over minipaged/memory and minipaged/scheduling.

    python -m tests.mutants.automatic --sample 400 --seed 1 --seconds 15 --jobs 2 [--json FILE] [--until 14:45]
    python -m tests.mutants.automatic --sample 400 --seed 1 --again FILE   the survivors of that run, under the tests of today

Small changes are sampled by a seed and put under the quick specs, one after another in forked children: each imports the package anew with
the one module's code replaced in memory, so nothing is written to the tree. A child has `--seconds` of processor time; one that uses
them up counts as killed (it hangs) and is listed apart. Survivors are run again under the full ci profile. Examples are not shrunk.
"""

from __future__ import annotations

import argparse
import importlib.abc
import importlib.util
import json
import os
import random
import resource
import select
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from tests.mutants.automatic_operators import Mutant, compiled, count_changes, mutant_of

FOLDERS = ("minipaged/memory", "minipaged/scheduling")
OTHER_SYSTEMS = {"reservations", "buddy", "systems", "contiguous"}  # what the paged memory is compared with
MEMORY_TESTS = ["tests/memory", "tests/spec/test_survivors_memory.py", "tests/spec/test_laws_memory.py"]
SCHEDULING_TESTS = [
    "tests/scheduling",
    "tests/spec/test_survivors_scheduling.py",
    "tests/spec/test_survivors_counts.py",
    "tests/spec/test_scheduler_laws.py",
]
MACHINE = ["tests/spec/test_laws_machine.py"]
TIMED = "not constant_time"  # a clock's verdict on a busy machine is no evidence
FACTORS = {"quick": 0.5, "ci": 1.0}  # of the profile's examples: a quick child has to end well inside its seconds
MOST_MEMORY = 6 * 2**30
CI_TIMES = 20  # --seconds of processor time for a run under ci
UNCHANGED = -1


@dataclass
class Verdict:
    """What became of a mutant: killed, hung or survived, and by which test."""

    state: str
    test: str
    seconds: float


class Replacing(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives one module other code."""

    def __init__(self, name: str, path: str, code: CodeType) -> None:
        self.name, self.path, self.code = name, path, code

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> Any:
        """The spec of the one module."""
        if fullname != self.name:
            return None
        return importlib.util.spec_from_file_location(fullname, self.path, loader=self)

    def exec_module(self, module: ModuleType) -> None:
        """Run the other code."""
        exec(self.code, module.__dict__)


class Watching:
    """The pytest plugin of a child: no shrinking, and the first failure goes into the pipe."""

    def __init__(self, pipe: int, profile: str) -> None:
        self.pipe, self.profile = pipe, profile

    def pytest_configure(self) -> None:
        """Take the profile that tests/conftest.py registered, without the phases that only help a reader."""
        from hypothesis import Phase, settings

        base = settings.get_profile(self.profile)
        examples = max(1, int(base.max_examples * FACTORS[self.profile]))
        settings.register_profile("mutants", base, max_examples=examples, phases=[Phase.explicit, Phase.generate])
        settings.load_profile("mutants")

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Tell the first failure."""
        if report.failed:
            os.write(self.pipe, f"{report.nodeid}\n".encode())

    def pytest_collectreport(self, report: Any) -> None:
        """Tell a module that cannot be imported."""
        if report.failed:
            os.write(self.pipe, f"import of {report.nodeid}\n".encode())


def tests_for(module: str, profile: str) -> list[str]:
    """The files that speak of the module, fast ones first; under ci each side also has the other's."""
    memory = ".memory." in module
    chosen = [*MEMORY_TESTS, *MACHINE] if memory else SCHEDULING_TESTS
    if profile == "ci":
        chosen = [*chosen, *(SCHEDULING_TESTS if memory else [*MEMORY_TESTS, "tests/spec/test_contiguous.py"])]
    return [t for t in chosen if Path(t).exists()]


def child(mutant: Mutant, tests: list[str], profile: str, seconds: int, pipe: int) -> None:
    """Run the tests in this process and leave with pytest's status."""
    os.setsid()
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    os.environ.update(HYPOTHESIS_PROFILE=profile, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1", OMP_NUM_THREADS="1")
    if mutant.number != UNCHANGED:
        code = compiled(Path(mutant.path), mutant.number)
        sys.meta_path.insert(0, Replacing(mutant.module, mutant.path, code))
    for name in [n for n in sys.modules if n.split(".")[0] in ("minipaged", "tests")]:
        del sys.modules[name]
    import pytest

    with tempfile.TemporaryDirectory() as replays:
        options = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-o", "addopts=", "-k", TIMED]
        options += ["-m", "not slow and not gpu", "--replay-dir", replays]
        status = int(pytest.main([*options, *tests], plugins=[Watching(pipe, profile)]))
    os._exit(status)


class Running:
    """A child at work."""

    def __init__(self, mutant: Mutant, profile: str, seconds: int) -> None:
        self.mutant, self.profile = mutant, profile
        self.started = time.monotonic()
        self.limit = 4.0 * seconds  # of the clock, for a child that sleeps
        self.pipe, theirs = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                child(mutant, tests_for(mutant.module, profile), profile, seconds, theirs)
            finally:
                os._exit(5)  # an exception out of pytest itself: the mutant broke the run
        os.close(theirs)

    def ended(self) -> Verdict | None:
        """The verdict, once there is one."""
        seconds = time.monotonic() - self.started
        if seconds > self.limit:
            os.killpg(self.pid, signal.SIGKILL)
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if not pid:
            return None
        told = os.read(self.pipe, 4096).decode() if select.select([self.pipe], [], [], 0)[0] else ""
        os.close(self.pipe)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL):
            return Verdict("hung", "", seconds)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
            return Verdict("survived", "", seconds)
        return Verdict("killed", (told.splitlines() or ["the package or the run broke"])[0], seconds)


def modules() -> list[tuple[str, Path]]:
    """(name, path) of every module that is mutated."""
    paths = sorted(path for folder in FOLDERS for path in Path(folder).glob("*.py"))
    return [(".".join(p.with_suffix("").parts), p) for p in paths if p.stem not in OTHER_SYSTEMS | {"__init__"}]


def sample(number: int, seed: int, only: str) -> tuple[list[Mutant], int]:
    """`number` mutants in the seed's order, and how many changes there are in all."""
    all_changes = [(name, path, i) for name, path in modules() if only in name for i in range(count_changes(path))]
    random.Random(seed).shuffle(all_changes)
    chosen: list[Mutant] = []
    for name, path, i in all_changes:
        if len(chosen) == number:
            break
        mutant = mutant_of(name, path, i)
        if mutant is not None:
            chosen.append(mutant)
    return chosen, len(all_changes)


def run_all(
    mutants: list[Mutant],
    profile: str,
    seconds: int,
    jobs: int,
    until: float | None,
    keep: Callable[[list[tuple[Mutant, Verdict]]], None] = lambda rows: None,
) -> list[tuple[Mutant, Verdict]]:
    """Put each under its tests, `jobs` at a time; what has not begun at `until` is left out. `keep` is told after each."""
    waiting, running, done = list(reversed(mutants)), [], []
    while waiting or running:
        if until is not None and time.time() > until:
            waiting.clear()
        while waiting and len(running) < jobs:
            running.append(Running(waiting.pop(), profile, seconds))
        for one in list(running):
            verdict = one.ended()
            if verdict is None:
                continue
            running.remove(one)
            done.append((one.mutant, verdict))
            keep(done)
            line = f"{len(done):4}/{len(mutants)} {profile:5} {verdict.state:8} {verdict.seconds:5.1f} s  {one.mutant.name}"
            print(f"{line}: {one.mutant.before} -> {one.mutant.after}  [{verdict.test}]", flush=True)
        time.sleep(0.02)
    return done


def check_baseline(profile: str, seconds: int) -> None:
    """The tests must pass on the code as it is, well inside the limit."""
    for side in ("memory", "scheduling"):
        nothing = Mutant(f"minipaged.{side}.nothing", "", UNCHANGED, "unchanged", 0, "", "")
        [(_, verdict)] = run_all([nothing], profile, seconds, 1, None)
        if verdict.state != "survived":
            raise SystemExit("the tests do not pass in time on the code as it is: nothing can be said of mutants")


def write_json(path: Path, head: dict[str, Any], rows: list[tuple[Mutant, Verdict]]) -> None:
    """Everything that is known so far."""
    path.write_text(json.dumps({**head, "mutants": [{**asdict(m), **asdict(v)} for m, v in rows]}, indent=1) + "\n")


def print_table(rows: list[tuple[Mutant, Verdict]], survivors: list[Mutant]) -> None:
    """Verdicts by module, then what survived, as markdown."""
    states = ("killed", "hung", "survived")
    count = Counter((m.module, v.state) for m, v in rows)
    print("\n| module | mutants | killed | hung | survived |\n|---|---|---|---|---|")
    for module in sorted({m.module for m, _ in rows}):
        of = [count[module, state] for state in states]
        print(f"| {module.removeprefix('minipaged.')} | {sum(of)} | {of[0]} | {of[1]} | {of[2]} |")
    of = [sum(v.state == state for _, v in rows) for state in states]
    killed = 100 * (of[0] + of[1]) / max(1, len(rows))
    print(f"| all | {len(rows)} | {of[0]} | {of[1]} | {of[2]} |\n\n{killed:.1f} % killed (hung ones included)\n")
    for m in survivors:
        print(f"- `{m.module.removeprefix('minipaged.')}:{m.line}` {m.kind}: `{m.before}` -> `{m.after}`")


def clock(text: str) -> float:
    """The next time that a clock shows HH:MM."""
    hour, minute = map(int, text.split(":"))
    now = time.localtime()
    return time.mktime((now.tm_year, now.tm_mon, now.tm_mday, hour, minute, 0, 0, 0, -1))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants.automatic", description=__doc__)
    parser.add_argument("--sample", type=int, default=400)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=int, default=15, help="processor time a mutant")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="leave out the rerun of survivors under the ci profile")
    parser.add_argument("--again", type=Path, help="only the survivors of this results file")
    parser.add_argument("--only", default="", help="modules whose name contains this")
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--until", type=clock, help="begin nothing after this time of day, HH:MM")
    chosen = parser.parse_args()
    import hypothesis.stateful  # noqa: F401  # before the forks: each child has them ready
    import numpy  # noqa: F401
    import pytest  # noqa: F401

    check_baseline("quick", chosen.seconds)
    mutants, total = sample(chosen.sample, chosen.seed, chosen.only)
    if chosen.again:
        left = {
            (m["module"], m["number"])
            for m in json.loads(chosen.again.read_text())["mutants"]
            if m["state"] == "survived"
        }
        mutants = [m for m in mutants if (m.module, m.number) in left]
    head = {"seed": chosen.seed, "changes": total, "sampled": len(mutants), "seconds": chosen.seconds}
    print(f"seed {chosen.seed}: {len(mutants)} mutants of {total} possible changes")

    def keep(rows: list[tuple[Mutant, Verdict]]) -> None:
        if chosen.json:
            write_json(chosen.json, head, rows)

    rows = run_all(mutants, "quick", chosen.seconds, chosen.jobs, chosen.until, keep)
    again = [m for m, v in rows if v.state == "survived"]
    print(f"{len(again)} survivors" + ("" if chosen.quick else ", now under the ci profile"))
    if chosen.quick:
        print_table(rows, again)
        return
    check_baseline("ci", CI_TIMES * chosen.seconds)
    later = dict(run_all(again, "ci", CI_TIMES * chosen.seconds, chosen.jobs, chosen.until))
    rows = [(m, later.get(m, v)) for m, v in rows]
    survivors = [m for m, v in rows if v.state == "survived"]
    print_table(rows, survivors)
    unproven = [m.name for m in survivors if m not in later]
    print(f"{len(mutants) - len(rows)} of the sample were not run; {len(unproven)} survivors not rerun under ci")
    if chosen.json:
        write_json(chosen.json, {**head, "not_rerun_under_ci": unproven}, rows)


if __name__ == "__main__":
    main()
