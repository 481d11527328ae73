"""What the shell may complete after an option: the values that exist. Imports no torch, so that a key press answers at once."""

from __future__ import annotations

import glob
import os

from minipaged.config import DTYPES, KV_CACHE_DTYPES, WEIGHTS


def models(incomplete: str) -> list[str]:
    """Names of models that run here; folders and .gguf files where a path is being typed."""
    from minipaged.model.loading.pull import SOURCES
    from minipaged.model.loading.shapes import SHAPES, SIMULATED_ONLY

    names = (*SOURCES, "toy", *(f"random:{name}" for name in SHAPES if name not in SIMULATED_ONLY))
    return _beginning(incomplete, (*names, *_paths(incomplete, ".gguf")))


def devices(incomplete: str) -> list[str]:
    """Words for where a model runs."""
    return _beginning(incomplete, ("auto", "cpu", "cuda"))


def dtypes(incomplete: str) -> list[str]:
    """Words for the precision of weights and of what is computed."""
    return _beginning(incomplete, ("auto", *DTYPES))


def weights(incomplete: str) -> list[str]:
    """Words for how quantized weights are kept."""
    return _beginning(incomplete, WEIGHTS)


def kv_cache_dtypes(incomplete: str) -> list[str]:
    """Words for what keys and values are kept as."""
    return _beginning(incomplete, KV_CACHE_DTYPES)


def downloads(incomplete: str) -> list[str]:
    """Names of models that `pull` knows."""
    from minipaged.model.loading.pull import SOURCES

    return _beginning(incomplete, tuple(SOURCES))


def shapes(incomplete: str) -> list[str]:
    """Names of shapes that can be simulated; folders and .json files where a path is being typed."""
    from minipaged.model.loading.shapes import SHAPES

    return _beginning(incomplete, (*SHAPES, *_paths(incomplete, ".json")))


def scenarios(incomplete: str) -> list[str]:
    """Names of recorded scenes."""
    from minipaged.tui.gallery import SCENARIOS

    return _beginning(incomplete, tuple(SCENARIOS))


def gpus(incomplete: str) -> list[str]:
    """Names of GPUs that can be simulated."""
    from minipaged.lab.simulation.hardware import GPUS

    return _beginning(incomplete, tuple(GPUS))


def systems(incomplete: str) -> list[str]:
    """Names of systems; after a comma, the next one of the list."""
    from minipaged.baselines.systems import SYSTEMS
    from minipaged.lab.simulation.simulate import ENGINE

    chosen, comma, last = incomplete.rpartition(",")
    names = (*SYSTEMS, ENGINE) if comma else ("all", *SYSTEMS, ENGINE)
    taken = chosen.split(",")
    return [f"{chosen}{comma}{name}" for name in _beginning(last, names) if name not in taken]


def _beginning(incomplete: str, names: tuple[str, ...]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def _paths(incomplete: str, suffix: str) -> tuple[str, ...]:
    if not incomplete:
        return ()
    found = sorted(glob.glob(f"{glob.escape(incomplete)}*"))
    return (
        *(f"{path}{os.sep}" for path in found if os.path.isdir(path)),
        *(path for path in found if path.endswith(suffix)),
    )
