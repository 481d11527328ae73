"""The lab's commands that run on this device: `compare --device`, `ablate`, `beams`, and `plot` for what they wrote."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from minipaged.cli.lab_options import HtmlFile, JsonFile, whole
from minipaged.config import check_choice, check_real
from minipaged.errors import InputError
from minipaged.text.safe import printable


def compare_on_device(
    systems: str,
    trace: str,
    model: str,
    device: str,
    requests: int,
    seed: int,
    block_size: int,
    pools: str,
    limit: float | None,
    peers: str,
    json_file: Path | None,
) -> None:
    """`lab compare --device`: peers first, while the device is empty, then every system in every pool."""
    from minipaged.cli.progress import status_line
    from minipaged.lab.measure.device_run import DeviceResult, requests_for, run_systems
    from minipaged.lab.measure.results import Results
    from minipaged.lab.measure.transformers_peer import PEERS, run_peer
    from minipaged.lab.report.device_report import device_dict, print_device
    from minipaged.lab.simulation.simulate import parse_systems

    names = parse_systems(systems)
    sizes = [None if text.strip() == "all" else whole("slots", text) for text in pools.split(",")]
    beside = [name.strip() for name in peers.split(",") if name.strip()]
    for peer in beside:
        check_choice("beside", peer, PEERS)
    asked = requests_for(trace, model, count=requests, seed=seed)
    kept = Results(json_file)
    found: list[DeviceResult] = []

    def done(result: DeviceResult) -> None:
        found.append(result)
        kept.add([device_dict(result)])

    with status_line() as progress:
        for peer in beside:  # first, while the device is empty: each is a process of its own
            progress(f"transformers {peer}", 0, 1)
            largest = None if None in sizes else max(size for size in sizes if size is not None)
            done(run_peer(peer, model, asked, device=device, pool=largest, seconds=limit))
        run_systems(
            names, asked,
            model=model, device=device, block_size=block_size, pools=sizes, seconds=limit, progress=progress, done=done,
        )  # fmt: skip
    title = f"{trace} on {'this device' if device == 'auto' else device}, {len(asked)} requests, {model}"
    print_device(title, found)


def ablate(
    model: Annotated[str, typer.Option(help="A zoo name or random:SHAPE.")] = "random:smollm2-135m",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    limit: Annotated[float, typer.Option("--seconds", help="Limit of each run of the engine.")] = 8.0,
    json_file: JsonFile = None,
    html: HtmlFile = None,
) -> None:
    """Measure on this device what each technique contributes: attention, layout, heads, block size, preemption, batching, all together."""
    from minipaged.cli.progress import status_line
    from minipaged.lab.measure.ablate import Ablation
    from minipaged.lab.measure.ablate import ablate as measure
    from minipaged.lab.measure.results import Results
    from minipaged.lab.report import device_report

    check_real("seconds", limit, 0.0, open_low=True)

    kept = Results(json_file)

    def done(found: Ablation) -> None:
        kept.rows = device_report.ablation_dicts(found)
        kept.write()

    with status_line() as progress:
        found = measure(model, device=device, seconds=limit, progress=progress, done=done)
    note = device_report.load_note(os.getloadavg()[0], os.cpu_count() or 1, found.device)
    if note:
        kept.note(note)
    device_report.print_ablation(found, note)
    if html is not None:
        device_report.ablation_page(found).write(html)


def beams(
    model: Annotated[str, typer.Option(help="A zoo name.")] = "smollm2-135m",
    widths: Annotated[
        str, typer.Option(help="Beams or samples of each request: numbers with commas between them.")
    ] = "2,4,6",
    requests: Annotated[int, typer.Option(help="How many of the 24 instructions.")] = 24,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    json_file: JsonFile = None,
) -> None:
    """Measure how many blocks a real model's beams and samples share. Fig. 15 shows them beside the simulated ones."""
    from dataclasses import asdict

    from minipaged.cli.progress import status_line
    from minipaged.lab.formats import percent
    from minipaged.lab.measure import beam_run
    from minipaged.lab.measure.results import Results
    from minipaged.lab.report.tables import table

    kept = Results(json_file)
    counts = [whole("widths", text) for text in widths.split(",") if text.strip()]
    with status_line() as progress:
        found = beam_run.measure(
            model=model,
            widths=counts,
            requests=requests,
            device=device,
            progress=progress,
            done=lambda s: kept.add([asdict(s)]),
        )
    rows = [(f"{s.width} {s.kind}", percent(s.saving), f"{s.steps:,}", f"{s.answer_tokens:.1f}") for s in found]
    title = f"{model}: {requests} instructions, blocks of {beam_run.BLOCK}"
    table(title, ("a request", "blocks saved %", "steps", "answer tokens"), rows)


