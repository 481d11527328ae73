# %% [markdown]
# # 1. The waste
#
# *15 minutes. You need Python, and a rough idea of what attention does.*
#
# ## Why
#
# A language model writes one token at a time. To choose the next token it looks back at all the tokens before
# it. For each of those it needs a **key** and a **value**, in every layer. They never change once computed,
# so every serving system keeps them: that store is the **KV cache**. (Lesson 2 builds one.)
#
# For this lesson you need only one fact about it: **each token takes one slot**, and slots are scarce. GPU
# memory holds the model first, and the KV cache gets what is left. When the slots are used up, no further
# request can run, however idle the arithmetic units are. So the question that decides how many people a GPU
# can serve is: *what share of the slots holds a token?*
#
# The old answer to "how many slots should a request get?" was: as many as it could ever need. Nobody knows
# how long an answer will be, attention kernels wanted one unbroken stretch of memory, and so each request got
# a stretch as long as the longest text that the model allows.
#
# ```
#  one request, in the middle of its answer
#
#  ├── prompt ──┼── answer so far ──┼── answer to come ──┼───────────── the rest of the reservation ─────────────┤
#  ████████████████████████████████ ░░░░░░░░░░░░░░░░░░░░░ ·······················································
#           token: holds KV         reserved: yet to fill            internal: will never be used
#
#  external: what lies outside of every reservation, holes too short for the next one, and what the allocator rounded up
# ```
#
# Token, reserved, internal, external: these four words are those of the PagedAttention paper (section 3.1).
# Learn them now: minipaged's screen, its lab and these lessons all use them.
#
# ## The pain
#
# Below is a small server in a loop: a pool of slots, a queue that is never empty, and requests whose lengths
# look like those of people chatting. Run the cell and see how many of them run side by side.

# %%
from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# slots: what a 40 GB card has left beside the weights of a 13-billion-parameter model (paper, section 6.1)
POOL = 15_728
MAX_LEN = 2_048  # the longest text that model allows


class Request(NamedTuple):
    prompt: int  # tokens
    answer: int  # tokens: the truth, which a server does not know beforehand


