# %% [markdown]
# # 18. Serving
#
# *40 minutes. You need lesson 7, and Python's `async` and `await`.*
#
# ## Why
#
# So far all requests were there when the engine began. People come when they like, want to read while the answer is
# being written, and close the window in the middle of it. A server stands between them and the engine's steps.
#
# ```
#  clients, one coroutine each              one loop                        the engine
#
#  answer("why?")    ── add ──────────────────────────────────────────────►  waiting
#       │                                  while there is work:                 │
#       │                                    growth = step()   in a thread  ◄── step
#       ◄──── queue ◄─────────────────────── to each its own
#  reads "be", "cause", …
#  closes the window ── cancel ───────────────────────────────────────────►  its blocks come back
# ```
#
# Two things are easy to get wrong. A step *blocks*: while it computes, nothing else in its thread can happen. If it
# runs in the thread of the event loop, no newcomer is heard and no text goes out before it ends. And a client that leaves
# must be noticed, or the engine writes for nobody and keeps the blocks.
#
# How well a server does is not one number. Each reader feels two:
#
# - the **time to first token**: from asking until the answer begins. It contains the time in the queue;
# - the **time per token**: the mean gap from one token to the next, once the first is there.
#
# More load makes both worse. So the owner says what is still good enough for both, and counts **goodput**: the requests a second
# that were served well enough. A server can have a higher throughput and a lower goodput: it finishes many, all of them too late.
#
# ## The pain
#
# A server that answers one request after the other, as a first draft does. Twelve people come within a second or two.

# %%
from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Awaitable, Callable
from typing import NamedTuple, Protocol

from minipaged.api import LLM
from minipaged.config import SamplingParams

Send = Callable[[str], Awaitable[None]]  # writes a piece of text to a client


class Growth(NamedTuple):
    """What a step has added to one request."""

    number: int
    text: str
    finished: bool


class Engine(Protocol):
    """What a server needs of an engine. `add` and `cancel` return at once, also while another thread is in `step`."""

    @property
    def has_work(self) -> bool:
        """Whether a step has anything to do."""
        ...

    def add(self, prompt: str, max_tokens: int) -> int:
        """Take in a request; it joins with the next step. Returns its number."""
        ...

    def step(self) -> list[Growth]:
        """Compute one step. Takes its time, and does not return before."""
        ...

    def cancel(self, number: int) -> None:
        """Give a request up. Does nothing if it has ended."""
        ...


class Toy:
    """minipaged's engine with a model that talks nonsense."""

    def __init__(self, rows: int = 8) -> None:
        self.engine = LLM("toy", device="cpu", num_blocks=400, block_size=8, max_num_seqs=rows).engine
        self.sent: dict[int, int] = {}

    @property
    def has_work(self) -> bool:
        return self.engine.has_work

    def add(self, prompt: str, max_tokens: int) -> int:
        return self.engine.submit(prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True))

    def step(self) -> list[Growth]:
        grown = []
        for output in self.engine.step():
            text, sent = output.outputs[0].text, self.sent.pop(output.request_id, 0)
            grown.append(Growth(output.request_id, text[sent:], output.finished))
            if not output.finished:
                self.sent[output.request_id] = len(text)
        return grown

    def cancel(self, number: int) -> None:
        self.engine.abort(number)


class Asked(NamedTuple):
    """Somebody who comes: when, and what for."""

    after: float  # seconds after the start
    prompt: str
    max_tokens: int


def traffic(count: int, rate: float, seed: int = 0) -> list[Asked]:
    """So many requests, `rate` a second on average, at random."""
    rng, now, asked = random.Random(seed), 0.0, []
    for i in range(count):
        now += rng.expovariate(rate)
        asked.append(Asked(now, f"question {i}: " + "why? " * rng.randint(1, 8), rng.randint(5, 25)))
    return asked


def one_after_the_other(asked: list[Asked]) -> list[tuple[float, list[float]]]:
    """For each: when it came, and when each of its pieces of text was there. A draft of a server."""
    toy, start, seen = Toy(), time.perf_counter(), []
    for one in asked:
        time.sleep(max(0.0, start + one.after - time.perf_counter()))
        toy.add(one.prompt, one.max_tokens)
        stamps = []
        while toy.has_work:
            stamps += [time.perf_counter() - start for _ in toy.step()]
        seen.append((one.after, stamps))
    return seen


