"""The engine of `minipaged bench screen`: it serves the same requests with its trace listened to, or not, and times both alike.

It runs in the engine's process, where the clock is.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from minipaged.assembly import build_engine
from minipaged.config import CacheConfig, EngineConfig, SamplingParams
from minipaged.engine import Engine
from minipaged.model.loading import zoo
from minipaged.model.loading.placement import choose_device, choose_dtype
from minipaged.model.loading.tokenizer import ByteTokenizer
from minipaged.trace.events import StepDelta

CONSONANTS, VOWELS = "bdfghjklmnprstvwz", "aeiou"

_TOPICS = (
    "You keep a library that never closes. Answer as its keeper would, in one calm paragraph, and name a book. ",
    "You are a careful cook. Say what to do step by step, with the weight of each thing, and warn of what burns. ",
    "You explain computers to a child who likes trains. Use tracks, wagons and tickets, and no word that is longer. ",
    "You write letters to neighbours. Be polite, be brief, and end with something about the weather of the day. ",
)
_ASKED = (
    "What is a page?",
    "Where do I begin?",
    "Tell me about the sea.",
    "Why must I wait?",
    "Who was here before me?",
)


class MadeUpWords(ByteTokenizer):
    """Text for a model drawn at random: bytes for prompts, and for every id beyond them a word that can be read aloud."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size)
        # Made once, as a vocabulary is looked up and not made; 0 to 256 are bytes and the end.
        self._words = [_word(token_id) if token_id > 256 else b"" for token_id in range(vocab_size)]

    def token_bytes(self, token_id: int, *, skip_special: bool = True) -> bytes:
        if 256 < token_id < self.vocab_size:
            return self._words[token_id]
        return super().token_bytes(token_id, skip_special=skip_special)


def _word(number: int) -> bytes:
    """A number in syllables."""
    syllables = ""
    while number:
        number, syllable = divmod(number, len(CONSONANTS) * len(VOWELS))
        consonant, vowel = divmod(syllable, len(VOWELS))
        syllables += CONSONANTS[consonant] + VOWELS[vowel]
    return f" {syllables}".encode()


def requests(count: int, max_tokens: int) -> list[tuple[str, SamplingParams]]:
    """`count` requests: four beginnings shared by many, every fourth with four samples, lengths from two thirds of `max_tokens` up."""
    made = []
    for number in range(count):
        text = _TOPICS[number % len(_TOPICS)] + f"{_ASKED[number % len(_ASKED)]} ({number})"
        length = max_tokens * (20 + number * 7 % 11) // 30
        n = 4 if number % 4 == 3 else 1
        made.append((text, SamplingParams(n=n, temperature=0.8, seed=number, max_tokens=length, ignore_eos=True)))
    return made


def timed_engine(
    model: str, settings: dict[str, Any], cores: Sequence[int] = (), progress: Callable[..., None] | None = None
) -> TimedEngine:
    """A factory for EngineProcess. cores: those that this process keeps to, with a thread of torch's on each; (): any, as torch likes."""
    import torch

    if cores:
        torch.set_num_threads(len(cores))
        os.sched_setaffinity(0, cores)
    given = dict(settings)
    device = choose_device(given.pop("device", "auto"))
    precision = choose_dtype(given.pop("dtype", "auto"), device)
    loaded = zoo.load(model, device=device, dtype=precision, weights=given.pop("weights", "auto"), progress=progress)
    if model.startswith("random:"):
        loaded = replace(loaded, tokenizer=MadeUpWords(loaded.config.vocab_size))
    cache = CacheConfig(num_blocks=given.pop("num_blocks"), num_host_blocks=given.pop("num_host_blocks", 0))
    limit = min(4096, loaded.config.max_position)
    config = EngineConfig(max_model_len=limit, depth=int(device.type == "cuda"), **given)
    return TimedEngine(build_engine(loaded, cache, config, device=device, dtype=str(precision).removeprefix("torch.")))


class TimedEngine:
    """What EngineLoop wants of an engine. The setting "quiet" serves all that was asked with nobody listening; "clock" starts a round.

    A round's figures come back as JSON, in the words of the setting "report".
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.codec = engine.codec
        self.trace = self
        self._listener: Callable[[StepDelta], None] | None = None
        self._silence: Callable[[], None] | None = None
        self._report: dict[str, float] = {}
        self._started = self._cpu = 0.0
        self._tokens = self._steps = self._preemptions = 0

    def subscribe(self, listener: Callable[[StepDelta], None]) -> None:
        """There is one listener: the loop."""
        self._listener = listener
        self._listen()

    def _listen(self) -> None:
        if self._silence is None and self._listener is not None:
            self._silence = self._engine.trace.subscribe(self._listener)

    def describe(self) -> dict[str, object]:
        """The engine's own."""
        return self._engine.describe()

    @property
    def has_work(self) -> bool:
        """The engine's own."""
        return self._engine.has_work

    def submit(self, prompt: str, params: SamplingParams) -> int:
        """The engine's own."""
        return self._engine.submit(prompt, params)

    def abort(self, request: int) -> None:
        """The engine's own."""
        self._engine.abort(request)

    def step(self) -> None:
        """One step, inside a round's time from the first to the last."""
        if not self._steps:
            self._engine.scheduler.manager.reset_prefix_cache()
            counters = self._engine.scheduler.counters
            self._tokens, self._preemptions = counters.generated_tokens, counters.preemptions
            self._started, self._cpu = time.perf_counter(), time.process_time()
        self._engine.step()
        self._steps += 1
        if not self._engine.has_work:
            seconds = time.perf_counter() - self._started
            counters = self._engine.scheduler.counters
            tokens = counters.generated_tokens - self._tokens
            self._report = {
                "tokens": tokens,
                "seconds": seconds,
                "steps": self._steps,
                "cpu_seconds": time.process_time() - self._cpu,
                "tokens_per_second": tokens / seconds,
                "preemptions": counters.preemptions - self._preemptions,
            }
            self._steps = 0

    def knob(self, name: str, value: object) -> str:
        """quiet: all that was asked, unheard. report: the last round's figures."""
        if name == "quiet":
            if self._silence is not None:
                self._silence()
                self._silence = None
            while self._engine.has_work:
                self.step()
            self._listen()
        return json.dumps(self._report)
