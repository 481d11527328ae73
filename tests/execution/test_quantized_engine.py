"""An engine over a quantized KV cache writes the same text whatever becomes of its blocks: L60 and L70.

The reference is each request alone, its prompt computed at once, in a roomy pool without a prefix cache, its keys and values kept as the
same dtype. The mutants lose scales on one path each, and the scene that takes that path must find each.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from minipaged.assembly import build_engine, check_kv_dtype, choose_num_blocks
from minipaged.config import CacheConfig, EngineConfig, ModelConfig, SamplingParams
from minipaged.engine import Engine
from minipaged.errors import InputError
from minipaged.execution.paged_kv import PagedKV
from minipaged.execution.step_inputs import StepInputs
from minipaged.model.llama import Llama
from minipaged.model.loading.tokenizer import ByteTokenizer
from minipaged.model.loading.zoo import LoadedModel
from minipaged.scheduling.plan import Pairs

CONFIG = ModelConfig(
    name="tiny",
    vocab_size=257,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position=256,
)
LOADED = LoadedModel(CONFIG, Llama.random(CONFIG, 3, torch.float32, "cpu", std=0.2).pack(), ByteTokenizer(257))
DTYPES = ("int8", "fp8")
SHARED = [(7 * i + 3) % 250 for i in range(26)]
PROMPTS = [[*SHARED, *((31 * p + 5 * i) % 250 for i in range(3 + 4 * p))] for p in range(5)]
GREEDY = SamplingParams(max_tokens=20, ignore_eos=True)
SAMPLES = SamplingParams(max_tokens=14, ignore_eos=True, n=3, temperature=0.9, seed=5)
BEAMS = SamplingParams(max_tokens=10, ignore_eos=True, n=3, beam_width=3)


def engine_of(kept: str, *, blocks: int = 400, **limits: Any) -> Engine:
    """An engine on the CPU; blocks of 4 tokens."""
    names = ("enable_prefix_caching", "num_host_blocks")
    pool = CacheConfig(4, blocks, kv_cache_dtype=kept, **{k: limits.pop(k) for k in names if k in limits})  # type: ignore[arg-type]
    config = EngineConfig(max_model_len=256, **limits)
    return build_engine(LOADED, pool, config, device=torch.device("cpu"), dtype="float32")


def answers(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> list[list[list[int]]]:
    """Token ids of every output of every prompt, all asked at once."""
    asked = [engine.ask(prompt, params) for prompt in prompts]
    while engine.has_work:
        engine.step()
    assert all(output.error is None for output in asked)
    return [[sample.token_ids for sample in output.outputs] for output in asked]


@cache
def alone(kept: str, params: SamplingParams) -> list[list[list[int]]]:
    """The reference, of each prompt. Kept, so that a mutant is not compared with itself."""
    found = []
    for prompt in PROMPTS:
        found += answers(engine_of(kept, enable_prefix_caching=False), [prompt], params)
    return found


def batched(kept: str) -> None:
    assert answers(engine_of(kept), PROMPTS, GREEDY) == alone(kept, GREEDY)


def chunked(kept: str) -> None:
    engine = engine_of(kept, max_num_batched_tokens=7, enable_prefix_caching=False)
    assert answers(engine, PROMPTS, GREEDY) == alone(kept, GREEDY)


def hits(kept: str) -> None:
    engine, expected = engine_of(kept), alone(kept, GREEDY)
    assert answers(engine, PROMPTS[:1], GREEDY) == expected[:1]
    assert answers(engine, PROMPTS[1:], GREEDY) == expected[1:]
    assert engine.scheduler.counters.hit_tokens >= 4 * 24


def recomputed(kept: str) -> None:
    engine = engine_of(kept, blocks=30, preemption="recompute", enable_prefix_caching=False)
    assert answers(engine, PROMPTS, GREEDY) == alone(kept, GREEDY)
    assert engine.scheduler.counters.preemptions > 0


def swapped(kept: str) -> None:
    engine = engine_of(kept, blocks=30, num_host_blocks=60, preemption="swap", enable_prefix_caching=False)
    assert answers(engine, PROMPTS, GREEDY) == alone(kept, GREEDY)
    assert engine.scheduler.counters.swaps > 0


def forked(kept: str) -> None:
    engine = engine_of(kept)
    assert answers(engine, PROMPTS[:3], SAMPLES) == alone(kept, SAMPLES)[:3]
    assert engine.scheduler.counters.copies > 0


def beams(kept: str) -> None:
    engine = engine_of(kept, blocks=60, preemption="recompute", max_num_batched_tokens=16)
    assert answers(engine, PROMPTS[:3], BEAMS) == alone(kept, BEAMS)[:3]
    assert engine.scheduler.counters.copies > 0


SCENES = (batched, chunked, hits, recomputed, swapped, forked, beams)


@pytest.mark.parametrize("kept", DTYPES)
@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
def test_L60_what_becomes_of_blocks_does_not_change_the_text(scene: Any, kept: str) -> None:
    scene(kept)


def with_scales(store: PagedKV, layer: int, changed: tuple[Tensor, Tensor], call: Any) -> Tensor:
    """The call, while the layer's scales are others."""
    kept, store.scales[layer] = store.scales[layer], changed
    try:
        found: Tensor = call()
    finally:
        store.scales[layer] = kept
    return found


