"""Helpers: processes that a test started, and waiting for a condition outside an app."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path


def children(program: Path) -> list[int]:
    """Processes whose command line names the path, and their children."""
    found: dict[int, tuple[int, str]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except (FileNotFoundError, ProcessLookupError):
                continue
            found[int(entry.name)] = (parent, command)
    named = {pid for pid, (_, command) in found.items() if str(program) in command and "echo" not in command}
    return sorted(named | {pid for pid, (parent, _) in found.items() if parent in named})


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait for a condition, not for a time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.05)
