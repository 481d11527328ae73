"""`minipaged warm`: start an engine once, so that all its kernels are in Triton's cache, and say what was compiled."""

from __future__ import annotations

import time
from typing import Any

import typer

from minipaged.cli.progress import status_line
from minipaged.errors import InputError


def warm(model: str, settings: dict[str, Any]) -> int:
    """Compile and capture what an engine with these settings does. Returns the command's exit status. InputError without a GPU."""
    from minipaged.api import LLM
    from minipaged.model.loading.placement import choose_device

    if choose_device(settings["device"]).type != "cuda":
        raise InputError("warm compiles kernels for a GPU, and there is none; on a CPU nothing is compiled")
    started = time.perf_counter()
    with status_line() as progress:
        parts = LLM(model, progress=progress, **settings)._parts
    compiled = parts.compiled
    for kernel in dict.fromkeys(each.kernel for each in compiled):
        seconds = [each.seconds for each in compiled if each.kernel == kernel]
        typer.echo(f"{kernel}: {len(seconds)} variants, {sum(seconds):.1f} s")
    typer.echo(
        f"{model}: ready after {time.perf_counter() - started:.1f} s; "
        + (f"{len(compiled)} variants are compiled now" if compiled else "all was compiled before")
    )
    return 0