class LostInCopies(PagedKV):
    """A copy on write leaves the scales behind: whoever writes on in a fork's block has another's."""

    def copy(self, pairs: Pairs) -> None:
        kept = {name: tensor.clone() for name, tensor in self.tensors.items() if "scale" in name}
        super().copy(pairs)
        for name, tensor in kept.items():
            self.tensors[name].copy_(tensor)


class LostInSwaps(PagedKV):
    """Blocks come back from the host with the scales of whoever was there meanwhile."""

    def swap_in(self, pairs: Pairs) -> None:
        kept = {name: tensor.clone() for name, tensor in self.tensors.items() if "scale" in name}
        super().swap_in(pairs)
        for name, tensor in kept.items():
            self.tensors[name].copy_(tensor)


class LostOnHits(PagedKV):
    """A chunk reads what it has found, or an earlier chunk has written, without the scales."""

    def attend(self, layer: int, query: Tensor, inputs: StepInputs) -> Tensor:
        scales = self.scales[layer]
        assert scales is not None
        changed = tuple(scale.clone() for scale in scales)
        starts = inputs.chunk_starts.tolist()
        for row, length in enumerate(inputs.chunk_lengths.tolist()):
            before = length - (starts[row + 1] - starts[row])
            for scale in changed:
                scale[inputs.chunk_tables[row, : before // self.block_size].long()] = 1.0
        attend = super().attend
        return with_scales(self, layer, (changed[0], changed[1]), lambda: attend(layer, query, inputs))


class OfTheWrongHead(PagedKV):
    """Every head's keys and values are read with its neighbour's scales."""

    def attend(self, layer: int, query: Tensor, inputs: StepInputs) -> Tensor:
        scales = self.scales[layer]
        assert scales is not None
        attend = super().attend
        rolled = scales[0].roll(1, 1), scales[1].roll(1, 1)
        return with_scales(self, layer, rolled, lambda: attend(layer, query, inputs))


class ValuesUnscaled(PagedKV):
    """The scales of values are never applied."""

    def attend(self, layer: int, query: Tensor, inputs: StepInputs) -> Tensor:
        scales = self.scales[layer]
        assert scales is not None
        attend = super().attend
        return with_scales(self, layer, (scales[0], torch.ones_like(scales[1])), lambda: attend(layer, query, inputs))


def near_dense(kept: str) -> None:
    """Not another network: with its seven bits the first tokens are the plain cache's."""
    plain, found = alone("auto", GREEDY), alone.__wrapped__(kept, GREEDY)
    same = sum(a == b for x, y in zip(plain, found, strict=True) for a, b in zip(x[0][:6], y[0][:6], strict=True))
    assert same >= 24, f"{same} of 30 tokens are the plain cache's"


def test_L60_a_quantized_cache_is_near_the_plain_one() -> None:
    near_dense("int8")


@pytest.mark.parametrize("kept", DTYPES)
@pytest.mark.parametrize(
    ("mutant", "scene"),
    [(LostInCopies, forked), (LostInCopies, beams), (LostInSwaps, swapped), (LostOnHits, hits), (LostOnHits, chunked)],
    ids=lambda one: one.__name__,
)
def test_L70_scales_that_are_lost_are_found(
    mutant: type[PagedKV], scene: Any, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for params in (GREEDY, SAMPLES, BEAMS):
        alone(kept, params)
    monkeypatch.setattr("minipaged.assembly.PagedKV", mutant)
    with pytest.raises(AssertionError):
        scene(kept)


@pytest.mark.parametrize("mutant", [OfTheWrongHead, ValuesUnscaled])
def test_L60_scales_that_are_not_applied_are_found(mutant: type[PagedKV], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minipaged.assembly.build_runner", spoiling(mutant))
    with pytest.raises(AssertionError, match="are the plain cache's"):
        near_dense("int8")


def spoiling(mutant: type[PagedKV]) -> Any:
    """build_runner with the mutant for a store, where the cache is quantized."""
    from minipaged import assembly

    build = assembly.build_runner

    def build_runner(loaded: LoadedModel, pool: CacheConfig, *rest: Any, **options: Any) -> Any:
        runner = build(loaded, pool, *rest, **options)
        if pool.kv_cache_dtype != "auto":
            runner.kv.__class__ = mutant
        return runner

    return build_runner


@pytest.mark.parametrize("kept", DTYPES)
def test_a_block_takes_what_the_config_says(kept: str) -> None:
    pool = CacheConfig(4, 30, kv_cache_dtype=kept)  # type: ignore[arg-type]
    store = PagedKV(CONFIG, 30, 4, kept_as=pool.kv_dtype("float32"), num_host_blocks=3)
    size = sum(tensor[0].nbytes for tensor in store.tensors.values())
    assert size == 4 * CONFIG.kv_bytes_per_token(pool.kv_dtype("float32"))
    assert sum(tensor[0].nbytes for tensor in store.host.values()) == size
    assert store.tensors.keys() == store.host.keys()
    engine = engine_of(kept)
    about = engine.describe()["engine"] if "engine" in engine.describe() else engine.describe()
    assert about["kv_bytes_per_token"] * 4 == size  # type: ignore[index]
    assert about["kv_cache_dtype"] == pool.kv_dtype("float32")  # type: ignore[index]


def test_a_quantized_pool_has_nearly_twice_the_blocks() -> None:
    from minipaged.model.loading.shapes import shape

    cpu = torch.device("cpu")
    plain, int8, fp8 = (
        choose_num_blocks(shape("llama-3-8b"), 16, kept, cpu) for kept in ("bfloat16", "int8", "float8_e4m3fn")
    )
    assert int8 == fp8
    assert 1.9 <= int8 / plain <= 2


def test_float8_is_refused_on_a_gpu_that_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minipaged.assembly.use_triton", lambda tensor: True)
    monkeypatch.setattr("torch.empty", lambda *shape, device: None)
    for found, refused in (((8, 0), True), ((8, 9), False), ((9, 0), False)):
        monkeypatch.setattr("minipaged.assembly.capability", lambda device, found=found: found)
        for kept in ("auto", "int8", "fp8"):
            pool = CacheConfig(4, 30, kv_cache_dtype=kept)  # type: ignore[arg-type]
            if refused and kept == "fp8":
                with pytest.raises(InputError, match=r"compute capability 8\.9.*has 8\.0: use int8"):
                    check_kv_dtype(pool, torch.device("cuda"))
            else:
                check_kv_dtype(pool, torch.device("cuda"))


def test_a_dtype_that_is_not_offered_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="kv_cache_dtype must be one of auto, int8, fp8, not 'int4'"):
        CacheConfig(kv_cache_dtype="int4")  # type: ignore[arg-type]
