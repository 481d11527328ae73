"""The Python API with arguments of the wrong kind: one error that names them, and no request left behind; the meter of a run."""

from __future__ import annotations

from typing import Any

import pytest

from minipaged.api import LLM
from minipaged.cli.generate import Meter
from minipaged.config import SamplingParams
from minipaged.errors import RequestError


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("toy", num_blocks=64, block_size=4)


@pytest.mark.parametrize(
    ("prompts", "params", "named"),
    [
        (5, None, "5"),
        (["fine", 5], None, "5"),
        (["fine", {"text": "x"}], None, "prompt_token_ids"),
        ({"prompt_token_ids": 5}, None, "prompt_token_ids must be a sequence"),
        ("fine", {"max_tokens": 5}, "SamplingParams"),
        (["fine", "too"], [SamplingParams(), "x"], "'x'"),
        (["fine", "too"], [SamplingParams()], "not 1"),
    ],
)
def test_generate(llm: LLM, prompts: Any, params: Any, named: str) -> None:
    with pytest.raises(RequestError, match=named):
        llm.generate(prompts, params)
    assert not llm.engine.has_work


@pytest.mark.parametrize("messages", ["hi", 5, [], {"role": "user", "content": "x"}, ["x"], [["x"]], [[5]]], ids=repr)
def test_chat(llm: LLM, messages: Any) -> None:
    with pytest.raises(RequestError):
        llm.chat(messages)
    assert not llm.engine.has_work


def test_a_meter_counts_its_own_run_alone(llm: LLM) -> None:
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    for _ in range(2):
        meter = Meter(llm)
        meter.run(lambda: llm.generate("count me", params))
        assert meter.figures()["generated_tokens"] == 5
