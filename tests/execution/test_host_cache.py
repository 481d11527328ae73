"""Prefixes that leave the device for the host and come back: the same text, whatever the cache keeps, and fewer tokens computed."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from minipaged.assembly import build_engine
from minipaged.config import CacheConfig, EngineConfig, SamplingParams
from minipaged.engine import Engine
from minipaged.execution.paged_kv import PagedKV
from minipaged.scheduling.plan import Pairs
from minipaged.trace.snapshot import Snapshot
from tests.execution.test_quantized_engine import LOADED

GREEDY = SamplingParams(max_tokens=6, ignore_eos=True)
KINDS = {
    "greedy": GREEDY,
    "samples": SamplingParams(max_tokens=6, ignore_eos=True, n=3, temperature=0.9, seed=5),
    "beams": SamplingParams(max_tokens=6, ignore_eos=True, n=2, beam_width=3),
}
# Each value of each setting once; all combinations among the slow tests.
OFTEN = {("greedy", "int8", None), ("samples", "auto", "window:24"), ("beams", "auto", "sinks:4+window:24")}
COMBINATIONS = [
    pytest.param(*names, marks=() if names in OFTEN else pytest.mark.slow)
    for names in itertools.product(KINDS, ("auto", "int8", "fp8"), (None, "window:24", "sinks:4+window:24"))
]
PROMPTS = [[(31 * p + 7 * i) % 250 for i in range(40)] for p in range(4)]


def engine_of(*, blocks: int = 30, host_blocks: int = 200, **settings: Any) -> Engine:
    """An engine on the CPU; blocks of 4 tokens, a pool that holds two prompts."""
    limits = {
        name: settings.pop(name) for name in ("depth", "preemption", "max_num_batched_tokens") if name in settings
    }
    pool = CacheConfig(4, blocks, host_blocks, **settings)
    return build_engine(
        LOADED, pool, EngineConfig(max_model_len=256, **limits), device=torch.device("cpu"), dtype="float32"
    )


def rounds(engine: Engine, params: SamplingParams, times: int = 2) -> list[list[list[int]]]:
    """The prompts one after the other, twice: the second time their blocks have left the device."""
    texts = []
    for prompt in PROMPTS * times:
        output = engine.ask(prompt, params)
        while not output.finished:
            engine.step()
        texts.append([list(sample.token_ids) for sample in output.outputs])
    return texts


@pytest.mark.parametrize(("kind", "kept", "retention"), COMBINATIONS)
def test_L36_L55_L60_L70_the_text_is_the_same(kind: str, kept: str, retention: str | None) -> None:
    settings: dict[str, Any] = {"kv_cache_dtype": kept, "retention": retention}
    plain = engine_of(blocks=400, host_blocks=0, enable_prefix_caching=False, **settings)
    cached = engine_of(**settings)
    assert rounds(cached, KINDS[kind]) == rounds(plain, KINDS[kind])
    counters = cached.scheduler.counters
    if retention != "sinks:4+window:24":  # which publish nothing after the first release
        assert counters.host_hit_tokens > 0


@pytest.mark.parametrize(
    ("depth", "preemption"),
    [
        (1, "swap"),
        *(pytest.param(*names, marks=pytest.mark.slow) for names in ((0, "swap"), (0, "recompute"), (1, "recompute"))),
    ],
)
def test_L47_L55_swaps_and_cached_prefixes_share_the_host(depth: int, preemption: str) -> None:
    plain = engine_of(blocks=400, host_blocks=0, enable_prefix_caching=False)
    tight = engine_of(blocks=24, host_blocks=30, depth=depth, preemption=preemption, max_num_batched_tokens=24)
    longer = SamplingParams(max_tokens=20, ignore_eos=True)
    expected = rounds(plain, longer)
    asked = [tight.ask(prompt, longer) for prompt in PROMPTS * 2]
    while tight.has_work:
        tight.step()
    assert [[list(sample.token_ids) for sample in output.outputs] for output in asked] == expected
    assert tight.scheduler.counters.preemptions > 0


def test_hits_on_the_host_are_counted_and_told() -> None:
    engine, snapshot = engine_of(), Snapshot()
    engine.trace.subscribe(snapshot.apply)
    kinds = []
    engine.trace.subscribe(lambda delta: kinds.extend(event.kind for event in delta.events))
    rounds(engine, GREEDY, 1)
    output = engine.ask(PROMPTS[0], GREEDY)
    while not output.finished:
        engine.step()
    assert output.num_cached_tokens == 36
    assert snapshot.stats.host_hit_tokens == 36
    assert snapshot.stats.hit_tokens == 36
    assert snapshot.stats.host_cached > 0
    assert {"spill", "host_hit"} <= set(kinds)
    assert not snapshot.misfit


class ForgetsScales(PagedKV):
    """Scales stay behind when blocks come back."""

    def swap_in(self, pairs: Pairs) -> None:
        """Codes alone."""
        kept = {name: tensor.clone() for name, tensor in self.tensors.items() if "scale" in name}
        super().swap_in(pairs)
        for name, tensor in kept.items():
            self.tensors[name].copy_(tensor)


def test_L60_lost_scales_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = rounds(engine_of(blocks=400, host_blocks=0, kv_cache_dtype="int8"), GREEDY)
    monkeypatch.setattr("minipaged.assembly.PagedKV", ForgetsScales)
    assert rounds(engine_of(kv_cache_dtype="int8"), GREEDY) != plain
