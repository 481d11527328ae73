"""The automatic mutation run over minipaged/memory, minipaged/scheduling and minipaged/baselines.

    python -m tests.mutants.automatic --sample 400 --seed 7 --seconds 15 --results results.json
    python -m tests.mutants.automatic --results results.json --again      its survivors once more, under the tests of today

Small changes are sampled by a seed and put under the quick specs, one after another in forked children: each imports the package anew with
the one module's code replaced in memory, so nothing is written to the tree. A child runs only the tests that reach the changed statement,
those first that find most in least time. It has `--seconds` of processor time: one that uses them up inside one test hangs and counts
as killed, listed apart; tests for which no time is left wait for the second pass. Whatever survives is run again under the full ci
profile (`tests/memory`, `tests/scheduling`, `tests/baselines` and `tests/laws`). Examples are not shrunk. Results are written as they
come; a run that is started again with the same arguments goes on where it stood.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tests.mutants.automatic_child import Child, Chosen, Told
from tests.mutants.automatic_operators import Mutant, count_changes, mutant_of, statement_of, texts_of

FOLDERS = ("minipaged/memory", "minipaged/scheduling", "minipaged/baselines")
CI_SECONDS = 400  # of processor time for a child under the ci profile
OPEN = "open"  # a survivor that is to be run again
STATE_MACHINE = "tests/laws/test_laws_machine.py"  # its items share one run


@dataclass
class Row:
    """A mutant and what became of it: killed, hung, survived, open, or gone (the code that it changed is no more).

    by: the test that killed it, or in which it hung; under_ci: whether the second pass was run.
    """

    mutant: Mutant
    state: str
    by: str
    seconds: float
    under_ci: bool = False
    first: str = ""  # what the tests of the first run said, where it has been run again since


def modules() -> list[tuple[str, Path]]:
    """(name, path) of every module that is mutated."""
    paths = sorted(path for folder in FOLDERS for path in Path(folder).glob("*.py"))
    return [(".".join(p.with_suffix("").parts), p) for p in paths if p.stem != "__init__"]


def sample(number: int, seed: int, only: str) -> tuple[list[Mutant], int]:
    """`number` mutants in the seed's order, and how many changes there are in all."""
    changes = [(name, path, i) for name, path in modules() if only in name for i in range(count_changes(path))]
    random.Random(seed).shuffle(changes)
    chosen: list[Mutant] = []
    for name, path, i in changes:
        if len(chosen) == number:
            break
        mutant = mutant_of(name, path, i)
        if mutant is not None:
            chosen.append(mutant)
    return chosen, len(changes)


def unit_of(name: str) -> str:
    """The item, or the state machine, whose items share one run."""
    return STATE_MACHINE if name.startswith((STATE_MACHINE, "state machine")) else name


class Reach:
    """Which tests run which lines, how long they take, and how often they have found something."""

    def __init__(self, profile: str, seconds: int) -> None:
        self._profile, self._seconds = profile, seconds
        files = frozenset(str(path) for _, path in modules())
        plain, traced = self._run(frozenset()), self._run(files)
        self._lines = {name: row["lines"] for name, row in traced.items()}
        self.expected = {name: row["seconds"] for name, row in plain.items()}
        shared: dict[str, set[int]] = {}
        for name in self._lines:
            if name.startswith(STATE_MACHINE):
                for path, lines in self._lines[name].items():
                    shared.setdefault(path, set()).update(lines)
        for name in self._lines:
            if name.startswith(STATE_MACHINE):
                self._lines[name] = shared
        self._seconds_of: dict[str, float] = dict.fromkeys(map(unit_of, self.expected), 0.0)
        for name, taken in self.expected.items():
            self._seconds_of[unit_of(name)] += taken
        self._found: Counter[str] = Counter()
        self._ran: Counter[str] = Counter()

    def _run(self, files: frozenset[str]) -> dict[str, Any]:
        """Every item with its seconds, and its lines where files are watched. SystemExit if the tests fail on the code as it is."""
        with tempfile.TemporaryDirectory() as folder:
            table = Path(folder) / "table.json"
            told = Child(None, Chosen(self._profile, 10 * CI_SECONDS, watch=table, files=files)).wait()
            if told.state != "survived" or not told.finished:
                raise SystemExit(
                    f"the tests do not pass on the code as it is, so nothing can be said of mutants: {told.state} by {told.test}"
                )
            found: dict[str, Any] = json.loads(table.read_text())
            return found

    def order_for(self, mutant: Mutant) -> list[str]:
        """The items that reach the changed statement, those first that find most in least time."""
        first, last, everywhere = statement_of(Path(mutant.path), mutant.number)
        names = [
            name
            for name, files in self._lines.items()
            if everywhere or any(first <= line <= last for line in files.get(mutant.path, ()))
        ]

        def cost(name: str) -> tuple[float, str]:
            unit = unit_of(name)
            return (0.005 + self._seconds_of[unit]) * (self._ran[unit] + 10) / (self._found[unit] + 1), unit

        return sorted(names, key=cost)

    def note(self, told: Told) -> None:
        """Learn from a child which items find something."""
        for name in told.items:
            self._ran[unit_of(name)] += 1
        if told.state == "killed":
            self._found[unit_of(told.test)] += 1


