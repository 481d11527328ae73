"""The lab's commands, pages and plots, end to end on small runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from minipaged.cli import lab_simulated
from minipaged.cli.lab import app
from minipaged.errors import InputError
from minipaged.lab.formats import seconds, size
from minipaged.lab.paper.figure_types import Curve, Row
from minipaged.lab.paper.figures import FIGURES, parse_figures
from minipaged.lab.report.html import Page
from minipaged.lab.report.svg import bars, line_chart, stacked_bars


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "160"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_simulate_prints_and_writes(tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    text = run("simulate", "--system", "orca-max,paged", "--requests", "60", "--json", str(out))
    assert "orca-max" in text
    results = json.loads(out.read_text())
    assert [r["system"] for r in results] == ["orca-max", "paged"]
    assert results[1]["tokens_per_s"] > results[0]["tokens_per_s"]
    assert sum(results[0]["pool_shares"].values()) == pytest.approx(1.0)


def test_a_users_trace_runs(tmp_path: Path) -> None:
    trace = tmp_path / "mine.csv"
    trace.write_text("arrival,prompt_tokens,output_tokens\n0,10,5\n1,20,7\n")
    assert "mine, 2 requests" in run("simulate", "--trace", str(trace))


def test_compare_writes_a_page_that_stands_alone(tmp_path: Path) -> None:
    page, numbers = tmp_path / "c.html", tmp_path / "c.json"
    text = run(
        "compare", "--systems", "static,paged", "--requests", "80", "--rates", "0.2, 0.5",
        "--html", str(page), "--json", str(numbers),
    )  # fmt: skip
    assert "0.2/s" in text
    html = page.read_text()
    assert html.count("<svg") == 3
    assert not re.search(r'(src|href)="http', html), "the page must not load anything"
    found = json.loads(numbers.read_text())
    assert [s["rate"] for s in found["sweep"]] == [0.2, 0.5]


@pytest.mark.parametrize(("given", "runs"), [([], "random:smollm2-135m"), (["--model", "toy"], "toy")])
def test_compare_on_a_device_has_a_model_that_runs(
    given: list[str], runs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shape that simulations begin with is no model's name."""
    asked: list[object] = []
    monkeypatch.setattr(lab_simulated, "compare_on_device", lambda *words: asked.extend(words))
    assert CliRunner().invoke(app, ["compare", "--device", "cpu", *given]).exit_code == 0
    assert asked[2] == runs


def test_plan_and_gpus() -> None:
    text = run("plan", "--rate", "10", "--price", "2.5")
    assert "819,200 B" in text
    assert "$" in text
    assert "a100-40" in run("gpus")


def test_figures_print_the_papers_numbers(tmp_path: Path) -> None:
    page = tmp_path / "f.html"
    text = run("figures", "--only", "19", "--html", str(page))
    assert "blocks of 16" in text
    assert "<svg" in page.read_text()


