"""What the lab's commands share: their options, and the reading of numbers that stand in lists. Knows flags only."""

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
        help="sharegpt, alpaca, alpaca-n4, alpaca-beam4, prefix-341, chatbot, uniform, or a .csv/.jsonl file."
    ),
]
Rate = Annotated[float, typer.Option(help="Requests a second (Poisson); inf: all at once.")]
Requests = Annotated[int, typer.Option(help="How many requests.")]
Seed = Annotated[int, typer.Option(help="Makes another draw of the same traffic.")]
BlockSize = Annotated[int, typer.Option(help="Tokens a block.")]
TensorParallel = Annotated[int, typer.Option("--tp", help="GPUs that share every layer.")]
Slots = Annotated[int | None, typer.Option(help="KV slots of the pool; computed from the GPU's memory if left out.")]
Systems = Annotated[str, typer.Option(help="Names with commas between them, or all.", autocompletion=complete.systems)]
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