def the_pain() -> None:
    Toy().add("warm up", 1)
    waited = [stamps[0] - came for came, stamps in one_after_the_other(traffic(12, rate=8.0))]
    print("one after the other, seconds until the answer begins, in the order in which they came:")
    print("  " + "  ".join(f"{seconds:.2f}" for seconds in waited) + "\n")


if __name__ == "__main__":
    the_pain()

# %% [markdown]
# ## Task 1: `timing`
#
# Both numbers of one request, from the moment it came and the moments at which its tokens were there. The first token
# ends no gap: three tokens have two. With a single token there is none, and the time per token is 0.
#
# ```console
# $ python 18_serving.py
# NotImplementedError: lesson 18, task 1: timing
# ```


# %%
class Timing(NamedTuple):
    """What a reader felt, in seconds."""

    first: float
    per_token: float


def timing(came: float, stamps: list[float]) -> Timing:
    """Time to first token and time per token. `stamps`: when each token was there, at least one.

    >>> timing(came=10.0, stamps=[12.0, 12.5, 14.0])
    Timing(first=2.0, per_token=1.0)
    """
    raise NotImplementedError("lesson 18, task 1: timing")


# %%
def test_1_the_first_and_the_gaps() -> None:
    assert timing(1.0, [3.0, 4.0, 5.0, 6.0, 7.0]) == Timing(2.0, 1.0)
    assert timing(0.5, [0.75, 1.0, 1.75]) == Timing(0.25, 0.5)


def test_1_one_token_has_no_gap() -> None:
    assert timing(1.0, [3.0]) == Timing(2.0, 0.0)


if __name__ == "__main__":
    test_1_the_first_and_the_gaps()
    test_1_one_token_has_no_gap()

# %% [markdown]
# ## Task 2: `goodput`
#
# Requests a second for which *both* times are within their limits (exactly at the limit is within).
# Those that were too slow in one of them count nothing; they have been computed all the same.


# %%
def goodput(timings: list[Timing], seconds: float, limits: Timing) -> float:
    """Requests a second that were served well, of those that were served in so many seconds.

    >>> goodput([Timing(1.0, 0.1), Timing(3.0, 0.1)], seconds=2.0, limits=Timing(first=2.0, per_token=0.2))
    0.5
    """
    raise NotImplementedError("lesson 18, task 2: goodput")


# %%
def test_2_both_must_be_good() -> None:
    timings = [Timing(1.0, 0.1), Timing(1.0, 0.3), Timing(3.0, 0.1), Timing(3.0, 0.3), Timing(2.0, 0.2)]
    said = goodput(timings, 4.0, Timing(2.0, 0.2))
    assert said == 0.5, (
        f"the first and the last of five are within both limits, in 4 seconds: you said {said}, right is 0.5"
    )
    assert goodput(timings, 4.0, Timing(0.5, 0.05)) == 0
    assert goodput([], 4.0, Timing(2.0, 0.2)) == 0


if __name__ == "__main__":
    test_2_both_must_be_good()

# %% [markdown]
# ## Task 3: `Server.run`
#
# The loop in the middle, a coroutine that never ends by itself. Its fields:
#
# - `self.work`, an `asyncio.Event`: set by whoever has added a request;
# - `self.queues`: for each request's number, the `asyncio.Queue` of the client who reads it.
#
# Over and over:
#
# 1. wait until `self.work` is set, and clear it at once (a set event lets the next `wait` through without a pause);
# 2. while the engine has work: run one step *in a thread of its own* (`await asyncio.to_thread(self.engine.step)`), so that
#    the event loop goes on meanwhile; then put each growth into its client's queue (`put_nowait`). If a number has no queue, its client has
#    left: ignore it.
#
# While nobody asks, the loop must sleep, and not ask the engine again and again.
#
# ## Task 4: `Server.answer`
#
# One client's side. `send` writes a piece of text to the client; await it.
#
# 1. add the request to the engine, put an `asyncio.Queue()` under its number into `self.queues`, set `self.work`;
# 2. take growths from the queue and send their texts one by one, until one is `finished`; its text is sent too. Then return;
# 3. however it ends, take the queue out of `self.queues`. If it ends before the finished growth came, `cancel` the request: the
#    client has left. You notice that by an exception: `send` raises `ConnectionError`, or your coroutine is cancelled while it
#    waits (`asyncio.CancelledError`). `try … finally` sees both; the exception goes on its way.