class Results:
    """What is known so far, kept in a file."""

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self.path, self.head = path, head
        self.rows: dict[Mutant, Row] = {}

    @classmethod
    def read(cls, path: Path) -> Results:
        """A file that an earlier run left."""
        known = json.loads(path.read_text())
        results = cls(path, known["head"])
        names = {f.name for f in fields(Mutant)}
        for entry in known["mutants"]:
            mutant = Mutant(**{k: v for k, v in entry.items() if k in names})
            row = Row(mutant, **{k: v for k, v in entry.items() if k not in names})
            results.rows[mutant] = row
        return results

    def put(self, row: Row) -> None:
        """Take a verdict in, and keep it."""
        self.rows[row.mutant] = row
        entries = [
            {**asdict(r.mutant), **{k: v for k, v in asdict(r).items() if k != "mutant"}} for r in self.rows.values()
        ]
        fresh = self.path.with_suffix(".part")
        fresh.write_text(json.dumps({"head": self.head, "mutants": entries}, indent=1) + "\n")
        fresh.replace(self.path)


def put_under(mutant: Mutant, reach: Reach, profile: str, seconds: int) -> Told:
    """The verdict of the profile's tests on one mutant."""
    order = reach.order_for(mutant)
    if not order:
        return Told("survived", "", 0.0, True, [])
    told = Child(mutant, Chosen(profile, seconds, order, reach.expected if profile == "quick" else None)).wait()
    reach.note(told)
    return told


def say(place: str, profile: str, told: Told, mutant: Mutant) -> None:
    """One line about one mutant."""
    rest = "" if told.finished or told.state != "survived" else " (some tests left out)"
    print(
        f"{time.strftime('%H:%M:%S')} {place} {profile:5} {told.state:8} {told.seconds:5.1f} s  {mutant.name}: "
        f"{mutant.before} -> {mutant.after}  [{told.test}]{rest}",
        flush=True,
    )


def first_pass(mutants: list[Mutant], results: Results, seconds: int) -> None:
    """Every mutant that has no verdict yet, under the quick profile."""
    known = {key: row for key, row in results.rows.items() if row.state != OPEN}
    waiting = [m for m in mutants if m not in known]
    if not waiting:
        return
    reach = Reach("quick", seconds)
    for number, mutant in enumerate(waiting, len(mutants) - len(waiting) + 1):
        before = results.rows.get(mutant)
        told = put_under(mutant, reach, "quick", seconds)
        results.put(Row(mutant, told.state, told.test, told.seconds, first=before.first if before else ""))
        say(f"{number:4}/{len(mutants)}", "quick", told, mutant)


def second_pass(results: Results) -> None:
    """Every survivor that has not been under the ci profile."""
    waiting = [row for row in results.rows.values() if row.state == "survived" and not row.under_ci]
    if not waiting:
        return
    reach = Reach("ci", CI_SECONDS)
    for number, row in enumerate(waiting, 1):
        told = put_under(row.mutant, reach, "ci", CI_SECONDS)
        results.put(Row(row.mutant, told.state, told.test, told.seconds, True, row.first))
        say(f"{number:4}/{len(waiting)}", "ci", told, row.mutant)


