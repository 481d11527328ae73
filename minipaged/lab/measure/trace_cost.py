"""What the trace costs the engine: steps of plain decoding with nobody listening, with a listener, a screen, a recording. No model.

The runner draws at once tokens that mean nothing, varied as a text's are (the same one every time would compress too well): all the time
that is seen is the control plane's and the trace's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from minipaged.config import EngineConfig, SamplingParams
from minipaged.engine import Engine
from minipaged.memory.block_manager import BlockManager
from minipaged.scheduling.plan import IntArray, StepPlan, StepTokens
from minipaged.scheduling.scheduler import Scheduler
from minipaged.serving.loop import sender as send_to
from minipaged.trace.events import StepDelta
from minipaged.trace.file import RecordPipe, StreamWriter, header_of

PROMPT, BLOCK, VOCABULARY = 128, 16, 10_000
STEPS, STRETCHES = 64, 6  # a stretch of one kind follows one of another; the quietest of each counts


class _Drawn:
    """What a step drew."""

    def __init__(self, token_ids: IntArray) -> None:
        self._token_ids = token_ids

    def tokens(self) -> StepTokens:
        return StepTokens(self._token_ids)


class _IdleRunner:
    """Computes nothing."""

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._rng = np.random.default_rng(1)

    def num_blocks(self) -> int:
        return self._num_blocks

    def launch(self, plan: StepPlan) -> _Drawn:
        return _Drawn(self._rng.integers(0, VOCABULARY, len(plan.draw_rows), np.int32))


class _NumberCodec:
    """A token reads as its number."""

    vocab_size = VOCABULARY

    def __init__(self) -> None:
        self._bytes = [f" {token}".encode() for token in range(VOCABULARY)]

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        return [int(word) for word in text.split()]

    def fewest_tokens(self, text: str) -> int:
        return 0

    def token_bytes(self, token: int, *, skip_special: bool = True) -> bytes:
        return self._bytes[token]


class _Sink:
    """A binary stream that forgets what it is told."""

    def write(self, data: bytes) -> int:
        return len(data)

    def flush(self) -> None:
        """Nothing waits."""


class TraceCost(NamedTuple):
    """Processor milliseconds of an engine's step."""

    alone: float  # nobody listens
    heard: float  # a listener that does nothing with the delta
    sent: float  # a listener that says it to a screen in another process
    recorded: float  # a listener that encodes it as a record, and a keyframe where one is due


def decoding_engine(num_seqs: int) -> Engine:
    """An engine without a model, `num_seqs` sequences of it decoding, with prompts of many lengths, so that block boundaries are spread."""
    longest = PROMPT + BLOCK + 4 * (STEPS + 2) * (STRETCHES + 1)
    num_blocks = num_seqs * -(-longest // BLOCK) + 1
    config = EngineConfig(max_num_seqs=num_seqs, max_num_batched_tokens=max(8192, num_seqs), max_model_len=longest)
    scheduler = Scheduler(config, BlockManager(num_blocks, BLOCK), BLOCK)
    engine = Engine(scheduler, _IdleRunner(num_blocks), codec=_NumberCodec())
    rng = np.random.default_rng(0)
    for _ in range(num_seqs):
        prompt = rng.integers(0, VOCABULARY, PROMPT + int(rng.integers(0, BLOCK))).tolist()
        engine.submit(prompt, SamplingParams(max_tokens=longest - len(prompt), ignore_eos=True))
    engine.step()
    while len(scheduler.waiting) or any(s.num_output == 0 for s in scheduler.sequences.values()):
        engine.step()
    return engine


def step_ms(engine: Engine, listener: Callable[[StepDelta], None] | None) -> float:
    """Processor milliseconds a step, block boundaries included, over one stretch of steps."""
    leave = engine.trace.subscribe(listener) if listener is not None else None
    engine.step()  # a listener's first delta tells all there is
    started = time.process_time()
    for _ in range(STEPS):
        engine.step()
    spent = time.process_time() - started
    if leave is not None:
        leave()
    return 1e3 * spent / STEPS


def measure_trace(num_seqs: int = 256) -> TraceCost:
    """The quietest stretch of each kind, since others on the machine only ever add to it."""
    engine = decoding_engine(num_seqs)
    sink: Any = _Sink()

    def recorder() -> Callable[[StepDelta], None]:
        return StreamWriter(sink, header_of(engine), state=engine.trace.state).delta

    def sender() -> Callable[[StepDelta], None]:
        return send_to(RecordPipe(sink, header_of(engine)))

    found = [
        (
            step_ms(engine, None),
            step_ms(engine, lambda delta: None),
            step_ms(engine, sender()),
            step_ms(engine, recorder()),
        )
        for _ in range(STRETCHES)
    ]
    return TraceCost(*(min(column) for column in zip(*found, strict=True)))
