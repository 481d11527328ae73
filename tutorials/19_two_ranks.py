# %% [markdown]
# # 19. Two ranks
#
# *40 minutes. You need lessons 2, 4 and 5.*
#
# ## Why
#
# A model that is too large for one GPU is cut into parts, and so are its keys and values. With **tensor parallelism** each of
# several processes, each called a **rank**, has a part of *every* layer: some of the heads, some of the columns of the MLP. All
# ranks compute the same step at the same time, each on its part, and add up what they have.
#
# What becomes of paging? Nothing much, and that is the beauty of it. A block table says *which* block holds a piece of the text,
# not what is in it. So there is one block manager, on rank 0, and one table for all:
#
# ```
#                        rank 0                                      rank 1
#   plan: table [5, 2] ──────────────────── broadcast ───────────►  table [5, 2]
#
#   pool, heads 0 and 1                                              pool, heads 2 and 3
#   block 2   block 5                                                block 2   block 5
#   [k v ..]  [k v ..]   the same tokens, in the same places         [k v ..]  [k v ..]
#
#   attention with heads 0, 1                                        attention with heads 2, 3
#        │ its rows of `out`                                              │ its rows of `out`
#        └───────────────────────────►  sum  ◄────────────────────────────┘      the same x on both
# ```
#
# Each rank keeps keys and values of its own heads alone. So with two ranks a block weighs half on each, and the pool
# holds twice as many tokens.
#
# ## How a layer is cut
#
# This is a layer of the tiny model that these lessons use; `x` is [tokens, width]:
#
# ```
#  q, k, v = (norm(x) @ qkv).view(tokens, 3, heads, head_dim).unbind(1)         qkv   [width, 3 * heads * head_dim]
#  x = x + attention(q, k, v).flatten(1) @ out                                  out   [heads * head_dim, width]
#  x = x + relu(norm(x) @ up) @ down                                            up    [width, 4 * width],  down [4 * width, width]
# ```
#
# The heads do not look at each other, so heads can be dealt out: a rank takes the *columns* of `qkv` that make its heads. What its
# heads give is multiplied with the *rows* of `out` that belong to them. A matrix product is a sum over such rows, so what
# each rank has now is one part of a sum: `attention @ out` of the whole layer is the sum over the ranks. The MLP is cut in the same way,
# columns of `up` and rows of `down`. That makes two sums a layer, and nothing else is sent.
#
# ## The pain

# %%
from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from minipaged.learn.tiny_model import TinyModel, dense_attention, norm

torch.set_num_threads(1)
FILE = globals().get("__file__")  # a notebook has none


def the_pain() -> None:
    print("a model of 70 billion parameters in 16 bits, 80 layers, 8 KV heads of 128 numbers; GPUs of 80 GB:")
    weights, token = 2 * 70e9, 2 * 2 * 80 * 8 * 128
    for ranks in (1, 2, 4, 8):
        room = 80e9 - weights / ranks
        tokens = max(0, int(room / (token / ranks)))
        print(f"{ranks:>3} GPUs: {weights / ranks / 1e9:6.1f} GB of weights on each, room for {tokens:>10,} tokens")
    print()


if __name__ == "__main__":
    the_pain()

# %% [markdown]
# ## Task 1: `my_heads`
#
# Which heads a rank has: `heads / ranks` of them, side by side, rank 0 the first. If they cannot be dealt out evenly, raise
# `ValueError`: a rank with fewer heads would be idle while the others compute.
#
# ```console
# $ python 19_two_ranks.py
# NotImplementedError: lesson 19, task 1: my_heads
# ```


# %%
def my_heads(rank: int, ranks: int, heads: int) -> range:
    """The heads of one rank. ValueError if the number of ranks does not divide that of heads.

    >>> my_heads(rank=1, ranks=2, heads=6)
    range(3, 6)
    """
    raise NotImplementedError("lesson 19, task 1: my_heads")


