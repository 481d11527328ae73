# %% [markdown]
# # 14. Grouped heads and paged prefill
#
# *35 minutes. You need lesson 5.*
#
# ## Why
#
# Lesson 5 attended for one new token, in a model whose heads all have keys and values of their own. Two things
# are different in the models that people run.
#
# Reading the KV cache is what decoding costs, and keeping it is what limits the batch. So models share: a
# **KV head**, with its keys and values, serves several query heads that stand side by side, its group.
#
# ```
#  query heads   0   1   2   3   4   5   6   7   8          9 heads, as in SmolLM2
#                └───┼───┘   └───┼───┘   └───┼───┘          groups of 3
#  KV heads          0           1           2              3 of them: a third of the bytes
# ```
#
# And a prompt has many tokens, which are all known. Computing them one by one would read all weights once for
# each. **Prefill** computes a chunk of them in one pass; each may look at what came before, and not at what
# comes after:
#
# ```
#                 keys at positions
#                 0  1  2  3 │ 4  5  6  7 │ 8                   table [7, 2, 5], blocks of 4
#  query at  6    █  █  █  █ │ █  █  █  · │ ·      the chunk: positions 6, 7 and 8.
#            7    █  █  █  █ │ █  █  █  █ │ ·      0 to 5 were written before: by an earlier chunk,
#            8    █  █  █  █ │ █  █  █  █ │ █      or by another request with the same beginning (lesson 10)
# ```
#
# ## The pain

# %%
from __future__ import annotations

import random
import time

import torch
from torch import Tensor

from minipaged.learn.tiny_model import TinyModel, dense_attention

torch.set_num_threads(1)


def the_pain() -> None:
    print("bytes of keys and values for one token, 16 bits each:")
    for name, layers, heads, kv_heads, head_dim in (("SmolLM2 135M", 30, 9, 3, 64), ("Llama 3 8B", 32, 32, 8, 128)):
        own, grouped = (4 * layers * each * head_dim for each in (heads, kv_heads))
        print(f"{name:>14}: {own:>9,} if each head had its own, {grouped:>9,} as it is")
    model, prompt = TinyModel(), [t % 64 for t in range(200)]
    seconds = {}
    for chunk in (1, 200):
        start = time.perf_counter()
        for at in range(0, 200, chunk):
            model(prompt[at : at + chunk], at, lambda layer, q, k, v: q)  # everything but attention
        seconds[chunk] = time.perf_counter() - start
    print(f"200 tokens through a tiny model, without attention: one by one {1e3 * seconds[1]:.1f} ms", end="")
    print(f", in one pass {1e3 * seconds[200]:.1f} ms\n")


if __name__ == "__main__":
    the_pain()

# %% [markdown]
# ## Task 1: `kv_head`
#
# Which KV head serves a query head? Groups are of equal size, and stand side by side, as in the picture.
#
# ```console
# $ python 14_grouped_heads_and_paged_prefill.py
# NotImplementedError: lesson 14, task 1: kv_head
# ```


# %%
def kv_head(head: int, heads: int, kv_heads: int) -> int:
    """The KV head whose keys the query head `head` looks at. `heads` is a multiple of `kv_heads`.

    >>> kv_head(4, heads=9, kv_heads=3)
    1
    """
    raise NotImplementedError("lesson 14, task 1: kv_head")


# %%
def test_1_groups_stand_side_by_side() -> None:
    assert [kv_head(head, 9, 3) for head in range(9)] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [kv_head(head, 8, 2) for head in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]


def test_1_the_two_ends() -> None:
    assert [kv_head(head, 4, 4) for head in range(4)] == [0, 1, 2, 3], "each has its own"
    assert [kv_head(head, 4, 1) for head in range(4)] == [0, 0, 0, 0], "all share one"


if __name__ == "__main__":
    test_1_groups_stand_side_by_side()
    test_1_the_two_ends()

