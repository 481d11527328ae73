"""Each lesson's own replay: a small run of the real engine that shows the lesson's idea, recorded when it is asked for.

The runs use the model `toy`, so they take seconds and no download. A lesson may also leave a recording beside the learner's files
(lesson 6 its counterexample, lesson 13 the learner's block manager at work); then that one is shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minipaged.config import SamplingParams
from minipaged.errors import InputError
from minipaged.learn.catalog import Lesson
from minipaged.learn.workspace import PROGRESS

RECORDINGS = ".recordings"
_STORY = "the pages of this book are not bound; a list says where each of them lies, "


@dataclass(frozen=True, slots=True)
class Scene:
    """A run to record: settings of LLM, what is asked, and what to look for on the screen."""

    look_for: str
    asked: tuple[tuple[str, SamplingParams], ...]
    settings: Mapping[str, Any] = field(default_factory=dict)


def _several(count: int, longest: int = 80) -> tuple[tuple[str, SamplingParams], ...]:
    """Prompts and answers of unequal lengths."""
    return tuple(
        (_STORY[: 10 + 17 * i % 60], SamplingParams(max_tokens=12 + (29 * i) % longest, ignore_eos=True))
        for i in range(count)
    )


SCENES: dict[int, Scene] = {
    1: Scene(
        "Only the last block of each text is partly empty. Compare the line of waste with the table you printed.",
        _several(8),
        {"num_blocks": 96},
    ),
    2: Scene(
        "One text. Each step after the first writes a single slot: open the inspector on the block that fills.",
        _several(1),
        {"num_blocks": 24, "block_size": 8},
    ),
    3: Scene(
        "Blocks go out and come back. Which is handed out next? Your pool: the one that has been free for longest. "
        "Here: the one that came back last, for it may still be in a cache.",
        _several(6, 40),
        {"num_blocks": 32, "block_size": 8, "enable_prefix_caching": False},
    ),
    4: Scene(
        "Two texts grow in turns: their blocks interleave in the pool, and each table keeps its own order.",
        _several(2),
        {"num_blocks": 24, "block_size": 4},
    ),
    5: Scene(
        "For every new token, each block of its table is read once, wherever it lies.",
        _several(3),
        {"num_blocks": 48, "block_size": 8},
    ),
    6: Scene(
        "Watch a text cross a block's boundary: the new block comes with the token that needs it, not one later.",
        _several(2, 30),
        {"num_blocks": 24, "block_size": 4},
    ),
    7: Scene(
        "At most 24 tokens a step: prompts come in pieces, and nobody who is writing ever waits for them.",
        _several(9),
        {"num_blocks": 128, "block_size": 8, "max_num_batched_tokens": 24},
    ),
    8: Scene(
        "Four samples of one prompt. Find the step where the shared last block is copied (/ then cow).",
        ((_STORY[:50], SamplingParams(n=4, temperature=1.0, seed=5, max_tokens=24, ignore_eos=True)),),
        {"num_blocks": 48, "block_size": 8},
    ),
    9: Scene(
        "Four beams. Losers leave, winners fork. A block is copied only where two write into the same half-filled one.",
        ((_STORY[:40], SamplingParams(beam_width=4, n=4, max_tokens=32, ignore_eos=True)),),
        {"num_blocks": 64, "block_size": 8},
    ),
    10: Scene(
        "The questions share a beginning. It is computed once; the others start with blocks that are there already.",
        tuple(
            (_STORY * 2 + question, SamplingParams(max_tokens=20, ignore_eos=True))
            for question in ("where is it?", "who wrote it?", "why?")
        ),
        {"num_blocks": 64, "block_size": 8, "max_num_batched_tokens": 170},
    ),
    11: Scene(
        "The pool is too small for all. The last to arrive makes way, and comes back later (/ then preempt).",
        _several(5, 60),
        {"num_blocks": 18, "block_size": 8, "num_host_blocks": 16, "preemption": "swap"},
    ),
    12: Scene(
        "What your kernel walks: the second pane is the table, the first is the pool.",
        _several(4),
        {"num_blocks": 64, "block_size": 16},
    ),
    14: Scene(
        "A long prompt comes in chunks of at most 32 tokens; each looks at all blocks before it. The second begins where the first's ends.",
        tuple(
            (_STORY * 2 + question, SamplingParams(max_tokens=12, ignore_eos=True)) for question in ("what?", "how?")
        ),
        {"num_blocks": 64, "block_size": 8, "max_num_batched_tokens": 32},
    ),
    15: Scene(
        "Keys and values in eight bits. Tables, sharing and copies are as ever: only what a block weighs is another.",
        _several(6, 40),
        {"num_blocks": 64, "block_size": 8, "kv_cache_dtype": "int8"},
    ),
    16: Scene(
        "The table grows, and what it holds does not: blocks behind the window go back (/ then release), the first one stays.",
        ((_STORY[:30], SamplingParams(max_tokens=60, ignore_eos=True)),),
        {"num_blocks": 24, "block_size": 4, "retention": "sinks:4+window:16"},
    ),
    17: Scene(
        "The pool is too small, and the host has room: find who is carried out (/ then swap_out) and back, and what had to wait for it.",
        _several(5, 60),
        {"num_blocks": 20, "block_size": 8, "num_host_blocks": 24, "preemption": "auto"},
    ),
    18: Scene(
        "Three rows and nine people: watch the queue. Who is let in at the step after somebody has finished?",
        _several(9, 30),
        {"num_blocks": 96, "block_size": 8, "max_num_seqs": 3},
    ),
    19: Scene(
        "All that two ranks must agree on: these tables. Each of them would hold its own heads in these very blocks.",
        _several(3),
        {"num_blocks": 48, "block_size": 8},
    ),
}


OWN = {
    6: "It is the shortest way to break the modulo: step through it with ] and, at the end, count what A's table holds.",
    13: "Your block manager in the engine: find the copies (/ then cow), the hits (/ then hit) and who made way (/ then preempt).",
}


def recording(folder: Path, one: Lesson) -> Path:
    """Where a lesson leaves its own recording in a learner's folder."""
    return folder / RECORDINGS / f"{one.path.stem}.trace"


def failed_run(file: Path) -> Path | None:
    """Where the run of a failing test of this copy of a lesson is left. None outside of a learner's folder: nothing is written there."""
    started = (file.parent / PROGRESS).is_file()
    return file.parent / RECORDINGS / f"{file.stem}.failed.trace" if started else None


def replay(one: Lesson, folder: Path | None, scratch: Path) -> tuple[Path, str]:
    """The recording to show for a lesson, and what to look for in it: the learner's own, else one that is made in `scratch`."""
    if folder is not None and recording(folder, one).is_file():
        return recording(folder, one), f"What your own run left behind. {OWN.get(one.number, '')}".rstrip()
    scene = SCENES.get(one.number)
    if scene is None:
        raise InputError(
            f"lesson {one.number} shows your own run, and there is none yet: solve it, then run python {one.path.name} in your folder"
        )
    target = scratch / f"{one.path.stem}.trace"
    record(scene, target)
    return target, scene.look_for


def record(scene: Scene, target: Path) -> None:
    """Run a scene to its end and write its trace."""
    from minipaged.api import LLM
    from minipaged.trace.file import open_recorder

    llm = LLM("toy", device="cpu", **scene.settings)
    recorder = open_recorder(target, llm.engine)
    llm.engine.trace.subscribe(recorder.write)
    try:
        llm.generate([prompt for prompt, _ in scene.asked], [params for _, params in scene.asked])
    finally:
        recorder.close()
