"""Small recorded scenarios, each showing one idea, made by make.py with a real model."""

from __future__ import annotations

from pathlib import Path

from minipaged.errors import InputError

SCENARIOS: dict[str, str] = {
    "cow": "two answers share their prompt's blocks; the last one is copied when they part",
    "prefix": "an equal beginning is found in the prefix cache and not computed again",
    "beam": "a beam search: beams fork from the best and the others are dropped",
    "preempt": "the pool runs dry: the latest arrival gives its blocks back and computes them again",
    "swap": "the pool runs dry: a request's blocks move to CPU memory and come back",
    "evict": "blocks of finished requests stay cached until their room is needed",
    "offload": "a prefix that leaves the pool goes to CPU memory, and comes back when it is asked for again",
    "orca": "ten requests in one pool, beside systems that reserve ahead (press c)",
}


def scenario_path(name: str) -> Path:
    """Where a scenario's trace lies. InputError if there is none of that name."""
    if name not in SCENARIOS:
        raise InputError(f"scenario must be one of {', '.join(SCENARIOS)}, not {name!r}")
    return Path(__file__).parent / f"{name}.mpt"
