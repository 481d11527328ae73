# %% [markdown]
# # 11. Running out
#
# *45 minutes. You need lessons 6 and 7.*
#
# ## Why
#
# Blocks are handed out when they are needed, and nobody knows who will need how many. That is the strength of
# paging. It is also a promise that cannot always be kept: one day four requests are in the middle of their
# answers, each needs one more block, and there is none.
#
# A server that reserves the maximum never has this problem, and pays for it all day long with empty memory
# (lesson 1). We prefer to take the risk, and to have an answer for the bad moment. The answer is
# **preemption**: somebody must leave, so that the others can finish, and comes back later as if nothing had
# happened. Three questions:
#
# ```
#  who?     the latest arrival. The earliest is never touched, so it finishes; then the next is the earliest. Nobody starves.
#
#  how?     recompute   throw the keys and values away, keep the tokens; later compute them again, as if they were a prompt
#           swap        carry the blocks to the CPU's memory (the *host*), later back to the GPU's (the *device*)
#
#  what if it can never work?    a request that is larger than the whole pool must be refused when it arrives, not when it is too late
# ```
#
# And one law above all: **the text does not change**. A request that was preempted, however often, writes
# what it would have written alone.
#
# ## A model that notices everything
#
# To test that law we need a model that betrays the smallest mistake. Ours has keys and values that are plain
# numbers, one for each token, and its next token is a checksum over all of them, as read through the block
# table. One wrong slot, and the text is another from there on.

# %%
from __future__ import annotations

import random
import time
import zlib
from array import array
from collections import deque
from dataclasses import dataclass, field

BLOCK = 4
DOLLARS_PER_HOUR = 2.0  # for one GPU: an example, chosen on 2026-11-28; put in what you pay


def key_value(token: int, position: int) -> int:
    """The "keys and values" of a token: they depend on it and on where it stands."""
    return token * 1_000_003 + position


def next_token(kv: list[int]) -> int:
    return zlib.crc32(array("Q", kv).tobytes()) % 1_000


def alone(prompt: list[int], answer: int) -> list[int]:
    """What a request writes when it has the machine to itself."""
    tokens = list(prompt)
    for _ in range(answer):
        tokens.append(next_token([key_value(t, p) for p, t in enumerate(tokens)]))
    return tokens[len(prompt) :]


@dataclass(eq=False)
class Request:
    arrival: int
    prompt: list[int]
    answer: int
    tokens: list[int] = field(default_factory=list)  # the prompt, and what has been written so far
    computed: int = 0  # tokens whose keys and values are in the pool
    table: list[int] = field(default_factory=list)  # device blocks
    host_table: list[int] = field(default_factory=list)  # host blocks, while it is swapped out

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)

    @property
    def finished(self) -> bool:
        return len(self.tokens) == len(self.prompt) + self.answer


