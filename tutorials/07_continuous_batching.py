# %% [markdown]
# # 7. Continuous batching
#
# *35 minutes. You need lesson 2. No blocks this time: memory is plentiful here, and comes back in lesson 11.*
#
# ## Why
#
# To compute one token, a GPU reads all the weights of the model. To compute one token each for thirty
# requests, it reads them once as well. So requests are computed together, in a batch. The question is who is
# in it.
#
# The simple way is the **static batch**: take the first few requests, run until the last of them has
# finished, take the next few. But answers have unequal lengths. The short ones end early, and their rows stay
# empty until the longest is done; and whoever arrives in between waits outside.
#
# ```
#  static                              continuous
#  A ████████████████▏                 A ████████████████▏
#  B ████▏···········                  B ████▏E █████████▏
#  C ██████████▏·····                  C ██████████▏F ███████▏
#  D ██▏·············  E ███…          D ██▏G ████████████████▏
# ```
#
# The other way is to decide again **at every step**: whoever has finished leaves, whoever waits may join. It
# is called continuous batching. All it takes is a function that answers one question, every few milliseconds:
# *which sequences compute how many tokens now?* That function is the scheduler. You will write it.
#
# One thing stands in its way. A newcomer brings a prompt, perhaps a thousand tokens long. If a step computes
# all of it at once, everybody who is writing waits for that step: their text stalls on the screen. So a step
# has a **token budget**, and long prompts are computed in pieces (**chunked prefill**), beside the others'
# single tokens.
#
# ## The pain

# %%
from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

MAX_RUNNING = 16
DOLLARS_PER_HOUR = 2.0  # for one GPU: an example, chosen on 2026-11-28; put in what you pay


@dataclass(eq=False)
class Request:
    """What was asked, and how far it is. Tokens [0, computed) are in the KV cache."""

    arrival: float  # seconds
    prompt: int
    answer: int
    computed: int = 0
    written: int = 0  # tokens of the answer so far
    times: list[float] = field(default_factory=list)  # when each token of the answer appeared

    @property
    def finished(self) -> bool:
        return self.written == self.answer


def step_seconds(num_tokens: int) -> float:
    """A model of a GPU: reading the weights takes the same time for any batch; each token adds its arithmetic."""
    return 0.010 + 0.000_1 * num_tokens


def traffic(count: int, rate: float, seed: int = 0) -> list[Request]:
    """Requests that arrive at random, `rate` a second, with very unequal lengths."""
    rng, now, requests = random.Random(seed), 0.0, list[Request]()
    for _ in range(count):
        now += rng.expovariate(rate)
        requests.append(Request(now, int(rng.lognormvariate(4.5, 1.0)) + 1, int(rng.lognormvariate(3.6, 0.8)) + 1))
    return requests


Schedule = Callable[[list[Request], deque[Request]], list[tuple[Request, int]]]


def compute(plan: list[tuple[Request, int]], now: float) -> None:
    """One pass of the model. A sequence whose known tokens are all computed gets one more."""
    for request, count in plan:
        request.computed += count
        if request.computed == request.prompt + request.written:
            request.written += 1
            request.times.append(now)


def serve(requests: list[Request], schedule: Schedule) -> dict[str, float]:
    """Run until everybody is served. Returns the measurements."""
    arriving, waiting, running = deque(requests), deque[Request](), list[Request]()
    now, steps, rows = 0.0, 0, 0
    while arriving or waiting or running:
        while arriving and arriving[0].arrival <= now:
            waiting.append(arriving.popleft())
        plan = schedule(running, waiting)
        if not plan:
            if not arriving:
                raise RuntimeError("somebody waits, but nothing was scheduled: this would go on for ever")
            now = arriving[0].arrival
            continue
        now += step_seconds(sum(count for _, count in plan))
        compute(plan, now)
        running[:] = [request for request in running if not request.finished]
        steps, rows = steps + 1, rows + len(plan)
    gaps = [b - a for r in requests for a, b in zip(r.times, r.times[1:], strict=False)]
    return {
        "seconds": now,
        "batch": rows / steps,
        "per token": sum((r.times[-1] - r.arrival) / r.answer for r in requests) / len(requests),
        "first token": sum(r.times[0] - r.arrival for r in requests) / len(requests),
        "longest gap": max(gaps, default=0.0),
    }


def static(running: list[Request], waiting: deque[Request]) -> list[tuple[Request, int]]:
    """The simple way: nobody joins before the last one has left; prompts are computed whole."""
    if not running:
        while waiting and len(running) < MAX_RUNNING:
            running.append(waiting.popleft())
    return [(request, request.prompt + request.written - request.computed) for request in running]


def show(name: str, measured: dict[str, float]) -> None:
    print(
        f"{name:>22}{measured['seconds']:9.1f} s {measured['batch']:8.2f} {1e3 * measured['per token']:9.0f} ms"
        f" {1e3 * measured['first token']:9.0f} ms {1e3 * measured['longest gap']:9.0f} ms"
    )


