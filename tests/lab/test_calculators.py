"""Sums against numbers that can be checked by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minipaged.config import ModelConfig
from minipaged.errors import InputError
from minipaged.lab.advise import calculators as calc
from minipaged.lab.advise.advice import Use, advise
from minipaged.lab.paper.claims import (
    factors_multiply,
    falcon,
    heavy_hitters,
    kv_sizes,
    quantized_batch,
    short_requests,
)
from minipaged.lab.simulation.hardware import find_gpu
from minipaged.lab.simulation.servers import paper_server
from minipaged.model.loading.shapes import shape


def llama_13b(**changes: object) -> calc.Deployment:
    return calc.Deployment(shape("llama-13b"), find_gpu("a100-40"), **changes)  # type: ignore[arg-type]


def test_kv_of_llama_13b_by_hand() -> None:
    assert llama_13b().kv_bytes == 2 * 40 * 40 * 128 * 2 == 819_200
    assert llama_13b(kv_dtype="int8").kv_bytes == 2 * 40 * 40 * (128 + 4) == 422_400, "and a scale for each head"


def test_the_papers_pools() -> None:
    """Table 1: 12, 21 and 264 GB of KV hold 15.7 K, 9.7 K and 60.1 K slots."""
    for name, gib, slots in (("opt-13b", 12, 15_700), ("opt-66b", 21, 9_700), ("opt-175b", 264, 60_100)):
        server = paper_server(name)
        assert server.pool == pytest.approx(slots, rel=0.01)
        assert server.pool * server.model.kv_bytes_per_token() == pytest.approx(gib * 2**30, rel=0.02)


def test_capacity_by_hand() -> None:
    deployment, load = llama_13b(), calc.Load(160, 320)
    fits = calc.capacity(deployment, load)
    assert fits.full_sequences == fits.slots // 480
    assert fits.mean_sequences == int(fits.slots / (160 + 160 + 8))
    weights = (deployment.model.num_parameters() - 32000 * 5120) * 2
    step = (weights + fits.rows * 320 * 819_200) / 1.555e12
    assert fits.seconds_per_token == pytest.approx(step, rel=1e-3)
    assert fits.bound_by == "memory bandwidth"
    assert fits.tokens_per_second < fits.rows / step
    one = calc.capacity(deployment, load, max_rows=1)
    assert one.rows == 1
    assert one.tokens_per_second < fits.tokens_per_second


def test_more_gpus_more_room_and_pipelines_do_not_shorten_a_token() -> None:
    load = calc.Load(160, 320)
    plain = calc.capacity(llama_13b(), load, max_rows=32)
    tensor = calc.capacity(llama_13b(tp=2), load, max_rows=32)
    pipeline = calc.capacity(llama_13b(pp=2), load, max_rows=32)
    assert tensor.slots == pipeline.slots > 2 * plain.slots
    assert tensor.seconds_per_token < 0.7 * plain.seconds_per_token
    assert pipeline.seconds_per_token > 0.85 * plain.seconds_per_token
    assert pipeline.tokens_per_second > 1.1 * plain.tokens_per_second


def test_kv_heads_fewer_than_ranks_are_replicated() -> None:
    mqa = ModelConfig("mqa", 32000, 4096, 11008, 32, 32, 1, 128, 4096)
    gpu = find_gpu("a100-40")
    one = calc.Deployment(mqa, gpu, tp=1)
    four = calc.Deployment(mqa, gpu, tp=4)
    room = 4 * gpu.memory_bytes * 0.95 - four.weights
    assert four.slots() == int(room // (4 * one.kv_bytes))


def test_a_fleet_is_rounded_up_and_priced() -> None:
    deployment, load = llama_13b(), calc.Load(160, 320, rate=100.0)
    fits = calc.capacity(deployment, load)
    fleet = calc.fleet(deployment, load, fits, price=2.0)
    assert (fleet.copies - 1) * fits.requests_per_second < 100.0 <= fleet.copies * fits.requests_per_second
    assert fleet.dollars_per_hour == 2.0 * fleet.gpus
    assert fleet.dollars_per_million_tokens == pytest.approx(2.0 * fleet.gpus / (100 * 320 * 3600 / 1e6))
    assert calc.fleet(deployment, load, fits).dollars_per_hour is None


def test_smallest_server() -> None:
    assert calc.smallest_tp(shape("llama-13b"), "a100-40") == 1
    assert calc.smallest_tp(shape("llama-70b"), "a100-40") == 4
    assert calc.smallest_tp(shape("llama-70b"), "a100-40", weight_bits=4.5) == 1


def test_a_model_from_its_config_json(tmp_path: Path) -> None:
    fields = {
        "model_type": "llama", "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": False, "hidden_act": "silu",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(fields))
    for name in (tmp_path, tmp_path / "config.json"):
        assert calc.find_model(str(name)).kv_bytes_per_token() == 2 * 2 * 2 * 16 * 2
    assert calc.find_model("llama-7b").num_layers == 32
    with pytest.raises(InputError, match="llama-8000b"):
        calc.find_model("llama-8000b")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"tp": 0}, "tp"),
        ({"pp": 41}, "pp"),
        ({"dtype": "int7"}, "int7"),
        ({"kv_dtype": "q8"}, "q8"),
        ({"weight_bits": 0.5}, "weight_bits"),
        ({"utilization": 1.2}, "utilization"),
    ],
)
def test_bad_deployments_are_named(changes: dict[str, object], word: str) -> None:
    with pytest.raises(InputError, match=word):
        llama_13b(**changes)


def test_bad_loads_are_named() -> None:
    with pytest.raises(InputError, match="prompt"):
        calc.Load(0, 5)
    with pytest.raises(InputError, match="rate"):
        calc.Load(5, 5, rate=-1.0)
    with pytest.raises(InputError, match="does not fit the pool"):
        calc.capacity(llama_13b(), calc.Load(20_000, 2_000))
    with pytest.raises(InputError, match="rate is needed"):
        calc.fleet(llama_13b(), calc.Load(5, 5), calc.capacity(llama_13b(), calc.Load(5, 5)))


def test_claims_say_what_baselines_say() -> None:
    assert "holds 7 of 32 blocks" in heavy_hitters().evidence
    assert "819,200 B" in kv_sizes().evidence
    assert "20,480 B (40x)" in kv_sizes().evidence
    assert "163,840 B (5x)" in kv_sizes().evidence
    assert "16x less KV" in falcon().evidence
    assert "422,400 B a token" in quantized_batch().evidence
    assert factors_multiply().verdict == "does not hold"
    assert short_requests().verdict == "does not hold"


def use(**changes: object) -> Use:
    values: dict[str, object] = {"prompt": 161, "output": 338, "users": 32, **changes}
    return Use(shape("llama-13b"), find_gpu("a100-40"), 1, **values)  # type: ignore[arg-type]


def verdicts(what: Use) -> dict[str, bool]:
    return {a.technique: a.helps for a in advise(what)}


def test_advice_follows_the_use() -> None:
    plain, shared = verdicts(use()), verdicts(use(prompt=700, shared=640, samples=4))
    assert plain["paging"]
    assert not plain["prefix caching"]
    assert not plain["copy-on-write sharing"]
    assert shared["prefix caching"]
    assert shared["copy-on-write sharing"]
    alone = verdicts(use(users=1, prompt=20, output=20))
    assert not alone["paging"]
    assert alone["4-bit weights"]
    assert not alone["chunked prefill"]
    assert all(any(ch.isdigit() for ch in a.why) for a in advise(use()))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"prompt": 0}, "prompt"),
        ({"users": 0}, "users"),
        ({"shared": 161}, "shared"),
        ({"output": 5000}, "context"),
        ({"latency": 0.0}, "latency"),
    ],
)
def test_bad_uses_are_named(changes: dict[str, object], word: str) -> None:
    with pytest.raises(InputError, match=word):
        use(**changes)
