"""Graphs, overlap and fusion against the plain path on a GPU: the same greedy text in float32, and each known hazard of frozen inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from minipaged.assembly import build_engine
from minipaged.config import CacheConfig, EngineConfig, SamplingParams
from minipaged.engine import Engine
from minipaged.execution import step_inputs
from minipaged.execution.paged_kv import PagedKV
from minipaged.execution.step_inputs import inputs_of
from minipaged.model.llama import Layer, angle_table
from minipaged.model.loading import zoo
from minipaged.model.loading.zoo import LoadedModel
from tests.execution.plans import plan_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return zoo.load("random:smollm2-135m", device="cuda", dtype=torch.float32)


def engine_on(loaded: LoadedModel, *, graphs: bool, depth: int, blocks: int = 600, **limits: Any) -> Engine:
    config = EngineConfig(max_model_len=512, depth=depth, max_num_seqs=limits.pop("max_num_seqs", 32), **limits)
    cache = CacheConfig(num_blocks=blocks, block_size=16, num_host_blocks=64)
    return build_engine(loaded, cache, config, device=torch.device("cuda"), dtype="float32", graphs=graphs)


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(5, 4000, (5 + 7 * i % 90,), generator=generator).tolist() for i in range(count)]


def params(i: int) -> SamplingParams:
    common: dict[str, Any] = {"max_tokens": 12 + 5 * (i % 7), "ignore_eos": i % 3 > 0}
    if i % 10 == 5:
        return SamplingParams(presence_penalty=0.5, frequency_penalty=0.2, logit_bias={7: 1.0, 9: -1.0}, **common)
    if i % 5 == 1:
        return SamplingParams(temperature=0.7, seed=i, **common)
    if i % 5 == 2:
        return SamplingParams(n=3, temperature=1.0, seed=i, **common)
    if i % 5 == 3:
        return SamplingParams(beam_width=2, **common)
    if i % 5 == 4:
        return SamplingParams(temperature=0.9, top_p=0.8, top_k=20, seed=i, **common)
    return SamplingParams(**common)


def texts(engine: Engine, count: int = 20, aborted: tuple[int, ...] = ()) -> list[list[list[int]]]:
    outputs = [engine.ask(prompt, params(i)) for i, prompt in enumerate(prompts(count))]
    steps = 0
    while engine.has_work:
        engine.step()
        steps += 1
        if steps == 6:
            for i in aborted:
                engine.abort(outputs[i].request_id)
    usage = engine.scheduler.manager.usage()
    assert usage.referenced == 0
    assert usage.host_free == usage.host_total
    return [[o.token_ids for o in output.outputs] for i, output in enumerate(outputs) if i not in aborted]


@pytest.fixture(scope="module")
def expected(loaded: LoadedModel) -> list[list[list[int]]]:
    return texts(engine_on(loaded, graphs=False, depth=0))


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("graphs", [False, True])
def test_same_text(loaded: LoadedModel, expected: list[list[list[int]]], graphs: bool, depth: int) -> None:
    assert texts(engine_on(loaded, graphs=graphs, depth=depth)) == expected


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_preemption_in_flight(loaded: LoadedModel, expected: list[list[list[int]]], preemption: str) -> None:
    engine = engine_on(loaded, graphs=True, depth=1, blocks=40, preemption=preemption)
    assert texts(engine) == expected
    assert engine.scheduler.counters.preemptions > 0


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("budget", [7, 2048])
@pytest.mark.parametrize("depth", [0, 1])
def test_L65_equal_beginnings_are_computed_once(loaded: LoadedModel, depth: int, budget: int, samples: int) -> None:
    """Sixteen prompts with 100 tokens in common and 9 of their own: each answered as if it were alone, the common blocks computed once."""
    settings = SamplingParams(max_tokens=4, n=samples, temperature=float(samples > 1), seed=1, ignore_eos=True)
    common = [5 + i % 40 for i in range(100)]
    asked = [[*common, *(50 + number + i for i in range(9))] for number in range(16)]
    alone = engine_on(loaded, graphs=False, depth=0)
    expected = []
    for prompt in asked:
        output = alone.ask(prompt, settings)
        while alone.has_work:
            alone.step()
        assert alone.scheduler.manager.reset_prefix_cache()
        expected.append([o.token_ids for o in output.outputs])
    engine = engine_on(loaded, graphs=True, depth=depth, max_num_batched_tokens=budget, max_num_seqs=64)
    outputs = [engine.ask(prompt, settings) for prompt in asked]
    while engine.has_work:
        engine.step()
    assert [[o.token_ids for o in output.outputs] for output in outputs] == expected
    assert [o.request.sequences[0].num_cached for o in outputs] == [0] + [96] * 15
    decoded = 16 * samples * 3  # the fourth token's KV is never computed
    assert engine.scheduler.counters.computed_tokens - decoded == 109 + 15 * 13


@pytest.mark.parametrize("depth", [0, 1])
def test_same_text_where_common_blocks_are_read_once(
    loaded: LoadedModel, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two system prompts, questions that come and go, samples of one request, and some that share nothing."""
    beginnings = [[5 + i % 40 for i in range(100)], [7 + i % 30 for i in range(70)], [], []]
    asked = [(beginnings[i % 4] + prompt, params(i)) for i, prompt in enumerate(prompts(40))]

    def answers(graphs: bool) -> list[list[list[int]]]:
        engine = engine_on(loaded, graphs=graphs, depth=depth if graphs else 0, max_num_seqs=64)
        outputs = [engine.ask(*each) for each in asked]
        while engine.has_work:
            engine.step()
        return [[o.token_ids for o in output.outputs] for output in outputs]

    expected = answers(graphs=False)
    monkeypatch.setattr("minipaged.execution.shared_prefixes.FEWEST_TOKENS", 16)
    monkeypatch.setattr("minipaged.execution.shared_prefixes.FEWEST_COMMON", 16)
    seen = []
    tiles_of = step_inputs.tiles_of
    monkeypatch.setattr(
        step_inputs, "tiles_of", lambda groups, rows: seen.append(len(groups)) or tiles_of(groups, rows)
    )
    assert answers(graphs=True) == expected
    assert max(seen) >= 3