def blocks_for(tokens: int) -> int:
    return -(-tokens // BLOCK)


# %% [markdown]
# ## The engine
#
# It is given. The five functions that it calls and that are not there yet are yours: `never_fits`,
# `choose_victim`, `recompute`, `swap_out` and `swap_in`.
#
# ```
#  submit ──► waiting ──── admitted ────► running ──── finished ────►
#                ▲                         │ ▲ │
#                └──────── recompute ──────┘ │ └─── swap_out ───► swapped
#                                            └───────── swap_in ─────┘
# ```
#
# Each step: every running request gets room for the tokens it has not computed yet, one after the other; if
# there is none, somebody is preempted. If nobody was, those who were swapped out may return, and then
# newcomers may start. Then the model runs.


# %%
class Engine:
    """A pool of device blocks, a pool of host blocks, and requests in three places: waiting, running, swapped."""

    def __init__(self, num_blocks: int, num_host_blocks: int = 0, *, preemption: str = "recompute") -> None:
        self.num_blocks, self.preemption = num_blocks, preemption
        self.device: list[list[int]] = [[-1] * BLOCK for _ in range(num_blocks)]
        self.host: list[list[int]] = [[-1] * BLOCK for _ in range(num_host_blocks)]
        self.free = deque(range(1, num_blocks))  # block 0 is the null block
        self.free_host = deque(range(num_host_blocks))
        self.waiting, self.swapped = deque[Request](), deque[Request]()
        self.running: list[Request] = []
        self.preemptions = self.computed = self.swapped_blocks = self.steps = 0

    def submit(self, request: Request) -> None:
        """ValueError, at once, for a request that could never finish here."""
        if never_fits(len(request.prompt), request.answer, self.num_blocks):
            raise ValueError(
                f"{len(request.prompt)} + {request.answer} tokens can never fit into {self.num_blocks - 1} blocks"
            )
        self.waiting.append(request)

    def grow(self, request: Request) -> bool:
        """Room for all its tokens; False, and nothing changed, if there is none."""
        missing = blocks_for(len(request.tokens)) - len(request.table)
        if missing > len(self.free):
            return False
        request.table += [self.free.popleft() for _ in range(missing)]
        return True

    def preempt(self) -> None:
        """Somebody leaves: to the host if that is wanted and there is room, else to be computed again."""
        self.preemptions += 1
        if self.preemption == "none":
            raise RuntimeError("the pool is full, somebody needs a block, and nobody may be preempted")
        request = choose_victim(self.running)
        carried = len(request.table)
        if self.preemption == "swap" and swap_out(self, request):
            self.swapped_blocks += carried
        else:
            recompute(self, request)

    def step(self) -> None:
        preempted = False
        for request in list(self.running):
            while request in self.running and not self.grow(request):
                self.preempt()
                preempted = True
        while not preempted and self.swapped:
            carried = len(self.swapped[0].host_table)
            if not swap_in(self, self.swapped[0]):
                break
            self.swapped_blocks += carried
            self.running.append(self.swapped.popleft())
        while not preempted and not self.swapped and self.waiting and self.grow(self.waiting[0]):
            self.running.append(self.waiting.popleft())
        self.compute()

    def compute(self) -> None:
        """The model: write the keys and values that are missing, read all of them, write one more token."""
        self.steps += 1
        for request in self.running:
            for position in range(request.computed, len(request.tokens)):
                block, place = request.table[position // BLOCK], position % BLOCK
                self.device[block][place] = key_value(request.tokens[position], position)
                self.computed += 1
            request.computed = len(request.tokens)
            kv = [number for block in request.table for number in self.device[block]][: request.computed]
            request.tokens.append(next_token(kv))
        for request in [r for r in self.running if r.finished]:
            self.running.remove(request)
            self.free.extend(reversed(request.table))
            request.table = []


def some_requests(count: int, seed: int = 0) -> list[Request]:
    rng = random.Random(seed)
    return [
        Request(i, [rng.randrange(1_000) for _ in range(rng.randint(1, 20))], rng.randint(1, 30)) for i in range(count)
    ]


def run(engine: Engine, requests: list[Request]) -> Engine:
    for request in requests:
        engine.submit(request)
    while engine.waiting or engine.running or engine.swapped:
        engine.step()
        if engine.steps > 10_000:
            raise RuntimeError("this goes on for ever: nobody finishes any more")
    return engine


# %% [markdown]
# ## The pain
#
# An engine that hands out blocks on demand and has no answer for the bad moment.


# %%
def the_pain() -> None:
    engine = Engine(num_blocks=17, preemption="none")
    engine.waiting.extend(some_requests(6))
    try:
        while True:
            engine.step()
    except RuntimeError as error:
        print(f"after {engine.steps} steps: {error}")
        for request in engine.running:
            done, whole = len(request.tokens) - len(request.prompt), request.answer
            print(
                f"  request {request.arrival}: {done:>2} of {whole} tokens written, holds {len(request.table)} blocks"
            )
    print()


if __name__ == "__main__":
    the_pain()

# %% [markdown]
# ## Task 1: `never_fits`
#
# The one case in which preemption cannot help: a request that is too large even if it is alone. It needs room
# for its prompt and its whole answer. Say so when it arrives. A server that finds out later has already made
# others leave, in vain; and if such a request stands at the head of the queue, everybody behind it waits for
# ever.
#
# (You know from lesson 2 that the last token of an answer is only written down, so one token less would do.
# Count it all the same, as minipaged does: prompt plus answer is a sum that everybody can check.)
#
# ```console
# $ python 11_running_out.py
# NotImplementedError: lesson 11, task 1: never_fits
# ```


# %%
def never_fits(prompt: int, answer: int, num_blocks: int) -> bool:
    """Whether a request of that many tokens is too large for a pool of num_blocks (block 0 is not for use).

    >>> never_fits(prompt=6, answer=10, num_blocks=5), never_fits(prompt=7, answer=10, num_blocks=5)  # blocks of 4
    (False, True)
    """
    raise NotImplementedError("lesson 11, task 1: never_fits")


# %%
def test_1_the_null_block_is_no_room() -> None:
    assert not never_fits(6, 10, num_blocks=5), "16 tokens, 4 blocks of 4: just fits"
    assert never_fits(7, 10, num_blocks=5), "17 tokens need 5 blocks, and one of the 5 is the null block"
    assert never_fits(1, 1, num_blocks=1)


if __name__ == "__main__":
    test_1_the_null_block_is_no_room()

# %% [markdown]
# ## Task 2: `choose_victim`
#
# Of those who run, the one who leaves: the latest arrival. `running` is not always in order of arrival, since
# some return from a swap.


# %%
def choose_victim(running: list[Request]) -> Request:
    """Who must leave.

    >>> early, late = Request(arrival=3, prompt=[1], answer=5), Request(arrival=7, prompt=[1], answer=5)
    >>> choose_victim([late, early]) is late
    True
    """
    raise NotImplementedError("lesson 11, task 2: choose_victim")


# %%
def test_2_the_latest_arrival() -> None:
    a, b, c = (Request(i, [1], 5) for i in (3, 7, 5))
    assert choose_victim([a, b, c]) is b, "of arrivals 3, 7 and 5, the one of 7 must leave"
    assert choose_victim([a]) is a, "if it is alone, it makes room by leaving"


if __name__ == "__main__":
    test_2_the_latest_arrival()

# %% [markdown]
# ## Task 3: `recompute`
#
# The simple way to leave: give back all blocks, forget what was computed, keep the tokens. Move the request
# from `running` to the **front** of `waiting`: it arrived before all who wait there. The tokens it has
# written are part of what it will compute when it returns; a long prompt, nothing else. (Remember lesson 7:
# there are no phases.)


# %%
def recompute(engine: Engine, request: Request) -> None:
    """`request` leaves the pool and will be computed again.

    >>> engine, request = Engine(num_blocks=9), Request(arrival=0, prompt=[5, 6, 7], answer=4)
    >>> engine.running, took_a_block = [request], engine.grow(request)
    >>> recompute(engine, request)
    >>> request.table, len(engine.free), engine.running, list(engine.waiting) == [request]
    ([], 8, [], True)
    """
    raise NotImplementedError("lesson 11, task 3: recompute")


# %%
def watched(engine: Engine, requests: list[Request]) -> Engine:
    """Run to the end; look at everything after each step."""
    for request in requests:
        engine.submit(request)
    while engine.waiting or engine.running or engine.swapped:
        earliest = min((r for r in requests if not r.finished), key=lambda r: r.arrival)
        was_running = earliest in engine.running
        engine.step()
        assert engine.steps < 5_000, "this goes on for ever: nobody finishes any more"
        held = [block for r in requests for block in r.table]
        assert sorted([*held, *engine.free]) == list(range(1, engine.num_blocks)), "device blocks were lost or doubled"
        kept = [block for r in requests for block in r.host_table]
        assert sorted([*kept, *engine.free_host]) == list(range(len(engine.host))), "host blocks were lost or doubled"
        for place in (engine.waiting, engine.swapped):
            order = [r.arrival for r in place]
            assert order == sorted(order), f"those who wait are out of order: {order}"
        still = earliest.finished or earliest in engine.running
        assert still or not was_running, "the earliest of all was made to leave"
    return engine


def texts(requests: list[Request]) -> list[list[int]]:
    return [request.tokens[len(request.prompt) :] for request in requests]


def test_3_leaves_everything_behind_but_its_tokens() -> None:
    engine = Engine(num_blocks=9)
    one, two = some_requests(2, seed=3)
    engine.running, engine.waiting = [one, two], deque([Request(9, [1], 1)])
    for request in (one, two):
        engine.grow(request)
    engine.compute()
    tokens = list(two.tokens)
    recompute(engine, two)
    assert engine.running == [one]
    assert engine.waiting[0] is two, "it arrived before all who wait: it belongs to the front"
    assert two.tokens == tokens
    assert (two.table, two.computed) == ([], 0)
    assert len(engine.free) == 8 - len(one.table)


def test_3_the_texts_are_the_same_for_any_pool_that_holds_the_largest() -> None:
    requests = some_requests(8)
    expected = [alone(r.prompt, r.answer) for r in requests]
    smallest = 1 + max(blocks_for(len(r.prompt) + r.answer) for r in requests)
    for num_blocks in (smallest, smallest + 1, smallest + 5, 2 * smallest, 200):
        requests = some_requests(8)
        watched(Engine(num_blocks), requests)
        assert texts(requests) == expected, f"with {num_blocks} blocks somebody wrote another text"


def test_3_what_never_fits_does_not_stop_the_others() -> None:
    engine, large = Engine(num_blocks=6), Request(0, [1] * 30, 10)
    try:
        engine.submit(large)
    except ValueError:
        pass
    else:
        raise AssertionError("40 tokens in 5 blocks of 4: this must be refused")
    small = Request(1, [1, 2, 3], 5)
    run(engine, [small])
    assert texts([small]) == [alone([1, 2, 3], 5)]


if __name__ == "__main__":
    test_3_leaves_everything_behind_but_its_tokens()
    test_3_the_texts_are_the_same_for_any_pool_that_holds_the_largest()
    test_3_what_never_fits_does_not_stop_the_others()

# %% [markdown]
# ## Task 4: `swap_out`
#
# The other way: carry the blocks to the host. For each device block take a host block, copy the contents
# (`engine.host[h] = list(engine.device[d])`), give the device block back. The host blocks go into
# `request.host_table`, in the order of the text. `computed` stays as it is: nothing is lost. The request
# moves from `running` to the front of `swapped`.
#
# If the host has too few free blocks, return `False` and change nothing; the engine will fall back to
# `recompute`.
#
# ## Task 5: `swap_in`
#
# And back. The request needs device blocks for what it carries, **and for the token it will compute next**.
# Without that second part it might come back, find no block for its next token, and be thrown out again at
# once, for ever. If there are too few, return `False` and change nothing. The engine moves the request to
# `running` itself.


# %%
def swap_out(engine: Engine, request: Request) -> bool:
    """Carry a running request's blocks to the host; False, and nothing changed, if they do not fit there.

    >>> engine, request = Engine(num_blocks=9, num_host_blocks=3), Request(arrival=0, prompt=[5, 6, 7], answer=4)
    >>> engine.running, took_a_block = [request], engine.grow(request)
    >>> swap_out(engine, request), request.table, request.host_table, list(engine.swapped) == [request]
    (True, [], [0], True)
    """
    raise NotImplementedError("lesson 11, task 4: swap_out")


def swap_in(engine: Engine, request: Request) -> bool:
    """Carry its blocks back to the device, with room for its next token; False, and nothing changed, if there is too little.

    >>> engine, request = Engine(num_blocks=9, num_host_blocks=3), Request(arrival=0, prompt=[5, 6, 7], answer=4)
    >>> engine.running, took_a_block = [request], engine.grow(request)
    >>> swap_out(engine, request), swap_in(engine, request), len(request.table), request.host_table
    (True, True, 1, [])
    """
    raise NotImplementedError("lesson 11, task 5: swap_in")


# %%
def half_way(num_host_blocks: int) -> tuple[Engine, Request]:
    engine, request = Engine(9, num_host_blocks, preemption="swap"), Request(0, [5, 6, 7, 8, 9, 10], 20)
    engine.running = [request]
    engine.grow(request)
    engine.compute()
    return engine, request


def test_4_everything_is_on_the_host() -> None:
    engine, request = half_way(num_host_blocks=3)
    contents = [list(engine.device[block]) for block in request.table]
    assert swap_out(engine, request)
    assert [engine.host[block] for block in request.host_table] == contents
    assert request.table == []
    assert request.computed == 6, "nothing is lost: it need not be computed again"
    assert len(engine.free) == 8
    assert len(engine.free_host) == 1
    assert engine.running == []
    assert list(engine.swapped) == [request]
    for block in engine.device:
        block[:] = [-9] * BLOCK
    assert [engine.host[block] for block in request.host_table] == contents, "the host holds a reference, not a copy"


def test_4_a_full_host_changes_nothing() -> None:
    engine, request = half_way(num_host_blocks=1)
    table = list(request.table)
    assert swap_out(engine, request) is False
    assert (request.table, request.host_table, engine.running) == (table, [], [request])
    assert list(engine.free_host) == [0]


def test_5_out_and_in_changes_nothing_but_the_blocks_numbers() -> None:
    engine, request = half_way(num_host_blocks=3)
    contents = [list(engine.device[block]) for block in request.table]
    swap_out(engine, request)
    for block in engine.free:
        engine.device[block] = [-9] * BLOCK  # others were here
    assert swap_in(engine, request)
    assert [engine.device[block] for block in request.table][:2] == contents
    assert request.host_table == []
    assert len(engine.free_host) == 3


def test_5_comes_back_only_if_the_next_token_fits_too() -> None:
    engine, request = half_way(num_host_blocks=3)
    for _ in range(2):
        engine.grow(request)
        engine.compute()
    assert (request.computed, len(request.tokens)) == (8, 9), "two full blocks, and a ninth token to compute"
    swap_out(engine, request)
    taken = [engine.free.popleft() for _ in range(6)]
    assert swap_in(engine, request) is False, "two free blocks are too few: the ninth token needs a third"
    assert len(engine.free) == 2
    assert len(request.host_table) == 2
    engine.free.append(taken.pop())
    assert swap_in(engine, request)
    assert len(request.table) == 3


def test_5_the_texts_are_the_same_whatever_is_swapped() -> None:
    requests = some_requests(8)
    expected = [alone(r.prompt, r.answer) for r in requests]
    smallest = 1 + max(blocks_for(len(r.prompt) + r.answer) for r in requests)
    for num_blocks in (smallest, smallest + 2, 2 * smallest):
        for num_host_blocks in (0, 3, 100):
            requests = some_requests(8)
            watched(Engine(num_blocks, num_host_blocks, preemption="swap"), requests)
            assert texts(requests) == expected, f"{num_blocks} blocks, {num_host_blocks} on the host"


if __name__ == "__main__":
    test_4_everything_is_on_the_host()
    test_4_a_full_host_changes_nothing()
    test_5_out_and_in_changes_nothing_but_the_blocks_numbers()
    test_5_comes_back_only_if_the_next_token_fits_too()
    test_5_the_texts_are_the_same_whatever_is_swapped()

# %% [markdown]
# ## What was won
#
# The same forty requests through smaller and smaller pools. The last column is the law: is every text what it
# would have been alone?
#
# The seconds are measured here, where moving a block costs next to nothing and so does a token; the dollars are
# for a million such rounds. The price of an hour, `DOLLARS_PER_HOUR` at the top of the file, is an example of
# 2026-11-28 and not an offer: write your own there.


# %%
def what_was_won() -> None:
    count = 40
    asked = some_requests(count, seed=1)
    expected = [alone(r.prompt, r.answer) for r in asked]
    least = sum(len(r.prompt) + r.answer - 1 for r in asked)
    smallest = 1 + max(blocks_for(len(r.prompt) + r.answer) for r in asked)
    print(f"dollars: for a million rounds, at {DOLLARS_PER_HOUR:.2f} an hour")
    print("blocks  way        steps  preempted  tokens again  blocks carried  seconds  dollars  unchanged")
    for num_blocks in (400, 100, 50, 25, smallest):
        for way, hosts in (("recompute", 0), ("swap", 400)):
            seconds = float("inf")
            for _ in range(5):  # the fastest counts: other programs only ever add to it
                requests = some_requests(count, seed=1)
                start = time.perf_counter()
                engine = run(Engine(num_blocks, hosts, preemption=way), requests)
                seconds = min(seconds, time.perf_counter() - start)
            dollars = 1e6 * seconds * DOLLARS_PER_HOUR / 3_600
            print(
                f"{num_blocks:>6}  {way:<10}{engine.steps:>6,}{engine.preemptions:>11,}{engine.computed - least:>14,}"
                f"{engine.swapped_blocks:>16,}{seconds:>9.4f}{dollars:>9.2f}{texts(requests) == expected!s:>11}"
            )


if __name__ == "__main__":
    what_was_won()

# %% [markdown]
# Which way is better? Recomputing costs arithmetic, as much as the prompt and the tokens so far; a GPU does
# many tokens at once, so it is cheaper than it looks. Swapping costs a trip over a slow bus, twice, and many
# small blocks make a slow trip. So the answer depends on the block size and on the machine, and it can be
# calculated.
#
# ## What real engines do
#
# - **The vLLM paper** has both ways, and measures which wins for which block size (Kwon et al. 2023, section
#   4.5 and Fig. 19). Victims are taken latest first, as here.
# - **vLLM today** only recomputes ([optimization
#   guide](https://docs.vllm.ai/en/stable/configuration/optimization/)): with the prefix cache, a request that
#   returns soon finds most of its own blocks still there.
# - **TGI** and **TensorRT-LLM** can also run without preemption: they admit a request only if there is room
#   for the longest answer it may give. Safe and simple, and some of lesson 1's waste is back.
# - **Operating systems** swap since the 1960s, and know the failure too: when everybody is swapped out all
#   the time, nobody gets anything done. It is called thrashing. First come, first served is what protects us
#   from it.
#
# ## Where this lives in minipaged
#
# - `minipaged/scheduling/scheduler.py`: `Scheduler.check` refuses what never fits; `Scheduler.schedule` is
#   the engine's step.
# - `minipaged/memory/block_manager.py`: `BlockManager.swap_out` and `BlockManager.swap_in`, which also keep
#   sharing alive: a block of two samples travels once.
# - `minipaged/scheduling/policies.py`: `PreemptionCost.swap_is_cheaper` does the calculation.
# - `minipaged/memory/swap.py`: `HostPool`.
# - `minipaged/laws.py`: `LAWS`, laws L39 to L50, and L55: the outputs do not depend on the schedule.
