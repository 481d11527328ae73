"""What a number format costs in quality: a text read once in float32 and once in each format, and how far the predictions move.

The text ships with this module: the United States Declaration of Independence (1776) and Lincoln's Gettysburg Address (1863), both in the
public domain. It is cut into windows, each a prompt of its own, whose tokens attend to keys and values as the format keeps them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minipaged.config import Progress, check_choice, check_int
from minipaged.errors import InputError
from minipaged.execution.paged_kv import PagedKV
from minipaged.execution.step_inputs import StepInputs, inputs_of
from minipaged.kernels.cache.quantize import LARGEST_CODE
from minipaged.model.llama import Llama
from minipaged.model.loading import zoo
from minipaged.model.loading.placement import choose_device
from minipaged.model.loading.zoo import LoadedModel
from minipaged.scheduling.plan import StepPlan

TEXT = Path(__file__).parent / "speeches.txt"
BLOCK = 16
WINDOW = 512

Stored = Callable[[LoadedModel, int, torch.device], PagedKV]  # the model, blocks, where


class Rounded(PagedKV):
    """Keys and values rounded to bfloat16, so that nothing but the cache has sixteen bits."""

    def write(self, layer: int, key: Tensor, value: Tensor, inputs: StepInputs) -> None:
        """As PagedKV's."""
        super().write(layer, key.bfloat16().float(), value.bfloat16().float(), inputs)


class OneScale(PagedKV):
    """Float8 with scale 1 for all, the default of other engines where a checkpoint names no scale."""

    def write(self, layer: int, key: Tensor, value: Tensor, inputs: StepInputs) -> None:
        """As PagedKV's."""
        scales = self.scales[layer]
        if scales is None:
            raise ValueError("one scale for all is for a cache of codes")
        kept = self.keys[layer].dtype
        largest = LARGEST_CODE[kept]
        for cache, new, scale in ((self.keys[layer], key, scales[0]), (self.values[layer], value, scales[1])):
            codes = new.clamp(-largest, largest).to(kept).view(torch.int8)
            flat = cache.view(torch.int8).flatten(0, 1)
            flat[inputs.slot_mapping.long()] = codes
            scale.fill_(1.0)


def _kept_as(name: str | None, kind: type[PagedKV] = PagedKV) -> Stored:
    def make(loaded: LoadedModel, blocks: int, device: torch.device) -> PagedKV:
        return kind(loaded.config, blocks, BLOCK, kept_as=name, device=device)

    return make


@dataclass(frozen=True)
class Format:
    """A number format. store: its keys and values; kv_dtype: what they take, as ModelConfig.kv_bytes_per_token names it."""

    store: Stored
    kv_dtype: str


REFERENCE = "float32"
FORMATS: dict[str, Format] = {
    REFERENCE: Format(_kept_as(None), "float32"),
    "bfloat16": Format(_kept_as(None, Rounded), "bfloat16"),
    "int8": Format(_kept_as("int8"), "int8"),
    "fp8": Format(_kept_as("float8_e4m3fn"), "float8_e4m3fn"),
    "fp8-tensor": Format(_kept_as("float8_e4m3fn", OneScale), "float8_e4m3fn"),
}


@dataclass(frozen=True)
class Quality:
    """One format over the text. kl: mean of KL(float32 || format), nats a token; same: share of tokens whose likeliest next is equal."""

    format: str
    model: str
    tokens: int
    perplexity: float
    ratio: float  # over the reference's
    kl: float
    same: float
    device: str
    kv_bytes_per_token: int
    tokens_per_second: float


def windows_of(model: LoadedModel, text: str, size: int) -> list[list[int]]:
    """The text's tokens in pieces of `size`, the last, shorter one left out. InputError if not one is full."""
    tokens = model.tokenizer.encode(text)
    if len(tokens) < size:
        raise InputError(f"the text has {len(tokens)} tokens of {model.config.name}, not one window of {size}")
    return [tokens[start : start + size] for start in range(0, len(tokens) - size + 1, size)]


def predictions(model: Llama, store: PagedKV, tokens: Sequence[int]) -> Tensor:
    """Log-probabilities of the next token after each, float32 [tokens, vocab], the tokens being one prompt in blocks 1, 2, ..."""
    count = len(tokens)
    blocks = -(-count // store.block_size)
    plan = StepPlan(
        step=1,
        swap_outs=(),
        swap_ins=(),
        copies=(),
        seq_ids=np.zeros(1, np.int64),
        slots=np.zeros(1, np.int32),
        starts=np.zeros(1, np.int32),
        lengths=np.array([count], np.int32),
        token_ids=np.array(tokens, np.int32),
        tables=np.arange(1, blocks + 1, dtype=np.int32)[None],
        draw_rows=np.zeros(0, np.int32),
        draw_slots=np.zeros(0, np.int32),
        sampling=None,
    )
    inputs = inputs_of(plan, store.block_size, store.device)

    def attention(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        store.write(layer, key, value, inputs)
        return store.attend(layer, query, inputs)

    with torch.inference_mode():
        return model.logits(model(inputs.token_ids.long(), inputs.positions, attention)).log_softmax(-1)


def measure(
    model: str,
    formats: Sequence[str] = tuple(FORMATS),
    *,
    window: int = WINDOW,
    most_windows: int | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> Iterator[Quality]:
    """Each format's quality, the reference first. model: a zoo name. most_windows: of the text, None for all."""
    check_int("window", window, 2, 4096)
    for name in formats:
        check_choice("format", name, FORMATS)
    names = [REFERENCE, *(name for name in dict.fromkeys(formats) if name != REFERENCE)]
    place = choose_device(device)
    loaded = zoo.load(model, device=place, dtype=torch.float32, progress=progress)
    windows = windows_of(loaded, TEXT.read_text(encoding="utf-8"), window)[:most_windows]
    stores = {name: FORMATS[name].store(loaded, -(-window // BLOCK) + 1, place) for name in names}
    sums = {name: np.zeros(4) for name in names}  # of losses, KL, equal tokens, seconds
    for number, tokens in enumerate(windows):
        if progress is not None:
            progress(f"{model}, windows of {window} tokens", number, len(windows))
        following = torch.tensor(tokens[1:], device=place)[:, None]
        reference = None
        for name in names:
            began = time.perf_counter()
            found = predictions(loaded.model, stores[name], tokens)[:-1]
            loss = -float(found.gather(1, following).double().sum())
            seconds = time.perf_counter() - began
            reference = found if reference is None else reference
            kl = float((reference.exp() * (reference - found)).sum(-1).double().sum())
            equal = int((reference.argmax(-1) == found.argmax(-1)).sum())
            sums[name] += (loss, kl, equal, seconds)
    count = len(windows) * (window - 1)
    plain = float(np.exp(sums[REFERENCE][0] / count))
    for name in names:
        loss, kl, same, seconds = sums[name].tolist()
        perplexity = float(np.exp(loss / count))
        yield Quality(
            format=name,
            model=model,
            tokens=count,
            perplexity=perplexity,
            ratio=perplexity / plain,
            kl=kl / count,
            same=same / count,
            device=str(place),
            kv_bytes_per_token=loaded.config.kv_bytes_per_token(FORMATS[name].kv_dtype),
            tokens_per_second=len(windows) * window / seconds,
        )
