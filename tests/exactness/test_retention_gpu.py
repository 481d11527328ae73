"""Windows, sinks and heavy hitters on a GPU: the compiled kernels against the definition, graphs and overlap against the plain path."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from minipaged.assembly import build_engine
from minipaged.config import CacheConfig, EngineConfig, SamplingParams
from minipaged.engine import Engine
from minipaged.kernels.attention import paged_decode, paged_prefill
from minipaged.kernels.attention.heavy_hitters import Budget, Marks, keep_heaviest_torch
from minipaged.memory.retention import Retention
from minipaged.model.loading import zoo
from minipaged.model.loading.zoo import LoadedModel
from tests.kernels.paged_cases import assert_close
from tests.kernels.test_heavy_hitters import copied, rows_of
from tests.kernels.test_sinks import stream_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.usefixtures("unset_choice"),
]
KINDS = (
    SamplingParams(max_tokens=150, ignore_eos=True),
    SamplingParams(n=3, temperature=1.0, seed=1, max_tokens=60, ignore_eos=True),
    SamplingParams(beam_width=2, max_tokens=40, ignore_eos=True),
)
POLICIES = [Retention(64, 4), Retention(300, 70), Retention(17, 16)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [(2, 1), (2, 4)], ids=str)
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_L57_L64_decode_with_sinks(policy: Retention, heads: tuple[int, int], dtype: torch.dtype) -> None:
    """Few rows, which are cut into chunks, and many."""
    for starts in ([700], [5, 80, 333, 700], [64 + 3 * i for i in range(40)]):
        rows = [(n, 1) for n in starts]
        stream = stream_of(rows, policy, block_size=16, heads=heads, head_dim=64, dtype=dtype, device="cuda")
        assert_close(paged_decode(*stream.decode(), window=stream.window, sinks=stream.sinks), stream.expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [(2, 1), (1, 4)], ids=str)
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_L57_L64_prefill_with_sinks(policy: Retention, heads: tuple[int, int], dtype: torch.dtype) -> None:
    rows = [(0, 150), (90, 60), (500, 130), (20, 2)]
    stream = stream_of(rows, policy, block_size=16, heads=heads, head_dim=128, dtype=dtype, device="cuda")
    assert_close(paged_prefill(*stream.arguments, window=stream.window, sinks=stream.sinks), stream.expected)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return zoo.load("random:smollm2-135m", device="cuda", dtype=torch.float32)


def engine_on(
    loaded: LoadedModel, retention: str, *, graphs: bool, depth: int, blocks: int = 400, **limits: Any
) -> Engine:
    config = EngineConfig(max_model_len=3000, depth=depth, max_num_seqs=32, max_num_batched_tokens=64, **limits)
    cache = CacheConfig(num_blocks=blocks, block_size=16, num_host_blocks=100, retention=retention)
    return build_engine(loaded, cache, config, device=torch.device("cuda"), dtype="float32", graphs=graphs)


def texts(engine: Engine, kinds: tuple[SamplingParams, ...] = KINDS) -> list[list[list[int]]]:
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(5, 4000, (5 + 37 * i % 190,), generator=generator).tolist() for i in range(9)]
    outputs = [engine.ask(prompt, kinds[i % len(kinds)]) for i, prompt in enumerate(prompts)]
    while engine.has_work:
        engine.step()
    assert [output.error for output in outputs] == [None] * len(outputs)
    assert engine.scheduler.manager.usage().referenced == 0
    return [[o.token_ids for o in output.outputs] for output in outputs]


@pytest.mark.parametrize("retention", ["window:48", "sinks:4+window:48"])
def test_L71_graphs_and_overlap_give_the_same_text(loaded: LoadedModel, retention: str) -> None:
    expected = texts(engine_on(loaded, retention, graphs=False, depth=0))
    for graphs, depth in ((True, 0), (True, 1)):
        assert texts(engine_on(loaded, retention, graphs=graphs, depth=depth)) == expected
    for preemption in ("recompute", "swap"):
        engine = engine_on(loaded, retention, graphs=True, depth=1, blocks=40, preemption=preemption)
        assert texts(engine) == expected
        assert engine.scheduler.counters.preemptions > 0


@pytest.mark.parametrize("codes", [None, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)], ids=str)
def test_L64_L72_heavy_hitters_by_kernel(heads: tuple[int, int], codes: torch.dtype | None) -> None:
    """The kernels of decodes against the torch form on the CPU: what goes, and what is in each slot then."""
    from minipaged.kernels.attention.heavy_hitters_triton import keep_heaviest_triton

    case = rows_of([400, 0, 7, 399, 120], Budget(250, 150), heads, 16, codes)
    twin = copied(case)
    on_gpu = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in case.items()}
    on_gpu["marks"] = Marks(*(x.cuda() for x in case["marks"]))
    on_gpu["scales"] = None if codes is None else tuple(x.cuda() for x in case["scales"])
    keep_heaviest_triton(**on_gpu)
    keep_heaviest_torch(drawn_from=None, **twin)
    for name in ("key_cache", "value_cache"):
        assert torch.equal(on_gpu[name].cpu().float().nan_to_num(99), twin[name].float().nan_to_num(99))
    assert torch.equal(on_gpu["marks"].positions.cpu(), twin["marks"].positions)
    torch.testing.assert_close(on_gpu["marks"].scores.cpu(), twin["marks"].scores, equal_nan=True, rtol=1e-4, atol=1e-4)


def test_L72_graphs_choose_the_same_heavy_hitters(loaded: LoadedModel) -> None:
    expected = texts(engine_on(loaded, "h2o:24+24", graphs=False, depth=0), KINDS[:2])
    for blocks in (400, 45):
        engine = engine_on(loaded, "h2o:24+24", graphs=True, depth=1, blocks=blocks)
        assert texts(engine, KINDS[:2]) == expected
        assert bool(engine.scheduler.counters.swaps) == (blocks == 45)


def test_L57_a_long_stream_takes_no_more_memory_and_graphs_stay(loaded: LoadedModel) -> None:
    engine = engine_on(loaded, "sinks:4+window:44", graphs=True, depth=1, blocks=12)
    output = engine.ask([1, 2, 3], SamplingParams(max_tokens=2500, ignore_eos=True))
    held = []
    while engine.has_work:
        engine.step()
        if len(output.request.sequences[0].token_ids) in (500, 2400):
            torch.cuda.synchronize()
            held.append((torch.cuda.memory_allocated(), engine.scheduler.manager.usage().referenced))
    assert len(output.outputs[0].token_ids) == 2500
    assert len({memory for memory, _ in held}) == 1
    assert all(blocks <= 6 for _, blocks in held)
