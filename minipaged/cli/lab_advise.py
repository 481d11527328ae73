"""The lab's calculators: `plan` (what fits, how fast, what it costs) and `advise` (which technique helps a use)."""

from __future__ import annotations

from typing import Annotated

import typer

from minipaged.cli.lab_options import (
    BlockSize,
    GPUName,
    JsonFile,
    ModelName,
    TensorParallel,
)
from minipaged.config import check_real
from minipaged.errors import InputError


def plan(
    model: ModelName = "llama-13b",
    gpu: GPUName = "a100-40",
    tp: TensorParallel = 1,
    pp: Annotated[int, typer.Option("--pp", help="Pipeline stages.")] = 1,
    dtype: Annotated[
        str, typer.Option(help="Precision of activations and weights: bfloat16, float16, float32.")
    ] = "bfloat16",
    kv_dtype: Annotated[
        str, typer.Option(help="Precision of the cache: bfloat16, float16, float32, int8, float8_e4m3fn.")
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
    """Calculate KV bytes a token, weights, pool, sequences that fit, bounds on speed, and the GPUs and cost for a load."""
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
    prompt: Annotated[int | None, typer.Option(help="Mean prompt tokens; those of the use if left out.")] = None,
    output: Annotated[int | None, typer.Option(help="Mean answer tokens; those of the use if left out.")] = None,
    users: Annotated[
        int | None, typer.Option(help="Requests that run at the same time; asked for if left out.")
    ] = None,
    shared: Annotated[int | None, typer.Option(help="Leading prompt tokens that requests share.")] = None,
    samples: Annotated[int, typer.Option(help="Samples or beams a request.")] = 1,
    latency_ms: Annotated[float | None, typer.Option(help="Goal between two tokens, milliseconds.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Say which techniques help a given use and which do not, each with its figure. Asks for what is left out."""
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