def reopen(results: Results) -> list[Mutant]:
    """Let the survivors be run again, and return them: each as the same change to today's code."""
    reopened = []
    for key, row in list(results.rows.items()):
        if row.state not in ("survived", OPEN):
            continue
        now = same_change(row.mutant, reopened)
        if now is None:
            results.put(Row(row.mutant, "gone", "", 0.0, first="survived"))
            continue
        del results.rows[key]
        results.put(Row(now, OPEN, "", 0.0, first="survived"))
        reopened.append(now)
    return reopened


def same_change(old: Mutant, taken: list[Mutant]) -> Mutant | None:
    """The same change to the same line as it stands today, in its own module or in one that it moved to, the nearest first."""
    alike: list[Mutant] = []
    for name, path in sorted(modules(), key=lambda module: module[0] != old.module):
        numbers = [i for i, text in enumerate(texts_of(path)) if text == (old.kind, old.before)]
        found = [mutant_of(name, path, i) for i in numbers]
        alike = [m for m in found if m and (m.after, m.text) == (old.after, old.text) and m not in taken]
        if alike:
            break
    return min(alike, key=lambda m: abs(m.line - old.line), default=None)


def print_table(results: Results) -> None:
    """Verdicts by module, then what survived, as markdown."""
    rows = list(results.rows.values())
    states = ("killed", "hung", "survived", "gone")
    count = Counter((row.mutant.module, row.state) for row in rows)
    print("\n| module | mutants | killed | hung | survived | gone |\n|---|---|---|---|---|---|")
    for module in sorted({row.mutant.module for row in rows}):
        of = [count[module, state] for state in states]
        print(f"| {module.removeprefix('minipaged.')} | {sum(of)} | {of[0]} | {of[1]} | {of[2]} | {of[3]} |")
    of = [sum(row.state == state for row in rows) for state in states]
    print(f"| all | {len(rows)} | {of[0]} | {of[1]} | {of[2]} | {of[3]} |\n")
    first = sum("survived" in (row.state, row.first) for row in rows)
    print(
        f"{100 * (of[0] + of[1]) / max(1, len(rows)):.1f} % killed (hung ones included); by the tests of the first run ",
        end="",
    )
    print(f"{100 * (len(rows) - first) / max(1, len(rows)):.1f} %")
    print(
        f"{sum(row.state == 'survived' and not row.under_ci for row in rows)} survivors not run under the ci profile\n"
    )
    for row in rows:
        if row.state != "killed":
            m = row.mutant
            print(
                f"- {row.state} `{m.module.removeprefix('minipaged.')}:{m.line}` {m.kind}: `{m.before}` -> `{m.after}` {row.by}"
            )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants.automatic", description=__doc__)
    parser.add_argument("--sample", type=int, default=400)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--seconds", type=int, default=15, help="processor time a mutant")
    parser.add_argument("--results", type=Path, required=True, help="where the results go, and what is known already")
    parser.add_argument("--quick", action="store_true", help="leave out the rerun of survivors under the ci profile")
    parser.add_argument("--again", action="store_true", help="run the survivors again, under the tests of today")
    parser.add_argument("--only", default="", help="modules whose name contains this")
    chosen = parser.parse_args()
    import hypothesis.stateful  # noqa: F401  # before the forks: each child has them ready
    import numpy  # noqa: F401
    import pytest  # noqa: F401

    if chosen.again:
        results = Results.read(chosen.results)
        first_pass(reopen(results), results, chosen.seconds)
    else:
        mutants, total = sample(chosen.sample, chosen.seed, chosen.only)
        head = {"seed": chosen.seed, "changes": total, "sampled": len(mutants), "seconds": chosen.seconds}
        print(f"seed {chosen.seed}: {len(mutants)} mutants of {total} possible changes", flush=True)
        results = Results(chosen.results, head)
        if chosen.results.exists():
            results = Results.read(chosen.results)
            if results.head != head:
                raise SystemExit(f"{chosen.results} holds another run: {results.head}")
        first_pass(mutants, results, chosen.seconds)
    if not chosen.quick:
        second_pass(results)
    print_table(results)


if __name__ == "__main__":
    main()