# %%
class Server:
    """Many clients on one engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.work = asyncio.Event()
        self.queues: dict[int, asyncio.Queue[Growth]] = {}

    async def run(self) -> None:
        """Step while there is work, and hand out what each step has added. Ends only when it is cancelled.

        >>> async def ask() -> str:
        ...     server = Server(Toy())
        ...     number = server.engine.add("why?", 1)
        ...     server.queues[number] = queue = asyncio.Queue()
        ...     server.work.set()
        ...     loop = asyncio.create_task(server.run())
        ...     growth = await asyncio.wait_for(queue.get(), 5)
        ...     loop.cancel()
        ...     return growth.finished
        >>> asyncio.run(ask())
        True
        """
        raise NotImplementedError("lesson 18, task 3: Server.run")

    async def answer(self, prompt: str, max_tokens: int, send: Send) -> None:
        """Ask the engine, and send the pieces of its answer as they come.

        >>> async def ask() -> int:
        ...     server, pieces = Server(Toy()), []
        ...     async def send(piece: str) -> None:
        ...         pieces.append(piece)
        ...     loop = asyncio.create_task(server.run())
        ...     await server.answer("why?", 3, send)
        ...     loop.cancel()
        ...     return len(pieces)
        >>> asyncio.run(ask())
        3
        """
        raise NotImplementedError("lesson 18, task 4: Server.answer")


# %%
class Scripted:
    """An engine for tests: one letter a step for each request, and it notes what is done to it."""

    def __init__(self) -> None:
        self.left: dict[int, int] = {}
        self.steps, self.asked_for_work, self.cancelled = 0, 0, list[int]()
        self.gate: threading.Event | None = None  # a step waits for it
        self.in_a_step = threading.Event()

    @property
    def has_work(self) -> bool:
        self.asked_for_work += 1
        if self.asked_for_work > 10_000:
            raise AssertionError(
                "has_work is asked again and again without a pause: wait for self.work, and clear it once it is set"
            )
        return bool(self.left)

    def add(self, prompt: str, max_tokens: int) -> int:
        number = self.steps * 100 + len(self.left) + 7
        self.left[number] = max_tokens
        return number

    def step(self) -> list[Growth]:
        taken = list(self.left)
        self.in_a_step.set()
        if self.gate is not None and not self.gate.wait(2):
            raise AssertionError("while a step ran, the event loop stood still: run the step in a thread")
        self.steps += 1
        grown = []
        for number in taken:
            if number in self.left:
                self.left[number] -= 1
                grown.append(Growth(number, "abcdefgh"[self.left[number] % 8], self.left[number] == 0))
                if not self.left[number]:
                    del self.left[number]
        return grown

    def cancel(self, number: int) -> None:
        self.cancelled.append(number)
        self.left.pop(number, None)


def stuck(server: Server, engine: Scripted) -> str:
    """Why nothing comes any more, as far as can be seen."""
    if not engine.left:
        return "the engine has no work left, so a growth was not put into its client's queue, or the last was not seen"
    if server.work.is_set():
        return "the engine has work and self.work is set, but run does not step"
    return "the engine has work, but self.work was never set for it, or run has stopped stepping before all was done"


def served(scene: Callable[[Server, Scripted], Awaitable[None]]) -> None:
    """Play a scene while the server's loop runs. What the loop raises is raised here."""

    async def play() -> None:
        engine = Scripted()
        server = Server(engine)
        loop = asyncio.create_task(server.run())
        acts = asyncio.ensure_future(scene(server, engine))
        try:
            done, _ = await asyncio.wait({loop, acts}, timeout=8, return_when=asyncio.FIRST_COMPLETED)
            if loop in done:
                loop.result()
                raise AssertionError("run has ended, though nobody has cancelled it")
            assert acts in done, f"nothing comes any more, and a client waits for ever: {stuck(server, engine)}"
            acts.result()
        finally:
            for task in (loop, acts):
                task.cancel()
            if engine.gate is not None:
                engine.gate.set()

    asyncio.run(play())


def enqueue(server: Server, max_tokens: int) -> tuple[int, asyncio.Queue[Growth]]:
    """A request with a queue, as answer makes it."""
    number = server.engine.add("x", max_tokens)
    server.queues[number] = asyncio.Queue()
    server.work.set()
    return number, server.queues[number]


