"""Two ranks on two GPUs, with graphs and without, against one."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import pytest
import torch

from minipaged import LLM
from minipaged.scheduling.request import RequestOutput
from tests.execution.test_ranks import TIGHT, answers, assert_same

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
ON_GPUS: dict[str, Any] = {**TIGHT, "device": "cuda", "dtype": "float32"}


@pytest.fixture(scope="module")
def expected() -> list[RequestOutput]:
    """What one GPU says, kernel by kernel."""
    return answers(LLM("toy", **ON_GPUS, graphs=False))


@pytest.mark.parametrize(
    "settings",
    [
        {"tensor_parallel": 2},
        {"pipeline_parallel": 2},
        {"tensor_parallel": 2, "graphs": False, "num_host_blocks": 40, "preemption": "swap"},
        {"tensor_parallel": 2, "max_num_batched_tokens": 2048},
    ],
    ids=["graphs", "stages", "kernel by kernel with swaps", "whole prompts"],
)
def test_L73_two_gpus_say_what_one_says(settings: dict[str, Any], expected: list[RequestOutput]) -> None:
    together = LLM("toy", **{**ON_GPUS, **settings})
    try:
        assert_same(answers(together), expected)
    finally:
        together.close()


DEATH = """
import os, signal, sys
from minipaged import LLM, SamplingParams
from minipaged.errors import RankError
llm = LLM("random:llama-3.2-1b", tensor_parallel=2, num_blocks=200)
stream = llm.stream("hello", SamplingParams(max_tokens=2000, ignore_eos=True))
for _ in range(20):
    next(stream)
os.kill(llm._parts.ranks._children[1].pid, signal.SIGKILL)
try:
    list(stream)
except RankError as error:
    print("word:", error, flush=True)
"""


def test_L73_a_rank_that_is_killed_ends_the_run_on_gpus_too() -> None:
    began = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", DEATH], capture_output=True, text=True, timeout=120)
    assert "word: rank 1 was killed by SIGKILL" in ended.stdout, ended.stderr
    assert time.monotonic() - began < 100
