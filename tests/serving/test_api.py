"""What a client reads: documents, codes, names. The engine is a script, so that every answer is known."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

import minipaged
from tests.serving.engines import scripted, toy
from tests.serving.running import Serving, serving

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving(scripted) as found:
        yield found


def said(prompt: str, count: int) -> str:
    """What the script answers: its letter at each position of the sequence."""
    return "".join(LETTERS[(len(prompt) + i) % 26] for i in range(count))


def test_a_completion(server: Serving) -> None:
    document = server.complete(prompt="xyz", max_tokens=5)
    assert document["object"] == "text_completion"
    assert document["model"] == "scripted"
    assert document["choices"][0]["text"] == said("xyz", 5)
    assert document["choices"][0]["finish_reason"] == "length"
    assert document["usage"]["prompt_tokens"] == 3
    assert document["usage"]["completion_tokens"] == 5
    assert document["usage"]["total_tokens"] == 8
    assert len(server.complete(prompt="xyz")["choices"][0]["text"]) == 16, "OpenAI's default"


def test_prompts_are_text_token_ids_or_lists_of_either(server: Serving) -> None:
    ids = list(b"xyz")
    for prompt, count in (("xyz", 1), (ids, 1), (["xyz", "ab"], 2), ([ids, list(b"ab")], 2), (["xyz", list(b"ab")], 2)):
        choices = server.complete(prompt=prompt, max_tokens=3)["choices"]
        assert [choice["index"] for choice in choices] == list(range(count))
        assert choices[0]["text"] == said("xyz", 3)
        assert count == 1 or choices[1]["text"] == said("ab", 3)
    assert len(server.complete(prompt=["a", "b"], n=2, max_tokens=2)["choices"]) == 4


def test_a_chat_completion(server: Serving) -> None:
    document = server.chat("hi", max_completion_tokens=4, max_tokens=9)
    choice = document["choices"][0]
    text = "<user>hi</><assistant>"
    assert document["object"] == "chat.completion"
    assert choice["message"] == {"role": "assistant", "content": said(text, 4), "refusal": None}, "the newer limit wins"
    assert document["usage"]["prompt_tokens"] == len(text)
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    for content in (parts, "hi"):
        same = server.http.post(
            "/v1/chat/completions",
            json={"messages": [{"role": "user", "content": content}], "max_tokens": 4, "temperature": None},
        ).json()
        assert same["choices"][0]["message"]["content"] == said(text, 4)


def test_the_last_message_can_be_continued(server: Serving) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "well "}]
    body = {"messages": messages, "continue_final_message": True}
    tokens = server.http.post("/tokenize", json=body).json()["tokens"]
    assert bytes(tokens) == b"<user>hi</><assistant>well"
    plain = server.http.post("/tokenize", json={"messages": messages, "add_generation_prompt": False}).json()["tokens"]
    assert bytes(plain) == b"<user>hi</><assistant>well </>"
    assert server.refusal({**body, "add_generation_prompt": True}, "/v1/chat/completions")[0] == 400


def test_an_absent_limit_is_cut_and_a_given_one_is_refused_with_the_number_that_could(server: Serving) -> None:
    prompt = "x" * 8180
    assert server.complete(prompt=prompt)["usage"]["completion_tokens"] == 12, "16 by default, and 12 fit"
    status, error = server.refusal({"prompt": prompt, "max_tokens": 13})
    assert (status, error["param"], error["code"]) == (400, "max_tokens", "context_length_exceeded")
    assert "at most 12 " in error["message"]
    assert server.complete(prompt=prompt, max_tokens=12)["usage"]["completion_tokens"] == 12
    assert server.refusal({"prompt": "x" * 8192})[0] == 400
    assert server.chat("x" * 8100)["usage"]["completion_tokens"] == 8192 - 8100 - len("<user></><assistant>")


def test_a_window_lets_a_request_be_longer_than_the_pool() -> None:
    window = {"retention": "window:16", "block_size": 4, "num_blocks": 40, "max_num_batched_tokens": 64}
    with serving(toy, **window) as server:
        assert server.complete(prompt="a" * 200, max_tokens=4, ignore_eos=True)["usage"]["completion_tokens"] == 4
        status, error = server.refusal({"prompt": "a" * 200, "max_tokens": 4, "n": 30})
        assert status == 400
        assert "the pool has 39" in error["message"]


def test_log_probabilities_have_an_entry_for_every_token(server: Serving) -> None:
    for stop in (None, said("xyz", 8)[5:7]):
        for n in (1, 3):
            document = server.complete(prompt="xyz", max_tokens=8, logprobs=2, n=n, stop=stop)
            for choice in document["choices"]:
                logprobs = choice["logprobs"]
                count = document["usage"]["completion_tokens"] // n
                assert count == (8 if stop is None else 7)
                assert all(len(values) == count for values in logprobs.values())
                assert "".join(logprobs["tokens"])[:5] == choice["text"][:5]
                assert logprobs["text_offset"] == list(range(count))
                for token, value, top in zip(
                    logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
                ):
                    assert top[token] == value, "the drawn token is among them, the same float"
    for top_count in (0, 3):
        content = server.chat("a", max_tokens=4, logprobs=True, top_logprobs=top_count)["choices"][0]["logprobs"][
            "content"
        ]
        assert [len(entry["top_logprobs"]) for entry in content] == [top_count] * 4
        assert all(entry["bytes"] == list(entry["token"].encode()) for entry in content)
        assert all(entry["token"] in [t["token"] for t in entry["top_logprobs"]] for entry in content if top_count)
    assert server.chat("a", max_tokens=4)["choices"][0]["logprobs"] is None


def test_lists_of_log_probabilities_may_be_long() -> None:
    """Longer than what a stranger's record may be; two of them in one step are two records."""
    with serving(toy, num_blocks=512) as server:
        asked = {"prompt": ["a" * 1000, "b" * 1000], "max_tokens": 1, "prompt_logprobs": 100}
        for choice in server.complete(**asked, cache_salt="é" * 1_000_000)["choices"]:
            assert all(len(entry) in (100, 101) for entry in choice["prompt_logprobs"][1:])
            assert len(choice["prompt_logprobs"]) == 1000
    with serving(scripted, max_model_len=20_000) as server:
        assert server.refusal({"prompt": "a" * 19_000, "max_tokens": 1, "prompt_logprobs": 100})[0] == 400