# %% [markdown]
# ## Task 2: `visible`
#
# The picture above, for one page. A chunk's `count` queries stand at the positions `first_query`,
# `first_query + 1` and so on; a page's `size` keys at `first_key`, `first_key + 1` and so on. Query and key are
# `True` together where the query may see the key: where the key's position is the query's own or an earlier one.
#
# Positions are those in the text. It is a common mistake to compare the number of the query within its chunk
# with the number of the key: that is right for the first chunk of a prompt, and for no other.


# %%
def visible(first_query: int, count: int, first_key: int, size: int) -> Tensor:
    """Who sees whom: bool [count, size].

    >>> visible(first_query=6, count=3, first_key=4, size=4).int().tolist()  # the middle page of the picture
    [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    """
    raise NotImplementedError("lesson 14, task 2: visible")


# %%
def test_2_a_first_chunk() -> None:
    assert visible(0, 3, 0, 3).int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]


def test_2_a_chunk_over_a_prefix() -> None:
    for first_query, count, first_key, size in ((6, 3, 0, 4), (6, 3, 4, 4), (6, 3, 8, 1), (5, 1, 4, 4), (0, 9, 4, 4)):
        seen = visible(first_query, count, first_key, size)
        assert (seen.shape, seen.dtype) == ((count, size), torch.bool)
        for i in range(count):
            expected = [first_key + j <= first_query + i for j in range(size)]
            found, right = seen[i].int().tolist(), [int(each) for each in expected]
            assert found == right, (
                f"visible({first_query}, {count}, {first_key}, {size}): the query at {first_query + i} looks at the keys "
                f"from {first_key} on\nyou said  {found}\nright     {right}"
            )


if __name__ == "__main__":
    test_2_a_first_chunk()
    test_2_a_chunk_over_a_prefix()

# %% [markdown]
# ## Task 3: `paged_prefill`
#
# Lesson 5's walk, for `n` queries at once. `OnlineSoftmax` is given, for scores of the shape
# `[kv_heads, group, n, keys]`. The steps for each page:
#
# 1. how many of its slots are filled: the chunk's own keys are in the cache already, so the context has
#    `first_query + n` tokens. What lies after them is `NaN`. The table may be longer than the context: end the walk
#    at the first page with nothing in it;
# 2. the scores of its filled slots. View `q` as `[n, kv_heads, group, head_dim]` and let `torch.einsum` pair each
#    group with its KV head. Do not repeat the keys for the group's heads: that copy is what sharing was to save;
# 3. divide by the root of `head_dim`, and put −∞ where `visible` is `False`: `exp(−∞)` is 0;
# 4. feed them to the softmax, with the page's values.
#
# For the queries at the front, the last pages lie in the future as a whole. They add nothing: every query has seen key
# 0 before, so its top is a number, and each weight is `exp(−∞ − top)`, 0. (Should the walk begin at a page
# that a query does not see, as a window's may, −∞ less −∞ would be `NaN`.)
#
# `online.result()` is `[kv_heads, group, n, head_dim]`. Bring it back into the form of `q`.


# %%
class OnlineSoftmax:
    """Lesson 5's, for many queries in groups."""

    def __init__(self, kv_heads: int, group: int, n: int, head_dim: int) -> None:
        self.top = torch.full((kv_heads, group, n), float("-inf"))
        self.total = torch.zeros(kv_heads, group, n)
        self.weighted = torch.zeros(kv_heads, group, n, head_dim)

    def add(self, scores: Tensor, values: Tensor) -> None:
        """scores [kv_heads, group, n, keys]; values [keys, kv_heads, head_dim]."""
        new_top = torch.maximum(self.top, scores.amax(-1))
        shrink = torch.exp(self.top - new_top)
        weights = torch.exp(scores - new_top[..., None])
        self.total = self.total * shrink + weights.sum(-1)
        self.weighted = self.weighted * shrink[..., None] + torch.einsum("kgns,skd->kgnd", weights, values)
        self.top = new_top

    def result(self) -> Tensor:
        """The means: [kv_heads, group, n, head_dim]."""
        return self.weighted / self.total[..., None]


