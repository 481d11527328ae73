"""The engine's side of a server: what one request brings ends that request alone."""

from __future__ import annotations

from typing import Any

import pytest

from minipaged import LLM
from minipaged.serving.answers import Answers


def test_a_fault_that_nobody_thought_of_refuses_its_request_and_the_next_is_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = LLM("toy", device="cpu", num_blocks=40).engine
    answers, ask = Answers(engine), engine.ask

    def breaks(tokens: Any, params: Any) -> Any:
        if tokens[0] == 66:
            raise ValueError("a library says no")
        return ask(tokens, params)

    monkeypatch.setattr(engine, "ask", breaks)
    answers.ask(1, [66, 67], {"max_tokens": 2})
    answers.ask(2, [68, 67], {"max_tokens": 2})
    rows = answers._rows
    assert rows[0] == ["refused", 1, "a library says no"]
    assert rows[1][:2] == ["accepted", 2]
    while engine.has_work:
        engine.step()
    assert engine.scheduler.manager.usage().referenced == 0