HEADING = f"{'':>22}{'in all':>11} {'batch':>8} {'a token':>12} {'the first':>12} {'longest gap':>12}"


def the_pain() -> None:
    print(HEADING)
    show("static, batch of 16", serve(traffic(300, rate=8.0), static))
    print("\na token: from arrival to the end, divided by the answer's length. Times are those of the modelled GPU.\n")


if __name__ == "__main__":
    the_pain()

# %% [markdown]
# Look at the batch. Sixteen rows were allowed.
#
# ## Task 1: `tokens_left`
#
# Before scheduling, an idea that makes it simple. It is tempting to think in phases: first a request is *in
# prefill* (its prompt is computed), then *in decode* (it writes, a token a step). Two phases, two queues, two
# cases everywhere, and more cases for a prompt in pieces or a request that comes back after a pause.
#
# Instead think of two numbers. A sequence **has** `prompt + written` tokens. Of these, `computed` are in the
# cache. What is left to compute is the difference, and that is all a scheduler needs to know. A new prompt
# has many left; a sequence that is writing always has one (the token it has just written must go through the
# model to yield the next). There are no phases.
#
# ```console
# $ python 07_continuous_batching.py
# NotImplementedError: lesson 7, task 1: tokens_left
# ```


# %%
def tokens_left(request: Request) -> int:
    """Known tokens of this request that are not computed yet.

    >>> tokens_left(Request(arrival=0.0, prompt=10, answer=3, computed=4))
    6
    """
    raise NotImplementedError("lesson 7, task 1: tokens_left")


# %%
def test_1_there_are_no_phases() -> None:
    request = Request(0.0, prompt=10, answer=3)
    assert tokens_left(request) == 10
    compute([(request, 4)], now=1.0)
    assert tokens_left(request) == 6, "a piece of the prompt is done"
    compute([(request, 6)], now=2.0)
    assert request.written == 1, "the prompt is complete, so the first token is there"
    assert tokens_left(request) == 1
    compute([(request, 1)], now=3.0)
    assert tokens_left(request) == 1


if __name__ == "__main__":
    test_1_there_are_no_phases()

# %% [markdown]
# ## Task 2: `schedule`
#
# The rules, in order:
#
# 1. **Running requests first**, in the order they are in. Each gets what it has left, or what is left of the
#    budget, whichever is less. If nothing is left of the budget, the rest get nothing in this step.
# 2. Then, while there is budget left, somebody waits, and fewer than `MAX_RUNNING` run: **admit** the first
#    in the queue. Move it from `waiting` to the end of `running`, and give it tokens by the same rule.
# 3. Nobody overtakes in the queue. First come, first served.
#
# Return the plan: pairs of a request and a count of at least one token. Change nothing in the requests
# themselves: `compute`, above, does that when the step has run.
#
# ```
#  budget 16     running   A 1 left    B 1 left    C 9 left          waiting   D 100 left    E 3 left
#  plan                    A 1         B 1         C 9                         D 5           E waits: the budget is spent
# ```
#
# Why does nobody starve? Follow the picture into the next step. A, B and C have one token left each, and come
# first. D stands behind them and gets what remains. A prompt in pieces is always the *last* of the running,
# because while it eats the whole rest of the budget nobody can join behind it. So nobody who writes ever
# waits for a prompt, as long as the budget is at least `MAX_RUNNING`.


# %%
def schedule(running: list[Request], waiting: deque[Request], budget: int = 256) -> list[tuple[Request, int]]:
    """Who computes how many tokens in this step: at most `budget` in all. Moves those who are admitted to `running`.

    >>> long = Request(arrival=0.0, prompt=100, answer=3)
    >>> running, waiting = [], deque([long])
    >>> schedule(running, waiting, budget=16) == [(long, 16)], running == [long], len(waiting)
    (True, True, 0)
    """
    raise NotImplementedError("lesson 7, task 2: schedule")


# %%
def request(left: int, *, writing: bool = False) -> Request:
    return Request(0.0, prompt=left, answer=50, computed=left, written=1) if writing else Request(0.0, left, 50)


def test_2_the_picture() -> None:
    a, b, c, d, e = request(7, writing=True), request(3, writing=True), request(9), request(100), request(3)
    names = {id(r): name for r, name in zip((a, b, c, d, e), "ABCDE", strict=True)}
    running, waiting = [a, b, c], deque([d, e])
    plan = schedule(running, waiting, budget=16)
    assert [(names[id(r)], count) for r, count in plan] == [("A", 1), ("B", 1), ("C", 9), ("D", 5)]
    assert [names[id(r)] for r in running] == ["A", "B", "C", "D"], "D was admitted: it runs now"
    assert [names[id(r)] for r in waiting] == ["E"]


def test_2_no_more_than_allowed_run() -> None:
    running, waiting = [request(5, writing=True) for _ in range(MAX_RUNNING)], deque([request(5)])
    assert len(schedule(running, waiting, budget=256)) == MAX_RUNNING
    assert len(waiting) == 1


