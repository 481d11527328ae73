"""Figures that only a device can give, read from the results files that came with this version: the rows of `lab ablate`,
`lab compare --device` and `bench kernels`. Claims and figures cite them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minipaged.lab.measure.ablate import CONSECUTIVE, SHUFFLED
from minipaged.lab.measure.results import read_results

FOLDER = Path(__file__).parents[1] / "results"
Document = dict[str, Any]


def newest(key: str, folder: Path = FOLDER) -> Document | None:
    """The latest results on a GPU whose rows have that key."""
    found = [read_results(path) for path in sorted(folder.glob("*.json"))]
    fitting = [d for d in found if d["rows"] and key in d["rows"][0] and not d["device"].startswith("CPU")]
    return max(fitting, key=lambda document: str(document["date"]), default=None)


def origin(document: Document) -> str:
    """Where and when."""
    return f"{document['device']}, {document['date']}"


def layout_cost(document: Document) -> float | None:
    """Time of shuffled over consecutive blocks under one kernel, less 1: what paging costs in attention. From an ablation; None if it was
    cut short before that.
    """
    took = {
        name: row["seconds"]
        for row in document["rows"]
        for name in (CONSECUTIVE, SHUFFLED)
        if row["section"] == "layout" and row["name"].endswith(f"one layer: {name}")
    }
    return float(took[SHUFFLED] / took[CONSECUTIVE] - 1) if len(took) == 2 else None


def against_dense(document: Document) -> list[float]:
    """Time of the paged decode kernel over that of torch's fastest dense attention, shape by shape. From `bench kernels`."""
    ours: dict[str, float] = {}
    dense: dict[str, float] = {}
    for row in document["rows"]:
        if row["kernel"] != "decode":
            continue
        shape, taken = row["shape"], row["microseconds"]
        if row["contender"] == "minipaged":
            ours[shape] = taken
        elif row["contender"].startswith("torch"):
            dense[shape] = min(taken, dense.get(shape, taken))
    return sorted(ours[shape] / dense[shape] for shape in ours.keys() & dense.keys())


def speeds(document: Document) -> dict[str, float]:
    """Tokens per second of each system in the smallest pool, where memory binds most; transformers' in its own. From a comparison."""
    pools = [row["pool"] for row in document["rows"] if row["tokens"] and not row["system"].startswith("transformers")]
    return {
        row["system"]: row["tokens_per_second"]
        for row in document["rows"]
        if row["tokens"] and (row["pool"] == min(pools) or row["system"].startswith("transformers"))
    }


def shares(document: Document) -> dict[str, float]:
    """Share of the smallest pool that held tokens, by system. From a comparison."""
    pools = [row["pool"] for row in document["rows"] if row["token_share"] is not None]
    return {
        row["system"]: row["token_share"]
        for row in document["rows"]
        if row["token_share"] is not None and row["pool"] == min(pools)
    }


def factors(document: Document) -> tuple[float, float, float] | None:
    """Attention's factor alone, the batch's alone, and both together; None from an ablation that was cut short before them."""
    together = [float(row["ratio"]) for row in document["rows"] if row["section"] == "together"]
    return (together[1], together[2], together[3]) if len(together) >= 4 else None
