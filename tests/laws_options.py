"""Which implementation stands under the spec, and where a failing property leaves its replay.

    pytest tests/laws --block-manager my_module:MyBlockManager --scheduler my_module:MyScheduler --replay-dir /tmp/replays

tests/conftest.py takes the two hooks from here; the spec and the mutants ask `block_manager_class()` and `scheduler_class()`.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import pytest

DEFAULTS = {
    "block_manager": "minipaged.memory.block_manager:BlockManager",
    "scheduler": "minipaged.scheduling.scheduler:Scheduler",
}
_chosen: dict[str, Any] = {"replay_dir": Path(".hypothesis") / "replays"}


def pytest_addoption(parser: pytest.Parser) -> None:
    """--block-manager, --scheduler, --replay-dir."""
    group = parser.getgroup("minipaged")
    group.addoption(
        "--block-manager", metavar="MODULE:CLASS", default=DEFAULTS["block_manager"], help="put it under the spec"
    )
    group.addoption("--scheduler", metavar="MODULE:CLASS", default=DEFAULTS["scheduler"], help="put it under the spec")
    group.addoption(
        "--replay-dir",
        metavar="DIR",
        default=str(_chosen["replay_dir"]),
        help="where failing properties leave their replays",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Find the classes at once, so that a wrong name is one clear line."""
    for name in DEFAULTS:
        _chosen[name] = _load(name, config.getoption(name))
    _chosen["replay_dir"] = Path(config.getoption("replay_dir"))


def _load(name: str, spec: str) -> type:
    option = "--" + name.replace("_", "-")
    module, _, attribute = spec.partition(":")
    if not module or not attribute:
        raise pytest.UsageError(f"{option} takes MODULE:CLASS, not {spec!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise pytest.UsageError(f"{option} {spec}: {error}") from error
    if not isinstance(found, type):
        raise pytest.UsageError(f"{option} {spec}: that is no class")
    return found


def block_manager_class() -> type:
    """The class that stands under the spec."""
    return _chosen.get("block_manager") or _load("block_manager", DEFAULTS["block_manager"])


def scheduler_class() -> type:
    """The scheduler that stands under the spec."""
    return _chosen.get("scheduler") or _load("scheduler", DEFAULTS["scheduler"])


def replay_dir() -> Path:
    """Where failing properties leave their replays."""
    folder: Path = _chosen["replay_dir"]
    return folder
