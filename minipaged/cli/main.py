"""The command line. Each command is a few lines over the Python API; torch and textual are imported by the commands that need them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from minipaged.cli.bench import app as bench_app
from minipaged.cli.lab import app as lab_app
from minipaged.cli.learn import app as learn_app
from minipaged.config import DEFAULT_MODEL, SamplingParams
from minipaged.errors import InputError

app = typer.Typer(
    name="minipaged",
    help="A PagedAttention engine that one can see through. Without a command: the screen, on the default model.",
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(lab_app, name="lab", help="Other systems, simulated or measured here; figures, calculators, claims.")
app.add_typer(learn_app, name="learn", help="Build it yourself: twelve lessons.")
app.add_typer(bench_app, name="bench", help="What things cost on this machine.")

Model = Annotated[
    str, typer.Option(help="A zoo name, a Hugging Face folder, a .gguf file, hf:org/name or random:SHAPE.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
DTypeName = Annotated[str, typer.Option("--dtype", help="auto, float32, float16 or bfloat16.")]
BlockSize = Annotated[int, typer.Option(help="Tokens a block.")]
NumBlocks = Annotated[int | None, typer.Option(help="Blocks in the pool; measured if left out.")]


@app.callback(invoke_without_command=True)
def home(context: typer.Context) -> None:
    """The screen on the default model; plain lines where there is no terminal."""
    if context.invoked_subcommand is None:
        from minipaged.cli.show import show

        raise typer.Exit(show(DEFAULT_MODEL))


@app.command()
def generate(
    prompts: Annotated[
        list[str], typer.Argument(metavar="PROMPT...", help="One or more prompts; - reads standard input.")
    ],
    model: Model = DEFAULT_MODEL,
    n: Annotated[int, typer.Option(help="Samples of each prompt; they share its blocks.")] = 1,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of each answer.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Above 0, at most 1.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="0 keeps all.")] = 0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    beam_width: Annotated[int | None, typer.Option(help="Beam search of this width.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Leave the prompt as it is: no chat template.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document instead of text.")] = False,
    device: Device = "auto",
    dtype: DTypeName = "auto",
    block_size: BlockSize = 16,
    num_blocks: NumBlocks = None,
) -> None:
    """Generate text for one or more prompts at once, through paged memory."""
    from minipaged.cli.generate import generate as run

    texts = [read_stdin() if prompt == "-" else prompt for prompt in prompts]
    params = SamplingParams(
        n=n,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        beam_width=beam_width,
    )
    settings: dict[str, Any] = {"device": device, "dtype": dtype, "block_size": block_size, "num_blocks": num_blocks}
    raise typer.Exit(run(model, texts, params, settings, raw=raw, as_json=as_json))


@app.command()
def chat(
    model: Model = DEFAULT_MODEL,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of each answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.0,
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    device: Device = "auto",
    dtype: DTypeName = "auto",
) -> None:
    """Talk with the model; the conversation so far is found in the prefix cache, not computed again."""
    from minipaged.cli.chat import chat as run

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature)
    raise typer.Exit(run(model, params, {"device": device, "dtype": dtype}, system))


@app.command()
def pull(model: Annotated[str, typer.Argument(help="A zoo name.")] = DEFAULT_MODEL) -> None:
    """Fetch a model into the cache."""
    from minipaged.cli.progress import status_line
    from minipaged.model.loading import zoo

    with status_line() as progress:
        path = zoo.pull(model, progress)
    typer.echo(f"{model}: {path}")


@app.command()
def doctor() -> None:
    """What this machine has, and the one command that mends what is missing."""
    from minipaged.cli.doctor import report

    raise typer.Exit(report())


@app.command()
def tui(
    model: Model = DEFAULT_MODEL,
    prompts: Annotated[Path | None, typer.Option(help="A file with a prompt a line.")] = None,
    record: Annotated[Path | None, typer.Option(help="Write the trace to this file.")] = None,
    replay: Annotated[Path | None, typer.Option(help="Show a recorded trace instead of running a model.")] = None,
    headless: Annotated[bool, typer.Option("--headless", help="No terminal: run, take the screenshot, end.")] = False,
    steps: Annotated[int | None, typer.Option(help="Stop after so many steps.")] = None,
    screenshot: Annotated[Path | None, typer.Option(help="Write the screen as SVG to this file at the end.")] = None,
    size: Annotated[str | None, typer.Option(help="Columns x rows without a terminal, such as 120x40.")] = None,
    ascii_only: Annotated[bool, typer.Option("--ascii", help="Letters and signs of ASCII alone.")] = False,
    light: Annotated[bool, typer.Option("--light", help="For terminals with a light background.")] = False,
    scenario: Annotated[
        str | None, typer.Option(help="A recorded scene: cow, prefix, beam, preempt, swap, evict or orca.")
    ] = None,
    web: Annotated[bool, typer.Option("--web", help="In a browser on this machine (extra `web`).")] = False,
    device: Device = "auto",
    dtype: DTypeName = "auto",
    block_size: BlockSize = 16,
    num_blocks: NumBlocks = None,
) -> None:
    """The screen: block tables, sharing and waste, live while a model generates."""
    from minipaged.cli.show import show

    settings: dict[str, Any] = {"device": device, "dtype": dtype, "block_size": block_size, "num_blocks": num_blocks}
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
            web=web,
            settings=settings,
        )
    )


@app.command()
def laws(tests: Annotated[Path, typer.Option(help="The tests folder to search.")] = Path("tests")) -> None:
    """The laws of a paged engine, and where each is tested."""
    from minipaged.cli.laws import show_laws

    raise typer.Exit(show_laws(tests))


def read_stdin() -> str:
    """Standard input as text. InputError where it is none."""
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is no text: {error}") from None


def run_guarded(command: Callable[..., Any]) -> int:
    """Run a Typer app and turn what users can cause into an exit code."""
    try:
        result = command(standalone_mode=False)
    except InputError as error:
        print(f"minipaged: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except typer.Abort:
        return 130
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except Exception as error:
        show = getattr(error, "show", None)  # click's usage errors
        if show is None:
            raise
        show()
        return int(getattr(error, "exit_code", 2))
    return result if isinstance(result, int) else 0
