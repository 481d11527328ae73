"""`minipaged bench ...`: what things cost on this machine. Each command prints a table; --json writes the rows, with device,
versions, date and command.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from minipaged.cli.options import KVCacheDTypeName
from minipaged.config import DEFAULT_MODEL, check_choice, check_int
from minipaged.errors import InputError
from minipaged.lab.measure.results import Results
from minipaged.lab.report.tables import table
from minipaged.text.safe import printable

WIDTH = 130  # columns of the wide tables

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the rows to this file as well.")]


@app.callback()
def bench() -> None:
    """Benchmarks of this machine."""


@app.command("control-plane")
def control_plane(json_file: JsonFile = None) -> None:
    """Time the scheduler, the block manager and the trace with many running decodes. Needs no model and no device."""
    results = Results(json_file)
    from minipaged.lab.measure.control_plane import measure

    rows = measure()
    table(
        "Control plane",
        ("what", "measured", "unit", "goal"),
        [(row.what, f"{row.value:.3f}", row.unit, "" if row.goal is None else f"≤ {row.goal:g}") for row in rows],
    )
    results.add(row._asdict() for row in rows)


@app.command()
def soak(
    requests: Annotated[int, typer.Option(help="Simulated requests.")] = 100_000,
    seed: Annotated[int, typer.Option(help="Seed of the workload.")] = 0,
    depth: Annotated[int, typer.Option(help="Steps in flight beside the one being committed.")] = 0,
    json_file: JsonFile = None,
) -> None:
    """Serve simulated requests with forks, aborts, swaps and priorities in a pool that is too small, and check the laws of sharing."""
    check_int("requests", requests, 1)
    check_int("depth", depth, 0, 64)
    results = Results(json_file)
    from minipaged.cli.progress import status_line
    from minipaged.lab.measure.soak import soak as run

    with status_line() as progress:
        report = run(
            requests,
            seed=seed,
            depth=depth,
            progress=lambda done: progress(f"{100 * done // requests} % of the requests", done, requests),
        )
    seen = [(name, f"{value:,.1f}" if isinstance(value, float) else f"{value}") for name, value in report.rows()]
    table("Soak: nothing was lost", ("what", "seen"), seen)
    results.add([dict(report.rows())])


@app.command()
def serve(
    url: Annotated[str, typer.Option(help="Any server that speaks OpenAI's completions.")] = "http://localhost:8000",
    model: Annotated[str | None, typer.Option(help="The model to ask for; the server's only one if left out.")] = None,
    requests: Annotated[int, typer.Option(help="How many requests.")] = 100,
    rate: Annotated[
        str, typer.Option(help="Requests a second, with commas between several; inf for all at once.")
    ] = "inf",
    concurrency: Annotated[int, typer.Option(help="Requests at a time; 0 for no limit.")] = 0,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 128,
    max_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 128,
    first_within: Annotated[float, typer.Option(help="Milliseconds to the first token that goodput allows.")] = 200.0,
    gap_within: Annotated[float, typer.Option(help="Milliseconds a further token that goodput allows.")] = 50.0,
    api_key: Annotated[str, typer.Option(help="The server's key.", envvar="MINIPAGED_API_KEY")] = "",
    seed: Annotated[int, typer.Option(help="Seed of prompts and arrivals.")] = 0,
    plot: Annotated[
        Path | None, typer.Option(help="Draw first tokens and gaps over the rates into this SVG file.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Send requests to a server and measure what its clients see: first tokens, gaps between tokens, ends, goodput."""
    import asyncio

    from minipaged.cli.progress import status_line
    from minipaged.lab.measure.serve_load import Load, drive, summary

    rates = [_rate(word) for word in _names(rate)]
    loads = [
        Load(
            url,
            model,
            requests,
            each,
            concurrency,
            prompt_tokens,
            max_tokens,
            api_key,
            seed,
            first_within / 1000,
            gap_within / 1000,
        )
        for each in rates
    ]
    results = Results(json_file, device=f"the server at {url}")
    columns = ("rate", "failed", "tok/s", "req/s", "good/s", "first p50", "p99", "gap p50", "p99", "end p50", "p99")
    rows, shown = [], []
    for load in loads:
        with status_line() as progress:
            row = summary(load, asyncio.run(drive(load, partial(progress, f"{load.rate:g} requests a second"))))
        rows.append(row)
        results.add([row])
        names = ("first_p50_ms", "first_p99_ms", "gap_p50_ms", "gap_p99_ms", "end_p50_ms", "end_p99_ms")
        counts = (f"{load.rate:g}", f"{row['failed']}", f"{row['tokens_per_second']:,.0f}")
        speeds = (f"{row['requests_per_second']:.2f}", f"{row['goodput']:.2f}")
        shown.append((*counts, *speeds, *(f"{row[name]:,.1f}" for name in names)))
    title = f"{url}: {requests} requests of {prompt_tokens} + {max_tokens} tokens; times in ms"
    table(title, columns, shown, words=0, width=WIDTH)
    if plot is not None:
        from minipaged.lab.paper.figure_types import Curve
        from minipaged.lab.report.svg import line_chart

        curves = [
            Curve(label, tuple((row["rate"] or 0.0, row[name]) for row in rows))
            for label, name in (
                *(("first token, median", "first_p50_ms"), ("first token, P99", "first_p99_ms")),
                *(("gap, median", "gap_p50_ms"), ("gap, P99", "gap_p99_ms")),
            )
        ]
        plot.write_text(line_chart(url, curves, "requests a second", "milliseconds", log_y=True), encoding="utf-8")


