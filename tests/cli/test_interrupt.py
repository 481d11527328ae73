"""ctrl+c at any moment: exit code 130, no traceback, no half file in the cache, no process left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


def start(args: list[str], cache: Path | None = None) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if cache is not None:
        environment["MINIPAGED_CACHE"] = str(cache)
    return subprocess.Popen(
        [sys.executable, "-m", "minipaged", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        env=environment,
        start_new_session=True,
    )


def interrupt(child: subprocess.Popen[str]) -> tuple[str, str]:
    os.killpg(child.pid, signal.SIGINT)
    out, err = child.communicate(timeout=30)
    assert "Traceback" not in err, err
    assert child.returncode in (130, -signal.SIGINT), (
        child.returncode,
        err,
    )  # the latter before Python itself has started
    assert group_is_gone(child.pid)
    return out, err


def group_is_gone(group: int) -> bool:
    """Whether no process of the group is left, after a moment to end."""
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("after_seconds", [0.6, 1.5, 5.0])
def test_while_loading_or_generating(after_seconds: float) -> None:
    child = start(
        ["generate", "Count.", "--model", "random:smollm2-135m", "--raw", "--max-tokens", "1500", "--num-blocks", "100"]
    )
    time.sleep(after_seconds)
    assert child.poll() is None, "it ended by itself"
    interrupt(child)


def test_while_the_plain_run_goes_on() -> None:
    child = start(["tui", "--model", "random:smollm2-135m"])
    assert child.stdout is not None
    child.stdout.readline()  # it generates
    interrupt(child)
