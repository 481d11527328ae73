"""The lab's commands around the paper: its figures, and the claims that circulate about it."""

from __future__ import annotations

from typing import Annotated

import typer

from minipaged.cli.lab_options import (
    HtmlFile,
    JsonFile,
)


def figures(
    only: Annotated[str, typer.Option(help="Figure numbers with commas between them, or all.")] = "all",
    json_file: JsonFile = None,
    html: HtmlFile = None,
) -> None:
    """Simulate the figures of the PagedAttention paper; each number stands beside the published one. All take minutes."""
    from minipaged.cli.progress import status_line
    from minipaged.lab.paper.figures import FIGURES, parse_figures
    from minipaged.lab.report.simulation_report import FIGURE_COLUMNS, figure_page, figure_rows
    from minipaged.lab.report.tables import table, write_json

    names = parse_figures(only)
    with status_line() as progress:
        found = [FIGURES[name](progress) for name in names]
    for figure in found:
        table(
            f"Fig. {figure.name}: {figure.title}", FIGURE_COLUMNS, figure_rows(figure), notes=(" ".join(figure.notes),)
        )
    if json_file is not None:
        write_json(json_file, found)
    if html is not None:
        figure_page(found).write(html)


def claims(json_file: JsonFile = None) -> None:
    """Recompute the claims that circulate about paged attention, and say which hold."""
    from minipaged.cli.progress import status_line
    from minipaged.lab.paper.claims import all_claims
    from minipaged.lab.report.tables import table, write_json

    with status_line() as progress:
        found = all_claims(progress)
    table("Claims", ("claim", "verdict", "why"), [(c.claim, c.verdict, c.evidence) for c in found], words=2, lines=True)
    if json_file is not None:
        write_json(json_file, found)
