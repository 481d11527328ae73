"""`minipaged lab ...`: the group, and which file has which command.

Each command is a few lines: it reads the flags, computes and prints a table. Its imports are inside it, so that help is instant.
"""

from __future__ import annotations

import typer

from minipaged.cli.lab_advise import advise, plan
from minipaged.cli.lab_measured import ablate, beams, plot, quality, retention
from minipaged.cli.lab_paper import claims, figures
from minipaged.cli.lab_simulated import compare, gpus, offload, shadow, simulate

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def lab() -> None:
    """The systems lab: what PagedAttention is compared with, simulated, measured and calculated."""


for command in (
    compare,
    simulate,
    shadow,
    ablate,
    beams,
    quality,
    retention,
    offload,
    plot,
    plan,
    advise,
    figures,
    claims,
    gpus,
):
    app.command()(command)
