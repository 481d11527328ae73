"""Random streams that depend on nothing but (seed, sample index, position): a rerun is equal whatever the schedule was."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele, Lea and Flood, 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniform(
    seed: npt.NDArray[np.int64], index: npt.NDArray[np.int64], position: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """One number in [0, 1) for each (seed, sample index, position). All arrays [draws]."""
    with np.errstate(over="ignore"):
        x = _mix(seed.astype(np.uint64) + _GOLDEN)
        x = _mix(x + _GOLDEN * (index.astype(np.uint64) + np.uint64(1)))
        x = _mix(x + _GOLDEN * (position.astype(np.uint64) + np.uint64(1)))
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53
