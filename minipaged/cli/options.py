"""Options that several commands share, each with its help and with what the shell may complete after it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any, get_type_hints

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
OffloadWeights = Annotated[
    str,
    typer.Option(
        "--offload-weights",
        metavar="auto|none|GB",
        help="Weights that stay in host memory and are copied in each step: auto for what the device has no room for.",
    ),
]
KVCacheDTypeName = Annotated[
    str,
    typer.Option(
        "--kv-cache-dtype",
        help="auto, int8 or fp8: what keys and values are kept as.",
        autocompletion=complete.kv_cache_dtypes,
    ),
]
BlockSize = Annotated[int, typer.Option(help="Tokens a block.")]
NumBlocks = Annotated[int | None, typer.Option(help="Blocks in the pool; measured if left out.")]
TensorParallel = Annotated[
    int, typer.Option(help="Processes that share the model, each on a GPU of its own, or all on the CPU.")
]
PipelineParallel = Annotated[
    int, typer.Option(help="Stages that the layers are cut into, each of --tensor-parallel processes.")
]
HostBlocks = Annotated[
    int,
    typer.Option(
        "--host-blocks",
        help="Blocks of the computer's memory: for requests that are swapped out, the rest for prefixes that the device has no room for.",
    ),
]
DiskCache = Annotated[
    str | None,
    typer.Option(
        "--disk-cache",
        metavar="DIR",
        help="Keep computed prefixes in this folder, for later runs too. It holds prompts.",
    ),
]
DiskGB = Annotated[float, typer.Option("--disk-gb", help="GB that --disk-cache may take; the least recently used go.")]
RetentionText = Annotated[
    str | None,
    typer.Option(
        "--retention",
        help="Which tokens stay in memory: all, window:W, sinks:S+window:W or h2o:HEAVY+RECENT; as the model's windows allow if left out.",
    ),
]
BlockManagerText = Annotated[
    str | None,
    typer.Option(
        "--block-manager", metavar="FILE.py:CLASS", help="A block manager of your own in place of minipaged's."
    ),
]
Temperature = Annotated[float, typer.Option(help="0 takes the most likely token.")]
TopP = Annotated[float, typer.Option(help="Draw from the likeliest tokens that together reach this probability.")]
TopK = Annotated[int, typer.Option(help="Draw from this many of the likeliest tokens; 0 keeps all.")]
MinP = Annotated[float, typer.Option(help="Drop tokens less likely than this share of the likeliest one.")]
RepetitionPenalty = Annotated[
    float, typer.Option(help="Above 1, tokens that the text holds already become less likely.")
]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]
System = Annotated[str | None, typer.Option(help="The system prompt: it comes before everything else.")]

# The engine's own options, in the order in which --help lists them, and what each is if nobody gives it: arguments of LLM by the same name.
ENGINE_OPTIONS: dict[str, tuple[Any, Any]] = {
    "device": (Device, "auto"),
    "dtype": (DTypeName, "auto"),
    "weights": (WeightsName, "auto"),
    "offload_weights": (OffloadWeights, "none"),
    "kv_cache_dtype": (KVCacheDTypeName, "auto"),
    "block_size": (BlockSize, 16),
    "num_blocks": (NumBlocks, None),
    "num_host_blocks": (HostBlocks, 0),
    "disk_cache": (DiskCache, None),
    "disk_gb": (DiskGB, 10.0),
    "retention": (RetentionText, None),
    "block_manager": (BlockManagerText, None),
    "tensor_parallel": (TensorParallel, 1),
    "pipeline_parallel": (PipelineParallel, 1),
}


def with_engine_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with ENGINE_OPTIONS behind its own options; it gets them as one dict, its argument `settings`."""

    @wraps(command)
    def run(**given: Any) -> None:
        settings = {name: given.pop(name) for name in ENGINE_OPTIONS}
        command(**given, settings=settings)

    hints = get_type_hints(command, include_extras=True)
    del hints["settings"]
    parameters = {name: inspect.signature(command).parameters[name].default for name in hints if name != "return"}
    for name, (hint, default) in ENGINE_OPTIONS.items():
        hints[name], parameters[name] = hint, default
    run.__annotations__ = hints
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # what typer reads
        [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[name])
            for name, default in parameters.items()
        ]
    )
    return run
