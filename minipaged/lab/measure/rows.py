"""What a kernel benchmark writes down: rows, and the ceilings that their shares are of."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from minipaged.lab.measure.timing import Timing

OURS = "minipaged"
SECTIONS = {  # of `lab ablate`, in their order, and their titles
    "attention": "Attention: one layer's operator, and the whole decode step",
    "prefill": "Attention over a prompt: the whole step, and so the first token",
    "layout": "Contiguous and paged: where the blocks lie",
    "block size": "Block size, shuffled blocks",
    "batching": "Batching: the engine, in a pool that binds",
    "preemption": "Preemption: computed again, or swapped",
    "together": "Do the factors multiply?",
    "ladder": "One thing after the other: decode steps at the batches measured above",
    "heads": "Heads of keys and values",
}
PAST_CACHE_BYTES = 256 * 2**20  # buffers that rotate are together at least this large
ENOUGH_STEPS = 20  # of a run that a time limit stopped: fewer are mostly prompts and first times, and rank nobody
# A graph's work takes at least this long, so that the time between two replays does not count.
GRAPH_MICROSECONDS = 1500


def too_few_steps(steps: int | None, note: str) -> bool:
    """Whether a run of the engine was stopped before its speed says anything. steps: None where nobody counted them."""
    return note.startswith("stopped") and steps is not None and steps < ENOUGH_STEPS


@dataclass(frozen=True)
class Row:
    """One measurement.

    value, unit: GB/s of KV read (decode) or of bytes that must move (small kernels, copy), TFLOP/s (prefill, matrix product). share: of the
    measured ceiling, copy or matrix product. ratio, in a peer's row: how many times as fast as this peer ours is.
    """

    kernel: str
    shape: str
    contender: str
    microseconds: float
    rounds: tuple[float, ...]
    value: float
    unit: str
    share: float | None = None
    ratio: float | None = None

    def as_json(self) -> dict[str, Any]:
        """For the results file."""
        return asdict(self)


@dataclass(frozen=True)
class Ceilings:
    """What the machine gives at best, measured: GB/s read and written by a copy, TFLOP/s of a bfloat16 matrix product."""

    gigabytes: float
    teraflops: float

    def of(self, unit: str) -> float:
        """The ceiling in that unit."""
        return self.gigabytes if unit == "GB/s" else self.teraflops

    def passes(self, work: float, unit: str, calls: int) -> int:
        """How often `calls` calls are repeated in a graph. work: as in make_row."""
        return max(1, round(GRAPH_MICROSECONDS * self.of(unit) / (work * calls)))


def make_row(
    kernel: str,
    shape: str,
    contender: str,
    taken: Timing,
    work: float,
    unit: str,
    *,
    ceilings: Ceilings | None = None,
    ratio: float | None = None,
) -> Row:
    """A row. work: what one call does, in units * microseconds: bytes / 1e3 for GB/s, operations / 1e6 for TFLOP/s."""
    value = work / taken.microseconds
    share = value / ceilings.of(unit) if ceilings is not None else None
    return Row(kernel, shape, contender, taken.microseconds, taken.rounds, value, unit, share, ratio)
