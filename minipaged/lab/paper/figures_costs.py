"""Fig. 18b (block size) and Fig. 19 (recompute against swap) of the PagedAttention paper."""

from __future__ import annotations

from minipaged.baselines.systems import PAGED
from minipaged.config import Progress
from minipaged.lab.paper.figure_types import Curve, Figure, Row
from minipaged.lab.simulation.capacity_search import sustainable_rate
from minipaged.lab.simulation.hardware import COPY_SECONDS
from minipaged.lab.simulation.roofline import FEMTO, roofline
from minipaged.lab.simulation.servers import paper_server
from minipaged.lab.simulation.workloads import Workload, make_workload

BLOCK_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def figure_18b(progress: Progress) -> Figure:
    """What the block size costs in memory: the sustained rate at each."""
    server = paper_server("opt-13b")
    paper = {"sharegpt": 128, "alpaca": 32}  # the largest sizes that the paper finds good
    rows: list[Row] = []
    curves = []
    for i, (name, largest) in enumerate(paper.items()):

        def make(rate: float, count: int, name: str = name) -> Workload:
            return make_workload(name, rate=rate, count=count)

        rates = {}
        for j, size in enumerate(BLOCK_SIZES):
            progress(f"Fig. 18b: {name}, blocks of {size}", len(BLOCK_SIZES) * i + j, 2 * len(BLOCK_SIZES))
            rates[size] = sustainable_rate(PAGED, make, server, block_size=size)
        best = max(rates.values())
        for size in (16, largest, 256):
            share = Row(f"{name}: rate with blocks of {size}, of the best", 100 * rates[size] / best, unit="%")
            rows.append(share)
        good = max(size for size, rate in rates.items() if rate >= 0.9 * best)
        rows.append(Row(f"{name}: largest block that keeps 90 % of the rate", good, largest, "tokens"))
        curves.append(Curve(name, tuple((float(size), rate / best) for size, rate in rates.items())))
    notes = (
        "The paper: ShareGPT is best at 16 to 128, Alpaca at 16 to 32. Large blocks lose memory in their tails: that comes out here. Small",
        "ones lost time in the paper's 2023 kernel; a roofline knows no such loss, so the lower ends of the ranges are not reproduced.",
    )
    return Figure(
        "18b", "Block size, OPT-13B", tuple(rows), notes, tuple(curves), "block size", "rate, of the best", log_x=True
    )


def swap_seconds(tokens: int, block_size: int) -> float:
    """Seconds to move `tokens` of OPT-13B's KV out and in again over PCIe 4, block by block and layer by layer."""
    server = paper_server("opt-13b")
    clock = roofline(server.model, server.gpu)
    copies = 2 * -(-tokens // block_size) * server.model.num_layers * 2
    return 2 * tokens * clock.swap_fs / FEMTO + copies * COPY_SECONDS


def recompute_seconds(tokens: int) -> float:
    """Seconds to run `tokens` through OPT-13B again in one pass."""
    server = paper_server("opt-13b")
    return roofline(server.model, server.gpu).step(tokens, 1, tokens, tokens * (tokens + 1) // 2) / FEMTO


def figure_19(progress: Progress) -> Figure:
    """Bringing a preempted request back: recompute is flat over the block size, swap pays per block."""
    progress("Fig. 19", 0, 1)
    tokens = 500  # a ShareGPT request at its end: 161 + 338
    again = recompute_seconds(tokens)
    swap = {size: swap_seconds(tokens, size) for size in BLOCK_SIZES}
    rows = [
        Row(f"swap over recompute, blocks of {size}", swap[size] / again, (0.5, 2.0) if 16 <= size <= 64 else None, "x")
        for size in BLOCK_SIZES
    ]
    curves = (
        Curve("recompute", tuple((float(size), 1e3 * again) for size in BLOCK_SIZES)),
        Curve("swap", tuple((float(size), 1e3 * value) for size, value in swap.items())),
    )
    notes = (
        f"Data-sheet rates and {COPY_SECONDS * 1e6:g} us a copy (assumed), {tokens} tokens. The paper draws curves: similar from 16 to 64,",
        "read here as within a factor of 2; recompute does not depend on the block size at all.",
    )
    return Figure(
        "19", "Recompute against swap, OPT-13B", tuple(rows), notes, curves, "block size", "milliseconds", log_x=True
    )
