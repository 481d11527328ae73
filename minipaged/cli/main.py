"""The command line. Each command is a few lines over the Python API; torch and textual are imported by the commands that need them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from minipaged import __version__
from minipaged.cli import complete
from minipaged.cli.bench import app as bench_app
from minipaged.cli.lab import app as lab_app
from minipaged.cli.learn import app as learn_app
from minipaged.cli.options import (
    MinP,
    Model,
    RepetitionPenalty,
    Seed,
    System,
    Temperature,
    TopK,
    TopP,
    with_engine_options,
)
from minipaged.cli.terminal import read_stdin
from minipaged.config import DEFAULT_MODEL, SamplingParams
from minipaged.errors import InputError
from minipaged.text.safe import printable

app = typer.Typer(
    name="minipaged",
    help="A PagedAttention engine that one can see through. Without a command it opens the screen on the default model.",
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(lab_app, name="lab", help="Compare memory systems, simulated or measured here; calculate; draw figures.")
app.add_typer(learn_app, name="learn", help="Rebuild PagedAttention yourself, in lessons that are checked.")
app.add_typer(bench_app, name="bench", help="Measure what kernels, engines and the host cost on this machine.")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"minipaged {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def home(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Without a command: open the screen on the default model, or print plain lines where there is no terminal."""
    if context.invoked_subcommand is None:
        from minipaged.cli.show import show

        raise typer.Exit(show(DEFAULT_MODEL))


@app.command()
@with_engine_options
def generate(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT...", help="One or more prompts; - reads standard input.")
    ] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="A file with a prompt a line, after those given.")] = None,
    model: Model = DEFAULT_MODEL,
    system: System = None,
    n: Annotated[int, typer.Option(help="Samples of each prompt; they share its blocks.")] = 1,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of each answer.")] = 128,
    stop: Annotated[list[str] | None, typer.Option(help="End an answer before this text; may be repeated.")] = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = None,
    beam_width: Annotated[int | None, typer.Option(help="Beam search of this width.")] = None,
    logprobs: Annotated[
        int | None, typer.Option(help="With --json: log-probabilities of each token and of so many likeliest ones.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Leave the prompt as it is: no chat template.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document instead of text.")] = False,
    *,
    settings: dict[str, Any],
) -> None:
    """Generate text for one or more prompts at once, through paged memory."""
    from minipaged.cli.generate import generate as run

    params = SamplingParams(
        n=n,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=tuple(stop or ()),
        beam_width=beam_width,
        logprobs=logprobs,
    )
    texts = [read_stdin() if prompt == "-" else prompt for prompt in prompts or ()]
    if prompts_file is not None:
        from minipaged.cli.show import read_prompts

        texts += [text for text, _ in read_prompts(prompts_file)]
    if not texts:
        raise InputError("there is no prompt: give PROMPT, - to read standard input, or --prompts-file FILE")
    raise typer.Exit(run(model, texts, params, settings, system=system, raw=raw, as_json=as_json))


@app.command()
@with_engine_options
def chat(
    model: Model = DEFAULT_MODEL,
    system: System = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of each answer.")] = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    *,
    settings: dict[str, Any],
) -> None:
    """Talk with the model. What was said before is found in the prefix cache and not computed again."""
    from minipaged.cli.chat import chat as run

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    raise typer.Exit(run(model, params, settings, system))


@app.command()
@with_engine_options
def serve(
    model: Annotated[
        str,
        typer.Argument(
            help="A name (smollm2-135m, toy), a Hugging Face folder, a .gguf file, hf:org/name or random:SHAPE.",
            autocompletion=complete.models,
        ),
    ] = DEFAULT_MODEL,
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port to listen on.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="A key that clients must send; may be repeated. MINIPAGED_API_KEY is one too."),
    ] = None,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="What clients call the model; may be repeated.")
    ] = None,
    max_waiting: Annotated[int, typer.Option(help="Requests that may wait; further ones get 429.")] = 1024,
    drain: Annotated[float, typer.Option(help="Seconds that requests have to end after ctrl+c or SIGTERM.")] = 10.0,
    metrics_prefix: Annotated[str, typer.Option(help="Before the names in /metrics: minipaged or vllm.")] = "minipaged",
    tui: Annotated[bool, typer.Option("--tui", help="Show the screen; the server's words go to a file.")] = False,
    show_prompts: Annotated[
        bool, typer.Option("--show-prompts", help="Show texts to attached screens; else they see their lengths alone.")
    ] = False,
    allow_control: Annotated[
        bool,
        typer.Option("--allow-control", help="Let attached screens pause the engine, abort requests, change settings."),
    ] = False,
    max_num_seqs: Annotated[int, typer.Option(help="Sequences that run side by side.")] = 256,
    max_num_batched_tokens: Annotated[int, typer.Option(help="Tokens a step computes at most.")] = 2048,
    max_model_len: Annotated[
        int | None, typer.Option(help="Tokens of prompt and answer; the model's if left out.")
    ] = None,
    *,
    settings: dict[str, Any],
) -> None:
    """Serve the model over HTTP, as OpenAI's API has it."""
    if tui:
        from minipaged.cli.serve import serve_with_screen

        raise typer.Exit(serve_with_screen(host, port, next(iter(api_key or ()), "")))
    from minipaged.cli.serve import serve as run

    settings |= {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": max_num_batched_tokens}
    settings["max_model_len"] = max_model_len
    raise typer.Exit(
        run(
            model,
            settings,
            host=host,
            port=port,
            keys=api_key or (),
            names=served_model_name or (),
            max_waiting=max_waiting,
            drain=drain,
            metrics_prefix=metrics_prefix,
            show_prompts=show_prompts,
            allow_control=allow_control,
        )
    )


@app.command()
def pull(
    model: Annotated[str, typer.Argument(help="The model's name.", autocompletion=complete.downloads)] = DEFAULT_MODEL,
) -> None:
    """Download a model into the cache."""
    from minipaged.cli.progress import status_line
    from minipaged.model.loading.pull import pull as download

    with status_line() as progress:
        path = download(model, progress)
    typer.echo(printable(f"{model}: {path}"))


@app.command()
@with_engine_options
def warm(
    model: Annotated[str, typer.Argument(help="As --model elsewhere.", autocompletion=complete.models)] = DEFAULT_MODEL,
    max_num_seqs: Annotated[int, typer.Option(help="Sequences that the engine may run at once.")] = 256,
    max_num_batched_tokens: Annotated[int, typer.Option(help="Tokens of a step at most.")] = 2048,
    max_model_len: Annotated[
        int | None, typer.Option(help="Tokens of a sequence at most; the model's if left out.")
    ] = None,
    *,
    settings: dict[str, Any],
) -> None:
    """Compile all kernels that a model needs on this GPU, so that its next start finds them."""
    from minipaged.cli.warm import warm as run

    limits = {
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "max_model_len": max_model_len,
    }
    raise typer.Exit(run(model, settings | limits))


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="A name, a Hugging Face folder, a .gguf file or hf:org/name.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    form: Annotated[str, typer.Option("--format", help="awq or gptq.")] = "awq",
    group: Annotated[int, typer.Option(help="Weights that share a scale: 32, 64 or 128.")] = 128,
) -> None:
    """Round a model's matrices to four bits and write them as AWQ or GPTQ folders hold them."""
    from minipaged.cli.progress import status_line
    from minipaged.model.loading.quantize import quantize as run

    with status_line() as progress:
        path = run(model, out, form, group, progress)
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    typer.echo(f"{path}: {size / 2**20:,.0f} MiB, {form} in groups of {group}")


