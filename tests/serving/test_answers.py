"""The engine's side of a server: what one request brings ends that request alone."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

import pytest

from minipaged import LLM
from minipaged.serving.answers import Answers


def test_a_fault_that_nobody_thought_of_refuses_its_request_and_the_next_is_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = LLM("toy", device="cpu", num_blocks=40).engine
    answers, ask = Answers(engine, lambda call: call()), engine.ask

    def breaks(tokens: Any, params: Any, **given: Any) -> Any:
        if tokens[0] == 66:
            raise ValueError("a library says no")
        return ask(tokens, params, **given)

    monkeypatch.setattr(engine, "ask", breaks)
    answers.ask(1, [66, 67], {"max_tokens": 2})
    answers.ask(2, [68, 67], {"max_tokens": 2})
    rows = answers._rows
    assert rows[0] == ["refused", 1, "a library says no"]
    assert rows[1][:2] == ["accepted", 2]
    while engine.has_work:
        engine.step()
    assert engine.scheduler.manager.usage().referenced == 0


def test_a_schema_is_read_beside_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks meanwhile is queued at once; who leaves meanwhile is never queued; a schema that is none is refused."""
    engine = LLM("toy", device="cpu", num_blocks=40).engine
    calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
    answers, go_on, read = Answers(engine, calls.put), threading.Event(), engine.read_schema

    def slowly(schema: str) -> Any:
        assert go_on.wait(20)
        return read(schema)

    monkeypatch.setattr(engine, "read_schema", slowly)
    answers.ask(1, [66, 67], {"max_tokens": 40, "json_schema": '{"enum": [7]}'})
    answers.ask(2, [66, 67], {"max_tokens": 40, "json_schema": '{"enum": [8]}'})
    answers.ask(3, [66, 67], {"max_tokens": 2})
    answers.ask(4, [66, 67], {"max_tokens": 2, "json_schema": "[]"})
    answers.cancel(2)
    assert [row[:2] for row in answers._rows] == [["accepted", 3]]
    go_on.set()
    for _ in range(3):
        calls.get(timeout=20)()
    told = {row[1]: row for row in answers._rows}
    assert told[1][0] == "accepted"
    assert told[4][0] == "refused"
    assert "schema" in told[4][2]
    assert 2 not in told
    while engine.has_work:
        answers.grow(engine.step())
    assert "".join(row[3] for row in answers._rows if row[0] == "grew" and row[1] == 1).strip() == "7"
