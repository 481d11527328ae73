"""The names of the systems, and the memory that stands behind each. README.md says what each name means and which file has it."""

from __future__ import annotations

from collections.abc import Callable

from minipaged.baselines.batches import FasterTransformer, StaticBatch, WebUI
from minipaged.baselines.orca import OrcaMax, OrcaOracle, OrcaPow2
from minipaged.baselines.reservations import Reservations
from minipaged.baselines.tgi import EarlyTGI, PagedTGI
from minipaged.errors import InputError

RESERVING: dict[str, Callable[..., Reservations]] = {
    kind.name: kind
    for kind in (WebUI, StaticBatch, FasterTransformer, OrcaMax, OrcaPow2, OrcaOracle, EarlyTGI, PagedTGI)
}
PAGED = "paged"  # this project's own memory: minipaged/memory
SYSTEMS: tuple[str, ...] = (*RESERVING, PAGED)
OLD_NAMES = {"vllm": PAGED}  # as `paged` was called: results files and command lines may still say so


def todays_name(system: str) -> str:
    """The name that a system has today. Names that were never used pass through."""
    return OLD_NAMES.get(system, system)


def reservations(system: str, pool: int, *, max_len: int = 2048, block_size: int = 16) -> Reservations:
    """The accounting of a system that reserves ahead. Raises InputError that lists the known ones."""
    kind = RESERVING.get(system)
    if kind is None:
        raise InputError(f"unknown system {system!r}; known: {', '.join(RESERVING)}")
    return kind(pool, max_len=max_len, block_size=block_size)
