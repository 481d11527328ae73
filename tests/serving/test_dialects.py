"""Anthropic's messages and OpenAI's responses: the same answers in other documents."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.serving.engines import scripted
from tests.serving.running import Serving, serving


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving(scripted) as found:
        yield found


def named_events(text: str) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
        assert found[-1][1]["type"] == found[-1][0]
    return found


ASKED: dict[str, Any] = {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "max_tokens": 8}


def test_a_message(server: Serving) -> None:
    whole = server.chat("hi", max_tokens=8)["choices"][0]["message"]["content"]
    found = server.http.post("/v1/messages", json=ASKED).json()
    assert (found["type"], found["role"], found["stop_reason"]) == ("message", "assistant", "max_tokens")
    assert found["content"] == [{"type": "text", "text": whole}]
    usage = found["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == len("<user>hi</><assistant>")
    assert usage["output_tokens"] == 8
    calm = server.http.post("/v1/messages", json={**ASKED, "thinking": {"type": "disabled"}}).json()
    assert calm["content"] == found["content"]
    stopped = server.http.post("/v1/messages", json={**ASKED, "stop_sequences": [whole[3:5]]}).json()
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", whole[3:5])
    assert stopped["content"][0]["text"] == whole[:3]
    count = server.http.post("/v1/messages/count_tokens", json={"messages": ASKED["messages"], "system": "s"}).json()
    assert count == {"input_tokens": len("<system>s</><user>hi</><assistant>")}
    going = {**ASKED, "messages": [*ASKED["messages"], {"role": "assistant", "content": "abc"}]}
    count = server.http.post("/v1/messages/count_tokens", json=going).json()
    assert count == {"input_tokens": len("<user>hi</><assistant>abc")}


def test_a_streamed_message(server: Serving) -> None:
    whole = server.http.post("/v1/messages", json=ASKED).json()
    events = named_events(server.http.post("/v1/messages", json={**ASKED, "stream": True}).text)
    names = [name for name, _ in events]
    assert names[:2] == ["message_start", "content_block_start"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert "".join(d["delta"]["text"] for n, d in events if n == "content_block_delta") == whole["content"][0]["text"]
    assert events[-2][1]["delta"]["stop_reason"] == "max_tokens"
    assert events[-2][1]["usage"]["output_tokens"] == 8


@pytest.mark.parametrize(
    "change",
    [
        {"max_tokens": None},
        {"messages": []},
        {"messages": [{"role": "system", "content": "a"}]},
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
        {"tools": [{"name": "x"}]},
        {"thinking": {"type": "enabled", "budget_tokens": 9}},
        {"temperature": "hot"},
    ],
)
def test_bad_messages_are_told_as_anthropic_tells_them(server: Serving, change: dict[str, Any]) -> None:
    answer = server.http.post("/v1/messages", json={**ASKED, **change})
    assert answer.status_code == 400, answer.text
    assert answer.json()["type"] == "error"
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert answer.json()["error"]["message"]


def test_responses_by_the_real_client(server: Serving) -> None:
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    whole = server.chat("hi", max_tokens=8)["choices"][0]["message"]["content"]
    found = client.responses.create(model="scripted", input="hi", max_output_tokens=8)
    assert found.output_text == whole
    assert found.status == "incomplete"
    assert found.usage is not None
    assert found.usage.output_tokens == 8
    with client.responses.stream(
        model="scripted", input=[{"role": "user", "content": "hi"}], max_output_tokens=8
    ) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    assert text == whole
    parts: Any = [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}]
    assert client.responses.create(model="scripted", input=parts, max_output_tokens=8).output_text == whole
    for bad in ({"previous_response_id": "resp_1"}, {"reasoning": {"effort": "high"}}, {"background": True}):
        with pytest.raises(openai.BadRequestError, match="not supported"):
            client.responses.create(model="scripted", input="hi", **bad)  # type: ignore[call-overload]


def test_an_engine_that_dies_is_told_in_each_dialect() -> None:
    for path, body in (("/v1/messages", {**ASKED, "max_tokens": 500}), ("/v1/responses", {"input": "hi"})):
        with serving(scripted, step_seconds=0.01, fail_at=20) as server:
            text = server.http.post(path, json={**body, "stream": True}).text
            name, data = named_events(text)[-1]
            assert name == "error"
            assert "engine died" in json.dumps(data)