def test_an_echoed_prompt_can_be_scored_without_an_answer(server: Serving) -> None:
    for most in (0, 1):
        document = server.complete(prompt="xyz", max_tokens=most, echo=True, logprobs=1)
        choice = document["choices"][0]
        assert choice["text"] == "xyz" + said("xyz", most)
        assert choice["logprobs"]["tokens"] == list("xyz" + said("xyz", most))
        assert choice["logprobs"]["token_logprobs"][0] is None
        assert choice["logprobs"]["top_logprobs"][0] is None
        assert all(value < 0 for value in choice["logprobs"]["token_logprobs"][1:])
        assert document["usage"]["completion_tokens"] == most
    streamed = server.events(prompt="xyz", max_tokens=0, echo=True, logprobs=1)
    assert "".join(choice["text"] for event in streamed for choice in event["choices"]) == "xyz"
    assert server.refusal({"prompt": "xyz", "max_tokens": 0})[0] == 400


def test_the_end_of_a_text_is_counted_and_is_no_text() -> None:
    with serving(scripted, text=b"abc\0") as server:
        document = server.complete(prompt="abcd", max_tokens=50, logprobs=0)
        choice = document["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == ("abc", "stop")
        assert document["usage"]["completion_tokens"] == 4
        assert choice["logprobs"]["tokens"] == ["a", "b", "c", "<end>"]
        document = server.complete(prompt="abcd", max_tokens=6, ignore_eos=True, skip_special_tokens=False)
        assert document["choices"][0]["text"] == "abc<end>ab"


def test_vllms_fields(server: Serving) -> None:
    found = server.complete(prompt="xyz", max_tokens=3, return_token_ids=True, prompt_logprobs=1, min_p=0.1, top_k=-1)
    choice = found["choices"][0]
    assert bytes(choice["token_ids"]).decode() == choice["text"]
    assert choice["prompt_token_ids"] == list(b"xyz")
    assert choice["prompt_logprobs"][0] is None
    assert choice["prompt_logprobs"][1][str(ord("y"))]["decoded_token"] == "y"
    assert server.chat("a", max_tokens=2, prompt_logprobs=0)["prompt_logprobs"][0] is None
    assert server.complete(prompt="xyz", max_tokens=9, stop_token_ids=[ord("f")])["choices"][0]["stop_reason"] == ord(
        "f"
    )
    beams = server.complete(prompt="xyz", max_tokens=4, use_beam_search=True, n=2)
    assert len({choice["text"] for choice in beams["choices"]}) == 2
    best = server.complete(prompt="xyz", max_tokens=4, best_of=3, n=1)
    assert best["usage"]["completion_tokens"] == 12, "all that was drawn"


def test_small_routes(server: Serving) -> None:
    get = server.http.get
    assert get("/v1/models").json()["data"][0]["id"] == "scripted"
    assert get("/v1/models").json()["data"][0]["max_model_len"] == 8192
    assert get("/v1/models/scripted").json()["object"] == "model"
    assert get("/v1/models/other").status_code == 404
    assert get("/health").json() == {"status": "ok"}
    assert get("/version").json()["version"]
    tokens = server.http.post("/tokenize", json={"prompt": "hé", "return_token_strs": True}).json()
    assert tokens["tokens"] == list("hé".encode())
    assert (tokens["count"], tokens["max_model_len"]) == (3, 8192)
    assert server.http.post("/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": "hé"}
    assert server.http.post("/detokenize", json={"tokens": [9999]}).status_code == 400
    info = get("/tokenizer_info").json()
    assert (info["vocab_size"], info["eos_token"]) == (257, "<end>")


def test_methods_and_paths(server: Serving) -> None:
    answer = server.http.get("/v1/completions")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert server.http.delete("/v1/models").headers["allow"] == "GET, HEAD"
    assert server.http.get("/nothing").json()["error"]["type"] == "not_found_error"
    for path in ("/health", "/version", "/v1/models", "/metrics", "/tokenizer_info"):
        got, head = server.http.get(path), server.http.head(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-type"] == got.headers["content-type"]


def test_metrics_have_vllms_names_and_count(server: Serving) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    def read() -> dict[tuple[str, str], float]:
        families = text_string_to_metric_families(server.http.get("/metrics").text)
        return {
            (s.name, "".join(v for k, v in s.labels.items() if k != "model_name")): s.value
            for f in families
            for s in f.samples
        }

    server.wait_idle()
    before = read()
    server.complete(prompt="metrics " * 10, max_tokens=7, n=2)
    server.wait_idle()
    after = {key: value - before[key] for key, value in read().items()}
    assert after["minipaged:prompt_tokens_total", ""] == 80
    assert after["minipaged:generation_tokens_total", ""] == 14
    assert after["minipaged:request_success_total", "length"] == 2
    assert after["minipaged:time_to_first_token_seconds_count", ""] == 1
    assert after["minipaged:e2e_request_latency_seconds_count", ""] == 1
    assert after["minipaged:request_queue_time_seconds_count", ""] == 1
    assert after["minipaged:inter_token_latency_seconds_count", ""] == 6
    assert after["minipaged:prefix_cache_queries_total", ""] == 80
    assert ("minipaged:kv_blocks", "cached") in before
    assert before["minipaged:num_requests_running", ""] == before["minipaged:kv_cache_usage_perc", ""] == 0


def test_the_boards_queries_ask_for_metrics_that_there_are(server: Serving) -> None:
    server.refusal({"prompt": 3})
    text = server.http.get("/metrics").text
    there = {re.split(r"[{ ]", line)[0] for line in text.splitlines() if not line.startswith("#")}
    labels = set(re.findall(r'(\w+)="', text))
    board = json.loads((Path(minipaged.__file__).parent / "serving/grafana.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    assert len(queries) > 12
    for query in queries:
        assert set(re.findall(r"minipaged:\w+", query)) <= there, query
        assert set(re.findall(r"(\w+)=~", query)) <= labels, query


BAD = [
    ({"prompt": "a", "temperature": -1}, "temperature"),
    ({"prompt": "a", "top_p": 0}, "top_p"),
    ({"prompt": "a", "n": 0}, "n"),
    ({"prompt": "a", "n": 1025}, "n"),
    ({"prompt": "a", "stop": ["x"] * 10_000}, "stop"),
    ({"prompt": "a", "stop": "x" * 5000}, "stop"),
    ({"prompt": "a", "logprobs": 101}, "logprobs"),
    ({"prompt": "a", "max_tokens": "many"}, "max_tokens"),
    ({"prompt": "a", "max_tokens": -1}, "max_tokens"),
    ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias"),
    ({"prompt": "a", "logit_bias": {"3": 101}}, "logit_bias"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [1.5]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [1, 2**63]}, "prompt"),
    ({"prompt": ["a", [-(2**70)]]}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": [99999]}, None),
    ({"prompt": "a", "stop_token_ids": [99999]}, None),
    ({}, "prompt"),
    ({"prompt": "a", "suffix": "b"}, "suffix"),
    ({"prompt": "a", "response_format": {"type": "json_objekt"}}, "response_format"),
    ({"prompt": "a", "response_format": {"type": "json_schema"}}, "response_format"),
    ({"prompt": "a", "stream_options": 3}, "stream_options"),
    ({"prompt": "a", "use_beam_search": True, "temperature": 0.5}, "temperature"),
    ({"prompt": "a", "n": 3, "best_of": 2}, "best_of"),
    ({"prompt": "a", "seed": 2**70}, "seed"),
]


@pytest.mark.parametrize(("body", "param"), BAD)
def test_a_bad_field_is_named(server: Serving, body: dict[str, object], param: str | None) -> None:
    status, error = server.refusal(body)
    assert status == 400, error
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param, error
    server.wait_idle()  # it takes no place in the queue


CHAT_BAD = [
    ({"messages": []}, "messages"),
    ({}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "messages[0].content[0]"),
    ({"messages": [{"content": "a"}]}, "messages[0]"),
    ({"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function"}]}, "tools"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0]"),
    ({"messages": [{"role": "user", "content": "a"}], "top_logprobs": 3}, "top_logprobs"),
    ({"messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"messages": [{"role": "user", "content": "a"}], "reasoning_effort": "high"}, "reasoning_effort"),
]


@pytest.mark.parametrize(("body", "param"), CHAT_BAD)
def test_a_bad_field_of_a_chat_is_named(server: Serving, body: dict[str, object], param: str) -> None:
    status, error = server.refusal(body, "/v1/chat/completions")
    assert (status, error["param"]) == (400, param), error


def test_unknown_fields_are_ignored_and_named(server: Serving) -> None:
    body = {
        "prompt": "a",
        "max_tokens": 1,
        "frobnicate": 3,
        "user": "me",
        "metadata": {},
        "tools": None,
        "bad\nname": 1,
    }
    answer = server.http.post("/v1/completions", json=body)
    assert answer.status_code == 200
    assert answer.headers["x-minipaged-ignored"] == "frobnicate"


def test_an_unknown_model(server: Serving) -> None:
    status, error = server.refusal({"prompt": "a", "model": "gpt-4"})
    assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")


RAW = [
    *(b"", b"{", b"[]", b"null", b"3", b'"a"', b"\xff\xfe", b'{"prompt": NaN}', b'{"prompt": 1e999}', b"[" * 50_000),
    *(b'{"prompt":' + b"[" * 50_000, b'{"prompt": "\\ud800"}', b'{"prompt": "a", "n": Infinity}'),
    b'{"prompt": "a", "x": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001,
]


@pytest.mark.parametrize("body", RAW, ids=range(len(RAW)))
def test_bodies_that_are_no_json_are_400(server: Serving, body: bytes) -> None:
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        status, error = server.refusal(body, path)
        assert status == 400
        assert error["message"]


def test_of_a_key_given_twice_the_last_counts(server: Serving) -> None:
    answer = server.http.post("/v1/completions", content=b'{"prompt": 3, "prompt": "xyz", "max_tokens": 2}')
    assert answer.json()["choices"][0]["text"] == said("xyz", 2)


@pytest.fixture(scope="module")
def short() -> Iterator[Serving]:
    """A server whose longest answer is short."""
    with serving(scripted, max_model_len=64, num_blocks=512) as found:
        yield found


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_mutated_bodies_are_never_the_servers_fault(short: Serving, count: int) -> None:
    seeds = [
        {"prompt": "a", "max_tokens": 2, "stop": ["x"], "logit_bias": {"3": 1}, "n": 1, "stream": False},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "max_tokens": 2, "seed": 1},
    ]
    odd = [None, True, -1, 0, 1.5, "", "x", [], {}, [[]], [None], {"a": None}, 2**63, -(2**70), 1e300, "\x00", [1, "a"]]
    rng = random.Random(7)

    def mutate(value: object) -> object:
        if isinstance(value, dict) and value and rng.random() < 0.8:
            name = rng.choice(list(value))
            return {**value, name: mutate(value[name])}
        if isinstance(value, list) and value and rng.random() < 0.8:
            return [mutate(value[0]), *value[1:]]
        return rng.choice(odd)

    seen = set()
    for i in range(count):
        path = ("/v1/completions", "/v1/chat/completions")[i % 2]
        body = json.dumps(mutate(seeds[i % 2])).encode()
        if rng.random() < 0.3:
            at = rng.randrange(len(body))
            body = body[:at] + bytes([rng.randrange(256)]) + body[at + rng.randrange(3) :]
        answer = short.http.post(path, content=body)
        seen.add(answer.status_code)
        assert answer.status_code in (200, 400, 404), (body, answer.text)
        assert answer.status_code == 200 or answer.json()["error"]["message"], body
    assert seen >= {200, 400}
    short.wait_idle()


def test_every_route_wants_the_key() -> None:
    with serving(scripted, options={"keys": ("sesame", "other")}) as server:
        known = [*server.run.app.routes, "/v1/models/scripted", "/nothing"]
        plain = httpx.Client(base_url=server.url)
        for path in known:
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "sesame"}, {"x-api-key": "sesam"}):
                for method in ("GET", "POST", "PUT"):
                    answer = plain.request(method, path, headers=headers)
                    if path in ("/health", "/version"):
                        assert answer.status_code in (200, 405)
                    else:
                        assert answer.status_code == 401, path
                        assert answer.headers["www-authenticate"] == "Bearer"
        for headers in ({"authorization": "Bearer sesame"}, {"x-api-key": "other"}):
            assert plain.get("/v1/models", headers=headers).status_code == 200


def test_request_ids_are_echoed_where_they_can_be(server: Serving) -> None:
    post = server.http.post
    body = {"prompt": "a", "max_tokens": 1}
    assert post("/v1/completions", json=body, headers={"x-request-id": "mine"}).headers["x-request-id"] == "mine"
    assert post("/v1/completions", json=body, headers={"x-request-id": "mine"}).status_code == 200, "twice is no matter"
    long = post("/v1/completions", json=body, headers={"x-request-id": "i" * 60_000})
    assert long.status_code == 200
    assert len(long.headers["x-request-id"]) == 32
    assert post("/v1/completions", json=body, headers={"x-request-id": "i" * 1_000_000}).status_code == 431