@app.command()
def doctor() -> None:
    """Show what this machine has, and for each thing that is missing the command that installs it."""
    from minipaged.cli.doctor import report

    raise typer.Exit(report())


@app.command()
@with_engine_options
def tui(
    model: Model = DEFAULT_MODEL,
    prompts: Annotated[Path | None, typer.Option(help="A file with a prompt a line.")] = None,
    record: Annotated[Path | None, typer.Option(help="Write the trace to this file.")] = None,
    replay: Annotated[Path | None, typer.Option(help="Show a recorded trace instead of running a model.")] = None,
    headless: Annotated[
        bool, typer.Option("--headless", help="Run without a terminal, take the screenshot, end.")
    ] = False,
    steps: Annotated[int | None, typer.Option(help="Stop after so many steps.")] = None,
    screenshot: Annotated[Path | None, typer.Option(help="Write the screen as SVG to this file at the end.")] = None,
    size: Annotated[str | None, typer.Option(help="Size without a terminal, columns x rows, such as 120x40.")] = None,
    ascii_only: Annotated[bool, typer.Option("--ascii", help="Draw with ASCII characters only.")] = False,
    light: Annotated[bool, typer.Option("--light", help="Colours for a light background.")] = False,
    scenario: Annotated[
        str | None,
        typer.Option(
            help="A recorded scene: cow, prefix, beam, preempt, swap, evict, offload or orca.",
            autocompletion=complete.scenarios,
        ),
    ] = None,
    attach: Annotated[
        str | None, typer.Option(help="Look on at the server at this address, such as http://localhost:8000.")
    ] = None,
    api_key: Annotated[
        str, typer.Option(help="The server's key, with --attach.", envvar="MINIPAGED_API_KEY", show_envvar=False)
    ] = "",
    web: Annotated[
        bool, typer.Option("--web", help="Show the screen in a browser on this machine (extra `web`).")
    ] = False,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens of each answer.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the most likely token.")] = None,
    no_tour: Annotated[bool, typer.Option("--no-tour", help="Let the first run go on without its stops.")] = False,
    *,
    settings: dict[str, Any],
) -> None:
    """Open the screen: it shows block tables, sharing and waste while a model generates."""
    from minipaged.cli.show import show

    raise typer.Exit(
        show(
            model,
            prompts=prompts,
            record=record,
            replay=replay,
            headless=headless,
            steps=steps,
            screenshot=screenshot,
            size=size,
            ascii_only=ascii_only,
            light=light,
            scenario=scenario,
            attach=attach,
            api_key=api_key,
            web=web,
            max_tokens=max_tokens,
            temperature=temperature,
            tour=not no_tour,
            settings=settings,
        )
    )


@app.command()
def show(
    trace: Annotated[Path, typer.Argument(metavar="FILE", help="A recorded run, such as tui --record writes.")],
    html: Annotated[
        Path | None, typer.Option(metavar="OUT", help="Write it as a page that plays in a browser, without a network.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="With --html: replace a file that is there.")] = False,
) -> None:
    """Show a recorded run: on the screen, or with --html as one page for a browser."""
    if html is not None:
        from minipaged.cli.page import write_page

        typer.echo(printable(write_page(trace, html, force=force)))
        return
    from minipaged.cli.show import refuse
    from minipaged.cli.show import show as run

    refuse({"--force": force}, "without --html there is no use for")
    raise typer.Exit(run(DEFAULT_MODEL, replay=trace))


@app.command()
def laws(tests: Annotated[Path, typer.Option(help="The tests folder to search.")] = Path("tests")) -> None:
    """List the laws of a paged engine, and the tests of each."""
    from minipaged.cli.laws import show_laws

    raise typer.Exit(show_laws(tests))
