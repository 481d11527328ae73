"""The lab's commands that simulate: `gpus`, `simulate`, `compare` (which runs for real with --device) and `shadow`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from minipaged.cli import complete
from minipaged.cli.lab_measured import compare_on_device
from minipaged.cli.lab_options import (
    BlockSize,
    GPUName,
    HtmlFile,
    JsonFile,
    ModelName,
    Rate,
    Requests,
    Seed,
    Slots,
    Systems,
    TensorParallel,
    Traffic,
    not_negative,
    number,
    whole,
)
from minipaged.errors import InputError


def gpus() -> None:
    """List the GPUs that can be simulated, with their published figures."""
    from minipaged.lab.report.tables import table
    from minipaged.lab.simulation.hardware import GIB, GPUS

    rows = [
        (
            gpu.name,
            f"{gpu.memory_bytes / GIB:.0f}",
            *(f"{rate / 1e9:,.0f}" for rate in (gpu.bandwidth_bytes, gpu.link_bytes, gpu.host_bytes)),
            f"{gpu.peak_flops / 1e12:,.4g}",
        )
        for gpu in GPUS.values()
    ]
    table("GPUs", ("name", "memory GiB", "GB/s", "link GB/s", "host GB/s", "16-bit TFLOP/s"), rows)


def simulate(
    system: Systems = "paged",
    model: ModelName = "llama-13b",
    gpu: GPUName = "a100-40",
    tp: TensorParallel = 1,
    trace: Traffic = "sharegpt",
    rate: Rate = 2.0,
    requests: Requests = 2000,
    seed: Seed = 0,
    block_size: BlockSize = 16,
    slots: Slots = None,
    efficiency: Annotated[
        float | None, typer.Option(help="Share of the data sheet's rates; fitted for A100, else 1.")
    ] = None,
    overhead_ms: Annotated[float, typer.Option(help="The host's part of each step, milliseconds.")] = 0.0,
    json_file: JsonFile = None,
) -> None:
    """Simulate one or more systems on a workload, on a virtual clock. Prints throughput, batch, latency and waste."""
    from minipaged.cli.progress import status_line
    from minipaged.lab.report.simulation_report import print_results, result_dict
    from minipaged.lab.report.tables import write_json
    from minipaged.lab.simulation.servers import make_server
    from minipaged.lab.simulation.simulate import parse_systems
    from minipaged.lab.simulation.simulate import simulate as run
    from minipaged.lab.simulation.trace_files import load_workload

    names = parse_systems(system)
    server = make_server(
        model,
        gpu,
        tp=tp,
        slots=slots,
        efficiency=efficiency,
        overhead_seconds=not_negative("overhead-ms", overhead_ms) / 1e3,
    )
    load = load_workload(trace, rate=rate, count=requests, seed=seed)
    with status_line() as progress:
        results = [run(n, load, server, block_size=block_size, progress=partial(progress, n)) for n in names]
    print_results(results)
    if json_file is not None:
        write_json(json_file, [result_dict(r) for r in results])


def compare(
    systems: Systems = "all",
    trace: Traffic = "sharegpt",
    model: Annotated[
        str | None,
        typer.Option(
            help="A known shape, or the path of a config.json [llama-13b]. With --device: any model [random:smollm2-135m].",
            autocompletion=complete.shapes,
        ),
    ] = None,
    gpu: GPUName = "a100-40",
    tp: TensorParallel = 1,
    rate: Rate = 2.0,
    rates: Annotated[str, typer.Option(help="Further rates, with commas between them, for latency against rate.")] = "",
    requests: Requests = 2000,
    seed: Seed = 0,
    block_size: BlockSize = 16,
    slots: Annotated[
        str,
        typer.Option(
            help="KV slots of the pool, or `all` that the GPU holds. With --device, several with commas between them."
        ),
    ] = "all",
    device: Annotated[
        str | None, typer.Option(help="Run for real on this device (auto, cpu, cuda) instead of simulating.")
    ] = None,
    limit: Annotated[
        float | None, typer.Option("--seconds", help="With --device: stop a system that runs longer than this.")
    ] = None,
    beside: Annotated[
        str,
        typer.Option(
            help="With --device: run transformers beside them in the largest pool: generate, continuous, or both with a comma."
        ),
    ] = "",
    json_file: JsonFile = None,
    html: HtmlFile = None,
) -> None:
    """Compare systems on the same traffic. Prints tables; can write JSON and one self-contained HTML page with plots.

    With --device the systems run for real, and all requests wait from the start. --model is then any that runs, such as
    random:SHAPE, and the pool is what the device holds unless --slots says less. --trace sharegpt, nano or bN is the
    fixed requests of `minipaged bench engine`. --gpu, --tp and --rate belong to the simulation and are not used.
    """
    if device is not None:
        if html is not None or rates:
            raise InputError("--rates and --html are for simulations: leave them out with --device")
        chosen = model or "random:smollm2-135m"
        compare_on_device(systems, trace, chosen, device, requests, seed, block_size, slots, limit, beside, json_file)
        return
    if limit is not None or beside:
        raise InputError("--seconds and --beside need --device")
    from minipaged.cli.progress import status_line
    from minipaged.lab.report import simulation_report
    from minipaged.lab.report.tables import table, write_json
    from minipaged.lab.simulation import compare as comparing
    from minipaged.lab.simulation.servers import make_server
    from minipaged.lab.simulation.simulate import parse_systems

    pool = None if slots == "all" else whole("slots", slots)
    names, server = parse_systems(systems), make_server(model or "llama-13b", gpu, tp=tp, slots=pool)
    others = [number("rates", text) for text in rates.split(",") if text.strip()]
    with status_line() as progress:
        found = comparing.compare(
            names, trace, server,
            rate=rate, count=requests, seed=seed, block_size=block_size, rates=others, progress=progress,
        )  # fmt: skip
    simulation_report.print_results(found.results)
    if found.sweep:
        curves = simulation_report.latency_curves(found)
        columns = ("latency a token", *(f"{x:g}/s" for x, _ in curves[0].points))
        table("seconds a token against rate", columns, [(c.name, *(f"{y:.3g}" for _, y in c.points)) for c in curves])
    if json_file is not None:
        write_json(json_file, simulation_report.comparison_dict(found))
    if html is not None:
        simulation_report.comparison_page(found).write(html)


def shadow(
    trace: Annotated[Path, typer.Argument(help="A recorded trace.")],
    systems: Annotated[str, typer.Option(help="Names with commas between them, or all that reserve ahead.")] = "all",
    max_len: Annotated[int, typer.Option(help="The context: what a system that reserves the limit takes.")] = 2048,
    out: Annotated[
        Path | None, typer.Option(help="Write the trace again with the shadows in it, for the screen.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Count what other systems would have held on the traffic of a recorded trace. This is memory, not speed."""
    from minipaged.baselines import shadows
    from minipaged.lab.formats import percent
    from minipaged.lab.report.simulation_report import WASTE_COLUMNS
    from minipaged.lab.report.tables import table, write_json

    names = shadows.DEFAULT_SYSTEMS if systems == "all" else tuple(n.strip() for n in systems.split(",") if n.strip())
    deltas = shadows.read_deltas(trace)
    found = shadows.summarise(deltas, names, max_len=max_len)
    notes = ["Means over the steps of the trace. Rows grow as the engine's did: accounting, not speed."]
    if any(s.refused for s in found):
        notes.append(
            f"Where requests never fit, the trace's pool holds no reservation of {max_len} tokens: try a smaller --max-len."
        )
    rows = [(s.system, f"{s.running:.2f}", f"{s.waiting:.2f}", f"{s.refused:,}") for s in found]
    table(f"{trace.name}: {len(deltas):,} steps", ("system", "would run", "would wait", "never fit"), rows, notes=notes)
    shares = [(s.system, *(percent(b) for b in s.shares.values())) for s in found]
    table("percent of the pool", WASTE_COLUMNS, shares)
    if out is not None:
        shadows.write_with_shadows(trace, out, names, max_len=max_len)
    if json_file is not None:
        write_json(json_file, found)


