"""Engines for tests of the server: real schedulers and block managers, answers by a script, steps that take a given time."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np

from minipaged.config import EngineConfig
from minipaged.engine import Engine
from minipaged.errors import RequestError
from minipaged.lab.simulation.hardware import GPUS
from minipaged.lab.simulation.simulated_runner import Done, SimulatedRunner
from minipaged.memory.block_manager import BlockManager
from minipaged.model.loading.chat_template import ChatTemplate
from minipaged.model.loading.shapes import shape
from minipaged.model.loading.tokenizer import ByteTokenizer
from minipaged.scheduling.plan import IntArray, StepPlan
from minipaged.scheduling.scheduler import Scheduler

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
END = 256


class ScriptRunner(SimulatedRunner):
    """Draws the byte that a text has at the token's position, again and again; a step takes `step_seconds` of real time.

    fail_at: the step that raises; die_at: the step in which the process dies without a word.
    """

    def __init__(
        self, text: bytes, step_seconds: float, num_blocks: int, block_size: int, fail_at: int, die_at: int
    ) -> None:
        super().__init__(shape("toy"), next(iter(GPUS.values())), num_blocks=num_blocks, block_size=block_size)
        self._script = np.frombuffer(text, np.uint8).astype(np.int32)
        self._seconds, self._fail_at, self._die_at = step_seconds, fail_at, die_at
        self._ends = self._script[:0]

    def launch(self, plan: StepPlan) -> Done:
        """As the script has it."""
        if plan.step == self._fail_at:
            raise RuntimeError("the script says: this step fails")
        if plan.step == self._die_at:
            os._exit(7)
        if self._seconds:
            time.sleep(self._seconds)
        self._ends = (plan.starts + plan.lengths)[plan.draw_rows]
        return super().launch(plan)

    def _draw(self, step: int, slots: IntArray) -> IntArray:
        drawn: IntArray = self._script[self._ends % len(self._script)].copy()
        drawn[drawn == 0] = END  # a zero byte in the script is the end
        return drawn


class TemplatedBytes(ByteTokenizer):
    """Bytes with a chat template."""

    def __init__(self) -> None:
        super().__init__()
        self.chat_template = ChatTemplate(TEMPLATE)

    def __reduce__(self) -> tuple[type[TemplatedBytes], tuple[()]]:
        return TemplatedBytes, ()


def scripted(
    progress: Any = None,
    *,
    text: bytes = b"abcdefghijklmnopqrstuvwxyz",
    step_seconds: float = 0.0,
    num_blocks: int = 4096,
    block_size: int = 16,
    max_num_seqs: int = 256,
    max_model_len: int = 8192,
    fail_at: int = -1,
    die_at: int = -1,
    load_seconds: float = 0.0,
    refuse: str = "",
) -> Engine:
    """A whole engine over a ScriptRunner."""
    if progress is not None:
        progress("loading weights", 1, 4)
    time.sleep(load_seconds)
    if refuse:
        raise RequestError(refuse)
    config = EngineConfig(max_num_seqs=max_num_seqs, max_model_len=max_model_len, preemption="recompute")
    scheduler = Scheduler(config, BlockManager(num_blocks, block_size), block_size)
    runner = ScriptRunner(text, step_seconds, num_blocks, block_size, fail_at, die_at)
    return Engine(
        scheduler, runner, codec=TemplatedBytes(), eos_token_ids=(END,), vocab_size=257, about={"model": "scripted"}
    )


def toy(progress: Any = None, **settings: Any) -> Engine:
    """The toy model: what it says depends on every key and value."""
    from minipaged.api import LLM

    engine = LLM("toy", device="cpu", progress=progress, **settings).engine
    engine.codec = TemplatedBytes()
    return engine
