"""Traffic: means, seeds, the engines' fixed requests, and trace files with their errors."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest

from minipaged.errors import InputError
from minipaged.lab.simulation.trace_files import load_workload, read_trace
from minipaged.lab.simulation.workloads import WORKLOADS, Lengths, engine_requests, make_workload


@pytest.mark.parametrize(("name", "prompt", "output"), [("sharegpt", 161.31, 337.99), ("alpaca", 19.31, 58.45)])
def test_means_are_the_published_ones(name: str, prompt: float, output: float) -> None:
    load = make_workload(name, rate=2.0, count=200_000, seed=0)
    assert load.prompts.mean() == pytest.approx(prompt, rel=0.02)
    assert load.outputs.mean() == pytest.approx(output, rel=0.02)
    assert load.arrivals[-1] == pytest.approx(100_000, rel=0.02)


@pytest.mark.parametrize("name", sorted(WORKLOADS))
def test_every_workload_is_sorted_positive_and_repeatable(name: str) -> None:
    first, again, other = (make_workload(name, rate=5.0, count=500, seed=seed) for seed in (3, 3, 4))
    assert (np.diff(first.arrivals) >= 0).all()
    assert first.prompts.min() >= 1
    assert 1 <= first.outputs.min() <= first.outputs.max() <= first.max_new
    assert (first.prompts + first.outputs).max() <= 2048
    assert (first.prompts > first.prefix).all()
    assert (first.prompts == again.prompts).all()
    assert (first.arrivals == again.arrivals).all()
    assert (first.outputs != other.outputs).any()


def test_the_rate_moves_arrivals_and_nothing_else() -> None:
    slow, fast = (make_workload("sharegpt", rate=rate, count=100) for rate in (1.0, 4.0))
    assert (slow.prompts == fast.prompts).all()
    assert slow.arrivals == pytest.approx(4 * fast.arrivals)
    assert (make_workload("sharegpt", rate=math.inf, count=9).arrivals == 0).all()


def test_most_chats_fill_the_history() -> None:
    load = make_workload("chatbot", rate=1.0, count=5000)
    assert (load.prompts == 1024).mean() > 0.6
    assert load.prompts.max() == 1024


def digest(requests: list[tuple[list[int], int]]) -> str:
    return hashlib.sha256(json.dumps(requests).encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("name", "count", "expected"),
    [
        ("nano", 256, "d72f19b572464c05"),
        ("sharegpt", 256, "a16f98eccdeed715"),
        ("b32", 32, "023e3a32bea77cf3"),
        ("chat", 256, "753ee0318f7ad23c"),
        ("long", 48, "5819ecb8e14e5830"),
        ("context", 32, "ce214832c31cc336"),
        ("prefix", 128, "cbf9fa5861390b82"),
    ],
)
def test_the_engines_draws_never_change(name: str, count: int, expected: str) -> None:
    requests = engine_requests(name)
    assert len(requests) == count
    assert digest(requests) == expected


@pytest.mark.parametrize("name", ["bert", "b0", "b", "", "opt"])
def test_unknown_draws_and_workloads_are_named(name: str) -> None:
    with pytest.raises(InputError, match="sharegpt"):
        engine_requests(name)
    with pytest.raises(InputError, match="alpaca"):
        make_workload(name, rate=1.0, count=1)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"rate": 0.0}, "rate"),
        ({"rate": -1.0}, "rate"),
        ({"rate": math.nan}, "rate"),
        ({"count": 0}, "requests"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, float], word: str) -> None:
    with pytest.raises(InputError, match=word):
        make_workload("sharegpt", **{"rate": 1.0, "count": 5, **settings})  # type: ignore[arg-type]


def test_impossible_lengths_are_named() -> None:
    with pytest.raises(InputError, match="mean"):
        Lengths(2000, 1.0, 4, 1024)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_csv_and_jsonl_read_alike(tmp_path: Path) -> None:
    table = write(tmp_path / "a.csv", "arrival,user,prompt_tokens,output_tokens\n0,x,10,5\n1.5,y,20,7\n")
    lines = write(
        tmp_path / "a.jsonl",
        '{"arrival": 0, "prompt_tokens": 10, "output_tokens": 5}\n\n'
        '{"arrival": 1.5, "prompt_tokens": 20, "output_tokens": 7}\n',
    )
    for path in (table, lines):
        load = load_workload(str(path), rate=1.0, count=100)
        assert load.arrivals.tolist() == [0.0, 1.5]
        assert load.prompts.tolist() == [10, 20]
        assert load.outputs.tolist() == [5, 7]
        assert load.max_new == 7
    assert len(load_workload(str(table), rate=1.0, count=1)) == 1


HEADER = "arrival,prompt_tokens,output_tokens\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arrival,prompt_tokens\n0,5\n", "line 1: no column output_tokens"),
        ("", "line 1: no column"),
        (HEADER, "holds no requests"),
        (HEADER + "0,5,5\n-1,5,5\n", "line 3: arrival"),
        (HEADER + "3,5,5\n2,5,5\n", "line 3: arrival 2 is before"),
        (HEADER + "0,0,5\n", "line 2: prompt_tokens"),
        (HEADER + "0,5,0\n", "line 2: output_tokens"),
        (HEADER + "0,5,2.5\n", "line 2: output_tokens"),
        (HEADER + "0,5\n", "line 2: missing output_tokens"),
        (HEADER + "now,5,5\n", "line 2: arrival"),
        (HEADER + "nan,5,5\n", "line 2: arrival"),
        (HEADER + "0,many,5\n", "line 2: prompt_tokens"),
        (HEADER + "0,1e99,5\n", "line 2: prompt_tokens"),
    ],
)
def test_a_bad_csv_names_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_trace(write(tmp_path / "t.csv", text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"arrival": 0, "prompt_tokens": 1}\n', "line 1: missing output_tokens"),
        ("[1, 2, 3]\n", "line 1: expected an object"),
        ('{"arrival": 0,\n', "line 1: not JSON"),
        ('{"arrival": 0, "prompt_tokens": true, "output_tokens": 4}\n', "line 1: prompt_tokens"),
    ],
)
def test_a_bad_jsonl_names_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_trace(write(tmp_path / "t.jsonl", text))


def test_a_binary_file_and_a_missing_one(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"\xff\xfe\x00\x80" * 9)
    with pytest.raises(InputError, match="not a CSV text file"):
        read_trace(tmp_path / "t.csv")
    with pytest.raises(InputError, match="no trace file"):
        read_trace(tmp_path / "none.csv")