def _rate(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise InputError(f"--rate must be numbers with commas between them, or inf, not {word!r}") from None


@app.command()
def kernels(
    against: Annotated[
        str, typer.Option(help="Peers to measure too, with commas between them: fa3, flashinfer, sdpa.")
    ] = "sdpa",
    json_file: JsonFile = None,
) -> None:
    """Time every kernel beside the machine's measured ceilings and its peers. Needs a GPU."""
    peers = _names(against)
    for peer in peers:
        check_choice("against", peer, ("fa3", "flashinfer", "sdpa"))
    results = Results(json_file)
    from minipaged.lab.measure.kernels import measure

    rows = []
    for row in measure(peers, results.note):
        results.add([row.as_json()])
        share = "" if row.share is None else f"{100 * row.share:.0f} %"
        value = f"{row.value:,.0f} {row.unit}"
        rows.append((row.kernel, row.shape, row.contender, f"{row.microseconds:.1f}", value, share, _times(row.ratio)))
    columns = ("kernel", "shape", "contender", "us", "", "of ceiling", "minipaged is")
    table("Kernels", columns, rows, words=3, width=WIDTH, notes=_left_out(results))


@app.command()
def engine(
    model: Annotated[str, typer.Option(help="random:SHAPE, or any model.")] = "random:llama-7b",
    workload: Annotated[
        str, typer.Option(help="nano, sharegpt and batch:N, with commas between them.")
    ] = "batch:1,batch:8,batch:32,sharegpt",
    against: Annotated[
        str, typer.Option(help="Peers to measure too, with commas between them: vllm, transformers.")
    ] = "",
    repeats: Annotated[int, typer.Option(help="Timed passes of batch:N after the warm one. The median counts.")] = 3,
    long_repeats: Annotated[int, typer.Option(help="Timed passes of nano and sharegpt after the warm one.")] = 3,
    max_num_seqs: Annotated[int, typer.Option(help="Sequences that every engine may run at once.")] = 256,
    limit: Annotated[float, typer.Option(help="Seconds that each engine may take, with loading.")] = 900.0,
    plain: Annotated[
        bool, typer.Option("--plain", help="Also run minipaged without graphs, fusions and overlap.")
    ] = False,
    device: Annotated[str, typer.Option(help="Device of minipaged and transformers: auto, cpu or cuda.")] = "auto",
    kv_cache_dtype: KVCacheDTypeName = "auto",
    tensor_parallel: Annotated[int, typer.Option(help="GPUs that share the model, of minipaged and vllm.")] = 1,
    pipeline_parallel: Annotated[int, typer.Option(help="Stages of the layers, of minipaged and vllm.")] = 1,
    json_file: JsonFile = None,
) -> None:
    """Measure output tokens per second of whole engines on this device, each in a process of its own."""
    from minipaged.cli.progress import status_line
    from minipaged.lab.measure.engine import OURS, Job, check_contenders, measure

    peers = _names(against)
    check_contenders(peers, model)
    job = Job(
        model,
        _names(workload),
        repeats,
        long_repeats,
        max_num_seqs,
        limit,
        device,
        kv_cache_dtype,
        tensor_parallel,
        pipeline_parallel,
    )
    results = Results(json_file, device="unknown: no engine could be started")
    shown: list[tuple[str, ...]] = []
    title = f"Engine, {model}" + ("" if kv_cache_dtype == "auto" else f", KV in {kv_cache_dtype}")
    contenders = (OURS, *(["minipaged-plain"] if plain else []), *peers)
    with status_line() as progress:
        for outcome, rows in measure(contenders, job, results.note, progress=progress):
            results.device = outcome.device or results.device
            results.add(row.as_json() for row in rows)
            shown += [
                (
                    row.contender, row.workload, f"{row.requests}", f"{row.output_tokens:,}", f"{row.seconds:.2f}",
                    f"{row.tokens_per_second:,.1f}", _times(row.ratio),
                )
                for row in rows
            ]  # fmt: skip
    if not results.rows:
        for note in _left_out(results):
            print(printable(note))
        raise typer.Exit(1)
    columns = ("contender", "workload", "requests", "tokens", "s", "tok/s", "minipaged is")
    table(title, columns, shown, words=2, width=WIDTH, notes=_left_out(results))


@app.command()
def host(
    model: Annotated[str, typer.Option(help="random:SHAPE, or any model.")] = "random:qwen3-0.6b",
    batch: Annotated[int, typer.Option(help="Sequences that decode together.")] = 256,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    json_file: JsonFile = None,
) -> None:
    """Measure what a decode step costs beside the GPU's work: the host gap, each part of the host's time, the trace."""
    check_int("batch", batch, 1, 4096)
    results = Results(json_file)
    from minipaged.lab.measure.contender_minipaged import make_llm
    from minipaged.lab.measure.host import measure

    rows = []
    for row in measure(make_llm(model, max_num_seqs=batch, device=device), batch):
        results.add([{**row._asdict(), "model": model, "batch": batch}])
        goal = "" if row.goal is None else f"< {row.goal:g} {row.unit}"
        rows.append((row.what, f"{row.value:,.1f} {row.unit}", goal))
    table(f"Host, {model}, batch {batch}", ("what", "measured", "goal"), rows, width=WIDTH)


@app.command()
def screen(
    model: Annotated[str, typer.Option(help="Any model; one drawn at random speaks in made-up words.")] = DEFAULT_MODEL,
    requests: Annotated[int, typer.Option(help="Requests at the same time; every fourth asks for four samples.")] = 8,
    max_tokens: Annotated[int, typer.Option(help="Tokens of the longest answer.")] = 96,
    num_blocks: Annotated[
        int, typer.Option(help="Blocks of the pool, 16 tokens each. With few blocks requests are preempted.")
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
    """Measure output tokens per second with the terminal screen on and off, in turn."""
    for name, value in (("requests", requests), ("max-tokens", max_tokens), ("pairs", pairs)):
        check_int(name, value, 1)
    check_int("num-blocks", num_blocks, 2)
    if threads is not None:
        check_int("threads", threads, 1)
    results = Results(json_file)
    from minipaged.tui.bench.measure import Plan, measure

    settings = {"num_blocks": num_blocks, "device": device, "max_num_batched_tokens": 2048}
    folder = "" if pictures is None else str(pictures.resolve())
    outcome = measure(Plan(model, settings, requests, max_tokens, pairs, threads, folder))
    rows = [
        (
            f"{number // 2 + 1}",
            "on" if on else "off",
            f"{figures['tokens']:.0f}",
            f"{figures['steps']:.0f}",
            f"{figures['seconds']:.2f}",
            f"{figures['cpu_seconds']:.2f}",
            f"{figures['tokens_per_second']:,.1f}",
        )
        for number, (on, figures) in enumerate(outcome.rounds)
    ]
    columns = ("round", "screen", "tokens", "steps", "seconds", "engine's CPU s", "tok/s")
    table(f"The screen, {model}", columns, rows, words=2, width=110)
    pairwise = ", ".join(f"{ratio:.1%}" for ratio in outcome.ratios)
    print(f"with the screen: {outcome.ratio:.1%} of the tokens per second without (median; pairs {pairwise})")
    print(
        f"by the engine's own processor time a token: {outcome.processor_ratio:.1%} (less disturbed by other work here)"
    )
    print(f"{outcome.terminal_bytes:,} bytes went to the terminal; {len(outcome.pictures)} pictures")
    results.add({"model": model, "screen": on, **figures} for on, figures in outcome.rounds)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Where the results (*.json) are.")],
    into: Annotated[Path | None, typer.Option(help="A Markdown file whose marked part is replaced.")] = None,
    only: Annotated[
        str, typer.Option(help="Groups, separated by commas: engine, kernels, host, systems, ablation, screen.")
    ] = "",
) -> None:
    """Turn results files into Markdown tables, printed or written into the marked part of a file."""
    from minipaged.lab.report.bench_report import insert
    from minipaged.lab.report.bench_report import report as tables_of

    tables = tables_of(folder, _names(only))
    if into is None:
        typer.echo(printable(tables), nl=False)
        return
    try:
        text = into.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{into}: cannot be read: {error.strerror}") from None
    into.write_text(insert(text, tables), encoding="utf-8")


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


def _left_out(results: Results) -> list[str]:
    return [f"Left out: {note}" for note in results.notes]