# %%
def test_1_every_head_has_one_rank() -> None:
    for ranks in (1, 2, 4, 8):
        parts = [my_heads(rank, ranks, 8) for rank in range(ranks)]
        each = 8 // ranks
        right = [range(first, first + each) for first in range(0, 8, each)]
        assert parts == right, f"8 heads for {ranks} ranks: you said {parts}, right is {right}"


def test_1_uneven_is_refused() -> None:
    for rank in range(3):
        try:
            my_heads(rank, 3, 8)
        except ValueError:
            continue
        raise AssertionError("8 heads for 3 ranks: this must be refused, on every rank")


if __name__ == "__main__":
    test_1_every_head_has_one_rank()
    test_1_uneven_is_refused()

# %% [markdown]
# ## Task 2: `cut`
#
# One rank's part of a layer. Mind the order of `qkv`'s columns: first the queries of all heads, then the keys of all heads, then the
# values. So a rank's columns do not lie side by side:
#
# ```
#  columns of qkv, 4 heads      q0 q1 q2 q3   k0 k1 k2 k3   v0 v1 v2 v3
#  rank 1 of 2                        ■  ■          ■  ■          ■  ■         ──►   q2 q3   k2 k3   v2 v3
# ```
#
# Views make it easy: seen as [width, 3, heads, head_dim], the heads are the third axis. `out`, seen as [heads, head_dim, width],
# has them first. `up` has `4 * width` columns, which are dealt out like heads, evenly and side by side; `down` has as
# many rows. `model.qkv`, `model.out`, `model.up` and `model.down` are lists with one matrix for each layer.


# %%
class Part(NamedTuple):
    """What one rank has of one layer."""

    qkv: Tensor  # [width, 3 * my heads * head_dim]
    out: Tensor  # [my heads * head_dim, width]
    up: Tensor  # [width, 4 * width / ranks]
    down: Tensor  # [4 * width / ranks, width]


def cut(model: TinyModel, layer: int, rank: int, ranks: int) -> Part:
    """One rank's part of a layer.

    >>> part = cut(TinyModel(width=8, heads=2), layer=0, rank=1, ranks=2)
    >>> [list(matrix.shape) for matrix in part]
    [[8, 12], [4, 8], [8, 16], [16, 8]]
    """
    raise NotImplementedError("lesson 19, task 2: cut")


# %%
def rows_in(whole: Tensor, part: Tensor) -> str:
    """Which rows of the whole make the part: "0-5 12-17"."""
    if part.dim() != 2 or part.shape[1] != whole.shape[1]:
        return f"a matrix {list(part.shape)}, which does not consist of them"
    same = (part[:, None] == whole[None]).all(-1)
    runs: list[list[int]] = []
    for row in (int(found.int().argmax()) if found.any() else -1 for found in same):
        if runs and row == runs[-1][1] + 1 > 0:
            runs[-1][1] = row
        else:
            runs.append([row, row])
    return " ".join(f"{first}-{last}" if first >= 0 else "(none of them)" for first, last in runs[:12]) or "nothing"


def test_2_the_whole_is_the_parts_side_by_side() -> None:
    model = TinyModel(width=24, heads=4)  # so head_dim is 6
    for layer in range(model.layers):
        for ranks in (1, 2, 4):
            for rank in range(ranks):
                part, a, b = cut(model, layer, rank, ranks), 24 * rank // ranks, 24 * (rank + 1) // ranks
                qkv = f"{a}-{b - 1} {24 + a}-{23 + b} {48 + a}-{47 + b}" if ranks > 1 else "0-71"
                for what, whole, mine, right in (
                    ("columns of qkv", model.qkv[layer].T, part.qkv.T, qkv),
                    ("rows of out", model.out[layer], part.out, f"{a}-{b - 1}"),
                    ("columns of up", model.up[layer].T, part.up.T, f"{4 * a}-{4 * b - 1}"),
                    ("rows of down", model.down[layer], part.down, f"{4 * a}-{4 * b - 1}"),
                ):
                    said = rows_in(whole, mine)
                    assert said == right, f"{what}, rank {rank} of {ranks}: you took {said}, right is {right}"


