"""`minipaged bench ...`: what things cost here. Prints a table; --json keeps the rows with device, versions, date
and command.
"""

from __future__ import annotations

import json
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from minipaged.config import check_choice, check_int

DEFAULT_MODEL = "smollm2-135m"

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the rows to this file as well.")]


@app.callback()
def bench() -> None:
    """Benchmarks of this machine."""


@app.command("control-plane")
def control_plane(json_file: JsonFile = None) -> None:
    """Schedule + commit at many running decodes, and the block manager's primitives; no model, no device."""
    from minipaged.lab.control_plane import measure

    rows = measure()
    table = Table("what", "measured", "unit", "goal", title="Control plane")
    for row in rows:
        table.add_row(row.what, f"{row.value:.3f}", row.unit, "" if row.goal is None else f"≤ {row.goal:g}")
    Console().print(table)
    _keep(json_file, [row._asdict() for row in rows])


@app.command()
def soak(
    requests: Annotated[int, typer.Option(help="Simulated requests.")] = 100_000,
    seed: Annotated[int, typer.Option(help="Of the workload.")] = 0,
    json_file: JsonFile = None,
) -> None:
    """Forks, aborts, swaps and priorities in a pool that is too small, with the invariants checked; no model."""
    check_int("requests", requests, 1)
    from rich.progress import Progress

    from minipaged.lab.soak import soak as run

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("requests", total=requests)
        report = run(requests, seed=seed, progress=lambda done: bar.advance(task, done))
    table = Table("what", "seen", title="Soak: nothing was lost")
    for name, value in report.rows():
        table.add_row(name, f"{value:,.1f}" if isinstance(value, float) else f"{value}")
    Console().print(table)
    _keep(json_file, [dict(report.rows())])


@app.command()
def kernels(
    against: Annotated[str, typer.Option(help="Peers beside ours, separated by commas: sdpa, fa3.")] = "sdpa",
    json_file: JsonFile = None,
) -> None:
    """Paged attention beside the copy ceiling and its peers; needs a GPU."""
    peers = tuple(filter(None, against.split(",")))
    for peer in peers:
        check_choice("against", peer, ("sdpa", "fa3"))
    from minipaged.lab.bench_kernels import measure

    table = Table("kernel", "shape", "contender", "us", "", "of the copy ceiling", title="Kernels")
    rows = []
    ceiling = 0.0
    for row in measure(peers):
        ceiling = row.value if row.kernel == "copy" else ceiling
        share = f"{100 * row.value / ceiling:.0f} %" if row.unit == "GB/s" else ""
        table.add_row(
            row.kernel, row.shape, row.contender, f"{row.microseconds:.1f}", f"{row.value:,.0f} {row.unit}", share
        )
        rows.append(vars(row))
    Console(width=120).print(table)
    _keep(json_file, rows)


@app.command()
def engine(
    model: Annotated[str, typer.Option(help="random:SHAPE, or any model.")] = "random:llama-7b",
    workload: Annotated[
        str, typer.Option(help="nano, sharegpt and batch:N, separated by commas.")
    ] = "batch:1,batch:8,batch:32,sharegpt",
    repeats: Annotated[int, typer.Option(help="Passes after the warm one; the median counts.")] = 3,
    plain: Annotated[bool, typer.Option("--plain", help="Without graphs, fusions and overlap as well.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Output tokens per second of the whole engine on this device."""
    check_int("repeats", repeats, 1)
    names = [name for name in workload.split(",") if name]
    from minipaged.lab.bench_engine import make_llm, measure, requests_of

    for name in names:
        requests_of(name)
    table = Table("contender", "workload", "tokens", "seconds", "tok/s", title=f"Engine, {model}")
    rows = []
    contenders: list[tuple[str, dict[str, Any]]] = [("minipaged", {})]
    if plain:
        contenders.append(("minipaged, plain path", {"graphs": False, "overlap": 0}))
    for contender, settings in contenders:
        llm = make_llm(model, **settings)
        for name in names:
            row = measure(llm, model, name, repeats=repeats, contender=contender)
            table.add_row(
                contender, name, f"{row.output_tokens:,}", f"{row.seconds:.2f}", f"{row.tokens_per_second:,.1f}"
            )
            rows.append(vars(row))
        del llm
    Console(width=110).print(table)
    _keep(json_file, rows)


@app.command()
def screen(
    model: Annotated[str, typer.Option(help="Any model; one drawn at random speaks in made-up words.")] = DEFAULT_MODEL,
    requests: Annotated[int, typer.Option(help="At once; every fourth draws four samples.")] = 8,
    max_tokens: Annotated[int, typer.Option(help="Of the longest answer.")] = 96,
    num_blocks: Annotated[
        int, typer.Option(help="Blocks of the pool, 16 tokens each; too few let some make way.")
    ] = 160,
    pairs: Annotated[
        int, typer.Option(help="Rounds with the screen, and as many without; the median pair counts.")
    ] = 5,
    threads: Annotated[
        int | None, typer.Option(help="On a CPU: torch's threads and cores; the screen gets the other cores.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    pictures: Annotated[Path | None, typer.Option(help="A folder for SVGs of the first round.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Output tokens per second of the engine with the terminal screen on and off, in turn."""
    for name, value in (("requests", requests), ("max-tokens", max_tokens), ("pairs", pairs)):
        check_int(name, value, 1)
    check_int("num-blocks", num_blocks, 2)
    if threads is not None:
        check_int("threads", threads, 1)
    from tui.bench import Plan, measure

    settings = {"num_blocks": num_blocks, "device": device, "max_num_batched_tokens": 2048}
    folder = "" if pictures is None else str(pictures.resolve())
    outcome = measure(Plan(model, settings, requests, max_tokens, pairs, threads, folder))
    table = Table(
        "round", "screen", "tokens", "steps", "seconds", "engine's CPU s", "tok/s", title=f"The screen, {model}"
    )
    for number, (on, figures) in enumerate(outcome.rounds):
        table.add_row(
            f"{number // 2 + 1}",
            "on" if on else "off",
            f"{figures['tokens']:.0f}",
            f"{figures['steps']:.0f}",
            f"{figures['seconds']:.2f}",
            f"{figures['cpu_seconds']:.2f}",
            f"{figures['tokens_per_second']:,.1f}",
        )
    Console(width=110).print(table)
    pairwise = ", ".join(f"{ratio:.1%}" for ratio in outcome.ratios)
    print(f"with the screen: {outcome.ratio:.1%} of the tokens per second without (median; pairs {pairwise})")
    print(f"{outcome.terminal_bytes:,} bytes went to the terminal; {len(outcome.pictures)} pictures")
    _keep(json_file, [{"model": model, "screen": on, **figures} for on, figures in outcome.rounds])


def _keep(path: Path | None, rows: list[dict[str, Any]]) -> None:
    """Write the rows with all that is needed to measure them again."""
    if path is None:
        return
    document = {
        "command": " ".join(["minipaged", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "device": _device(),
        "versions": {name: _version(name) for name in ("torch", "triton", "numpy", "minipaged")},
        "python": platform.python_version(),
        "rows": rows,
    }
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {platform.machine()}"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
