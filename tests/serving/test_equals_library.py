"""L74: the server's text, tokens, log-probabilities and usage are the library's, read by the real openai client."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from minipaged import LLM, SamplingParams
from minipaged.scheduling.request import RequestOutput
from tests.serving.engines import toy
from tests.serving.running import Serving, serving

PROMPTS = ["the cache is split", "once upon a time there was", "q"]


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving(toy, num_blocks=512) as found:
        yield found


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("toy", device="cpu", num_blocks=512)


@pytest.fixture(scope="module")
def client(server: Serving) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


SAME: list[dict[str, Any]] = [  # asked of both under the same names
    {"temperature": 0.0},
    {"temperature": 0.8, "seed": 3, "n": 3},
    {"temperature": 1.0, "seed": 5, "top_p": 0.7, "frequency_penalty": 1.0, "presence_penalty": 0.5},
    {"temperature": 0.0, "stop": ["e", "th"], "logprobs": 3},
    {"temperature": 0.0, "logit_bias": {"101": -100, "32": -5}},
    {"temperature": 1.0, "seed": 2, "best_of": 4, "n": 2},
]
EXTRA = {"top_k": 4, "min_p": 0.05, "repetition_penalty": 1.2, "min_tokens": 3}
CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    *((same, same) for same in SAME),
    ({"seed": 2, "extra_body": EXTRA}, {"temperature": 1.0, "seed": 2, **EXTRA}),
    ({"n": 2, "extra_body": {"use_beam_search": True, "best_of": 4}}, {"n": 2, "beam_width": 4}),
]


@pytest.mark.parametrize(("asked", "params"), CASES)
def test_L74_completions_equal_the_librarys(
    client: openai.OpenAI, llm: LLM, asked: dict[str, Any], params: dict[str, Any]
) -> None:
    wanted = llm.generate(PROMPTS, SamplingParams(max_tokens=24, **params))
    found = client.completions.create(model="scripted", prompt=PROMPTS, max_tokens=24, **asked)
    answers = [(output, answer) for output in wanted for answer in output.outputs]
    assert [choice.text for choice in found.choices] == [answer.text for _, answer in answers]
    assert [choice.finish_reason for choice in found.choices] == [answer.finish_reason for _, answer in answers]
    assert found.usage is not None
    assert found.usage.prompt_tokens == sum(len(output.prompt_token_ids) for output in wanted)
    if "best_of" not in params and "beam_width" not in params:
        assert found.usage.completion_tokens == sum(len(answer.token_ids) for _, answer in answers)
    if "logprobs" in params:
        for choice, (_, answer) in zip(found.choices, answers, strict=True):
            assert choice.logprobs is not None
            assert answer.logprobs is not None
            values = [entry[token].logprob for token, entry in zip(answer.token_ids, answer.logprobs, strict=True)]
            assert choice.logprobs.token_logprobs == values
    stream = client.completions.create(model="scripted", prompt=PROMPTS, max_tokens=24, stream=True, **asked)
    streamed = [choice for event in stream for choice in event.choices]
    for whole in found.choices:
        mine = [choice for choice in streamed if choice.index == whole.index]
        assert "".join(choice.text for choice in mine) == whole.text
        assert mine[-1].finish_reason == whole.finish_reason


def test_L74_a_prompts_log_probabilities_equal_the_librarys(client: openai.OpenAI, llm: LLM) -> None:
    wanted = llm.generate(PROMPTS, SamplingParams(max_tokens=1, prompt_logprobs=1))
    for prompt, output in zip(PROMPTS, wanted, strict=True):
        found = client.completions.create(model="scripted", prompt=prompt, max_tokens=0, echo=True, logprobs=1)
        logprobs = found.choices[0].logprobs
        assert logprobs is not None
        assert output.prompt_logprobs is not None
        pairs = zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
        values = [None if entry is None else entry[token].logprob for token, entry in pairs]
        assert logprobs.token_logprobs == values
        assert logprobs.tokens == list(prompt)


def test_a_chat_by_the_real_client(client: openai.OpenAI, llm: LLM, server: Serving) -> None:
    messages: Any = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    text = "<system>be brief</><user>hello</><assistant>"
    wanted: RequestOutput = llm.generate(text, SamplingParams(max_tokens=20))[0]
    asked: dict[str, Any] = {"model": "scripted", "messages": messages, "max_completion_tokens": 20, "temperature": 0}
    found = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    assert found.choices[0].message.content == wanted.outputs[0].text
    assert found.usage is not None
    assert found.usage.total_tokens == len(text) + 20
    assert found.choices[0].logprobs is not None
    assert found.choices[0].logprobs.content is not None
    assert len(found.choices[0].logprobs.content) == 20
    pieces, usage = [], None
    for event in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        pieces += [choice.delta.content or "" for choice in event.choices]
        usage = event.usage or usage
    assert "".join(pieces) == wanted.outputs[0].text
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert (usage.completion_tokens, usage.prompt_tokens_details.cached_tokens) == (20, len(text) // 16 * 16)


def test_the_real_clients_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="scripted", prompt="a", temperature=-1)
    with pytest.raises(openai.NotFoundError, match="gpt-4"):
        client.completions.create(model="gpt-4", prompt="a")
    assert [model.id for model in client.models.list()] == ["scripted"]
    assert client.models.retrieve("scripted").owned_by == "minipaged"


def test_the_real_client_is_told_of_an_engine_that_dies() -> None:
    with serving(toy, num_blocks=512) as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
        stream = client.completions.create(model="scripted", prompt="a", max_tokens=1500, stream=True)
        next(stream)
        server.child._process.kill()
        with pytest.raises(openai.APIError, match="engine died"):
            list(stream)


def test_a_seeded_request_is_the_same_beside_sixty_three_others(client: openai.OpenAI) -> None:
    def ask(seed: int) -> str:
        return client.completions.create(model="scripted", prompt="the same", max_tokens=40, seed=seed).choices[0].text

    alone = ask(11)
    found: dict[int, str] = {}
    threads = [threading.Thread(target=lambda seed=seed: found.update({seed: ask(seed)})) for seed in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[11] == alone
    assert len(set(found.values())) > 32
