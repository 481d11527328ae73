"""Answers that follow a JSON schema: any model's, here the toy's, whose every token is drawn at random."""

from __future__ import annotations

import io
import json
import queue
from collections.abc import Iterator
from typing import Any

import pytest

from minipaged import LLM, SamplingParams
from minipaged.errors import RequestError
from minipaged.serving.loop import EngineLoop
from minipaged.trace.file import Header, RecordPipe
from tests.serving.engines import toy
from tests.serving.running import Serving, serving, text_of

SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "dog"]}, "legs": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["kind", "legs"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("toy", device="cpu", num_blocks=512)


def params(**given: Any) -> SamplingParams:
    return SamplingParams(json_schema=json.dumps(SCHEMA), max_tokens=200, **given)


def follows(text: str) -> bool:
    found = json.loads(text)
    return found.keys() == SCHEMA["properties"].keys() and found["kind"] in ("cat", "dog") and 0 <= found["legs"] <= 9  # type: ignore[attr-defined]


def test_every_sample_follows_the_schema(llm: LLM) -> None:
    for output in llm.generate(["the answer is", "b"], [params(temperature=1.5, n=6, seed=1), params()]):
        for answer in output.outputs:
            assert answer.finish_reason == "stop", answer
            assert follows(answer.text), answer.text


def test_it_holds_with_a_step_in_flight_and_after_preemption(llm: LLM) -> None:
    """At depth 1 a draw would go ahead of the token that its mask depends on: such rows wait. Who is sent away walks again."""
    tight = LLM("toy", device="cpu", num_blocks=60, block_size=4, overlap=1, max_num_seqs=8)
    prompts = [chr(97 + i) * 6 for i in range(6)]
    asked = params(temperature=1.0, seed=3)
    found = tight.generate(prompts, asked)
    assert [o.outputs[0].text for o in found] == [o.outputs[0].text for o in llm.generate(prompts, asked)]
    assert all(follows(output.outputs[0].text) for output in found)
    assert tight.engine.scheduler.counters.preemptions > 0


def test_rows_beside_it_are_not_masked(llm: LLM) -> None:
    plain = SamplingParams(max_tokens=20, temperature=1.0, seed=5)
    alone = llm.generate("hello", plain)[0].outputs[0].text
    beside = llm.generate(["hello", "x"], [plain, params()])
    assert beside[0].outputs[0].text == alone


DEEP = '{"items":' * 200 + "{}" + "}" * 200  # deeper than llguidance reads


@pytest.mark.parametrize(
    "schema", ["{", "[]", '{"type": "no such type"}', '{"$ref": "#/nowhere"}', DEEP, '{"minimum": 1e400}']
)
def test_a_bad_schema_is_refused(llm: LLM, schema: str) -> None:
    with pytest.raises(RequestError, match="schema"):
        llm.generate("a", SamplingParams(json_schema=schema))


def test_beams_are_refused(llm: LLM) -> None:
    with pytest.raises(RequestError, match="json_schema must keep its default"):
        llm.generate("a", SamplingParams(json_schema="{}", beam_width=2))


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving(toy, num_blocks=512) as found:
        yield found


def test_response_format(server: Serving) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA, "strict": True}}
    choices = server.chat("an animal", response_format=form, n=3, seed=1, max_tokens=200)["choices"]
    assert all(follows(choice["message"]["content"]) for choice in choices)
    events = server.events(prompt="an animal", response_format=form, max_tokens=200)
    assert follows(text_of(events))
    form_of_responses = {"type": "json_schema", "name": "a", "schema": SCHEMA}
    body = {"input": "an animal", "text": {"format": form_of_responses}}
    answer = server.http.post("/v1/responses", json=body)
    assert follows(answer.json()["output"][0]["content"][0]["text"])
    any_object = server.complete(prompt="x", response_format={"type": "json_object"}, max_tokens=400, seed=4)[
        "choices"
    ][0]
    assert any_object["text"].lstrip().startswith("{")
    assert any_object["finish_reason"] == "length" or isinstance(json.loads(any_object["text"]), dict)
    for schema in ({"type": "nonsense"}, json.loads(DEEP)):
        bad = {"type": "json_schema", "json_schema": {"schema": schema}}
        status, error = server.refusal({"prompt": "a", "response_format": bad})
        assert status == 400
        assert "schema" in error["message"]
    assert server.complete(prompt="x", max_tokens=1)["choices"], "the engine lives"


def test_the_vocabulary_is_read_before_the_first_request() -> None:
    """It takes some hundred milliseconds in which no token is drawn: not while others stream."""
    engine = toy(num_blocks=64)
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    loop = EngineLoop(engine, RecordPipe(io.BytesIO(), Header()), inbox)
    loop._obey({"do": "serve"})
    assert engine._grammars is not None