def test_2_a_rank_computes_its_own_heads() -> None:
    model, x = TinyModel(width=24, heads=4), torch.randn(5, 24)
    whole = (x @ model.qkv[1]).view(5, 3, 4, 6)
    for rank in range(2):
        mine = (x @ cut(model, 1, rank, 2).qkv).view(5, 3, 2, 6)
        assert torch.allclose(mine, whole[:, :, 2 * rank : 2 * rank + 2], atol=1e-5), f"not the heads of rank {rank}"


if __name__ == "__main__":
    test_2_the_whole_is_the_parts_side_by_side()
    test_2_a_rank_computes_its_own_heads()

# %% [markdown]
# ## Task 3: `all_reduce`
#
# The sum over all ranks, and every rank gets it. You have `group.all_gather(x)`: every rank gives its tensor, and every rank gets the
# list of all of them, in the order of the ranks. All ranks must call it, or those who did will wait for ever.
#
# Add *in the order of the ranks*, on every rank. In floating point `(a + b) + c` and `(c + b) + a` differ in the last bits. A rank
# that began with its own would have another `x` than its neighbours, soon another token, and from there on another text. The tensors
# in the list are yours alone, but `x` is still needed by who called: leave it as it is.


# %%
class Group(Protocol):
    """The ranks that work together, as one of them sees them."""

    rank: int
    ranks: int

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """Every rank's tensor, in the order of the ranks. Waits for all of them."""
        ...

    def broadcast(self, plan: Plan | None) -> Plan | None:
        """The plan that rank 0 gives, on every rank. What the others give counts nothing."""
        ...


def all_reduce(group: Group, x: Tensor) -> Tensor:
    """The sum of all ranks' tensors, the same bits on each of them.

    >>> together(2, lambda group: all_reduce(group, torch.tensor([1 + group.rank])).tolist())
    [[3], [3]]
    """
    raise NotImplementedError("lesson 19, task 3: all_reduce")


# %%
class Threads:
    """A group inside of one process, for tests: a thread for each rank."""

    def __init__(self, rank: int, ranks: int, barrier: threading.Barrier, table: list[Any]) -> None:
        self.rank, self.ranks, self._barrier, self._table = rank, ranks, barrier, table
        self.sums = 0

    def _exchange(self, message: Any) -> list[Any]:
        self._table[self.rank] = message
        self._barrier.wait()
        taken = list(self._table)
        self._barrier.wait()
        return taken

    def all_gather(self, x: Tensor) -> list[Tensor]:
        self.sums += 1
        return [each.clone() for each in self._exchange(x.clone())]

    def broadcast(self, plan: Plan | None) -> Plan | None:
        return self._exchange(plan)[0]


def together(ranks: int, work: Callable[[Group], Any]) -> list[Any]:
    """Do the work on every rank at once; the results in the order of the ranks."""
    barrier, table = threading.Barrier(ranks, timeout=5), [None] * ranks
    results: list[Any] = [None] * ranks
    errors: list[BaseException] = []

    def one(rank: int) -> None:
        try:
            results[rank] = work(Threads(rank, ranks, barrier, table))
        except threading.BrokenBarrierError:
            errors.append(
                AssertionError(f"rank {rank} waits for another one that does not come: all must call all_gather")
            )
        except BaseException as error:
            errors.insert(0, error)
            barrier.abort()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def test_3_everybody_gets_the_sum() -> None:
    for ranks in (1, 2, 3):
        sums = together(ranks, lambda group: all_reduce(group, torch.tensor([1.0, 10.0**group.rank])))
        said, right = [each.tolist() for each in sums], [[ranks, sum(10.0**rank for rank in range(ranks))]] * ranks
        assert said == right, f"the sums on ranks 0 to {ranks - 1}: you said {said}, right is {right}"


def test_3_the_same_bits_on_every_rank() -> None:
    parts = [torch.tensor([value]) for value in (1e8, 1.0, -1e8, 3.0)]
    in_order = ((parts[0] + parts[1]) + parts[2]) + parts[3]
    sums = together(4, lambda group: all_reduce(group, parts[group.rank]))
    said, right = [each.item() for each in sums], [in_order.item()] * 4
    assert said == right, f"not added in the order of the ranks: you said {said}, right is {right}"