def test_3_each_gets_its_own() -> None:
    async def scene(server: Server, engine: Scripted) -> None:
        one, first = enqueue(server, 3)
        two, second = enqueue(server, 2)
        for queue, number, letters in ((first, one, "cba"), (second, two, "ba")):
            for letter in letters:
                right, said = Growth(number, letter, letter == "a"), await queue.get()
                assert said == right, f"in the queue of request {number}: yours is {said!r}, right is {right!r}"
        assert engine.steps == 3, f"both requests share the steps: you took {engine.steps}, right is 3"

    served(scene)


def test_3_others_are_heard_while_a_step_runs() -> None:
    async def scene(server: Server, engine: Scripted) -> None:
        engine.gate = threading.Event()
        _, first = enqueue(server, 2)
        while not engine.in_a_step.is_set():
            await asyncio.sleep(0.001)
        _, second = enqueue(server, 1)  # comes while the first step runs
        engine.gate.set()
        assert (await first.get()).text == "b"
        assert (await second.get()).finished, "who comes while a step runs joins the next one"
        assert engine.steps == 2, f"who comes while a step runs joins the next one: {engine.steps} steps, right is 2"

    served(scene)


def test_3_sleeps_while_nobody_asks() -> None:
    async def scene(server: Server, engine: Scripted) -> None:
        for _ in range(2):
            _, queue = enqueue(server, 1)
            await queue.get()
            await asyncio.sleep(0.02)
            asked = engine.asked_for_work
            await asyncio.sleep(0.1)
            assert engine.asked_for_work == asked, "the loop asks the engine again and again while nobody is there"
        assert engine.steps == 2

    served(scene)


def test_3_a_client_who_has_left_stops_nobody() -> None:
    async def scene(server: Server, engine: Scripted) -> None:
        left, _ = enqueue(server, 3)
        _, stays = enqueue(server, 3)
        del server.queues[left]
        assert [(await stays.get()).text for _ in range(3)] == ["c", "b", "a"]

    served(scene)


async def read(server: Server, max_tokens: int) -> str:
    """A client who stays."""
    pieces = []

    async def send(piece: str) -> None:
        pieces.append(piece)

    await server.answer("x", max_tokens, send)
    return "".join(pieces)


def test_4_all_of_the_text_and_nothing_left_behind() -> None:
    async def scene(server: Server, engine: Scripted) -> None:
        assert await asyncio.gather(*(read(server, n) for n in (5, 1, 3))) == ["edcba", "a", "cba"]
        assert engine.steps == 5, "those who come together share the steps"
        assert server.queues == {}, "a queue is left of an answer that is complete"
        assert engine.cancelled == [], "a request was cancelled though its answer was complete"

    served(scene)


def test_4_pieces_go_out_one_by_one() -> None:
    async def scene(server: Server, engine: Scripted) -> None:
        steps = []

        async def send(piece: str) -> None:
            steps.append(engine.steps)

        await server.answer("x", 4, send)
        assert len(steps) == 4, "a piece for each token"
        assert steps[0] < 4, "the first piece was sent only when all were there"

    served(scene)


def test_4_who_leaves_gives_the_engine_back() -> None:
    async def scene(server: Server, engine: Scripted) -> None:
        async def send(piece: str) -> None:
            raise ConnectionError("the window is closed")

        try:
            await server.answer("x", 100_000, send)
        except ConnectionError:
            pass
        else:
            raise AssertionError("send has raised ConnectionError, and answer went on as if nothing had happened")
        assert server.queues == {}, "the client has left, and its queue is still there"
        assert engine.cancelled, "the client has left, and the engine goes on writing for it"
        assert len(engine.cancelled) == 1, f"engine.cancel was called {len(engine.cancelled)} times, right is once"
        assert await read(server, 2) == "ba"

    served(scene)


def test_4_also_who_leaves_before_the_first_token() -> None:
    async def scene(server: Server, engine: Scripted) -> None:
        engine.gate = threading.Event()
        task = asyncio.create_task(read(server, 5))
        while not engine.in_a_step.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.wait({task})
        assert server.queues == {}, "cancelled while it waited for its first token: its queue is still there"
        assert len(engine.cancelled) == 1, (
            "cancelled while it waited for its first token (CancelledError is no Exception): "
            f"engine.cancel was called {len(engine.cancelled)} times, right is once"
        )
        engine.gate.set()

    served(scene)


