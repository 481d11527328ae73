"""Record the gallery again: `python -m minipaged.tui.gallery.make [NAME…] [--model NAME]`. Takes a minute a scenario on a CPU."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minipaged.api import LLM
from minipaged.baselines.shadows import write_with_shadows
from minipaged.config import DEFAULT_MODEL, SamplingParams
from minipaged.engine import Engine
from minipaged.trace.file import Header, open_recorder
from minipaged.tui.gallery import SCENARIOS, scenario_path

SEED = 11

PAGES = "A computer keeps its memory in pages of equal size. A table tells where each page lies."


@dataclass(frozen=True)
class Script:
    """What a scenario asks of the engine, and when."""

    arrivals: tuple[tuple[int, str, SamplingParams], ...]  # step, prompt, params
    num_blocks: int = 64
    num_host_blocks: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    steps: int = 400
    block_size: int = 4  # small blocks, so that a short text shows many
    shadows: tuple[str, ...] = ()  # other systems to follow on the same requests


_MIXED = (
    ("Once upon a time, in a library that never closed,", 100),
    ("The sun is", 20),
    ("A recipe for bread with four ingredients:", 60),
    (PAGES + " The first advantage is", 40),
    ("Dear neighbour, about the noise last night:", 90),
    ("The three most useful facts about prime numbers are:", 70),
    ("The moon is", 16),
    (PAGES + " A page that two programs read", 50),
    ("The best thing about the sea is", 80),
    ("My favourite word is", 30),
)


def plain(max_tokens: int, **words: Any) -> SamplingParams:
    """Greedy, unless asked otherwise."""
    return SamplingParams(max_tokens=max_tokens, **words)


SCRIPTS: dict[str, Script] = {
    "cow": Script(((0, "The best thing about the sea is", plain(14, n=2, temperature=0.9, seed=SEED)),), num_blocks=32),
    "prefix": Script(
        (
            (0, PAGES + " The first advantage is", plain(12)),
            (6, PAGES + " A page that two programs read", plain(12)),
            (12, "Once upon a time", plain(12)),
            (16, PAGES + " The first advantage is", plain(12)),
        ),
        num_blocks=80,
    ),
    "beam": Script(((0, "The capital of France is", plain(16, n=2, beam_width=3)),), num_blocks=48),
    "preempt": Script(
        (
            (0, "Once upon a time, in a library that never closed,", plain(40)),
            (1, "A recipe for bread with four ingredients:", plain(40)),
            (2, "The three most useful facts about prime numbers are:", plain(40)),
        ),
        num_blocks=24,
        settings={"preemption": "recompute", "watermark": 0.0},
    ),
    "swap": Script(
        (
            (0, "Once upon a time, in a library that never closed,", plain(40)),
            (1, "Dear neighbour, about the noise last night:", plain(30, n=2, temperature=0.8, seed=SEED)),
            (2, "The three most useful facts about prime numbers are:", plain(40)),
        ),
        num_blocks=27,
        num_host_blocks=32,
        settings={"preemption": "swap", "watermark": 0.0},
    ),
    "evict": Script(
        (
            (0, "The sun is", plain(18)),
            (20, "The moon is", plain(18)),
            (40, "The wind is a thing that", plain(24)),
            (66, "The sun is", plain(10)),
        ),
        num_blocks=16,
        settings={"watermark": 0.0},
    ),
    "offload": Script(
        (
            (0, PAGES + " The first advantage is", plain(12)),
            (20, "Once upon a time, in a library that never closed, somebody read by night.", plain(16)),
            (44, "Dear neighbour, about the noise last night: it was the cat, and not the piano.", plain(16)),
            (70, PAGES + " The second advantage is", plain(12)),
        ),
        num_blocks=16,
        num_host_blocks=24,
        settings={"watermark": 0.0},
    ),
    "orca": Script(
        tuple((4 * number, text, plain(length)) for number, (text, length) in enumerate(_MIXED)),
        num_blocks=385,
        block_size=16,
        shadows=("orca-max", "orca-pow2", "orca-oracle"),
    ),
}


def record(name: str, script: Script, model: str, path: Path) -> int:
    """Run a script and write its trace. Returns the steps."""
    llm = LLM(
        model,
        device="cpu",
        dtype="float32",
        block_size=script.block_size,
        num_blocks=script.num_blocks,
        num_host_blocks=script.num_host_blocks,
        seed=SEED,
        **script.settings,
    )
    header = Header(
        model,
        SEED,
        {"scenario": name, "block_size": script.block_size, **script.settings},
        extra={"about": SCENARIOS[name]},
    )
    recorder = open_recorder(path, llm.engine, header)
    leave: Callable[[], object] = llm.engine.trace.subscribe(recorder.write)
    try:
        return run(llm.engine, script)
    finally:
        leave()
        recorder.close()
        if script.shadows:
            add_shadows(path, script.shadows)


def add_shadows(path: Path, systems: tuple[str, ...]) -> None:
    """Write the trace again with what other systems would hold behind each step."""
    whole = path.with_suffix(".plain")
    path.rename(whole)
    write_with_shadows(whole, path, systems, max_len=2048)
    whole.unlink()


def run(engine: Engine, script: Script) -> int:
    """Step until nothing is left to arrive or to do."""
    left = list(script.arrivals)
    step = 0
    while step < script.steps and (left or engine.has_work):
        while left and (left[0][0] <= step or not engine.has_work):
            _, prompt, params = left.pop(0)
            engine.submit(prompt, params)
        engine.step()
        step += 1
    return step


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(SCRIPTS))
    parser.add_argument("--model", default=DEFAULT_MODEL)
    chosen = parser.parse_args()
    for name in chosen.names:
        path = scenario_path(name)
        steps = record(name, SCRIPTS[name], chosen.model, path)
        print(f"{name}: {steps} steps, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