def test_2_nothing_to_do_is_an_empty_plan() -> None:
    assert schedule([], deque()) == []


def obeying(budget: int) -> Schedule:
    """Your scheduler, watched at every step."""

    def watched(running: list[Request], waiting: deque[Request]) -> list[tuple[Request, int]]:
        writing = [r for r in running if r.written]
        before, queue = list(running), list(waiting)
        room = min(budget, sum(map(tokens_left, before)) + sum(map(tokens_left, queue[: MAX_RUNNING - len(before)])))
        plan = schedule(running, waiting, budget)
        used = sum(count for _, count in plan)
        assert used <= budget, f"{used} tokens were planned with a budget of {budget}"
        assert used == room, f"{room} tokens could have been computed, {used} were planned: do not leave budget unused"
        assert all(0 < count <= tokens_left(r) for r, count in plan), "a count is not between 1 and what is left"
        assert len({id(r) for r, _ in plan}) == len(plan), "a request is in the plan twice"
        assert len(running) <= MAX_RUNNING
        planned = {id(r) for r, _ in plan}
        assert all(id(r) in planned for r in writing), "somebody who was writing had to wait"
        assert running[: len(before)] == before, "the order of the running has changed"
        assert running[len(before) :] + list(waiting) == queue, "somebody has overtaken in the queue, or got lost"
        return plan

    return watched


def test_2_everybody_is_served_and_nobody_who_writes_ever_waits() -> None:
    for budget in (MAX_RUNNING, 40, 256, 10_000):
        requests = traffic(120, rate=20.0, seed=budget)
        serve(requests, obeying(budget))
        assert all(r.finished for r in requests)


if __name__ == "__main__":
    test_2_the_picture()
    test_2_no_more_than_allowed_run()
    test_2_nothing_to_do_is_an_empty_plan()
    test_2_everybody_is_served_and_nobody_who_writes_ever_waits()

# %% [markdown]
# ## What was won
#
# The same traffic, the same modelled GPU, the same sixteen rows. Only the function changed. Below it your
# scheduler with several budgets: the last column is the longest that anybody's text stood still between two
# tokens.
#
# The last two lines turn it into money. The price of an hour, `DOLLARS_PER_HOUR` at the top of the file, is an
# example of 2026-11-28 and not an offer: write your own there.


# %%
def with_budget(budget: int) -> Schedule:
    return lambda running, waiting: schedule(running, waiting, budget)


def what_was_won() -> None:
    print(HEADING)
    show("static, batch of 16", serve(traffic(300, rate=8.0), static))
    for budget in (32, 128, 512, 100_000):
        name = f"budget {budget:,}" if budget < 100_000 else "no budget"
        show(f"continuous, {name}", serve(traffic(300, rate=8.0), with_budget(budget)))
    print("\nand the most requests a second that each can take before the queue only grows:")
    for name, way in (("static", static), ("continuous", with_budget(512))):
        rate = 1.0
        while serve(traffic(300, rate), way)["first token"] < 2.0:
            rate *= 1.1
        seconds = 1_000 / rate  # of the modelled GPU
        dollars = DOLLARS_PER_HOUR * seconds / 3_600
        print(f"{name:>22} {rate:6.1f}   1,000 requests take {seconds:4.0f} s and cost {dollars:.3f} dollars")
    print(f"(the first token comes within two seconds, on average; an hour costs {DOLLARS_PER_HOUR:.2f} dollars)")


if __name__ == "__main__":
    what_was_won()

# %% [markdown]
# A small budget keeps the text flowing and makes newcomers wait longer for their first token; a large one
# does the opposite. There is no best value, only a trade-off that every server has to choose. Notice what did
# *not* change: the answers. A schedule decides when tokens are computed, never which.
#
# ## What real engines do
#
# - **Orca** introduced scheduling at every iteration (Yu et al., OSDI 2022,
#   [paper](https://www.usenix.org/conference/osdi22/presentation/yu)); **Sarathi-Serve** cut prompts into
#   chunks that ride along with decodes (Agrawal et al. 2024, [arXiv
#   2403.02310](https://arxiv.org/abs/2403.02310)).
# - **vLLM**'s scheduler says it in a comment: there is no decoding phase and no prefill phase, each request
#   just has the number of tokens computed and the number of tokens it has
#   ([`scheduler.py`](https://github.com/vllm-project/vllm/blob/main/vllm/v1/core/sched/scheduler.py)).
# - A real budget also counts memory: a request is admitted only if there are blocks for it. Lesson 11 puts
#   the two together.
#
# ## Where this lives in minipaged
#
# - `minipaged/scheduling/scheduler.py`: `Scheduler.schedule`: running first, then those who return, then
#   newcomers.
# - `minipaged/scheduling/scheduler.py`: `Scheduler.commit` takes in what the model has drawn, as our compute
#   does.
# - `minipaged/config.py`: `EngineConfig` with `max_num_batched_tokens` and `max_num_seqs`, your budget and
#   your limit.
# - `minipaged/baselines/batches.py`: static batching and its relatives, for comparison.
