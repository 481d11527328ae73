"""Options that several commands share, each with its help and with what the shell may complete after it."""

from __future__ import annotations

from typing import Annotated

import typer

from minipaged.cli import complete

Model = Annotated[
    str,
    typer.Option(
        help="A name (smollm2-135m, toy), a Hugging Face folder, a .gguf file, hf:org/name or random:SHAPE.",
        autocompletion=complete.models,
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.", autocompletion=complete.devices)]
DTypeName = Annotated[
    str, typer.Option("--dtype", help="auto, float32, float16 or bfloat16.", autocompletion=complete.dtypes)
]
WeightsName = Annotated[
    str,
    typer.Option(
        "--weights",
        help="packed keeps the codes of a quantized model, dense makes floats of them, auto packs where that is faster.",
        autocompletion=complete.weights,
    ),
]
BlockSize = Annotated[int, typer.Option(help="Tokens a block.")]
NumBlocks = Annotated[int | None, typer.Option(help="Blocks in the pool; measured if left out.")]
Temperature = Annotated[float, typer.Option(help="0 takes the most likely token.")]
TopP = Annotated[float, typer.Option(help="Draw from the likeliest tokens that together reach this probability.")]
TopK = Annotated[int, typer.Option(help="Draw from this many of the likeliest tokens; 0 keeps all.")]
MinP = Annotated[float, typer.Option(help="Drop tokens less likely than this share of the likeliest one.")]
RepetitionPenalty = Annotated[
    float, typer.Option(help="Above 1, tokens that the text holds already become less likely.")
]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]
System = Annotated[str | None, typer.Option(help="The system prompt: it comes before everything else.")]