def quality(
    model: Annotated[str, typer.Option(help="A zoo name.")] = "smollm2-135m",
    formats: Annotated[
        str, typer.Option(help="Formats of keys and values, with commas between them; float32 is read in any case.")
    ] = "bfloat16,int8,fp8,fp8-tensor",
    window: Annotated[int, typer.Option(help="Tokens of each piece of the text.")] = 512,
    windows: Annotated[int | None, typer.Option(help="Pieces of the text that are read; all if left out.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    json_file: JsonFile = None,
) -> None:
    """Measure what number formats cost in quality: a text's perplexity and how far predictions move, beside bytes and speed."""
    from dataclasses import asdict

    from minipaged.cli.progress import status_line
    from minipaged.lab.measure import quality as lab
    from minipaged.lab.measure.results import Results
    from minipaged.lab.report.device_report import load_note
    from minipaged.lab.report.tables import table

    names = [name.strip() for name in formats.split(",") if name.strip()]
    kept = Results(json_file)
    with status_line() as progress:
        found = list(lab.measure(model, names, window=window, most_windows=windows, device=device, progress=progress))
    kept.add(asdict(row) for row in found)
    note = load_note(os.getloadavg()[0], os.cpu_count() or 1, found[0].device)
    if note:
        kept.note(note)
    rows = [
        (
            row.format,
            f"{row.perplexity:.3f}",
            f"{row.ratio:.4f}",
            f"{row.kl:.1e}",
            f"{row.same:.3f}",
            f"{row.kv_bytes_per_token:,}",
            f"{row.tokens_per_second:,.0f}",
        )
        for row in found
    ]
    title = f"{model}: {found[0].tokens:,} tokens in windows of {window}"
    columns = ("format", "perplexity", "x float32", "KL", "same first", "bytes a token", "tok/s")
    table(title, columns, rows)
    if note:
        typer.echo(note)


def retention(
    model: Annotated[str, typer.Option(help="A zoo name.")] = "smollm2-135m",
    budget: Annotated[
        int, typer.Option(help="Tokens that a window, sinks with a window, and heavy hitters keep.")
    ] = 192,
    tokens: Annotated[int, typer.Option(help="Tokens of the text that are read.")] = 700,
    stream: Annotated[int, typer.Option(help="Then draw so many tokens behind sinks; 0: none.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    json_file: JsonFile = None,
) -> None:
    """Measure what forgetting costs and saves: a text's perplexity and the blocks held, and a long stream's memory and time."""
    from dataclasses import asdict

    from minipaged.cli.progress import status_line
    from minipaged.lab.measure import retention as lab
    from minipaged.lab.measure.results import Results
    from minipaged.lab.report.tables import table

    names, kept = lab.policies(budget), Results(json_file)
    found, marks = [], []
    with status_line() as progress:
        for row in lab.measure(model, names, tokens=tokens, device=device, progress=progress):
            found.append(row)
            kept.add([asdict(row)])
        if stream:
            for mark in lab.stream(model, names[2], tokens=stream, device=device, progress=progress):
                marks.append(mark)
                kept.add([asdict(mark)])
    rows = [
        (
            row.retention,
            f"{row.perplexity:.3f}",
            f"{row.most_blocks} of {row.all_blocks}",
            f"{row.kv_bytes / 2**20:.2f}",
        )
        for row in found
    ]
    title = f"{model}: {tokens} tokens of text, blocks of {lab.BLOCK}, chunks of {lab.CHUNK}"
    table(title, ("what stays", "perplexity", "most blocks", "MiB"), rows)
    if marks:
        steps = [(f"{mark.tokens:,}", f"{mark.step_ms:.2f}", str(mark.blocks)) for mark in marks]
        table(f"{model}: a stream with {names[2]}", ("tokens drawn", "ms a step", "blocks held"), steps)


def plot(
    results: Annotated[Path, typer.Argument(help="A file that `compare --device` or `ablate` wrote with --json.")],
    out: Annotated[Path, typer.Argument(help="The .svg file to write.")],
) -> None:
    """Draw a results file as an SVG plot."""
    from minipaged.lab.measure.results import read_results
    from minipaged.lab.report.device_report import plot_of

    text = plot_of(read_results(results))
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror}") from None
    typer.echo(printable(f"wrote {out}"))