def chats(count: int, seed: int = 0) -> list[Request]:
    """Requests of very unequal lengths, as chats are: log-normal, with the means of the paper's ShareGPT set."""
    rng = np.random.default_rng(seed)

    def lengths(mean: float, spread: float) -> np.ndarray:
        return np.clip(rng.lognormal(np.log(mean) - spread**2 / 2, spread, count), 1, MAX_LEN // 2).astype(int)

    return [Request(int(p), int(a)) for p, a in zip(lengths(161, 1.0), lengths(338, 0.8), strict=True)]


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


class Contiguous:
    """A pool that hands out unbroken stretches of 1, 2, 4, 8, ... slots, from the first hole that is long enough.

    Powers of two, as Orca's buddy allocator does it: holes of such sizes fit together again.
    """

    def __init__(self, size: int) -> None:
        self.holes = [(0, size)]  # (start, length), by address

    def take(self, slots: int) -> int | None:
        length = power_of_two(slots)
        for i, (start, hole) in enumerate(self.holes):
            if hole >= length:
                self.holes[i : i + 1] = [(start + length, hole - length)] if hole > length else []
                return start
        return None

    def give_back(self, start: int, slots: int) -> None:
        merged: list[tuple[int, int]] = []
        for s, n in sorted([*self.holes, (start, power_of_two(slots))]):
            if merged and sum(merged[-1]) == s:
                merged[-1] = (merged[-1][0], merged[-1][1] + n)
            else:
                merged.append((s, n))
        self.holes = merged


class Running(NamedTuple):
    request: Request
    start: int
    reserved: int
    since: int  # the step it began in


def serve(
    requests: list[Request], pool_size: int, reserve: Callable[[Request], int], steps: int, warm_up: int = 500
) -> dict:
    """Serve from a queue that is never empty, one token a request and step. Returns averages over the steps after the warm-up."""
    pool, queue, running = Contiguous(pool_size), deque(requests), list[Running]()
    sums = {"batch": 0.0, "token": 0.0, "promised": 0.0, "allocated": 0.0}
    for step in range(steps):
        for r in [r for r in running if step - r.since == r.request.answer]:
            running.remove(r)
            pool.give_back(r.start, r.reserved)
        while (start := pool.take(reserve(queue[0]))) is not None:  # first come, first served: the head blocks the line
            request = queue.popleft()
            queue.append(request)
            running.append(Running(request, start, reserve(request), step))
        if step >= warm_up:
            sums["batch"] += len(running)
            sums["token"] += sum(r.request.prompt + step - r.since + 1 for r in running)
            sums["promised"] += sum(r.request.prompt + r.request.answer for r in running)
            sums["allocated"] += sum(r.reserved for r in running)
    return {name: total / (steps - warm_up) for name, total in sums.items()}


def the_pain() -> None:
    mean = serve(chats(5_000), POOL, lambda request: MAX_LEN, steps=8_000)
    print(f"{POOL:,} slots, each request reserves {MAX_LEN:,}: {mean['batch']:.2f} requests run at once")
    print(f"slots that hold a token: {mean['token']:,.0f}, which is {mean['token'] / POOL:.1%} of the pool\n")


if __name__ == "__main__":
    the_pain()

# %% [markdown]
# That is a small batch for an expensive machine, and most of the memory behind it is empty.
#
# ## Task 1: `split`
#
# Take one request in the middle of its work and say what each of its reserved slots is for.
#
# First see the test fail. This is how every lesson goes: a command that must fail, then your code, then the
# same command again.
#
# ```console
# $ python 01_the_waste.py
# NotImplementedError: lesson 1, task 1: split
# ```


# %%
class Split(NamedTuple):
    token: int  # slots that hold a token's KV now
    reserved: int  # slots that this request will fill later
    internal: int  # slots that nobody will ever fill while the reservation stands


def split(request: Request, written: int, reservation: int) -> Split:
    """What the `reservation` slots of a request are for, when `written` of its tokens (prompt included) are in the cache.

    >>> split(Request(prompt=10, answer=30), written=15, reservation=100)
    Split(token=15, reserved=25, internal=60)
    """
    raise NotImplementedError("lesson 1, task 1: split")


# %%
def test_1_a_request_in_the_middle() -> None:
    assert split(Request(prompt=10, answer=30), written=15, reservation=100) == Split(15, 25, 60)


def test_1_nothing_is_left_over() -> None:
    for request in chats(50):
        for reservation in (MAX_LEN, request.prompt + request.answer):
            for written in (0, request.prompt, request.prompt + request.answer):
                parts = split(request, written, reservation)
                assert sum(parts) == reservation, f"{parts} do not add up to the reservation of {reservation}"
                assert min(parts) >= 0, f"{parts}: a count of slots cannot be negative"


if __name__ == "__main__":
    test_1_a_request_in_the_middle()
    test_1_nothing_is_left_over()

# %% [markdown]
# ## Task 2: `waste`
#
# Now predict what the simulation above measured, without running it. You are to return the share of the pool
# that holds **no** token, averaged over time, when each request reserves `max_len` slots and the queue is
# never empty.
#
# Think of the pool as a few rows of `max_len` slots:
#
# ```
#           max_len
#  row 0  ████████░░░░░·······························     a request, then the next one, then the next …
#  row 1  ███░░░░░░░░░░░░░░░··························
#  row 2  ██████████████░░····························
#  rest   ·······                                          too short for a row
# ```
#
# How many rows are there? Each is always busy. A request of `answer` tokens keeps its row for `answer` steps,
# and in its k-th step the row holds `prompt + k` tokens. Add up what a row holds over the whole life of every
# request, divide by the number of steps those lives take together, and you have the average of one row. Long
# answers stay longer, so they weigh more: the average over *requests* would be too small.
#
# (Rounding to powers of two plays no part: the longest text is one already.)


# %%
def waste(requests: list[Request], pool_size: int, max_len: int) -> float:
    """The predicted share, from 0 to 1, of the pool's slots that hold no token, under a reservation of max_len for each request.

    >>> waste([Request(prompt=10, answer=4)], pool_size=100, max_len=25)  # 4 rows; each holds 11, 12, 13, 14 tokens in turn
    0.5
    """
    raise NotImplementedError("lesson 1, task 2: waste")


# %%
def test_2_equal_requests() -> None:
    # 4 rows of 25; each holds 11, 12, 13, 14 tokens, then starts again: 12.5 on average, 50 of 100 slots
    assert abs(waste([Request(10, 4)], pool_size=100, max_len=25) - 0.5) < 1e-12


def test_2_slots_that_fit_no_row_are_wasted_too() -> None:
    assert abs(waste([Request(10, 4)], pool_size=124, max_len=25) - (1 - 50 / 124)) < 1e-12


def test_2_long_answers_weigh_more() -> None:
    # 1 step with 11 tokens, 99 steps with 11 to 109: the row holds about 60, not about 35
    requests = [Request(10, 1), Request(10, 99)]
    assert abs(waste(requests, pool_size=200, max_len=200) - (1 - (11 + sum(range(11, 110))) / 100 / 200)) < 1e-12


def test_2_prediction_meets_measurement() -> None:
    requests = chats(5_000)
    predicted = waste(requests, POOL, MAX_LEN)
    measured = 1 - serve(requests, POOL, lambda request: MAX_LEN, steps=8_000)["token"] / POOL
    assert abs(predicted - measured) < 0.04, f"you predict {predicted:.3f}; the simulation measured {measured:.3f}"


if __name__ == "__main__":
    test_2_equal_requests()
    test_2_slots_that_fit_no_row_are_wasted_too()
    test_2_long_answers_weigh_more()
    test_2_prediction_meets_measurement()

# %% [markdown]
# ## What was won
#
# Nothing yet: you have only learned how bad it is. So let us see what better guesses would bring. Three
# reservations, and one that is not a reservation at all:
#
# - **max**: the longest text allowed, as above;
# - **pow2**: the prompt, plus the answer rounded up to a power of two (a good guesser, generously treated);
# - **oracle**: exactly what the request will need, as if the server could see the future;
# - **paged**: small blocks, handed out when they are needed and not before. They need not lie side by side,
#   so there are no holes. Only the unfilled part of a request's last block is lost. You will build this from
#   lesson 3 on.
#
# The columns are the words from the picture. They are measured when you run this cell; beside them stands
# what the paper's authors found for the share that holds tokens.

# %%
PAPER_TOKEN_SHARE = {"max": 0.204, "pow2": 0.268, "oracle": 0.382, "paged": 0.963}  # arXiv 2309.06180, Fig. 2
BLOCK = 16


def serve_paged(requests: list[Request], pool_size: int, steps: int, warm_up: int = 500) -> dict:
    """The same server, but slots come in blocks of 16 as tokens are written; the latest arrival makes way when they run out."""
    blocks = pool_size // BLOCK
    queue = deque(requests)
    running: list[list[int]] = []  # [prompt, answer, written]
    sums = {"batch": 0.0, "token": 0.0, "allocated": 0.0}

    def used(rows: list[list[int]]) -> int:
        return sum(-(-(written + 1) // BLOCK) for _, _, written in rows)

    for step in range(steps):
        running = [row for row in running if row[2] < row[0] + row[1]]
        while used(running) > blocks:
            prompt, answer, _ = running.pop()
            queue.appendleft(Request(prompt, answer))
        while used(running) + -(-(queue[0].prompt + 1) // BLOCK) <= blocks:
            request = queue.popleft()
            queue.append(request)
            running.append([request.prompt, request.answer, request.prompt])
        for row in running:
            row[2] += 1
        if step >= warm_up:
            sums["batch"] += len(running)
            sums["token"] += sum(written for _, _, written in running)
            sums["allocated"] += sum(-(-written // BLOCK) * BLOCK for _, _, written in running)
    return {name: total / (steps - warm_up) for name, total in sums.items()}


def what_was_won() -> None:
    requests = chats(5_000)
    reservations: dict[str, Callable[[Request], int]] = {
        "max": lambda r: MAX_LEN,
        "pow2": lambda r: min(MAX_LEN, r.prompt + power_of_two(r.answer)),
        "oracle": lambda r: r.prompt + r.answer,
    }
    print(f"your prediction for max: {waste(requests, POOL, MAX_LEN):.1%} of the pool holds no token\n")
    print("           batch    token  reserved  internal  external   (paper: token)")
    for name, reserve in reservations.items():
        mean = serve(requests, POOL, reserve, steps=8_000)
        shares = [
            mean["token"] / POOL,
            (mean["promised"] - mean["token"]) / POOL,
            (mean["allocated"] - mean["promised"]) / POOL,
            1 - mean["allocated"] / POOL,
        ]
        row = "".join(f"{share:10.1%}" for share in shares)
        print(f"{name:>8}{mean['batch']:8.1f}{row}{PAPER_TOKEN_SHARE[name]:16.1%}")
    mean = serve_paged(requests, POOL, steps=3_000)
    row = f"{mean['token'] / POOL:10.1%}{0:10.1%}{(mean['allocated'] - mean['token']) / POOL:10.1%}{1 - mean['allocated'] / POOL:10.1%}"
    print(f"{'paged':>8}{mean['batch']:8.1f}{row}{PAPER_TOKEN_SHARE['paged']:16.1%}")


if __name__ == "__main__":
    what_was_won()

# %% [markdown]
# Compare the *batch* column first. A decoding step reads all the weights of the model once, whether for one
# request or for thirty. So the batch is, to a good approximation, the throughput.
#
# Then compare oracle with paged. Even perfect knowledge of the future loses to small blocks: a reservation
# stands empty before it is filled, and stretches of unequal length must be rounded up or leave holes. Paging
# needs no prophet.
#
# ## What real engines do
#
# - **FasterTransformer** and most servers of its time reserved the maximum for every row of a batch. **Orca**
#   reserved per request; the paper's "Orca (Max)", "(Pow2)" and "(Oracle)" are the rows above, with a buddy
#   allocator underneath (Kwon et al. 2023, [arXiv 2309.06180](https://arxiv.org/abs/2309.06180), sections 3.1
#   and 6.1).
# - **Hugging Face transformers** still offers the old way on purpose: a `StaticCache` of a fixed length,
#   because a shape that never changes is what a compiler likes ([cache
#   strategies](https://huggingface.co/docs/transformers/kv_cache)).
# - **vLLM**, **TensorRT-LLM**, **TGI** and **SGLang** all page.
#
# ## Where this lives in minipaged
#
# - `minipaged/baselines/reservations.py`: `Reservations` counts these four kinds (and padding and idleness) for
#   any system that reserves.
# - `minipaged/baselines/buddy.py`: `BuddyAllocator`, what Orca's reservations were cut from.
# - `minipaged/baselines/orca.py`: Orca as a few lines on top; the other systems stand beside it.
#
# Check your work with `minipaged learn check 1`, and look at a pool of blocks at work with
# `minipaged learn show 1`.
