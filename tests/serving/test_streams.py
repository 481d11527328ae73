"""Streams: their joined text is the unstreamed text, nothing is taken back, and the last words are said."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minipaged.text.detokenizer import TextStream
from tests.serving.engines import scripted
from tests.serving.running import Serving, serving, text_of

# Characters of one to four bytes, a sequence joined by a zero-width joiner, bytes that are no characters, and an end of a text.
WILD = "aé漢🙂👩‍👩‍👧 ß𝄞".encode() + b"\xff\xf0\x9f\x80 \xc3" + "Ωmega".encode()


@pytest.fixture(scope="module")
def wild() -> Iterator[Serving]:
    with serving(scripted, text=WILD) as found:
        yield found


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving(scripted) as found:
        yield found


def test_characters_split_over_tokens_are_whole_when_they_are_sent(wild: Serving) -> None:
    for start in range(1, len(WILD) + 1):
        for count in (2, 60):
            body = {"prompt": "p" * start, "max_tokens": count}
            whole = wild.complete(**body)["choices"][0]["text"]
            turned = WILD[start % len(WILD) :] + WILD * 3
            assert whole == turned[:count].decode("utf-8", errors="replace")
            if start % 3 == 0:
                assert text_of(wild.events(**body)) == whole


@given(
    data=st.binary(min_size=1, max_size=40),
    cuts=st.lists(st.integers(1, 7), max_size=40),
    stop=st.sampled_from(["", "a", "ab", "é", "\ufffd"]),
)
@settings(max_examples=200)
def test_what_is_stable_is_never_taken_back_for_any_bytes_and_chunking(data: bytes, cuts: list[int], stop: str) -> None:
    """What the engine sends of a text: its stable part, at whatever tokens it looks."""
    stream = TextStream(lambda token: bytes([token]), (stop,) if stop else ())
    sent, at = "", 0
    for size in [*cuts, len(data)]:
        stream.feed(list(data[at : at + size]))
        assert stream.text.startswith(sent)
        sent = stream.text[: stream.stable]
        at += size
    stream.finish()
    assert stream.text.startswith(sent)
    if not stop:
        assert stream.text == data.decode("utf-8", errors="replace")


@pytest.mark.parametrize("stop", ["ghi", "hijklm", ["zzz", "kl"], ["j"], "ab"])
@pytest.mark.parametrize("kept", [False, True])
def test_stop_strings_over_token_borders_never_leak(server: Serving, stop: str | list[str], kept: bool) -> None:
    body = {"prompt": "xyz", "max_tokens": 40, "stop": stop, "include_stop_str_in_output": kept}
    whole = server.complete(**body)["choices"][0]
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    text = (alphabet * 3)[3:43]
    places = [(text.find(s), s) for s in ([stop] if isinstance(stop, str) else stop) if s in text]
    at, found = min(places)
    assert whole["text"] == text[: at + (len(found) if kept else 0)]
    assert (whole["finish_reason"], whole["stop_reason"]) == ("stop", found)
    events = server.events(**body)
    assert text_of(events) == whole["text"]
    last = events[-1]["choices"][0]
    assert (last["finish_reason"], last["stop_reason"]) == ("stop", found)


def test_a_streams_usage_is_that_of_the_document(server: Serving) -> None:
    for body in ({"prompt": "xyz", "max_tokens": 9}, {"prompt": ["xyz", "ab"], "n": 2, "max_tokens": 5, "stop": "fg"}):
        whole = server.complete(**body)
        events = server.events(**body, stream_options={"include_usage": True})
        assert events[-1]["choices"] == []
        assert {**events[-1]["usage"], "prompt_tokens_details": None} == {
            **whole["usage"],
            "prompt_tokens_details": None,
        }
        assert all(event["usage"] is None for event in events[:-1])
        for choice in whole["choices"]:
            assert text_of(events, choice["index"]) == choice["text"]
        plain = server.events(**body)
        assert all("usage" not in event for event in plain)
    steps = server.events(
        prompt="xyz", max_tokens=5, stream_options={"include_usage": True, "continuous_usage_stats": True}
    )
    counts = [event["usage"]["completion_tokens"] for event in steps]
    assert counts == sorted(counts)
    assert counts[-1] == 5


def test_usage_holds_when_requests_are_preempted() -> None:
    """The pool holds six of the twelve answers: some are sent away and computed again, and counted once."""
    with serving(scripted, num_blocks=40, max_num_seqs=16) as server:
        prompts = [chr(97 + i) * 20 for i in range(12)]
        body = {"prompt": prompts, "max_tokens": 60}
        document = server.complete(**body)
        assert [len(choice["text"]) for choice in document["choices"]] == [60] * 12
        assert document["usage"]["completion_tokens"] == 720
        assert document["usage"]["prompt_tokens"] == 240
        events = server.events(**body, stream_options={"include_usage": True})
        assert events[-1]["usage"]["completion_tokens"] == 720
        assert "preemptions_total" in server.http.get("/metrics").text
        server.wait_idle()
        assert server.run.app.link is not None
        assert server.run.app.link.metrics.gauges["preemptions"] > 0


def test_a_chat_stream_begins_with_the_role_and_has_one_finish_a_choice(server: Serving) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "n": 2}
    events = server.events("/v1/chat/completions", **body)
    assert [event["choices"][0]["delta"] for event in events[:2]] == [{"role": "assistant", "content": ""}] * 2
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    finishes = [(c["index"], c["finish_reason"]) for event in events for c in event["choices"] if c["finish_reason"]]
    assert sorted(finishes) == [(0, "length"), (1, "length")]
    whole = server.chat("hi", max_tokens=5, n=2)
    for choice in whole["choices"]:
        assert text_of(events, choice["index"]) == choice["message"]["content"]


def test_a_streams_log_probabilities_are_the_documents(server: Serving) -> None:
    body = {"prompt": "xyz", "max_tokens": 9, "logprobs": 2, "stop": "hij", "echo": True}
    whole = server.complete(**body)["choices"][0]
    events = server.events(**body)
    assert text_of(events) == whole["text"]
    for name, values in whole["logprobs"].items():
        assert [v for event in events for c in event["choices"] for v in c["logprobs"][name]] == values
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "logprobs": True, "top_logprobs": 2}
    whole = server.chat("hi", max_tokens=5, logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    events = server.events("/v1/chat/completions", **body)
    told = [e for event in events for c in event["choices"] if c["logprobs"] for e in c["logprobs"]["content"]]
    assert told == whole


def test_a_stream_has_the_headers_of_one(server: Serving) -> None:
    with server.http.stream("POST", "/v1/completions", json={"prompt": "a", "stream": True}) as answer:
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert answer.headers["cache-control"] == "no-cache"
        assert answer.headers["x-accel-buffering"] == "no"
        assert answer.headers["x-request-id"]
        answer.read()


def test_a_stream_that_waits_says_so(server: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minipaged.serving.http.app.PING_SECONDS", 0.15)
    with serving(scripted, step_seconds=0.5) as slow:
        text = slow.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 2, "stream": True}).text
        assert text.count(": ping\n\n") >= 3


def test_best_of_and_beams_come_at_the_end(server: Serving) -> None:
    for extra in ({"best_of": 3}, {"use_beam_search": True, "n": 2}):
        body = {"prompt": "xyz", "max_tokens": 4, **extra}
        whole = server.complete(**body)
        events = server.events(**body)
        assert [text_of(events, c["index"]) for c in whole["choices"]] == [c["text"] for c in whole["choices"]]