if __name__ == "__main__":
    test_3_each_gets_its_own()
    test_3_others_are_heard_while_a_step_runs()
    test_3_sleeps_while_nobody_asks()
    test_3_a_client_who_has_left_stops_nobody()
    test_4_all_of_the_text_and_nothing_left_behind()
    test_4_pieces_go_out_one_by_one()
    test_4_who_leaves_gives_the_engine_back()
    test_4_also_who_leaves_before_the_first_token()

# %% [markdown]
# ## What was won
#
# Twelve people, the same ones as above, at your server. Then more and more of them a second, in an engine of four rows.
# Your machine is not mine, so the limits are taken from it: a first token within four times, a token within twice of
# what somebody feels who is here alone.


# %%
async def under_load(asked: list[Asked], rows: int = 8) -> tuple[list[Timing], float]:
    """What each of them felt, and the seconds from the first that came to the last that was served."""
    server = Server(Toy(rows))
    loop = asyncio.create_task(server.run())
    start = time.perf_counter()

    async def client(one: Asked) -> tuple[Timing, float]:
        await asyncio.sleep(one.after)
        came, stamps = time.perf_counter(), list[float]()

        async def send(piece: str) -> None:
            stamps.append(time.perf_counter())

        await server.answer(one.prompt, one.max_tokens, send)
        return timing(came, stamps), stamps[-1]

    felt = await asyncio.gather(*(client(one) for one in asked))
    loop.cancel()
    return [each for each, _ in felt], max(end for _, end in felt) - start - asked[0].after


def middle(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def what_was_won() -> None:
    felt, _ = asyncio.run(under_load(traffic(12, rate=8.0)))
    print("your server, seconds until the answer begins, in the order in which they came:")
    print("  " + "  ".join(f"{each.first:.2f}" for each in felt) + "\n")
    alone, _ = asyncio.run(under_load(traffic(6, rate=2.0, seed=9)))
    limits = Timing(4 * middle([a.first for a in alone], 0.5), 2 * middle([a.per_token for a in alone], 0.5))
    print(
        f"good enough: first token within {1e3 * limits.first:.0f} ms, a token within {1e3 * limits.per_token:.0f} ms"
    )
    print(f"{'came':>14} {'served':>14} {'goodput':>14} {'first token':>12} {'slowest tenth':>14} {'a token':>10}")
    base = 1 / (15 * middle([a.per_token for a in alone], 0.5))  # a second, one after the other: about 15 tokens each
    for times in (1, 2, 4, 8):
        felt, seconds = asyncio.run(under_load(traffic(40, rate=times * base, seed=2), rows=4))
        first = [each.first for each in felt]
        print(
            f"{times * base:10.1f} / s {len(felt) / seconds:10.1f} / s {goodput(felt, seconds, limits):10.1f} / s"
            f" {1e3 * middle(first, 0.5):9.0f} ms {1e3 * middle(first, 0.9):11.0f} ms"
            f" {1e3 * middle([each.per_token for each in felt], 0.5):7.0f} ms"
        )


if __name__ == "__main__":
    what_was_won()

# %% [markdown]
# As long as fewer come than can be served, the columns say the same. Then *served* stays where it is, for the
# machine can do no more; the queue grows, and the time to the first token with it. There goodput falls, although the engine has never
# been busier. This is why a server that is full had better say so (the status 429, or 503) than let everybody wait too long.
#
# ## What real engines do
#
# - **vLLM** has this loop in `AsyncLLM`, with the engine in a process of its own
#   ([`async_llm.py`](https://github.com/vllm-project/vllm/blob/main/vllm/v1/engine/async_llm.py)): Python runs one thread at a time, so a
#   process keeps the clients' work away from the step.
# - **DistServe** asks for goodput under limits for both times, and computes prompts and answers on different GPUs, so that neither slows
#   the other down (Zhong et al., OSDI 2024, [arXiv 2401.09670](https://arxiv.org/abs/2401.09670)).
#
# ## Where this lives in minipaged
#
# - `minipaged/serving/loop.py`: `EngineLoop`, the loop, in a process of its own.
# - `minipaged/serving/http/link.py`: `EngineLink.ask`, from the clients' side.
# - `minipaged/serving/http/mailbox.py`: `Ticket`, a queue that merges what a slow reader has not taken yet.
# - `minipaged/lab/measure/serve_load.py`: the same measurement for any server with OpenAI's API.
