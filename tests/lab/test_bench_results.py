"""Results files: their form, what they become in a README, and the commands' bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from minipaged.cli.bench import app
from minipaged.errors import InputError
from minipaged.lab.measure import host as bench_host
from minipaged.lab.measure.contender_minipaged import make_llm
from minipaged.lab.measure.results import HEAD, Results, read_results
from minipaged.lab.report.bench_report import BEGIN, END, insert, report

RESULTS = Path(__file__).parents[2] / "minipaged" / "lab" / "results"


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "160"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def write(path: Path, rows: list[dict[str, Any]], **more: Any) -> None:
    head = {"command": f"minipaged bench {path.stem}", "date": "2026-11-25", "device": "a GPU", "python": "3.12"}
    path.write_text(json.dumps({**head, "versions": {"torch": "2.11.0", "vllm": "0.24.0"}, "rows": rows, **more}))


def test_a_file_is_whole_after_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.json"
    monkeypatch.setattr("sys.argv", ["minipaged", "bench", "kernels", "--json", str(path)])
    results = Results(path, device="a GPU")
    results.add([{"kernel": "copy"}])
    assert read_results(path)["rows"] == [{"kernel": "copy"}]
    results.note("left out")
    results.note("left out")
    document = read_results(path)
    assert set(document) == {*HEAD, "notes"}
    assert document["notes"] == ["left out"]
    assert document["command"] == "minipaged bench kernels --json r.json"
    assert document["versions"]["torch"] == torch.__version__


def test_files_that_are_none_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no folder"):
        Results(tmp_path / "none" / "r.json")
    path = tmp_path / "r.json"
    with pytest.raises(InputError, match="cannot be read"):
        read_results(path)
    path.write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        read_results(path)
    path.write_text('{"rows": []}')
    with pytest.raises(InputError, match="not a results file of minipaged bench: command, date"):
        read_results(path)
    with pytest.raises(InputError, match="no results"):
        report(tmp_path / "none")


def test_our_own_policys_old_name_is_read_as_todays(tmp_path: Path) -> None:
    """Files of earlier versions say vllm where `paged` ran; a peer of that name, the real vLLM, keeps it."""
    write(tmp_path / "old.json", [{"system": "vllm"}, {"system": "orca-max"}, {"contender": "vllm"}])
    rows = read_results(tmp_path / "old.json")["rows"]
    assert rows == [{"system": "paged"}, {"system": "orca-max"}, {"contender": "vllm"}]


def test_the_report_holds_every_figure(tmp_path: Path) -> None:
    engine = {"model": "random:llama-7b", "requests": 32, "output_tokens": 1, "seconds": 1.0, "workload": "batch:32"}
    write(
        tmp_path / "engine.json",
        [
            {**engine, "contender": "minipaged", "tokens_per_second": 4000.4, "ratio": None},
            {**engine, "contender": "vllm", "tokens_per_second": 3906.0, "ratio": 1.024},
            {**engine, "contender": "minipaged", "workload": "batch:1", "tokens_per_second": 180.25, "ratio": None},
        ],
        notes=["vllm: out of memory; not measured: batch:1"],
    )
    kernel = {"kernel": "decode", "shape": "64 x 4096", "microseconds": 350.0, "unit": "GB/s"}
    write(
        tmp_path / "kernels.json",
        [
            {**kernel, "kernel": "copy", "shape": "2 GiB", "contender": "torch", "value": 3005.0},
            {**kernel, "contender": "minipaged", "value": 2950.0, "share": 0.982, "ratio": None},
            {**kernel, "contender": "fa3", "value": 2937.0, "share": 0.977, "ratio": 1.004},
            {**kernel, "kernel": "sampling", "contender": "minipaged", "value": 2600.0, "share": 0.865, "ratio": None},
        ],
    )
    write(tmp_path / "host.json", [{"what": "host gap", "value": 88.84, "unit": "us", "goal": 100.0}])
    text = report(tmp_path)
    assert "| llama-7b | batch:32 | 4,000 | 3,906 (**1.02×**) |" in text
    assert "| llama-7b | batch:1 | 180.2 |  |" in text
    assert "Left out: vllm: out of memory; not measured: batch:1." in text
    assert "| 64 x 4096 | 2,950 | 98 % | 350.0 | 2,937 (**1.00×**) |" in text
    assert "| sampling | 64 x 4096 | 2,600 | 86 % | 350.0 |" in text
    assert "copy 2 GiB 3,005 GB/s" in text
    assert "| host gap | 88.8 us | < 100 us |" in text
    assert "**Engine**, one a GPU, torch 2.11.0, vllm 0.24.0, 2026-11-25: `minipaged bench engine`." in text


def test_the_marked_part_of_a_file_is_replaced(tmp_path: Path) -> None:
    assert insert(f"a\n{BEGIN}\nold\n{END}\nb\n", "new\n") == f"a\n{BEGIN}\nnew\n{END}\nb\n"
    for text in ("a", f"{END}\n{BEGIN}", BEGIN, f"{BEGIN}{BEGIN}{END}"):
        with pytest.raises(InputError, match="measured: begin"):
            insert(text, "new\n")
    write(tmp_path / "host.json", [{"what": "host gap", "value": 1.0, "unit": "us", "goal": None}])
    readme = tmp_path / "README.md"
    readme.write_text(f"a\n{BEGIN}\n{END}\n")
    run("report", str(tmp_path), "--into", str(readme))
    assert "| host gap | 1.0 us |  |" in readme.read_text()
    assert "| host gap | 1.0 us |  |" in run("report", str(tmp_path))
    with pytest.raises(InputError, match="cannot be read"):
        run("report", str(tmp_path), "--into", str(tmp_path / "none.md"))
    with pytest.raises(InputError, match="only must be one of engine, kernels"):
        run("report", str(tmp_path), "--only", "engines")


@pytest.mark.parametrize(
    ("file", "only"), [(RESULTS.parents[2] / "README.md", ("engine", "systems")), (RESULTS / "README.md", ())]
)
def test_the_readmes_figures_are_those_of_the_files(file: Path, only: tuple[str, ...]) -> None:
    text = file.read_text()
    assert insert(text, report(RESULTS, only)) == text, "minipaged bench report minipaged/lab/results --into FILE"
    for path in RESULTS.glob("*.json"):
        assert read_results(path)["rows"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("kernels", "--against", "fa4"), "against must be one of fa3, flashinfer, sdpa"),
        (("engine", "--against", "sglang"), "against must be one of vllm, transformers"),
        (("engine", "--workload", "nano,burst"), "not 'burst'"),
        (("engine", "--repeats", "0"), "repeats must be"),
        (("host", "--batch", "0"), "batch must be"),
        (("engine", "--json", "no/such/folder/r.json"), "there is no folder"),
    ],
)
def test_bad_input_is_named_before_anything_runs(arguments: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        run(*arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_kernels_without_a_gpu_say_so() -> None:
    with pytest.raises(InputError, match="needs a CUDA GPU"):
        run("kernels")


def test_the_engine_command_writes_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = tmp_path / "r.json"
    text = run(
        "engine", "--model", "random:toy", "--workload", "batch:1", "--repeats", "2", "--device", "cpu",
        "--json", str(path),
    )  # fmt: skip
    assert "batch:1" in text
    (row,) = read_results(path)["rows"]
    assert (row["contender"], row["output_tokens"], len(row["passes"])) == ("minipaged", 256, 2)
    assert row["first_seconds"] > 0
    assert row["tokens_per_second"] == pytest.approx(256 / row["seconds"])
    assert "| toy | batch:1 |" in report(tmp_path)
    assert f"| toy | batch:1 | {row['first_seconds']:.2f} · {row['seconds']:.2f} |" in report(tmp_path)


def test_an_engine_that_cannot_start_ends_with_its_words(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["engine", "--model", "random:none", "--workload", "batch:1", "--device", "cpu"])
    assert result.exit_code == 1
    assert "no shape is called" in result.output


def test_host_time_is_told_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_host, "STEPS", 6)
    monkeypatch.setattr(bench_host, "PAIRS", 2)
    monkeypatch.setattr(bench_host, "PAIR_STEPS", 4)
    llm = make_llm("random:toy", max_num_seqs=2, device="cpu", num_blocks=60)
    before = dict(vars(llm.engine.scheduler))
    rows = {row.what: row for row in [*bench_host.part_rows(llm.engine, 2), *bench_host.listener_rows(llm.engine, 2)]}
    assert {"host: schedule", "host: launch", "host: wait for tokens", "host: commit"} < set(rows)
    assert all(row.value > 0 for what, row in rows.items() if what.startswith("host: "))
    assert rows["trace: a listener"].goal == 2.0
    assert not llm.engine.has_work
    assert vars(llm.engine.scheduler).keys() == before.keys(), "the wrappers are gone"
    with pytest.raises(InputError, match="batch must be at most max_num_seqs"):
        list(bench_host.part_rows(llm.engine, 3))
    small = make_llm("random:toy", max_num_seqs=8, device="cpu", num_blocks=20)
    with pytest.raises(InputError, match="the pool has 19"):
        list(bench_host.part_rows(small.engine, 8))


def test_the_host_gap_needs_graphs() -> None:
    newest = object()
    assert bench_host.last_graph([object(), newest]) is newest
    with pytest.raises(InputError, match="graphs must be on"):
        bench_host.last_graph([])