def paged_prefill(q: Tensor, key_cache: Tensor, value_cache: Tensor, table: list[int], first_query: int) -> Tensor:
    """Attention of a chunk whose keys are in the cache. q [n, heads, head_dim]; caches [num_blocks, block_size, kv_heads, head_dim].

    The result is [n, heads, head_dim].

    >>> keys, values = torch.zeros(2, 2, 1, 1), torch.tensor([0.0, 0.0, 1.0, 3.0]).view(2, 2, 1, 1)
    >>> paged_prefill(torch.ones(2, 1, 1), keys, values, table=[1], first_query=0).flatten().tolist()
    [1.0, 2.0]
    """
    raise NotImplementedError("lesson 14, task 3: paged_prefill")


# %%
class Scene:
    """A random text's keys and values, dense, and scattered over a pool full of NaN; and queries for all its positions."""

    def __init__(self, seed: int, *, length: int | None = None, block_size: int | None = None) -> None:
        rng, noise = random.Random(seed), torch.Generator().manual_seed(seed)
        self.block_size = block_size or rng.choice([1, 3, 4, 16])
        self.length = length or rng.randint(1, 5 * self.block_size)
        kv_heads, group, dim = rng.choice([1, 2, 3]), rng.choice([1, 2, 3]), 8
        self.q = torch.randn(self.length, kv_heads * group, dim, generator=noise)
        self.k, self.v = torch.randn(2, self.length, kv_heads, dim, generator=noise).unbind(0)
        entries = -(-self.length // self.block_size)
        self.table = rng.sample(range(1, 20 + entries), entries)
        self.keys, self.values = (
            torch.full((20 + entries, self.block_size, kv_heads, dim), float("nan")) for _ in "kv"
        )

    def write(self, until: int) -> None:
        """Put the text's first `until` keys and values where the table says."""
        for position in range(until):
            slot = self.table[position // self.block_size], position % self.block_size
            self.keys[slot], self.values[slot] = self.k[position], self.v[position]

    def dense(self) -> Tensor:
        """What every query should get, by repeating keys and values for each head of a group."""
        group = self.q.shape[1] // self.k.shape[1]
        return dense_attention(self.q, *(each.repeat_interleave(group, 1) for each in (self.k, self.v)))


def compute(scene: Scene, at: int, end: int) -> None:
    """The chunk from `at` to `end` gets what dense attention gives; or it says which query does not."""
    out, right = paged_prefill(scene.q[at:end], scene.keys, scene.values, scene.table, at), scene.dense()[at:end]
    place = f"a chunk of {end - at} queries from {at} on, blocks of {scene.block_size}, "
    place += f"{scene.q.shape[1]} heads, {scene.k.shape[1]} KV heads"
    assert out.shape == right.shape, f"{place}: the result is {list(out.shape)}, and should be {list(right.shape)}"
    wrong = ~torch.isclose(out, right, rtol=1e-4, atol=1e-5).all(-1)
    if bool(wrong.any()):
        query, head = wrong.nonzero()[0].tolist()
        told = f"{int(wrong.sum())} of {wrong.numel()} results are wrong, first that of the query at {at + query}, head {head}"
        nan = ". It is NaN: was a slot read that nobody wrote?" if out[query, head].isnan().any() else ""
        raise AssertionError(f"{place}: {told}{nan}")


def test_3_a_whole_prompt() -> None:
    for seed in range(40):
        scene = Scene(seed)
        scene.write(scene.length)
        compute(scene, 0, scene.length)


def test_3_any_cut_into_chunks_gives_the_same() -> None:
    """A chunk's keys are written just before it is computed; what comes after them is NaN."""
    for seed in range(40):
        rng, scene, at = random.Random(seed), Scene(seed), 0
        while at < scene.length:
            end = min(scene.length, at + rng.randint(1, 9))
            scene.write(end)
            compute(scene, at, end)
            at = end


def test_3_keys_are_neither_gathered_nor_repeated() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    scene, largest = Scene(3, length=2_048, block_size=16), 0
    scene.write(scene.length)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
            if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in known:
                largest = max(largest, out.nbytes)
            return out

    with Watch():
        paged_prefill(scene.q[-2:], scene.keys, scene.values, scene.table, scene.length - 2)
    page = scene.keys[0].nbytes  # three heads share it: repeated for each, it would be three times as large
    assert largest < 2 * page, (
        f"a tensor of {largest:,} bytes was made; a page's keys have {page:,}, all keys {scene.k.nbytes:,}. "
        "einsum pairs groups and KV heads without a copy for each head"
    )


if __name__ == "__main__":
    test_3_a_whole_prompt()
    test_3_any_cut_into_chunks_gives_the_same()
    test_3_keys_are_neither_gathered_nor_repeated()

# %% [markdown]
# ## What was won
#
# One prompt through a tiny model, its keys and values over pages, in chunks of several sizes: the same text
# follows, and the larger the chunk, the less time it takes. Then the same prompt when its first half is in the cache already.


# %%
def after(model: TinyModel, prompt: list[int], chunk: int, cached: int = 0) -> tuple[int, float]:
    """The likeliest token after the prompt, and the seconds it took, the first `cached` tokens not counted."""
    size = 16
    table = random.Random(0).sample(range(1, 40), -(-len(prompt) // size))
    caches = [torch.full((2, 40, size, model.heads, model.head_dim), float("nan")) for _ in range(model.layers)]
    at, start, best = 0, time.perf_counter(), -1
    while at < len(prompt):
        end = cached if at < cached else min(len(prompt), at + chunk)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, at: int = at) -> Tensor:
            positions = torch.arange(at, at + len(q))
            blocks, places = torch.tensor(table)[positions // size], positions % size
            caches[layer][0][blocks, places], caches[layer][1][blocks, places] = k, v
            return paged_prefill(q, *caches[layer], table[: -(-(at + len(q)) // size)], at)

        best = int(model(prompt[at:end], at, attend)[-1].argmax())
        at = end
        if at == cached:
            start = time.perf_counter()
    return best, time.perf_counter() - start


def test_3_a_model_does_not_notice() -> None:
    model, prompt = TinyModel(), [t * t % 64 for t in range(50)]
    expected = int(model(prompt, 0, lambda layer, q, k, v: dense_attention(q, k, v))[-1].argmax())
    assert {after(model, prompt, chunk)[0] for chunk in (1, 7, 16, 50)} == {expected}
    assert after(model, prompt, 50, cached=32)[0] == expected


def what_was_won() -> None:
    model, prompt = TinyModel(), [t * t % 64 for t in range(400)]
    for chunk in (1, 16, 64, 400):
        token, seconds = after(model, prompt, chunk)
        print(f"400 tokens in chunks of {chunk:>3}: {1e3 * seconds:8.1f} ms, then token {token}")
    token, seconds = after(model, prompt, 400, cached=208)
    print(f"the last 192 over a cached prefix: {1e3 * seconds:6.1f} ms, then token {token}")


if __name__ == "__main__":
    test_3_a_model_does_not_notice()
    what_was_won()

# %% [markdown]
# ## What real engines do
#
# - **Grouped heads** are from Ainslie et al. 2023 ([arXiv 2305.13245](https://arxiv.org/abs/2305.13245)); the extreme,
#   one KV head for all, from Shazeer 2019 ([arXiv 1911.02150](https://arxiv.org/abs/1911.02150)). Kernels load a
#   page once for a whole group.
# - **Sarathi-Serve** cuts prompts into chunks, so that those who are writing need not wait for a long prompt (Agrawal et al.
#   2024, [arXiv 2403.02310](https://arxiv.org/abs/2403.02310)). vLLM and SGLang do this by default.
# - A kernel leaves out the pages that no query of its tile sees, instead of masking them.
#
# ## Where this lives in minipaged
#
# - `minipaged/config.py`: `ModelConfig.group_size`.
# - `kernels/attention/prefill.py`: `paged_prefill`, and the twin that you have just written, `paged_prefill_torch`.
# - `minipaged/scheduling/scheduler.py`: `Scheduler.schedule` cuts prompts into chunks.
