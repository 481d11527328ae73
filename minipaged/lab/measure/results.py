"""The one form of all benchmark results: rows, with all that is needed to measure them again.

A file is written anew after every row, so a run that is cut short leaves what it has.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from minipaged.baselines.systems import todays_name
from minipaged.errors import InputError

PACKAGES = ("minipaged", "torch", "triton", "numpy", "transformers", "vllm", "flashinfer-python")
HEAD = ("command", "date", "device", "versions", "python", "rows")  # what every file holds; notes where there are any


class Results:
    """Rows and notes of one command. path: the file, or None to keep nothing."""

    def __init__(self, path: Path | None, *, device: str | None = None) -> None:
        if path is not None and not path.parent.is_dir():
            raise InputError(f"--json {path}: there is no folder {path.parent}")
        self.path = path
        self.device = device
        self.rows: list[dict[str, Any]] = []
        self.notes: list[str] = []

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Keep rows, and write the file."""
        self.rows.extend(rows)
        self.write()

    def note(self, text: str) -> None:
        """Keep a sentence about what was left out; said once."""
        if text not in self.notes:
            self.notes.append(text)
            self.write()

    def document(self) -> dict[str, Any]:
        """The whole file."""
        found = {name: _version(name) for name in PACKAGES}
        return {
            "command": self._command(),
            "date": datetime.now(UTC).date().isoformat(),
            "device": self.device if self.device is not None else device_name(),
            "versions": {name: number for name, number in found.items() if number is not None},
            "python": platform.python_version(),
            "rows": self.rows,
            **({"notes": self.notes} if self.notes else {}),
        }

    def _command(self) -> str:
        """What was typed; the file, and whatever else lies at an absolute path, by its name alone."""
        words = (Path(w).name if self.path == Path(w) or Path(w).is_absolute() else w for w in sys.argv[1:])
        return " ".join(["minipaged", *words])

    def write(self) -> None:
        """Write the file, if there is one."""
        if self.path is not None:
            self.path.write_text(json.dumps(self.document(), indent=1) + "\n", encoding="utf-8")


def read_results(path: Path) -> dict[str, Any]:
    """A results file. InputError if it is none."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    missing = [name for name in HEAD if not isinstance(document, dict) or name not in document]
    if missing:
        raise InputError(f"{path}: not a results file of minipaged bench: {', '.join(missing)} is missing")
    for row in document["rows"]:
        if isinstance(row, dict) and "system" in row:  # files of earlier versions call our own paged policy vllm
            row["system"] = todays_name(row["system"])
    return dict(document)


def device_name() -> str:
    """The GPU, or the kind of CPU. Starts CUDA in this process where there is a GPU."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {platform.machine()}"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
