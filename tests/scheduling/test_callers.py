"""One LLM and several callers: each sees every change of its own requests, whoever steps; calls from any thread are safe."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from minipaged.api import LLM
from minipaged.config import SamplingParams
from minipaged.errors import RequestError
from minipaged.scheduling.request import RequestOutput

PARAMS = SamplingParams(max_tokens=20, ignore_eos=True, logprobs=0)


@pytest.fixture
def llm() -> LLM:
    return LLM("toy", num_blocks=400, block_size=4)


@pytest.fixture
def hurried() -> Iterator[None]:
    """Threads take turns as often as the interpreter allows."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def lengths(outputs: list[RequestOutput]) -> list[int]:
    return [len(output.outputs[0].token_ids) for output in outputs]


def held_blocks(llm: LLM) -> int:
    return llm.engine.scheduler.manager.usage().referenced


def in_threads(*works: Callable[[], None]) -> None:
    """Run these side by side; the first error of any of them is raised."""
    errors: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive(), "a caller waits for ever"
    if errors:
        raise errors[0]


def test_L69_generate_inside_a_stream_takes_nothing_from_it(llm: LLM) -> None:
    seen = []
    for output in llm.stream("hello", PARAMS):
        seen.append(output)
        if len(seen) in (3, 7):
            assert llm.generate("in between", PARAMS)[0].finished
    assert lengths(seen) == list(range(1, 21))
    assert [output.finished for output in seen] == [False] * 19 + [True]


@pytest.mark.parametrize("overlap", [0, 1])
def test_L69_streams_by_turns_see_all_of_their_own(overlap: int) -> None:
    llm = LLM("toy", num_blocks=400, block_size=4, overlap=overlap)
    alone = [llm.generate(text, PARAMS)[0].outputs[0].token_ids for text in ("first", "second", "third")]
    streams = [llm.stream(text, PARAMS) for text in ("first", "second", "third")]
    seen: list[list[RequestOutput]] = [[], [], []]
    for turn in range(60):
        seen[turn % 3].append(next(streams[turn % 3]))
    assert all(next(stream, None) is None for stream in streams)
    for outputs, tokens in zip(seen, alone, strict=True):
        assert lengths(outputs) == list(range(1, 21))
        assert outputs[-1].outputs[0].token_ids == tokens
    assert held_blocks(llm) == 0


def test_L69_a_stream_that_is_left_takes_nothing_from_another(llm: LLM) -> None:
    kept, left = llm.stream("kept", PARAMS), llm.stream("left", PARAMS)
    seen = [next(kept)]
    next(left)
    left.close()  # type: ignore[attr-defined]
    seen.extend(kept)
    assert lengths(seen) == list(range(1, 21))
    assert held_blocks(llm) == 0
    assert not llm.engine.has_work


def test_L69_what_a_stream_gave_never_changes(llm: LLM) -> None:
    params = SamplingParams(max_tokens=9, n=2, temperature=1.0, logprobs=1, prompt_logprobs=0, ignore_eos=True)
    kept = [(output, repr(output), output.prompt_logprobs) for output in llm.stream("hello there", params)]
    for output, said, prompt in kept:
        assert repr(output) == said
        assert output.prompt_logprobs == prompt


@pytest.mark.usefixtures("hurried")
def test_L69_threads_generate_side_by_side(llm: LLM) -> None:
    texts = [f"thread {i} says" for i in range(4)]
    wanted = [llm.generate(text, PARAMS)[0].outputs[0].token_ids for text in texts]

    def ask(i: int) -> None:
        for _ in range(5):
            outputs = llm.generate([texts[i], texts[-1 - i]], PARAMS)
            assert [o.outputs[0].token_ids for o in outputs] == [wanted[i], wanted[-1 - i]]
            assert all(o.outputs[0].finish_reason == "length" for o in outputs)

    def stream() -> None:
        for _ in range(3):
            seen = list(llm.stream(texts[0], PARAMS))
            assert lengths(seen) == list(range(1, 21))
            assert seen[-1].outputs[0].token_ids == wanted[0]

    in_threads(*(lambda i=i: ask(i) for i in range(4)), stream)  # type: ignore[misc]
    assert held_blocks(llm) == 0
    assert not llm.engine.has_work


@pytest.mark.usefixtures("hurried")
def test_L69_requests_aborts_and_settings_from_other_threads() -> None:
    """With a watermark, since whether it counts depends on who holds blocks."""
    llm = LLM("toy", num_blocks=200, block_size=4, watermark=0.1)
    engine, quit_ = llm.engine, threading.Event()
    ids: list[int] = []

    def step() -> None:
        while not quit_.is_set() or engine.has_work:
            engine.step()

    def ask() -> None:
        for i in range(150):
            number = engine.submit([1 + i % 50, 2, 3], SamplingParams(max_tokens=4, ignore_eos=True))
            ids.append(number)
            if i % 3 == 0:
                engine.abort(number)
            if i % 5 == 0:
                engine.knob("policy", "priority" if i % 2 else "fcfs")
            with pytest.raises(RequestError, match="vocabulary"):
                engine.submit([10**6])

    def ask_then_quit() -> None:
        try:
            in_threads(ask, ask)
        finally:
            quit_.set()

    in_threads(step, ask_then_quit)
    assert len(set(ids)) == 300
    assert held_blocks(llm) == 0


def test_L69_a_step_that_fails_ends_the_requests_of_all(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller that steps gets the error; a stream that is read afterwards ends, and says why."""
    stream = llm.stream("hello", PARAMS)
    next(stream)

    def broken(plan: object) -> None:
        raise OSError("the device is gone")

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.runner, "launch", broken)
        with pytest.raises(OSError, match="gone"):
            llm.generate("other", PARAMS)
    last = list(stream)[-1]
    assert last.finished
    assert last.outputs[0].finish_reason == "error"
    assert llm.generate("again", PARAMS)[0].outputs[0].finish_reason == "length"


def test_L69_who_is_told_of_a_step_may_not_step(llm: LLM) -> None:
    leave = llm.engine.trace.subscribe(lambda delta: llm.generate("inside", PARAMS) and None)
    with pytest.raises(RuntimeError, match="under way in this thread"):
        llm.generate("outside", PARAMS)
    leave()
    assert llm.generate("outside", PARAMS)[0].finished


def test_L69_a_forked_process_is_refused(llm: LLM) -> None:
    """It has none of the threads that torch computes with."""
    llm.generate("before", PARAMS)
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        said = "nothing"
        try:
            llm.generate("after", PARAMS)
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writes, said.encode())
        os._exit(0)
    os.close(writes)
    with os.fdopen(reads, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(child, 0)
    assert said.startswith("RuntimeError: this engine belongs to process")
    assert "'spawn'" in said
