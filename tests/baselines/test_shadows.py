"""Shadows follow a real engine's traffic: their parts sum to the pool, and what they hold is what the rules say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from minipaged.baselines.shadows import (
    ShadowListener,
    answer_lengths,
    read_deltas,
    shadow_deltas,
    summarise,
    write_with_shadows,
)
from minipaged.baselines.systems import RESERVING
from minipaged.config import EngineConfig, SamplingParams
from minipaged.engine import Engine
from minipaged.errors import InputError
from minipaged.lab.simulation.hardware import find_gpu
from minipaged.lab.simulation.simulated_runner import SimulatedRunner
from minipaged.memory.block_manager import BlockManager
from minipaged.model.loading.shapes import shape
from minipaged.scheduling.scheduler import Scheduler
from minipaged.trace.events import ShadowDelta, StepDelta
from minipaged.trace.file import open_recorder
from minipaged.trace.sources import FileSource

NUM_BLOCKS, BLOCK_SIZE, MAX_LEN = 33, 8, 64  # 256 slots: four contexts


def engine() -> Engine:
    config = EngineConfig(max_num_seqs=16, max_num_batched_tokens=64, max_model_len=MAX_LEN, preemption="recompute")
    scheduler = Scheduler(config, BlockManager(NUM_BLOCKS, BLOCK_SIZE), BLOCK_SIZE)
    return Engine(
        scheduler, SimulatedRunner(shape("toy"), find_gpu("l4"), num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
    )


def record(path: Path | None = None, *, samples: int = 1) -> list[StepDelta]:
    """Twelve requests through a pool that is too small for them, in two waves."""
    run, deltas = engine(), list[StepDelta]()
    run.trace.subscribe(deltas.append)
    recorder = None
    if path is not None:
        recorder = open_recorder(path, run)
        run.trace.subscribe(recorder.write)
    rng = np.random.default_rng(3)
    for wave in range(2):
        for _ in range(6):
            prompt = rng.integers(0, 200, int(rng.integers(3, 30))).tolist()
            length = int(rng.integers(2, 30))
            run.submit(
                prompt, SamplingParams(max_tokens=length, ignore_eos=True, n=samples, temperature=float(samples > 1))
            )
        while run.has_work and (wave == 1 or len(deltas) < 12):
            run.step()
    if recorder is not None:
        recorder.close()
    return deltas


def by_system(deltas: list[StepDelta], **settings: object) -> dict[str, list[ShadowDelta]]:
    found: dict[str, list[ShadowDelta]] = {system: [] for system in RESERVING}
    for _, shadows in shadow_deltas(deltas, tuple(RESERVING), max_len=MAX_LEN, runs=True, **settings):  # type: ignore[arg-type]
        for shadow in shadows:
            found[shadow.system].append(shadow)
    return found


@pytest.mark.parametrize("samples", [1, 3])
def test_p5_bands_and_runs_sum_to_the_pool_at_every_step(samples: int) -> None:
    for system, shadows in by_system(record(samples=samples)).items():
        for shadow in shadows:
            assert sum(shadow.stats) == 256, (system, shadow.step)
            assert min(shadow.stats) >= 0, (system, shadow.step)
            assert sum(run.length for run in shadow.runs) == 256
            tokens = sum(run.length for run in shadow.runs if run.kind == "token")
            assert tokens == shadow.stats.token


def test_everything_comes_back_at_the_end() -> None:
    for system, shadows in by_system(record()).items():
        last = shadows[-1].stats
        assert last.token == 0, system
        assert last.idle == 256 if system != "fastertransformer" else last.idle + last.padding == 256


def test_orca_max_runs_at_most_four_and_the_oracle_more() -> None:
    deltas = record()
    found = {s.system: s for s in summarise(deltas, tuple(RESERVING), max_len=MAX_LEN)}
    assert found["orca-max"].running <= 4
    assert found["orca-oracle"].running > found["orca-max"].running
    assert found["orca-max"].shares["internal"] > found["orca-oracle"].shares["internal"] == 0
    assert found["orca-max"].waiting > 0
    assert found["webui"].running <= 1
    assert found["static"].shares["padding"] > 0


def test_live_the_limit_stands_for_the_length() -> None:
    run, heard = engine(), list[ShadowDelta]()
    limits = {}
    listener = ShadowListener(("orca-oracle",), max_len=MAX_LEN, limit_of=lambda sequence: limits.get(sequence, 20))
    run.trace.subscribe(lambda delta: heard.extend(listener(delta)))
    run.submit([1, 2, 3, 4], SamplingParams(max_tokens=6, ignore_eos=True))
    run.step()
    assert heard[-1].stats.token == 4
    assert heard[-1].stats.reserved == 20
    assert heard[-1].stats.internal == 0


def test_answer_lengths_are_the_recorded_ones() -> None:
    run, deltas = engine(), list[StepDelta]()
    run.trace.subscribe(deltas.append)
    for length in (3, 9):
        run.submit([5, 6, 7], SamplingParams(max_tokens=length, ignore_eos=True))
    while run.has_work:
        run.step()
    assert sorted(answer_lengths(deltas).values()) == [3, 9]


def test_a_file_gains_its_shadows_and_still_opens(tmp_path: Path) -> None:
    plain, shaded = tmp_path / "a.mpt", tmp_path / "b.mpt"
    deltas = record(plain)
    assert len(read_deltas(plain)) == len(deltas)
    write_with_shadows(plain, shaded, ("orca-max", "tgi-paged"), max_len=MAX_LEN)
    source = FileSource(shaded)
    assert len(source) == len(deltas)
    for i in range(len(source)):
        assert [shadow.system for shadow in source.shadows(i)] == ["orca-max", "tgi-paged"]
        assert sum(source.shadows(i)[0].stats) == 256
    source.close()
    with pytest.raises(InputError, match="another file"):
        write_with_shadows(plain, plain, ("orca-max",), max_len=MAX_LEN)


def test_unknown_shadows_and_empty_traces_are_named() -> None:
    with pytest.raises(InputError, match="'vllm'"):
        ShadowListener(("vllm",))
    with pytest.raises(InputError, match="max_len"):
        ShadowListener(max_len=0)
    with pytest.raises(InputError, match="no step"):
        summarise([])
