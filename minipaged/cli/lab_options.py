"""Options that several commands of the lab share, and how numbers in them are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from minipaged.cli import complete
from minipaged.errors import InputError

ModelName = Annotated[
    str,
    typer.Option(help="A known shape (llama-13b), or the path of a config.json.", autocompletion=complete.shapes),
]
GPUName = Annotated[
    str,
    typer.Option("--gpu", help="A known GPU; `minipaged lab gpus` lists them.", autocompletion=complete.gpus),
]
Traffic = Annotated[
    str,
    typer.Option(
        help="The traffic: sharegpt, alpaca, alpaca-n4, alpaca-beam4, prefix-341, chatbot, uniform, or a .csv or .jsonl file."
    ),
]
Rate = Annotated[float, typer.Option(help="Requests a second (Poisson arrivals); inf means all at once.")]
Requests = Annotated[int, typer.Option(help="How many requests.")]
Seed = Annotated[int, typer.Option(help="Another seed draws other requests of the same kind.")]
BlockSize = Annotated[int, typer.Option(help="Tokens a block.")]
TensorParallel = Annotated[int, typer.Option("--tp", help="GPUs that share every layer (tensor parallel).")]
Slots = Annotated[
    int | None, typer.Option(help="KV slots of the pool, one a token. Computed from the GPU's memory if left out.")
]
Systems = Annotated[
    str,
    typer.Option(
        help="Systems, with commas between them, or all: webui, static, fastertransformer, orca-max, orca-pow2, orca-oracle, "
        "tgi-early, tgi-paged and paged (this project). In a simulation `engine` runs our own scheduler in full.",
        autocompletion=complete.systems,
    ),
]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file.")]

HtmlFile = Annotated[Path | None, typer.Option(help="Write one self-contained HTML page to this file.")]


def number(name: str, text: str) -> float:
    """A number a user typed. InputError if it is none."""
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{name} must be numbers with commas between them, not {text.strip()!r}") from None


def whole(name: str, text: str) -> int:
    """A whole number a user typed. InputError if it is none."""
    try:
        return int(text)
    except ValueError:
        raise InputError(f"{name} must be whole numbers with commas between them, not {text.strip()!r}") from None


def not_negative(name: str, value: float) -> float:
    """A finite number, 0 or more. InputError otherwise."""
    if not 0 <= value < float("inf"):
        raise InputError(f"{name} must be a finite number, at least 0, not {value:g}")
    return value