def offload(
    model: ModelName = "opt-30b",
    gpu: GPUName = "t4",
    prompt: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 512,
    output: Annotated[int, typer.Option(help="Tokens of each answer.")] = 32,
    batches: Annotated[str, typer.Option(help="Batch sizes, with commas between them.")] = "1,2,4,8,16,32,64,144",
    link: Annotated[float | None, typer.Option(help="GB/s of the host link; the data sheet's if left out.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Weights that do not fit: throughput against batch size where they stream from host memory, and FlexGen's published figures beside
    what the same sums give. All simulated."""
    from minipaged.lab.advise.calculators import find_model
    from minipaged.lab.report.tables import table, write_json
    from minipaged.lab.simulation import offload as simulated
    from minipaged.lab.simulation.hardware import find_gpu

    sizes = simulated.parse_batches(batches)
    config, card = find_model(model), find_gpu(gpu)
    found = simulated.against_batch(config, card, sizes, prompt, output, None if link is None else link * 1e9)
    rows = [
        (str(size), f"{t.tokens_per_second:,.3g}", f"{t.step_seconds:,.3g}", f"{t.streamed_bytes / 1e9:,.1f}", t.limit)
        if t is not None
        else (str(size), "-", "-", "-", "keys and values leave no room")
        for size, t in zip(sizes, found, strict=True)
    ]
    columns = ("batch", "tok/s", "s a step", "GB streamed", "what takes longest")
    table(f"{config.name} on {card.name}, {prompt} + {output} tokens, 16 bits", columns, rows, words=0)
    published = simulated.against_published()
    table(
        "FlexGen's table (a T4, 512 + 32 tokens)",
        ("system", "model", "batch", "published tok/s", "simulated", "times", "what takes longest"),
        [
            (
                *(row.system, row.model, str(row.batch), f"{row.tokens_per_second:,.2f}"),
                *(f"{t.tokens_per_second:,.3g}", f"{t.tokens_per_second / row.tokens_per_second:.2f}", t.limit),
            )
            for row, t in published
        ],
        words=2,
        notes=(
            "Rates are the T4's data sheet (16 GB/s to the host), and assumed: 2 GB/s from disk, 1 GB/s to it, "
            "50 GB/s of host memory; everything overlaps, nothing is fitted. So most rows come out faster than measured; OPT-175B "
            "under FlexGen comes out slower: the real disk was faster than assumed, or part of it lay in memory.",
            "Placements: FlexGen's own for these rows; for the others the lowest tier that its table names holds all weights. "
            "Published figures of 0.01 have one digit.",
        ),
    )
    if json_file is not None:
        write_json(json_file, {"batches": found, "published": published})