def test_abort_in_flight(loaded: LoadedModel, expected: list[list[list[int]]]) -> None:
    aborted = (0, 2, 7, 13)
    kept = [answer for i, answer in enumerate(expected) if i not in aborted]
    assert texts(engine_on(loaded, graphs=True, depth=1), aborted=aborted) == kept


def test_batches_of_every_size_use_fresh_inputs(loaded: LoadedModel) -> None:
    """Sequences leave one by one, so every bucket is replayed with rows that shrink and padding that grows."""
    asked = [SamplingParams(max_tokens=3 + i, ignore_eos=True) for i in range(20)]
    answers = []
    for graphs in (False, True):
        engine = engine_on(loaded, graphs=graphs, depth=int(graphs))
        outputs = [engine.ask(p, a) for p, a in zip(prompts(20), asked, strict=True)]
        while engine.has_work:
            engine.step()
        answers.append([o.outputs[0].token_ids for o in outputs])
    assert answers[0] == answers[1]
    assert [len(a) for a in answers[1]] == [3 + i for i in range(20)]


def test_bfloat16_logits_are_close(loaded: LoadedModel) -> None:
    """Rotating in float32 on the way to the cache stays within bfloat16's rounding of rotating before, as transformers does."""
    model = zoo.load("random:smollm2-135m", device="cuda", dtype=torch.bfloat16).model
    device = torch.device("cuda")
    tokens = torch.tensor(prompts(12)[11], device=device)
    kv = PagedKV(model.config, 16, 16, dtype=torch.bfloat16, device=device)
    plan = plan_of([(0, len(tokens))], block_size=16, tables=[list(range(1, 1 + -(-len(tokens) // 16)))])
    inputs = inputs_of(plan, 16, device)
    angles = angle_table(model.frequencies, 512)

    def plain(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        kv.write(layer, key, value, inputs)
        return kv.attend(layer, query, inputs)

    def raw(layer: Layer, heads: torch.Tensor) -> torch.Tensor:
        return kv.attend(layer.index, kv.rope_write(layer, heads, inputs, angles), inputs)

    with torch.inference_mode():
        expected = model.logits(model(tokens, inputs.positions, plain))
        found = model.head(model.run_layers(model.embedding[tokens], raw), norm=model.norm).float()
    assert float((found - expected).norm() / expected.norm()) < 2e-2


@pytest.mark.parametrize("count", [1, 2, 8, 17])
def test_sixteen_bit_graphs_do_not_depend_on_how_they_are_launched(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row, few rows, many, and prompts among them: every kernel that may start before the one before it has ended, against the same
    kernels one after the other. Token for token: nothing in them depends on timing.
    """
    from minipaged.kernels.dependent_launch import ENVIRONMENT_VARIABLE, dependent_launch

    loaded = zoo.load("random:qwen3-0.6b", device="cuda", dtype=torch.bfloat16)

    def answers() -> list[list[int]]:
        config = EngineConfig(max_model_len=256, depth=1, max_num_seqs=32)
        cache = CacheConfig(num_blocks=600, block_size=16)
        engine = build_engine(loaded, cache, config, device=torch.device("cuda"), dtype="bfloat16")
        outputs = []
        for i, prompt in enumerate(prompts(count)):  # each comes while the ones before it decode
            outputs.append(engine.ask(prompt, SamplingParams(max_tokens=40 + i, ignore_eos=True)))
            engine.step()
        while engine.has_work:
            engine.step()
        return [output.outputs[0].token_ids for output in outputs]

    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "0")
    dependent_launch.cache_clear()
    expected = answers()
    monkeypatch.delenv(ENVIRONMENT_VARIABLE)
    dependent_launch.cache_clear()
    for _ in range(3):
        assert answers() == expected
