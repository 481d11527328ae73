"""A failing property leaves a trace of the counterexample that the player opens at its last step."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import Phase

from minipaged.trace.player import Player
from minipaged.trace.sources import FileSource
from minipaged.tui.session import Session
from tests.laws.model import BrokenLawError
from tests.laws.run import run_machine
from tests.mutants.memory_bugs import StaleKey, UncountedFork

PHASES = [Phase.generate, Phase.shrink]
ENOUGH = 1000  # examples to find the fault among, which takes about ten: which ones are drawn depends on the modules that are loaded


def test_a_broken_law_leaves_a_replay(tmp_path: Path) -> None:
    """The message gives the command; the file's last state is the one in which the law broke."""
    path = tmp_path / "L02.trace"
    with pytest.raises(BrokenLawError) as caught:
        run_machine(UncountedFork, frozenset({"L02"}), replay=path, phases=PHASES, max_examples=ENOUGH)
    assert f"minipaged tui --replay {path}" in "".join(caught.value.__notes__)
    source = FileSource(path)
    assert not source.damage
    assert len(source) >= 1
    player = Player(source)
    player.seek(len(source))
    snapshot = player.snapshot
    assert any(event.kind == "fork" for event in snapshot.events)
    counts = [0] * len(snapshot.device)
    for table in snapshot.tables.values():
        for block in table:
            counts[block] += block > 0
    assert counts != snapshot.device.refs.tolist(), "the counterexample shows the wrong counts"


def test_the_last_state_is_the_one_after_the_fault(tmp_path: Path) -> None:
    """A law that breaks inside a call, before anything of it is taken in, still shows what the call did."""
    path = tmp_path / "L32.trace"
    with pytest.raises(BrokenLawError, match="handed out block"):
        run_machine(StaleKey, frozenset({"L32"}), replay=path, phases=PHASES, max_examples=ENOUGH)
    session = Session(FileSource(path))
    assert session.playback.at_edge
    assert not session.playback.moving
    assert session.message.startswith("L32: ")
    taken = [(event.sequence, event.amount, event.block) for event in session.snapshot.events if event.kind == "alloc"]
    assert taken
    for sequence, index, block in taken:
        assert session.snapshot.tables[sequence][index] == block


def test_a_law_of_the_memory_by_itself_leaves_a_replay(tmp_path: Path) -> None:
    """Its calls, each a step: the last one is that after which the law was seen to be broken."""
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
    command += ["tests/laws/test_laws_memory.py", "-k", "L30", "--block-manager", "tests.mutants.memory_bugs:StaleKey"]
    told = subprocess.run([*command, "--replay-dir", str(tmp_path)], capture_output=True, text=True, timeout=240).stdout
    assert "1 failed" in told
    [path] = tmp_path.glob("*.trace")
    assert f"See it: minipaged tui --replay {path}" in told
    session = Session(FileSource(path))
    assert session.playback.at_edge
    assert session.message.startswith("L30")
    assert session.delta is not None
    [taken] = [event for event in session.delta.events if event.kind == "alloc"]
    assert taken.block in session.snapshot.tables[taken.sequence], "a cached block was handed out, and is found"


@pytest.mark.parametrize(
    ("law", "scheduler", "kinds"),
    [
        ("L37", "tests.mutants.scheduler_attacks:CopiesLost", {"fork"}),  # a copy is missing: the next step cannot run
        (
            "L39",
            "tests.mutants.scheduler_bugs:AdmitsAfterPreempting",
            {"preempt", "admit"},
        ),  # seen in the run's history
    ],
)
def test_a_schedulers_law_that_fails_leaves_a_replay(tmp_path: Path, law: str, scheduler: str, kinds: set[str]) -> None:
    """In a pytest of its own: the report names the command; the screen opens the file at the step in which the law broke."""
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
    command += ["tests/laws/test_scheduler_laws.py", "-k", law, "--scheduler", scheduler]
    told = subprocess.run([*command, "--replay-dir", str(tmp_path)], capture_output=True, text=True, timeout=240).stdout
    assert "1 failed" in told
    [path] = tmp_path.glob("*.trace")
    assert f"See it: minipaged tui --replay {path}" in told
    source = FileSource(path)
    assert not source.damage
    session = Session(source)
    assert session.playback.at_edge
    assert session.message.startswith(law)
    assert session.snapshot.sequences
    assert kinds <= {event.kind for event in session.snapshot.events}
