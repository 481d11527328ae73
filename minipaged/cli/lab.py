"""`minipaged lab ...`: the commands of the lab. Each is a few lines: read the flags, compute, print a table.

Knows flags; knows nothing of how anything is computed. The imports of a command are inside it, so that help is instant.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from minipaged.cli.lab_measured import ablate, beams, compare_on_device, plot
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
from minipaged.config import check_real
from minipaged.errors import InputError

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def lab() -> None:
    """The systems lab: what PagedAttention is compared with, simulated and calculated."""


@app.command()
def gpus() -> None:
    """The GPUs that can be simulated, with their published figures."""
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


@app.command()
def simulate(
    system: Systems = "vllm",
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
    """Run one or more systems over a workload on a virtual clock: throughput, batch, latency and waste."""
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


@app.command()
def plan(
    model: ModelName = "llama-13b",
    gpu: GPUName = "a100-40",
    tp: TensorParallel = 1,
    pp: Annotated[int, typer.Option("--pp", help="Pipeline stages.")] = 1,
    dtype: Annotated[str, typer.Option(help="Of activations and weights: bfloat16, float16, float32.")] = "bfloat16",
    kv_dtype: Annotated[
        str, typer.Option(help="Of the cache: bfloat16, float16, float32, int8, float8_e4m3fn.")
    ] = "bfloat16",
    weight_bits: Annotated[float, typer.Option(help="Bits a weight: 16, or 4.5 for 4-bit blocks with scales.")] = 16.0,
    prompt: Annotated[int, typer.Option(help="Mean prompt tokens.")] = 161,
    output: Annotated[int, typer.Option(help="Mean answer tokens.")] = 338,
    rate: Annotated[float | None, typer.Option(help="Requests a second to be served.")] = None,
    price: Annotated[float | None, typer.Option(help="Dollars an hour for one GPU.")] = None,
    block_size: BlockSize = 16,
    max_num_seqs: Annotated[int | None, typer.Option(help="Most sequences that run side by side.")] = None,
    latency_ms: Annotated[
        float | None, typer.Option(help="Goal between two tokens, milliseconds: limits the batch.")
    ] = None,
    efficiency: Annotated[float, typer.Option(help="Share of the data sheet's rates that is reached.")] = 1.0,
    json_file: JsonFile = None,
) -> None:
    """Calculator: KV bytes a token, weights, pool, sequences that fit, bounds on speed, GPUs and cost for a load."""
    from minipaged.lab.advise import calculators
    from minipaged.lab.report.simulation_report import print_plan
    from minipaged.lab.report.tables import write_json
    from minipaged.lab.simulation.hardware import find_gpu

    deployment = calculators.Deployment(
        calculators.find_model(model), find_gpu(gpu), tp, pp, dtype, kv_dtype, weight_bits, efficiency=efficiency
    )
    if price is not None and rate is None:
        raise InputError("--price needs --rate: a cost is for a load")
    if max_num_seqs is not None and max_num_seqs < 1:
        raise InputError(f"max-num-seqs must be at least 1, not {max_num_seqs}")
    load = calculators.Load(prompt, output, rate)
    if latency_ms is not None:
        check_real("latency-ms", latency_ms, 0.0, open_low=True)
        within = calculators.rows_within(deployment, load, latency_ms / 1e3)
        max_num_seqs = within if max_num_seqs is None else min(within, max_num_seqs)
    fits = calculators.capacity(deployment, load, block_size=block_size, max_rows=max_num_seqs)
    fleet = None if rate is None else calculators.fleet(deployment, load, fits, price=price)
    print_plan(deployment, load, fits, fleet)
    if json_file is not None:
        write_json(
            json_file,
            {"capacity": fits, "fleet": fleet, "kv_bytes": deployment.kv_bytes, "weights": deployment.weights},
        )


@app.command()
def compare(
    systems: Systems = "all",
    trace: Traffic = "sharegpt",
    model: ModelName = "llama-13b",
    gpu: GPUName = "a100-40",
    tp: TensorParallel = 1,
    rate: Rate = 2.0,
    rates: Annotated[str, typer.Option(help="Further rates, with commas between them, for latency against rate.")] = "",
    requests: Requests = 2000,
    seed: Seed = 0,
    block_size: BlockSize = 16,
    slots: Annotated[
        str, typer.Option(help="KV slots of the pool; `all`: what the GPU holds. With --device, several with commas.")
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
            help="With --device: generate, continuous: transformers' own batching beside them, in the largest pool."
        ),
    ] = "",
    json_file: JsonFile = None,
    html: HtmlFile = None,
) -> None:
    """Systems side by side on the same traffic: tables, JSON, and one self-contained HTML page with plots.

    With --device they run for real, all requests waiting from the start: the model is a zoo name or random:SHAPE,
    the pool what the device holds unless --slots says less. --trace sharegpt is then the fixed draw of `minipaged
    bench engine`, as are `nano` and `bN`.
    """
    if device is not None:
        if html is not None or rates:
            raise InputError("--rates and --html are for simulations: leave them out with --device")
        compare_on_device(systems, trace, model, device, requests, seed, block_size, slots, limit, beside, json_file)
        return
    if limit is not None or beside:
        raise InputError("--seconds and --beside need --device")
    from minipaged.cli.progress import status_line
    from minipaged.lab.report.simulation_report import print_results
    from minipaged.lab.report.tables import table, write_json
    from minipaged.lab.simulation import compare as comparing
    from minipaged.lab.simulation.servers import make_server
    from minipaged.lab.simulation.simulate import parse_systems

    pool = None if slots == "all" else whole("slots", slots)
    names, server = parse_systems(systems), make_server(model, gpu, tp=tp, slots=pool)
    others = [number("rates", text) for text in rates.split(",") if text.strip()]
    with status_line() as progress:
        found = comparing.compare(
            names, trace, server,
            rate=rate, count=requests, seed=seed, block_size=block_size, rates=others, progress=progress,
        )  # fmt: skip
    print_results(found.results)
    if found.sweep:
        curves = comparing.latency_curves(found)
        columns = ("latency a token", *(f"{x:g}/s" for x, _ in curves[0].points))
        table("seconds a token against rate", columns, [(c.name, *(f"{y:.3g}" for _, y in c.points)) for c in curves])
    if json_file is not None:
        write_json(json_file, comparing.comparison_dict(found))
    if html is not None:
        comparing.comparison_page(found).write(html)


for measured in (ablate, beams, plot):
    app.command()(measured)


@app.command()
def figures(
    only: Annotated[str, typer.Option(help="Figure numbers with commas between them, or all.")] = "all",
    json_file: JsonFile = None,
    html: HtmlFile = None,
) -> None:
    """The PagedAttention paper's figures, simulated, each number beside the published one. All of them take minutes."""
    from minipaged.cli.progress import status_line
    from minipaged.lab.paper.figures import FIGURES, parse_figures
    from minipaged.lab.report.simulation_report import FIGURE_COLUMNS, figure_page, figure_rows
    from minipaged.lab.report.tables import table, write_json

    names = parse_figures(only)
    with status_line() as progress:
        found = [FIGURES[name](progress) for name in names]
    for figure in found:
        table(
            f"Fig. {figure.name}: {figure.title}", FIGURE_COLUMNS, figure_rows(figure), notes=(" ".join(figure.notes),)
        )
    if json_file is not None:
        write_json(json_file, found)
    if html is not None:
        figure_page(found).write(html)