def test_advise_asks_for_what_is_left_out() -> None:
    result = CliRunner().invoke(app, ["advise"], input="instructions\n4\n", env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    assert "What is it for" in result.output
    assert "19 tokens in, 58 out, 4 at a time" in result.output
    text = run("advise", "--prompt", "100", "--output", "50", "--users", "4", "--latency-ms", "1")
    assert "100 tokens in, 50 out, 4 at a time" in text
    assert "too slow" in text
    assert "is missed" in text


def test_a_uses_lengths_can_be_overruled() -> None:
    text = run("advise", "--use", "agents", "--users", "2", "--model", "llama-3-8b", "--output", "30")
    assert "6000 tokens in, 30 out" in text
    assert "4000 of 6000 prompt tokens hit" in text


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["simulate", "--system", "orca"], "orca-max"),
        (["simulate", "--gpu", "a9000"], "a9000"),
        (["simulate", "--model", "gpt-9"], "gpt-9"),
        (["simulate", "--trace", "reddit"], "reddit"),
        (["simulate", "--trace", "none.csv"], "none.csv"),
        (["simulate", "--rate", "-1"], "rate"),
        (["simulate", "--requests", "0"], "requests"),
        (["simulate", "--slots", "0"], "slots"),
        (["simulate", "--overhead-ms", "nan"], "overhead-ms"),
        (["simulate", "--block-size", "0", "--requests", "5"], "block_size"),
        (["compare", "--rates", "1,fast"], "fast"),
        (["compare", "--rates", "0"], "rates"),
        (["plan", "--price", "2"], "rate"),
        (["plan", "--max-num-seqs", "0"], "max-num-seqs"),
        (["plan", "--gpu", "t4"], "at least 2"),
        (["plan", "--latency-ms", "0"], "latency-ms"),
        (["plan", "--latency-ms", "1"], "even one row"),
        (["advise", "--use", "games", "--users", "1"], "games"),
        (["figures", "--only", "11"], "11"),
        (["simulate", "--requests", "5", "--json", "/nowhere/x.json"], "cannot write"),
    ],
)
def test_bad_input_is_one_clear_error(arguments: list[str], word: str) -> None:
    with pytest.raises(InputError, match=word):
        run(*arguments)


def test_plots_are_well_formed_and_escape_names() -> None:
    curves = [Curve("a<b", ((0.0, 1.0), (1.0, 3.0))), Curve("empty", ())]
    for picture in (
        line_chart("t & u", curves, "x", "y"),
        line_chart("logs", [Curve("a", ((1.0, 0.0), (2.0, 10.0), (3.0, float("nan"))))], "x", "y", log_y=True),
        line_chart("both logs", [Curve("a", ((1.0, 5.0), (16.0, 10.0), (0.0, 1.0)))], "x", "y", log_x=True, log_y=True),
        bars("groups", {"g<": [("a & b", 1.0, "1"), ("nothing", float("nan"), "-")], "empty": []}, "x"),
        line_chart("nothing", [], "x", "y"),
        line_chart("flat", [Curve("a", ((1.0, 2.0),))], "x", "y", log_y=True),
        stacked_bars("bars", {"paged": {"token": 0.9, "idle": 0.1}}, "%"),
    ):
        ElementTree.fromstring(picture)


def test_pages_escape_what_they_are_given() -> None:
    page = Page("<title>")
    page.table(("a",), [("<script>",)])
    page.notes(("x < y",))
    assert "<script>" not in page.text()
    assert "&lt;title&gt;" in page.text()


def test_differences_read_as_what_they_are() -> None:
    assert Row("a", 22.0, 20.0, "%").difference == "+2.0 points"
    assert Row("a", 1.1, 1.0, "x").difference == "+10 %"
    assert Row("a", 2.0, (1.7, 2.7), "x").difference == "inside"
    assert Row("a", 1.53, (1.7, 2.7), "x").difference == "-10 %"
    assert Row("a", 1.0).difference == ""
    assert Row("a", 1.0, 1.0, "x", fitted=True).difference == "+0 % (fitted)"


def test_units_read_well() -> None:
    assert seconds(0.0123) == "12.3 ms"
    assert seconds(float("nan")) == "-"
    assert seconds(4321.0) == "4,321 s"
    assert seconds(2e-5) == "20 us"
    assert size(819_200) == "800 KiB"


@pytest.mark.parametrize("name", sorted(FIGURES))
@pytest.mark.slow
def test_every_figure_runs(name: str) -> None:
    figure = FIGURES[name](lambda message, done, total: None)
    assert figure.rows
    if name == "12":
        null = next(row for row in figure.rows if row.what == "opt-175b, alpaca: over orca-oracle")
        assert null.ours < 1.1, "Fig. 12f: 175B with Alpaca must show next to no advantage"


def test_figure_names_are_checked() -> None:
    assert parse_figures("2, 12") == ("2", "12")
    with pytest.raises(InputError, match="no figure '3'"):
        parse_figures("3")
    with pytest.raises(InputError, match="no figure given"):
        parse_figures(",")