def test_3_what_was_given_stays() -> None:
    given = [torch.tensor([1.0]), torch.tensor([2.0])]
    together(2, lambda group: all_reduce(group, given[group.rank]))
    assert [each.item() for each in given] == [1.0, 2.0], "all_reduce has changed the tensor that it was given"


if __name__ == "__main__":
    test_3_everybody_gets_the_sum()
    test_3_the_same_bits_on_every_rank()
    test_3_what_was_given_stays()

# %% [markdown]
# ## Task 4: `Rank.step`
#
# The whole model's pass: embed, then each layer from above on this rank's part, then the logits. A layer has two sums, your
# `all_reduce(self.group, …)`: of what comes out of `out`, and of what comes out of `down`. `norm` is given too. Given are:
#
# - `self.parts[layer]`, your `cut`, for each of `self.model.layers` layers; `self.heads`, your `my_heads`; `self.head_dim`;
# - `self.embed(plan)`: the `x` that goes in, [tokens, width]. It is whole and the same on every rank;
# - `self.attend(layer, q, k, v, plan)`: writes keys and values of this rank's heads into its pool where the table says, and attends
#   over all that is there. q, k, v and what it returns are [tokens, my heads, head_dim];
# - `self.logits(x)`, for the end; every rank computes all of them.


# %%
class Plan(NamedTuple):
    """What a step computes: tokens of one text from a position on, and where the whole text lies. Integers only."""

    tokens: list[int]
    first: int
    table: list[int]


BLOCK_SIZE = 4


