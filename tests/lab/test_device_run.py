"""Real execution of every system on the toy model: the same text, other memory."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest

from minipaged.baselines.systems import RESERVING
from minipaged.errors import InputError
from minipaged.lab.measure.device_run import (
    Bench,
    DeviceResult,
    percentiles,
    requests_for,
    requests_of,
    run_systems,
    serve,
)
from minipaged.lab.measure.rows import ENOUGH_STEPS
from minipaged.lab.report.bench_report import system_tables
from minipaged.lab.report.device_report import (
    device_dict,
    device_latency_row,
    device_notes,
    device_row,
    plot_of,
    print_device,
)
from minipaged.lab.simulation.workloads import make_workload

RNG = random.Random(5)
DRAWS = [([RNG.randrange(250) for _ in range(RNG.randint(2, 24))], RNG.randint(2, 20)) for _ in range(10)]


def run(systems: tuple[str, ...], **settings: object) -> dict[str, DeviceResult]:
    results = run_systems(
        systems, DRAWS, model="toy", device="cpu", dtype="float32", block_size=4, pools=(256,), max_len=64, max_new=30,
        progress=lambda message, done, total: None, **settings,
    )  # type: ignore[arg-type]  # fmt: skip
    return {r.system: r for r in results}


def test_every_system_gives_the_same_text() -> None:
    found = run(("paged", *sorted(RESERVING)))
    for system, result in found.items():
        assert result.same_answers == 1.0, system
        assert result.refused == 0, system
        assert result.tokens == sum(length for _, length in DRAWS)
    assert found["paged"].mean_rows > found["orca-max"].mean_rows > found["webui"].mean_rows
    assert found["paged"].token_share > found["orca-max"].token_share
    assert found["webui"].mean_rows <= 1


def test_several_pools_in_one_go_and_each_result_at_once() -> None:
    heard: list[tuple[str, int]] = []
    results = run_systems(
        ("orca-max", "paged"), DRAWS, model="toy", device="cpu", dtype="float32", block_size=4, pools=(128, 256), max_len=64,
        max_new=30, progress=lambda message, done, total: None, done=lambda r: heard.append((r.system, r.pool)),
    )  # fmt: skip
    assert heard == [(r.system, r.pool) for r in results]
    assert heard == [("orca-max", 128), ("paged", 128), ("orca-max", 256), ("paged", 256)]
    assert all(r.finished == len(DRAWS) for r in results)
    assert results[2].mean_rows > results[0].mean_rows


def test_a_time_limit_stops_a_system_and_says_so() -> None:
    found = run(("webui", "static"), seconds=1e-9)
    webui, static = found["webui"], found["static"]
    assert webui.finished < len(DRAWS)
    assert webui.note.startswith("stopped")
    assert math.isinf(webui.first_token[1])
    assert static.note.startswith("stopped")
    assert run(("paged",), seconds=1e9)["paged"].note == ""


def test_a_system_stopped_after_a_few_steps_is_not_ranked(capsys: pytest.CaptureFixture[str]) -> None:
    """No speed in the table, in the report or in the plot; a note says how many steps it made. Others keep their place."""
    whole, cut = run(("paged",))["paged"], run(("orca-max",), seconds=1e-9)["orca-max"]
    assert whole.steps is not None
    assert whole.steps >= ENOUGH_STEPS
    assert not whole.too_few_steps
    assert (cut.steps, cut.too_few_steps) == (1, True)
    assert "1 step: too few" in cut.note
    assert device_row(whole)[2] != "-"
    assert device_row(cut)[2:5] == ("-", "-", "-")
    rows = [device_dict(whole), device_dict(cut)]
    _, table, *notes = system_tables(rows)
    assert "orca-max" not in table
    assert any("orca-max: stopped" in note for note in notes)
    plot = plot_of({"device": "here", "date": "today", "rows": rows})
    assert "paged" in plot
    assert "orca-max" not in plot
    assert "not ranked" in " ".join(device_notes([whole, cut]))
    for row in rows:
        del row["steps"]  # as in files of earlier versions, which are shown as they were
    assert "orca-max" in system_tables(rows)[1]


def test_progress_moves_with_every_step_and_never_back() -> None:
    heard: list[tuple[str, int, int]] = []
    run_systems(
        ("static", "paged"), DRAWS, model="toy", device="cpu", block_size=4, pools=(256,), max_len=64, max_new=30,
        progress=lambda *what: heard.append(what),
    )  # fmt: skip
    assert [what for what, _, _ in heard if what.startswith("warming up")] == ["warming up"] * 3
    served = [(what, done / total) for what, done, total in heard if not what.startswith("warming up")]
    shares = [share for _, share in served]
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert shares[-1] == 1
    assert len(set(shares)) > 20, "a few jumps are no progress"
    assert served[0][0] == "static: the whole batch's prompts, in one step"


def test_progress_follows_the_time_limit_where_that_ends_first() -> None:
    engine, slots, fits = Bench("toy", "cpu", "float32", 4, (256,), 16, 64).engine("paged", DRAWS, 30, 256)
    shares: list[float] = []
    serve(engine, "paged", DRAWS, slots, 1e-9, shares.append, fits=fits)
    assert shares == [0.0, 1.0]


def test_systems_run_ahead_as_the_engine_does_on_a_gpu() -> None:
    """With a step in flight every system gives the text that it gives without."""
    cost = {"model": "toy", "device": "cpu", "dtype": "float32", "block_size": 4}
    bench = Bench(**cost, pools=(256,), max_num_seqs=16, max_len=64)
    texts = {}
    for depth in (0, 1):
        bench.config = replace(bench.config, depth=depth)
        for system in ("paged", *RESERVING):
            engine, slots, fits = bench.engine(system, DRAWS, 30, 256)
            assert engine.depth == depth
            _, texts[system, depth] = serve(engine, system, DRAWS, slots, None, lambda done: None, fits=fits)
    assert all(text == texts["paged", 0] for text in texts.values())


@pytest.mark.parametrize("system", sorted(RESERVING))
def test_what_an_empty_pool_could_not_hold_is_refused_and_the_others_are_served(system: str) -> None:
    """Clients allow 40 tokens; some rules reserve them, and a pool of 60 slots then holds only short prompts."""
    (result,) = run_systems(
        (system,), DRAWS, model="toy", device="cpu", dtype="float32", block_size=4, pools=(60,), max_len=64, max_new=40,
        progress=lambda message, done, total: None,
    )  # fmt: skip
    assert result.finished + result.refused == len(DRAWS)
    assert (result.note != "") == (result.refused > 0)
    if system == "static":
        assert result.refused == sum(len(p) + max(40, n) > 60 for p, n in DRAWS) > 0
    if system == "orca-max":
        assert result.refused == len(DRAWS), "a whole context is 16 blocks; the largest buddy of 15 has 8"


def test_percentiles_count_what_never_came_as_infinitely_late() -> None:
    assert percentiles(np.array([1.0, 2.0, math.nan, math.nan]), served=4) == (2.0, math.inf)
    assert percentiles(np.array([3.0, 1.0, 2.0]), served=3) == (2.0, 3.0)
    assert all(math.isnan(x) for x in percentiles(np.array([]), served=0))


def test_draws_have_the_workloads_lengths_and_prefix() -> None:
    load = make_workload("prefix-80", rate=1.0, count=5)
    requests = requests_of(load, 1000)
    assert [len(p) for p, _ in requests] == load.prompts.tolist()
    assert [o for _, o in requests] == load.outputs.tolist()
    assert requests[0][0][:80] == requests[1][0][:80] != requests[0][0][80:160]


def test_bad_input_is_named() -> None:
    with pytest.raises(InputError, match="'hf'"):
        run(("hf",))
    for settings, word in (
        ({"seconds": 0.0}, "seconds"),
        ({"pools": (2,)}, "slots"),
        ({"max_len": 8}, "context of 8"),
    ):
        with pytest.raises(InputError, match=word):
            run_systems(
                ("paged",), DRAWS, model="toy", device="cpu", block_size=4, progress=lambda message, done, total: None,
                **{"pools": (256,), **settings},
            )  # type: ignore[arg-type]  # fmt: skip
    with pytest.raises(InputError, match="no requests"):
        run_systems(("paged",), [], model="toy", progress=lambda message, done, total: None)


def test_results_become_tables_and_a_plot() -> None:
    found = [*run(("webui", "paged")).values(), run(("orca-max",), seconds=1e-9)["orca-max"]]
    rows = json.loads(json.dumps([device_dict(r) for r in found]))
    _, table, *notes = system_tables(rows[:2])
    assert "| paged | 256 |" in table
    assert notes == []
    assert rows[2]["first_token"][1] is None
    ElementTree.fromstring(plot_of({"device": "here", "date": "today", "rows": rows}))
    assert device_latency_row(found[2])[3].startswith("> ")
    print_device("t", found)


def test_draws_fit_the_vocabulary_and_the_count() -> None:
    assert max(max(p) for p, _ in requests_for("sharegpt", "random:toy", count=9)) < 257
    assert [len(p) for p, _ in requests_for("sharegpt", "random:llama-7b", count=3)] == [179, 46, 9]
    assert len(requests_for("alpaca", "toy", count=4)) == 4
    with pytest.raises(InputError, match="requests"):
        requests_for("sharegpt", "toy", count=0)
    with pytest.raises(InputError, match="unknown workload"):
        requests_for("reddit", "toy", count=1)
