"""Measures what real beams share: a real model's beam search over short instructions, blocks counted at every step.

Beside it stands the same with parallel samples. The simulated figure that both are compared with is in paper/figures.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minipaged.config import CacheConfig, EngineConfig, Progress, SamplingParams, check_int
from minipaged.errors import InputError
from minipaged.lab.measure.results import read_results
from minipaged.lab.simulation.workloads import ALPACA
from minipaged.trace.events import StepDelta

RESULTS = Path(__file__).parents[1] / "results" / "cpu_beams_smollm2-135m.json"
BLOCK = 16  # the paper's
MAX_TOKENS = 160  # an answer is cut there

# Short instructions as in Alpaca; written for this project.
INSTRUCTIONS = (
    "Give three tips for staying healthy during a long winter.",
    "Write a short poem about the sea at night.",
    "Explain why the sky is blue to a child of six.",
    "Name five countries in South America and their capitals.",
    "Rewrite this sentence in the passive voice: The cat chased the small grey mouse across the garden, under the fence and into the "
    "neighbour's kitchen.",
    "Summarize this in one sentence: The library opens at nine and closes at six. On Saturdays it closes at noon. Members may borrow ten "
    "books for four weeks, and may renew them twice unless another reader waits.",
    "Describe how to make a cup of tea, step by step.",
    "What is the difference between weather and climate?",
    "Suggest a name for a small bakery that sells bread and cakes.",
    "Translate the following message into French: Good morning! Could you tell me where the nearest railway station is, and when the next "
    "train to Lyon leaves, please?",
    "List four uses of a paper clip other than holding paper.",
    "Write an email that asks a colleague to move the weekly meeting from Monday morning to Wednesday afternoon, because two people of the "
    "team will be travelling.",
    "Which planet is the largest in the solar system, and how large is it?",
    "Give an example of a metaphor and say what it means.",
    "How does a bicycle stay upright when it is moving?",
    "Classify these animals as mammals, birds or fish, and give one reason for each: bat, penguin, whale, owl, salmon, dolphin, ostrich.",
    "Write a headline for an article about a new public library.",
    "Explain what a hash table is and when one would use it.",
    "Find the mistakes in this text and correct them: She don't like apples, but her brothers eats it every days with their breakfast.",
    "Describe a sunset for somebody who has never seen one.",
    "What are the main causes of soil erosion, and what can a farmer on a steep hillside do against each of them without much money?",
    "Make a list of things to pack for a weekend in the mountains.",
    "Compare cats and dogs as pets in a short paragraph.",
    "Edit this paragraph for grammar and style: we was going to the market yesterday when it start to rain, so we has to run home very "
    "quick.",
)


@dataclass(frozen=True, slots=True)
class Sharing:
    """One run. `saving`: blocks saved over blocks needed without sharing (paper, section 6.3), summed over the steps."""

    kind: str  # beams, samples
    width: int
    saving: float
    requests: int
    steps: int
    prompt_tokens: float  # mean
    answer_tokens: float  # mean


def measure(
    *,
    model: str = "smollm2-135m",
    widths: Sequence[int] = (2, 4, 6),
    kinds: Sequence[str] = ("beams", "samples"),
    requests: int = len(INSTRUCTIONS),
    device: str = "auto",
    progress: Progress,
    done: Callable[[Sharing], None] = lambda sharing: None,
) -> list[Sharing]:
    """All widths of each kind. Answers have Alpaca's lengths, so that they are those of the simulated figure."""
    from minipaged.assembly import assemble

    check_int("requests", requests, 1, len(INSTRUCTIONS))
    for width in widths:
        check_int("width", width, 1, 64)
    lengths = np.minimum(ALPACA.output.draw(np.random.default_rng(0), requests), MAX_TOKENS).tolist()
    rows = requests * max(widths)
    whole = len(widths) * len(kinds) * requests
    cache = CacheConfig(block_size=BLOCK, enable_prefix_caching=False)
    config = EngineConfig(max_num_seqs=rows, max_num_batched_tokens=8192)
    blocks = rows * (-(-(MAX_TOKENS + 64) // BLOCK) + 1) + 1  # nobody is preempted
    found: list[Sharing] = []
    progress("loading", 0, whole)
    parts = assemble(model, cache, config, device=device, num_blocks=blocks, max_model_len=MAX_TOKENS + 64)
    engine = parts.engine
    account = _Account()
    engine.trace.subscribe(account.hear)
    for kind in kinds:
        for width in widths:
            account.used = account.saved = account.steps = 0
            prompts = 0
            for text, length in zip(INSTRUCTIONS[:requests], lengths, strict=True):
                params = SamplingParams(max_tokens=length, ignore_eos=True, **_branching(kind, width))
                output = engine.ask(text, params)
                if output.error is not None:
                    raise InputError(output.error)
                prompts += len(output.request.prompt_token_ids)
            ended = 0
            while engine.has_work:
                ended += sum(output.finished for output in engine.step())
                progress(f"{width} {kind}", len(found) * requests + ended, whole)
            sharing = Sharing(
                kind, width, account.saved / (account.used + account.saved), requests, account.steps,
                prompts / requests, sum(lengths) / requests,
            )  # fmt: skip
            found.append(sharing)
            done(sharing)
    return found


def _branching(kind: str, width: int) -> dict[str, Any]:
    if kind == "beams":
        return {"beam_width": width, "n": 1}
    if kind == "samples":
        return {"n": width, "temperature": 1.0, "seed": 0}
    raise InputError(f"kind must be beams or samples, not {kind!r}")


class _Account:
    """Sums over the steps of what the trace tells of the pool."""

    def __init__(self) -> None:
        self.used = self.saved = self.steps = 0

    def hear(self, delta: StepDelta) -> None:
        stats = delta.stats
        self.used += stats.total_blocks - 1 - stats.free_blocks
        self.saved += stats.shared_saved_blocks
        self.steps += 1


def kept() -> list[Sharing]:
    """What was measured with this version's results, if it was."""
    if not RESULTS.is_file():
        return []
    return [Sharing(**row) for row in read_results(RESULTS)["rows"]]
