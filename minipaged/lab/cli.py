"""`minipaged lab ...`: the commands of the lab. Each is a few lines: read the flags, compute, print a table.

Knows flags; knows nothing of how anything is computed.
"""

from __future__ import annotations

import typer
from rich.console import Console
from rich.table import Table

from minipaged.execution.hardware import GIB, GPUS

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def lab() -> None:
    """The systems lab: what PagedAttention is compared with, simulated and calculated."""


@app.command()
def gpus() -> None:
    """The GPUs that can be simulated, with their published figures."""
    table = Table(title="GPUs")
    for name in ("name", "memory GiB", "GB/s", "16-bit TFLOP/s", "link GB/s", "host GB/s"):
        table.add_column(name, justify="left" if name == "name" else "right")
    for gpu in GPUS.values():
        rates = (gpu.bandwidth_bytes / 1e9, gpu.peak_flops / 1e12, gpu.link_bytes / 1e9, gpu.host_bytes / 1e9)
        table.add_row(gpu.name, f"{gpu.memory_bytes / GIB:.0f}", *(f"{rate:,.4g}" for rate in rates))
    Console().print(table)
