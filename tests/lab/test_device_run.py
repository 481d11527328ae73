"""Real execution of every system on the toy model: the same text, other memory."""

from __future__ import annotations

import random

import pytest

from minipaged.errors import InputError
from minipaged.lab.device_run import DeviceResult, draws_of, run_systems
from minipaged.lab.workloads import make_workload
from minipaged.memory.systems import RESERVING

RNG = random.Random(5)
DRAWS = [([RNG.randrange(250) for _ in range(RNG.randint(2, 24))], RNG.randint(2, 20)) for _ in range(10)]


def run(systems: tuple[str, ...], **settings: object) -> dict[str, DeviceResult]:
    results = run_systems(
        systems, DRAWS, model="toy", device="cpu", dtype="float32", block_size=4, num_blocks=65, max_len=64, max_new=30,
        say=lambda message, done, total: None, **settings,
    )  # type: ignore[arg-type]  # fmt: skip
    return {r.system: r for r in results}


def test_every_system_gives_the_same_text() -> None:
    found = run(("vllm", *sorted(RESERVING)))
    for system, result in found.items():
        assert result.same_answers == 1.0, system
        assert result.refused == 0, system
        assert result.tokens == sum(length for _, length in DRAWS)
    assert found["vllm"].mean_rows > found["orca-max"].mean_rows > found["webui"].mean_rows
    assert found["vllm"].token_share > found["orca-max"].token_share
    assert found["webui"].mean_rows <= 1


def test_draws_have_the_workloads_lengths_and_prefix() -> None:
    load = make_workload("prefix-80", rate=1.0, count=5)
    draws = draws_of(load, 1000)
    assert [len(p) for p, _ in draws] == load.prompts.tolist()
    assert [o for _, o in draws] == load.outputs.tolist()
    assert draws[0][0][:80] == draws[1][0][:80] != draws[0][0][80:160]


def test_bad_input_is_named() -> None:
    with pytest.raises(InputError, match="'hf'"):
        run(("hf",))
    with pytest.raises(InputError, match="no requests"):
        run_systems(("vllm",), [], model="toy", say=lambda message, done, total: None)