class Rank:
    """One rank's part of the model, and its pool."""

    def __init__(self, model: TinyModel, group: Group, num_blocks: int = 64) -> None:
        self.model, self.group, self.head_dim = model, group, model.head_dim
        self.heads = my_heads(group.rank, group.ranks, model.heads)
        self.parts = [cut(model, layer, group.rank, group.ranks) for layer in range(model.layers)]
        shape = (model.layers, num_blocks * BLOCK_SIZE, len(self.heads), model.head_dim)
        self.keys, self.values = torch.full(shape, float("nan")), torch.full(shape, float("nan"))

    def embed(self, plan: Plan) -> Tensor:
        positions = torch.arange(plan.first, plan.first + len(plan.tokens))
        return self.model.token_embedding[plan.tokens] + self.model.position_embedding[positions]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
        length = plan.first + len(plan.tokens)
        slots = [plan.table[i // BLOCK_SIZE] * BLOCK_SIZE + i % BLOCK_SIZE for i in range(length)]
        self.keys[layer, slots[plan.first :]], self.values[layer, slots[plan.first :]] = k, v
        return dense_attention(q, self.keys[layer, slots], self.values[layer, slots])

    def logits(self, x: Tensor) -> Tensor:
        return norm(x) @ self.model.head

    def step(self, plan: Plan) -> Tensor:
        """Logits [tokens, vocab], the same on every rank. All ranks must be called with the same plan.

        >>> model, plan = TinyModel(), Plan(tokens=[1, 2, 3], first=0, table=[9])
        >>> one, two = together(2, lambda group: Rank(model, group).step(plan))
        >>> list(one.shape), torch.equal(one, two)
        ([3, 64], True)
        """
        raise NotImplementedError("lesson 19, task 4: Rank.step")


# %%
def lead(rank: Rank, prompt: list[int], count: int, seed: int = 0) -> list[int]:
    """Rank 0: it alone has a block manager. Makes a plan for each step and sends it to all. Returns what was written."""
    free = random.Random(seed).sample(range(1, 64), 63)
    tokens, computed, table = list(prompt), 0, list[int]()
    while len(tokens) < len(prompt) + count:
        while len(table) * BLOCK_SIZE < len(tokens):
            table.append(free.pop())
        logits = rank.step(rank.group.broadcast(Plan(tokens[computed:], computed, list(table))))
        computed = len(tokens)
        tokens.append(int(logits[-1].argmax()))
    rank.group.broadcast(None)
    return tokens[len(prompt) :]


def follow(rank: Rank) -> None:
    """The others: no table of their own, no decisions. None ends it."""
    while (plan := rank.group.broadcast(None)) is not None:
        rank.step(plan)


def written(group: Group, prompt: list[int], count: int) -> list[int]:
    """What all ranks write together; [] on those that follow."""
    rank = Rank(TinyModel(), group)
    if group.rank == 0:
        return lead(rank, prompt, count)
    follow(rank)
    return []


def alone(prompt: list[int], count: int) -> list[int]:
    """What the whole model writes, without ranks and without blocks."""
    model, tokens = TinyModel(), list(prompt)
    for _ in range(count):
        logits = model(tokens, 0, lambda layer, q, k, v: dense_attention(q, k, v))
        tokens.append(int(logits[-1].argmax()))
    return tokens[len(prompt) :]


def test_4_two_sums_a_layer() -> None:
    def work(group: Threads) -> int:
        Rank(TinyModel(layers=3), group).step(Plan([1, 2], 0, [5]))
        return group.sums

    said = together(2, work)
    assert said == [6, 6], (
        "each layer takes two sums, one after attention, one after the MLP, and nothing else is sent. "
        f"With 3 layers, on each rank: you took {said}, right is [6, 6]"
    )


def test_4_the_whole_models_logits() -> None:
    model = TinyModel()
    expected = model(list(range(11)), 0, lambda layer, q, k, v: dense_attention(q, k, v))
    for ranks in (1, 2, 4):

        def work(group: Group) -> Tensor:
            rank = Rank(model, group)
            plans = [Plan(list(range(7)), 0, [9, 3]), Plan([7], 7, [9, 3]), Plan([8, 9, 10], 8, [9, 3, 30])]
            return torch.cat([rank.step(plan) for plan in plans])

        for rank, logits in enumerate(together(ranks, work)):
            assert torch.allclose(logits, expected, atol=1e-3), (
                f"rank {rank} of {ranks} gives other logits than the whole model: "
                + (
                    "one rank alone has all, so it is not the sums but the layer, which is not as written above"
                    if ranks == 1
                    else "one rank alone was right, so look at the sums. They are taken of the product with `out` and of "
                    "the product with `down`, before these are added to x; x itself is whole on every rank. And every "
                    "rank returns self.logits(x)"
                )
            )


def test_4_the_text_of_the_whole_model() -> None:
    prompt = [3, 1, 4, 1, 5, 9]
    for ranks in (1, 2, 4):
        text, *others = together(ranks, lambda group: written(group, prompt, 20))
        assert text == alone(prompt, 20), f"{ranks} ranks write another text than the whole model"
        assert others == [[]] * (ranks - 1)


if __name__ == "__main__":
    test_4_two_sums_a_layer()
    test_4_the_whole_models_logits()
    test_4_the_text_of_the_whole_model()

# %% [markdown]
# ## What was won
#
# Threads were for tests: now two processes, which share nothing. **gloo** is the library with which torch lets processes on CPUs
# exchange tensors (on GPUs it is NCCL). Each process loads this file, makes its part of the model and its pool, and
# rank 0 writes with your `step` and your sum. Printed is what each keeps for a token, and where the time goes.


# %%
PROMPT, COUNT = [3, 1, 4, 1, 5, 9], 40


class Gloo:
    """A group of processes."""

    def __init__(self, rank: int, ranks: int, meeting_place: str) -> None:
        self.rank, self.ranks, self.seconds = rank, ranks, 0.0
        dist.init_process_group("gloo", init_method=f"file://{meeting_place}", rank=rank, world_size=ranks)

    def all_gather(self, x: Tensor) -> list[Tensor]:
        start = time.perf_counter()
        gathered = [torch.empty_like(x) for _ in range(self.ranks)]
        dist.all_gather(gathered, x.contiguous())
        self.seconds += time.perf_counter() - start
        return gathered

    def broadcast(self, plan: Plan | None) -> Plan | None:
        messages = [plan and tuple(plan)]
        dist.broadcast_object_list(messages)
        return messages[0] and Plan(*messages[0])


def process_main(rank: int, ranks: int, meeting_place: str) -> None:
    """One process: writes, and tells on standard output."""
    group = Gloo(rank, ranks, meeting_place)
    dist.barrier()
    start = time.perf_counter()
    text = written(group, PROMPT, COUNT)
    seconds = time.perf_counter() - start
    mine = Rank(TinyModel(), group)
    kept = 2 * mine.keys[:, 0].nbytes
    print(
        f"rank {rank}: process {os.getpid()}, heads {mine.heads.start} to {mine.heads.stop - 1}, {kept} bytes a token, "
        f"{1e3 * seconds / COUNT:.2f} ms a step, of these {1e3 * group.seconds / COUNT:.2f} in sums",
        flush=True,
    )
    if rank == 0:
        print("text", *text, flush=True)
    dist.destroy_process_group()


@cache  # starting Python and torch is what takes the time, so once for the test and for what is printed
def in_processes(ranks: int) -> list[str]:
    """What they tell, rank 0 first."""
    code = "import runpy, sys; f, r, n, p = sys.argv[1:]; runpy.run_path(f, run_name='a rank')['process_main'](int(r), int(n), p)"
    environment = {"GLOO_SOCKET_IFNAME": "lo", **os.environ} if sys.platform == "linux" else dict(os.environ)
    with tempfile.TemporaryDirectory() as folder:
        started = [
            subprocess.Popen(
                [sys.executable, "-c", code, str(FILE), str(rank), str(ranks), str(Path(folder) / "meet")],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for rank in range(ranks)
        ]
        try:
            told = [process.communicate(timeout=60) for process in started]
        finally:
            for process in started:
                process.kill()
    for rank, (process, (_, errors)) in enumerate(zip(started, told, strict=True)):
        assert process.returncode == 0, f"rank {rank} ended with {errors.strip()[-1500:]}"
    return [line for output, _ in told for line in output.splitlines()]


def test_4_two_processes_write_what_one_writes() -> None:
    if FILE is None:
        print("a notebook has no file that other processes could load: run this lesson as a script for this part")
        return
    text = next(line for line in in_processes(2) if line.startswith("text "))
    said, right = [int(token) for token in text.split()[1:]], alone(PROMPT, COUNT)
    assert said == right, f"two processes write another text than the whole model: you said {said}, right is {right}"


def what_was_won() -> None:
    if FILE is None:
        return
    expected = alone(PROMPT, COUNT)
    for ranks in (1, 2):
        print(f"{ranks} process{'es' if ranks > 1 else ''}")
        for line in in_processes(ranks):
            if line.startswith("text "):
                same = [int(token) for token in line.split()[1:]] == expected
                line = f"the text is {'' if same else 'NOT '}that of the whole model"
            print(f"  {line}")


if __name__ == "__main__":
    test_4_two_processes_write_what_one_writes()
    what_was_won()

# %% [markdown]
# Half the bytes for a token on each, and the same text. Faster it is not: this model is far too small, and what the ranks save by
# computing half, they lose waiting for each other. On GPUs the parts are large and the links fast; the two sums a
# layer remain what tensor parallelism costs, so GPUs of one machine do it, and machines do something else (each has some of the
# layers: pipeline parallelism).
#
# ## What real engines do
#
# - **Megatron-LM** is where this cut comes from: columns, then rows, and one sum behind them (Shoeybi et al. 2019,
#   [arXiv 1909.08053](https://arxiv.org/abs/1909.08053)).
# - **The vLLM paper** pages it as here: one block manager for all, the same block numbers on each GPU, each with its own heads
#   (Kwon et al. 2023, section 4.6, [arXiv 2309.06180](https://arxiv.org/abs/2309.06180)).
# - Models with fewer KV heads than ranks give the same KV head to several of them; then less than half is won.
#
# ## Where this lives in minipaged
#
# - `minipaged/model/split.py`: `Part` cuts a model.
# - `minipaged/execution/collectives.py`: `GlooCollectives.all_reduce`, your sum; `CudaCollectives` for GPUs.
# - `minipaged/execution/ranks.py`: `RankRunner` sends each plan to all ranks.
