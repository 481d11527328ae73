"""Weights and pools that do not fit are refused before anything is allocated, in a line with the bytes and what would fit."""

from __future__ import annotations

import os
import time

import pytest
import torch
from typer.testing import CliRunner

from minipaged import assembly
from minipaged.api import LLM
from minipaged.assembly import check_pool
from minipaged.cli import bench
from minipaged.config import CacheConfig
from minipaged.errors import InputError
from minipaged.lab.measure.contender import compete
from minipaged.lab.measure.engine import Job
from minipaged.model.llama import Llama
from minipaged.model.loading import placement, weights, zoo
from minipaged.model.loading.shapes import SHAPES

CPU = torch.device("cpu")
GIB = 2**30


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen GiB are free, and drawing or reading weights is a failure."""

    def allocate(*arguments: object, **settings: object) -> None:
        raise AssertionError("weights were allocated")

    monkeypatch.setattr(placement, "free_bytes", lambda device: 16 * GIB)
    monkeypatch.setattr(zoo, "free_bytes", lambda device: 16 * GIB)
    monkeypatch.setattr(Llama, "random", allocate)
    monkeypatch.setattr(weights, "load_model", allocate)


@pytest.mark.usefixtures("no_drawing")
def test_a_7b_in_float32_says_what_it_takes_and_what_would_fit() -> None:
    words = r"llama-7b in float32 takes 25\.1 GiB, and cpu has 16\.0 GiB free: dtype bfloat16 takes 12\.6; the largest shape .* random:"
    with pytest.raises(InputError, match=words):
        zoo.load("random:llama-7b", device="cpu")
    with pytest.raises(InputError, match=r"llama-70b in bfloat16 takes 12.* GiB") as failure:
        zoo.load("random:llama-70b", device="cpu", dtype="bfloat16")
    assert "dtype bfloat16" not in str(failure.value), "that is what was asked for"


@pytest.mark.usefixtures("no_drawing")
def test_what_fits_is_let_through() -> None:
    with pytest.raises(AssertionError, match="weights were allocated"):
        zoo.load("random:llama-7b", device="cpu", dtype="bfloat16")


@pytest.mark.usefixtures("no_drawing")
def test_every_contender_of_the_engine_benchmark_is_refused_before_it_loads() -> None:
    for name in ("minipaged", "minipaged-plain", "transformers"):
        with pytest.raises(InputError, match=r"25\.1 GiB") as failure:
            compete(name, Job("random:llama-7b", ("batch:1",), 1, 1, 8, 60.0, "cpu"), lambda words: None)
        assert "dtype bfloat16" not in str(failure.value), "the benchmark has no such option"


def test_bench_engine_ends_at_once_with_the_reason() -> None:
    """A 70B in float32, 257 GiB: no machine of ours holds it."""
    started = time.monotonic()
    arguments = ["engine", "--model", "random:llama-3-70b", "--workload", "batch:1", "--device", "cpu"]
    result = CliRunner().invoke(bench.app, arguments, env={"COLUMNS": "160"})
    assert result.exit_code == 1
    assert "GiB free" in " ".join(result.output.split())
    assert "contender" not in result.output, "an empty table tells nothing"
    assert time.monotonic() - started < 60


def test_a_pool_that_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match=r"a pool of 100,000,000 blocks of 16 tokens takes .* GiB .* lower num_blocks"):
        LLM("toy", device="cpu", num_blocks=100_000_000)


def test_free_memory_is_less_than_all_and_more_than_none() -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < placement.free_bytes(CPU) < total


@pytest.mark.parametrize(
    ("asked", "named", "fits"),
    [
        ({"num_blocks": 3}, None, 0),
        ({"num_blocks": 11}, "num_blocks", 9),  # 95 % of ten blocks
        ({"num_blocks": 5, "num_host_blocks": 4}, None, 0),
        ({"num_blocks": 5, "num_host_blocks": 5}, "num_host_blocks", 4),  # in the same memory
        ({"num_blocks": 10**30}, "num_blocks", 9),
    ],
)
def test_a_pool_is_refused_with_how_many_blocks_would_fit(
    asked: dict[str, int], named: str | None, fits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = SHAPES["toy"]
    block_bytes = shape.kv_bytes_per_token("float32") * 16
    monkeypatch.setattr(assembly, "free_bytes", lambda device: 10 * block_bytes)
    cache = CacheConfig(16, **asked)
    if named is None:
        check_pool(shape, cache, "float32", CPU)
        return
    with pytest.raises(InputError, match=rf"lower {named} to at most {fits}$"):
        check_pool(shape, cache, "float32", CPU)


def test_host_blocks_of_a_gpu_are_held_against_the_hosts_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, gpu = SHAPES["toy"], torch.device("cuda", 0)
    block_bytes = shape.kv_bytes_per_token("bfloat16") * 16
    monkeypatch.setattr(assembly, "free_bytes", lambda device: (100 if device.type == "cuda" else 10) * block_bytes)
    check_pool(shape, CacheConfig(16, 95, 9), "bfloat16", gpu)
    with pytest.raises(InputError, match=r"a host pool of 10 blocks .* cpu has .* lower num_host_blocks to at most 9$"):
        check_pool(shape, CacheConfig(16, 95, 10), "bfloat16", gpu)


def test_nothing_is_allocated_for_a_pool_that_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(*arguments: object, **settings: object) -> None:
        raise AssertionError("a pool was allocated")

    monkeypatch.setattr(assembly, "build_engine", allocate)
    with pytest.raises(InputError, match="lower num_blocks"):
        LLM("toy", device="cpu", num_blocks=10**9)
    with pytest.raises(InputError, match="lower num_host_blocks"):
        LLM("toy", device="cpu", num_blocks=10, num_host_blocks=10**9)


def test_a_pool_that_is_measured_fits_into_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = SHAPES["toy"]
    block_bytes = shape.kv_bytes_per_token("float32") * 16
    monkeypatch.setattr(assembly, "free_bytes", lambda device: 100 * block_bytes)
    assert assembly.choose_num_blocks(shape, 16, "float32", CPU) == 95
