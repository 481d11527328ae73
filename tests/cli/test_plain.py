"""The run as plain lines: each answer stands under the number by which the lines before it call its sequence."""

from __future__ import annotations

from functools import partial

import pytest

from minipaged.cli.plain import end_of, run_plain
from minipaged.cli.show import build_engine
from minipaged.config import SamplingParams


def test_answers_stand_under_their_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    factory = partial(build_engine, "toy", {"num_blocks": 64, "device": "cpu"})
    asked = (("one prompt", SamplingParams(max_tokens=4, n=2, seed=0)), ("another", SamplingParams(max_tokens=3)))
    assert run_plain(factory, asked, steps=None, record=None) == 0
    lines = capsys.readouterr().out.splitlines()
    ended = {line.split(" · ")[1].split(" is complete")[0] for line in lines if "is complete" in line}
    headed = [line.split(" · ") for line in lines if line.startswith("sequence ")]
    assert {name for name, _ in headed} == ended
    assert sorted(prompt for _, prompt in headed) == ["another", "one prompt", "one prompt"]


def test_the_end_of_a_prompt_begins_with_a_word() -> None:
    assert end_of("short", 10) == "short"
    assert end_of("exactly ten"[:10], 10) == "exactly te"
    assert end_of("some longer words", 10) == "…words"
    assert end_of("a longer words", 7) == "…words"
    assert end_of("withoutanyspace", 6) == "…space"
    assert all(len(end_of("one two three four", width)) <= width for width in range(2, 20))