@app.command()
def shadow(
    trace: Annotated[Path, typer.Argument(help="A recorded trace.")],
    systems: Annotated[str, typer.Option(help="Names with commas between them, or all that reserve ahead.")] = "all",
    max_len: Annotated[int, typer.Option(help="The context: what a system that reserves the limit takes.")] = 2048,
    out: Annotated[
        Path | None, typer.Option(help="Write the trace again with the shadows in it, for the screen.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """What other systems would have held on a recorded trace's traffic: accounting, not speed."""
    from minipaged.baselines import shadows
    from minipaged.baselines.shadow_files import read_deltas, write_with_shadows
    from minipaged.lab.report.simulation_report import WASTE_COLUMNS
    from minipaged.lab.report.tables import percent, table, write_json

    names = shadows.DEFAULT_SYSTEMS if systems == "all" else tuple(n.strip() for n in systems.split(",") if n.strip())
    deltas = read_deltas(trace)
    found = shadows.summarise(deltas, names, max_len=max_len)
    notes = ["Means over the steps of the trace. Rows grow as the engine's did: accounting, not speed."]
    if any(s.refused for s in found):
        notes.append(
            f"Where requests never fit, the trace's pool holds no reservation of {max_len} tokens: try a smaller --max-len."
        )
    rows = [(s.system, f"{s.running:.2f}", f"{s.waiting:.2f}", f"{s.refused:,}") for s in found]
    table(f"{trace.name}: {len(deltas):,} steps", ("system", "would run", "would wait", "never fit"), rows, notes=notes)
    shares = [(s.system, *(percent(b) for b in s.bands.values())) for s in found]
    table("percent of the pool", WASTE_COLUMNS, shares)
    if out is not None:
        write_with_shadows(trace, out, names, max_len=max_len)
    if json_file is not None:
        write_json(json_file, found)


@app.command()
def claims(json_file: JsonFile = None) -> None:
    """Claims that circulate about paged attention, each recomputed."""
    from minipaged.cli.progress import status_line
    from minipaged.lab.paper.claims import all_claims
    from minipaged.lab.report.tables import table, write_json

    with status_line() as progress:
        found = all_claims(progress)
    table("Claims", ("claim", "verdict", "why"), [(c.claim, c.verdict, c.evidence) for c in found], words=2, lines=True)
    if json_file is not None:
        write_json(json_file, found)


@app.command()
def advise(
    model: ModelName = "llama-13b",
    gpu: GPUName = "a100-40",
    tp: Annotated[
        int | None, typer.Option("--tp", help="GPUs that share every layer; the fewest that hold it if left out.")
    ] = None,
    use: Annotated[
        str | None,
        typer.Option(help="chat, instructions, long-chat, translation, documents, code or agents: gives the lengths."),
    ] = None,
    prompt: Annotated[int | None, typer.Option(help="Mean prompt tokens, if not the use's.")] = None,
    output: Annotated[int | None, typer.Option(help="Mean answer tokens, if not the use's.")] = None,
    users: Annotated[int | None, typer.Option(help="Requests at any time; asked for if left out.")] = None,
    shared: Annotated[int | None, typer.Option(help="Leading prompt tokens that requests share.")] = None,
    samples: Annotated[int, typer.Option(help="Samples or beams a request.")] = 1,
    latency_ms: Annotated[float | None, typer.Option(help="Goal between two tokens, milliseconds.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Which techniques help a given use and which do not, each with the figure that says so. Asks for what is left out."""
    from minipaged.lab.advise import advice
    from minipaged.lab.advise.calculators import find_model, smallest_tp
    from minipaged.lab.report.tables import table, write_json
    from minipaged.lab.simulation.hardware import find_gpu

    shape, device = find_model(model), find_gpu(gpu)
    notes = ["Computed from rooflines and simulation for this very use: what is said to help gains at least 5 %."]
    if use is None and (prompt is None or output is None):
        use = typer.prompt(f"What is it for ({', '.join(advice.PRESETS)})", default="chat")
    known = advice.preset(use) if use is not None else None
    if known is not None:
        notes.append(f"{use}: {known.prompt} tokens in, {known.output} out; {known.source}.")
    if users is None:
        users = typer.prompt("Requests at any time", type=int, default=32)
    ranks = tp if tp is not None else smallest_tp(shape, gpu)
    what = advice.Use(
        shape,
        device,
        ranks,
        prompt if prompt is not None else known.prompt if known is not None else 0,
        output if output is not None else known.output if known is not None else 0,
        users,
        shared if shared is not None else known.shared if known is not None and prompt is None else 0,
        samples,
        None if latency_ms is None else latency_ms / 1e3,
    )
    found = advice.advise(what)
    title = f"{shape.name} on {ranks} x {device.name}: {what.prompt} tokens in, {what.output} out, {users} at a time"
    rows = [(a.technique, a.verdict, a.why) for a in found]
    table(title, ("technique", "verdict", "why"), rows, words=2, notes=notes)
    if json_file is not None:
        write_json(json_file, found)
