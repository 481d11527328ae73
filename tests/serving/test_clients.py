"""Real clients, those of the extra `clients`: whole and streamed answers, log-probabilities, structured output, refusals.

By hand: pip install -e '.[clients]'; pytest -o addopts= -m slow tests/serving/test_clients.py. A client that is not installed is skipped.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel

from tests.serving.engines import toy
from tests.serving.running import Serving, serving

pytestmark = pytest.mark.slow
ASKED: dict[str, Any] = {"model": "scripted", "messages": [{"role": "user", "content": "hi"}]}


class Animal(BaseModel):
    """What a structured answer must be."""

    kind: Literal["cat", "dog"]
    legs: Literal[3, 4]


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving(toy, num_blocks=512, max_model_len=2048) as found:
        yield found


def test_openai(server: Serving) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    given: dict[str, Any] = {**ASKED, "max_tokens": 8, "temperature": 0}
    whole = client.chat.completions.create(**given, logprobs=True, top_logprobs=3)
    choice = whole.choices[0]
    assert choice.finish_reason == "length"
    assert whole.usage.completion_tokens == 8
    scored = choice.logprobs.content
    assert "".join(entry.token for entry in scored) == choice.message.content
    assert all(entry.logprob == max(top.logprob for top in entry.top_logprobs) for entry in scored), "greedy"
    pieces = list(client.chat.completions.create(**given, stream=True, stream_options={"include_usage": True}))
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert text == choice.message.content
    assert pieces[-1].usage == whole.usage.model_copy(
        update={"prompt_tokens_details": pieces[-1].usage.prompt_tokens_details}
    )
    parsed = client.chat.completions.parse(**ASKED, response_format=Animal, max_tokens=200, seed=1)
    assert parsed.choices[0].message.parsed.kind in ("cat", "dog")
    with client.chat.completions.stream(**ASKED, response_format=Animal, max_tokens=200, seed=1) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.parsed == parsed.choices[0].message.parsed
    plain = client.completions.create(model="scripted", prompt="ab", max_tokens=3, echo=True, logprobs=0, n=2, seed=1)
    assert [c.text[:2] for c in plain.choices] == ["ab", "ab"]
    assert len(plain.choices[0].logprobs.token_logprobs) == 5
    answer = client.responses.parse(model="scripted", input="an animal", text_format=Animal, max_output_tokens=200)
    assert answer.output_parsed.legs in (3, 4)
    assert client.models.list().data[0].id == "scripted"
    with pytest.raises(openai.BadRequestError, match="tools is not supported"):
        client.chat.completions.create(**ASKED, tools=[{"type": "function", "function": {"name": "f"}}])
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**{**ASKED, "model": "gpt-4"})


def test_openai_many_at_once(server: Serving) -> None:
    openai = pytest.importorskip("openai")

    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
            asked = [client.chat.completions.create(**ASKED, max_tokens=20, seed=i % 2) for i in range(16)]
            return [answer.choices[0].message.content for answer in await asyncio.gather(*asked)]

    assert len(set(asyncio.run(run()))) == 2, "two seeds"


def test_anthropic(server: Serving) -> None:
    anthropic = pytest.importorskip("anthropic")
    client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
    given: dict[str, Any] = {**ASKED, "max_tokens": 8, "extra_body": {"temperature": 0}}
    whole = client.messages.create(**given, system="be brief")
    assert whole.stop_reason == "max_tokens"
    assert whole.usage.output_tokens == 8
    with client.messages.stream(**given, system="be brief") as stream:
        assert "".join(stream.text_stream) == whole.content[0].text
        assert stream.get_final_message().usage.output_tokens == 8
    letter = whole.content[0].text[3]
    stopped = client.messages.create(**given, system="be brief", stop_sequences=[letter])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", letter)
    assert client.messages.count_tokens(**ASKED).input_tokens == len("<user>hi</><assistant>")
    with pytest.raises(anthropic.BadRequestError):
        client.messages.create(**ASKED, max_tokens=10_000)
    with pytest.raises(anthropic.BadRequestError, match="tools"):
        client.messages.create(**ASKED, max_tokens=8, tools=[{"name": "f", "input_schema": {"type": "object"}}])


def test_langchain(server: Serving) -> None:
    langchain_openai = pytest.importorskip("langchain_openai")

    def chat(**given: Any) -> Any:
        given = {"max_tokens": 8, "temperature": 0, **given}
        return langchain_openai.ChatOpenAI(base_url=server.url + "/v1", api_key="none", model="scripted", **given)

    whole = chat().invoke("hi")
    assert len(whole.content) == 8
    assert whole.usage_metadata["output_tokens"] == 8
    assert "".join(piece.content for piece in chat().stream("hi")) == whole.content
    scored = chat(logprobs=True, top_logprobs=2).invoke("hi").response_metadata["logprobs"]["content"]
    assert all(math.isfinite(entry["logprob"]) and len(entry["top_logprobs"]) == 2 for entry in scored)
    structured = chat(max_tokens=200).with_structured_output(Animal, method="json_schema")
    assert structured.invoke("an animal").kind in ("cat", "dog")
    batch = chat().batch(["hi", "ho", "hi"])
    assert batch[0].content == batch[2].content == whole.content
    plain = langchain_openai.OpenAI(base_url=server.url + "/v1", api_key="none", model="scripted", max_tokens=5)
    assert plain.invoke("ab")


def test_llm(server: Serving, tmp_path: Path) -> None:
    """Its command line, with the model in its own list."""
    pytest.importorskip("llm")
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- {{model_id: mine, model_name: scripted, api_base: '{server.url}/v1', supports_schema: true}}\n"
    )

    def run(*words: str) -> str:
        command = [sys.executable, "-m", "llm", "-m", "mine", "--key", "none", *words]
        done = subprocess.run(
            command, env=os.environ | {"LLM_USER_PATH": str(tmp_path)}, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    given = ("-o", "max_tokens", "8", "-o", "temperature", "0", "hi")
    whole = run("--no-stream", *given)
    assert len(whole) == 8
    assert run(*given) == whole, "streamed"
    found = run("--schema", json.dumps(Animal.model_json_schema()), "-o", "max_tokens", "200", "an animal")
    assert Animal.model_validate_json(found)
