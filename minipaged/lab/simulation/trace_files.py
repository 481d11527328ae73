"""A user's own traffic: CSV or JSONL files of arrival, prompt tokens and output tokens.

Every error names the file and the line.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from minipaged.errors import InputError
from minipaged.lab.simulation.workloads import Workload, make_workload

COLUMNS = ("arrival", "prompt_tokens", "output_tokens")
MAX_LENGTH = 10_000_000  # tokens: a longer one is a mistake in the file


def load_workload(source: str, *, rate: float, count: int, seed: int = 0) -> Workload:
    """A named workload, or the file at `source` (whose own arrivals count; at most `count` requests of it are read)."""
    if source.endswith((".csv", ".jsonl")):
        return read_trace(Path(source)).head(count)
    return make_workload(source, rate=rate, count=count, seed=seed)


def read_trace(path: Path) -> Workload:
    """Read a .csv (with a header line) or .jsonl trace with the columns arrival (seconds), prompt_tokens and
    output_tokens.

    Raises InputError naming the line for a missing column, a number that is none, a negative or decreasing arrival,
    or a length below 1.
    """
    if not path.is_file():
        raise InputError(f"no trace file at {path}")
    records = _csv_records(path) if path.suffix == ".csv" else _jsonl_records(path)
    arrivals: list[float] = []
    prompts: list[int] = []
    outputs: list[int] = []
    for line, record in records:
        where = f"{path}, line {line}"
        missing = [c for c in COLUMNS if record.get(c) in (None, "")]
        if missing:
            raise InputError(f"{where}: missing {', '.join(missing)}; every request needs {', '.join(COLUMNS)}")
        arrival = _arrival(where, record["arrival"])
        if arrivals and arrival < arrivals[-1]:
            raise InputError(
                f"{where}: arrival {arrival:g} is before the line above ({arrivals[-1]:g}); sort the file by arrival"
            )
        arrivals.append(arrival)
        prompts.append(_length(where, "prompt_tokens", record["prompt_tokens"]))
        outputs.append(_length(where, "output_tokens", record["output_tokens"]))
    if not arrivals:
        raise InputError(f"{path} holds no requests")
    return Workload(
        path.stem, np.array(arrivals), np.array(prompts, np.int64), np.array(outputs, np.int64), max_new=max(outputs)
    )


def _csv_records(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            names = [name.strip() for name in reader.fieldnames or ()]
            missing = [c for c in COLUMNS if c not in names]
            if missing:
                raise InputError(
                    f"{path}, line 1: no column {', '.join(missing)}; found {', '.join(names) or 'nothing'}"
                )
            reader.fieldnames = names
            for row in reader:
                yield reader.line_num, dict(row)
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is not a CSV text file: {error}") from error


def _jsonl_records(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a text file: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(record, dict):
            raise InputError(
                f"{path}, line {number}: expected an object with {', '.join(COLUMNS)}, not {line.strip()[:40]}"
            )
        yield number, record


def _arrival(where: str, value: object) -> float:
    try:
        arrival = float(str(value))
    except ValueError:
        raise InputError(f"{where}: arrival must be a number of seconds, not {value!r}") from None
    if not math.isfinite(arrival) or arrival < 0:
        raise InputError(f"{where}: arrival must be a finite number of seconds, at least 0, not {value!r}")
    return arrival


def _length(where: str, column: str, value: object) -> int:
    try:
        number = float(str(value))
    except ValueError:
        raise InputError(f"{where}: {column} must be a whole number, not {value!r}") from None
    if isinstance(value, bool) or not math.isfinite(number) or number != int(number) or not 1 <= number <= MAX_LENGTH:
        raise InputError(f"{where}: {column} must be a whole number from 1 to {MAX_LENGTH}, not {value!r}")
    return int(number)
