"""A failing property leaves a trace of the counterexample that the player opens at its last step."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import Phase

from minipaged.trace.player import Player
from minipaged.trace.sources import FileSource
from tests.mutants.memory_bugs import UncountedFork
from tests.spec.model import BrokenLawError
from tests.spec.run import run_machine


def test_a_broken_law_leaves_a_replay(tmp_path: Path) -> None:
    """The message gives the command; the file's last state is the one in which the law broke."""
    path = tmp_path / "L02.trace"
    with pytest.raises(BrokenLawError) as caught:
        run_machine(UncountedFork, frozenset({"L02"}), replay=path, phases=[Phase.generate, Phase.shrink])
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


def test_a_schedulers_law_that_fails_leaves_a_replay(tmp_path: Path) -> None:
    """In a pytest of its own: the report names the command; the file ends where the law broke, or with the run."""
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
    command += [
        "tests/spec/test_scheduler_laws.py",
        "-k",
        "L37",
        "--scheduler",
        "tests.mutants.scheduler_attacks:CopiesLost",
    ]
    told = subprocess.run([*command, "--replay-dir", str(tmp_path)], capture_output=True, text=True, timeout=240).stdout
    assert "1 failed" in told
    [path] = tmp_path.glob("*.trace")
    assert f"See it: minipaged tui --replay {path}" in told
    source = FileSource(path)
    assert not source.damage
    player = Player(source)
    player.seek(len(source))
    assert player.snapshot.sequences
    assert (player.snapshot.device.refs > 1).any(), "the last step is the fork after which a copy is missing"
