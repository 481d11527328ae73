"""What forgetting costs and saves: perplexity of a text and blocks held under each retention policy, and a long stream's memory and time.

The text is the shipped one of `lab quality`. It is read as one prompt in chunks, through the engine: blocks go back as the policy says, so
what is measured is what a user gets. Heavy hitters keep all of a prompt until it has been read, so there the text is what the engine
draws, of which nothing else is allowed: one token in each step.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from minipaged.assembly import build_engine, retention_of
from minipaged.config import CacheConfig, EngineConfig, Progress, SamplingParams, check_int
from minipaged.engine import Engine
from minipaged.errors import InputError
from minipaged.lab.measure.quality import TEXT
from minipaged.model.loading import zoo
from minipaged.model.loading.placement import choose_device
from minipaged.model.loading.zoo import LoadedModel
from minipaged.scheduling.request import Sequence as RequestSequence

BLOCK = 16
CHUNK = 32  # tokens of a step: short, so that blocks go back all along the text
SINKS = 4
MARKS = 10  # places of a stream that are told of


@dataclass(frozen=True)
class Forgetting:
    """One policy over the text. most_blocks: the most that were held at once, of those that a policy that keeps all holds."""

    retention: str
    model: str
    tokens: int
    perplexity: float
    most_blocks: int
    all_blocks: int
    kv_bytes: int  # of most_blocks


@dataclass(frozen=True)
class StreamMark:
    """A place in a stream of tokens. step_ms: the median of the steps since the mark before; blocks: held then."""

    retention: str
    model: str
    tokens: int
    step_ms: float
    blocks: int
    kv_bytes: int


def policies(budget: int) -> tuple[str, ...]:
    """Everything, and what keeps `budget` tokens: the last ones, the first SINKS and the last, or heavy hitters and the last by halves."""
    check_int("budget", budget, SINKS + BLOCK)
    heavy = budget // 2
    return ("all", f"window:{budget}", f"sinks:{SINKS}+window:{budget - SINKS}", f"h2o:{heavy}+{budget - heavy}")


def measure(
    model: str, retentions: Sequence[str], *, tokens: int = 700, device: str = "auto", progress: Progress | None = None
) -> Iterator[Forgetting]:
    """Each policy over the first `tokens` tokens of the text. model: a zoo name."""
    loaded = _load(model, device, progress)
    text = loaded.tokenizer.encode(TEXT.read_text(encoding="utf-8"))[: check_int("tokens", tokens, 2)]
    if len(text) < tokens:
        raise InputError(f"the text has {len(text)} tokens of {model}, not {tokens}")
    for number, retention in enumerate(retentions):
        if progress is not None:
            progress(f"{model}, {retention}", number, len(retentions))
        engine, block_bytes = _engine(loaded, retention, device, tokens + 2)
        if retention_of(loaded.config, CacheConfig(block_size=BLOCK, retention=retention)).heavy:
            most, losses = _drawn(engine, text, loaded.config.vocab_size)
            yield _forgetting(retention, model, losses, most, block_bytes)
            continue
        # One token more than the text's next, so that its blocks are still held when all of it has been read.
        output = engine.ask(text, SamplingParams(max_tokens=2, ignore_eos=True, prompt_logprobs=0))
        if output.error is not None:
            raise InputError(output.error)
        most = _run(engine)
        found = output.prompt_logprobs or []
        losses = [-entry[token].logprob for entry, token in zip(found[1:], text[1:], strict=True) if entry is not None]
        yield _forgetting(retention, model, losses, most, block_bytes)


def _forgetting(retention: str, model: str, losses: list[float], most: int, block_bytes: int) -> Forgetting:
    return Forgetting(
        retention=retention,
        model=model,
        tokens=len(losses),
        perplexity=math.exp(sum(losses) / len(losses)),
        most_blocks=most,
        all_blocks=-(-(len(losses) + 1) // BLOCK),
        kv_bytes=most * block_bytes,
    )


def _drawn(engine: Engine, text: list[int], vocab_size: int) -> tuple[int, list[float]]:
    """(the most blocks held, the loss of each token) where the text is drawn behind its first token, and nothing else may be."""

    def only_the_next(sequence: RequestSequence) -> bytes:
        allowed = bytearray(-(-vocab_size // 8))
        token = text[len(sequence.token_ids)]
        allowed[token // 8] = 1 << token % 8
        return bytes(allowed)

    output = engine.ask(text[:1], SamplingParams(max_tokens=len(text) - 1, ignore_eos=True, logprobs=0))
    if output.error is not None:
        raise InputError(output.error)
    output.request.mask_of = only_the_next  # read when the request is let in, in the first step
    most = _run(engine)
    drawn = output.outputs[0]
    if list(drawn.token_ids) != text[1:]:
        raise RuntimeError("the engine drew other tokens than the text's")
    return most, [-entry[token].logprob for entry, token in zip(drawn.logprobs or (), drawn.token_ids, strict=True)]


def stream(
    model: str, retention: str, *, tokens: int, device: str = "auto", progress: Progress | None = None
) -> Iterator[StreamMark]:
    """Draw `tokens` tokens after the text's beginning, however long the model's context is. InputError if the policy keeps all of them."""
    loaded = _load(model, device, progress)
    if retention_of(loaded.config, CacheConfig(block_size=BLOCK, retention=retention)).window is None:
        raise InputError(f"a stream of {tokens} tokens needs a policy that forgets, not {retention}")
    prompt = loaded.tokenizer.encode(TEXT.read_text(encoding="utf-8"))[:64]
    engine, block_bytes = _engine(loaded, retention, device, len(prompt) + tokens)
    output = engine.ask(prompt, SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=1.0, seed=0))
    if output.error is not None:
        raise InputError(output.error)
    times, every = list[float](), max(1, tokens // MARKS)
    while engine.has_work:
        began = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - began)
        drawn, blocks = output.request.sequences[0].num_output, engine.scheduler.manager.usage().referenced
        if drawn and drawn % every == 0 and engine.has_work:
            median = 1e3 * statistics.median(times)
            yield StreamMark(retention, model, drawn, median, blocks, blocks * block_bytes)
            times.clear()
        if progress is not None and drawn % 64 == 0:
            progress(f"{model}, {retention}", drawn, tokens)


def _load(model: str, device: str, progress: Progress | None) -> LoadedModel:
    return zoo.load(model, device=choose_device(device), dtype=torch.float32, progress=progress)


def _engine(loaded: LoadedModel, retention: str, device: str, longest: int) -> tuple[Engine, int]:
    """An engine with just enough blocks, and the bytes of one."""
    cache = CacheConfig(block_size=BLOCK, enable_prefix_caching=False, watermark=0.0, retention=retention)
    config = EngineConfig(max_num_seqs=1, max_num_batched_tokens=CHUNK, max_model_len=longest)
    kept = retention_of(loaded.config, cache)
    most = (
        kept.most_blocks(longest, BLOCK, CHUNK) if not kept.heavy else kept.most_blocks_of_request(1, longest, 1, BLOCK)
    )
    cache = replace(cache, num_blocks=most + 1)
    engine = build_engine(loaded, cache, config, device=choose_device(device), dtype="float32")
    return engine, loaded.config.kv_bytes_per_token("float32", heavy_hitters=kept.heavy > 0) * BLOCK


def _run(engine: Engine) -> int:
    """To the end; the most blocks that were held after a step."""
    most = 0
    while engine.has_work:
        engine.step()
        most = max(most, engine.scheduler.manager.usage().referenced)
    return most
