# %% [markdown]
# # 16. Windows and sinks
#
# *40 minutes. You need lessons 4 and 5.*
#
# ## Why
#
# A text that never ends fills any pool. Two things run out: memory, and positions, for a model has
# learned from texts of some length and knows nothing about positions beyond it.
#
# A **sliding window** answers the first: each query sees the last `window` tokens alone, so the blocks before
# them can go back to the pool while the sequence goes on. Its table keeps its form: the entry becomes the null
# block (lesson 3), so entry `n` still stands for the same part of the text.
#
# But models that were not trained with a window break down once the first tokens leave it: they have learned
# to put attention there when there is nothing to look at. These tokens are called sinks. So keep the first few too:
#
# ```
#  sinks 2, window 6, blocks of 4; the query stands at 21
#
#  position    0 1 2 3 │ 4 5 6 7 │ 8 … 11 │ 12 … 15 │ 16 17 18 19 │ 20 21
#  seen        ■ ■ · · │         │        │         │ ■  ■  ■  ■  │ ■  ■
#  table          7    │    0    │    0   │    0    │      3      │   9          0: released, the null block
#
#  within the cache: 0 1 and then 2 3 4 5 6 7. The query stands at 7 there, not at 21
# ```
#
# This answers the second as well: positions are counted within what is kept, so they never grow beyond `sinks + window - 1`.
#
# ## The pain

# %%
from __future__ import annotations

import random
import time

import torch
from torch import Tensor

torch.set_num_threads(1)


def the_pain() -> None:
    print("keys and values of one endless text, in a model of 32 layers with 8 KV heads of 128 numbers in 16 bits:")
    for length in (1_000, 30_000, 1_000_000):
        print(f"{length:>10,} tokens: {length * 2 * 2 * 32 * 8 * 128 / 2**30:8.2f} GiB")
    print()


if __name__ == "__main__":
    the_pain()

# %% [markdown]
# ## Task 1: `spare`
#
# Which entries of the table can go? `num_computed` tokens are computed, so the next query stands at the position
# `num_computed`, and no later one looks further back than it. It sees itself and the `window - 1` positions
# before it, and the first `sinks` positions. An entry is spare if none of its positions is seen.
#
# An entry that holds a sink stays, even if its other positions are not seen. After those, the spare entries are one
# range, perhaps an empty one. In the picture 21 tokens are computed.
#
# ```console
# $ python 16_windows_and_sinks.py
# NotImplementedError: lesson 16, task 1: spare
# ```


# %%
def spare(num_computed: int, window: int, sinks: int, block_size: int) -> range:
    """The table entries that no later query sees.

    >>> spare(num_computed=21, window=6, sinks=2, block_size=4)
    range(1, 4)
    """
    raise NotImplementedError("lesson 16, task 1: spare")


# %%
def sees(query: int, key: int, window: int, sinks: int) -> bool:
    """The definition, for one query and one key."""
    return key <= query and (key > query - window or key < sinks)


def test_1_by_the_definition() -> None:
    rng = random.Random(0)
    for _ in range(300):
        size, window, sinks = rng.choice([1, 2, 4]), rng.randint(1, 12), rng.randint(0, 6)
        computed = rng.randint(0, 40)
        expected = [
            entry
            for entry in range(computed // size)
            if not any(sees(computed, entry * size + i, window, sinks) for i in range(size))
        ]
        found = list(spare(computed, window, sinks, size))
        told = f"{computed} tokens computed, window {window}, sinks {sinks}, blocks of {size}"
        assert found == expected, f"{told}\nyou said  {found}\nright     {expected}"


if __name__ == "__main__":
    test_1_by_the_definition()

# %% [markdown]
# ## Task 2: `Stream.release`
#
# Give the blocks of these entries back, and put 0, the null block, in their place. An entry that is null already
# stays so: the range of task 1 names the old ones every time. Block 0 is nobody's and never goes to the list
# of free blocks.


# %%
class Stream:
    """The table of one endless text, and the blocks that are free."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.free = list(range(num_blocks - 1, 0, -1))
        self.table: list[int] = []

    def grow(self, length: int) -> None:
        """Room for so many tokens."""
        while len(self.table) * self.block_size < length:
            self.table.append(self.free.pop())

    def release(self, entries: range) -> None:
        """These entries are no longer needed.

        >>> stream = Stream(num_blocks=4, block_size=2)
        >>> stream.table, stream.free = [0, 3, 1], [2]
        >>> stream.release(range(0, 2))
        >>> stream.table, sorted(stream.free)
        ([0, 0, 1], [2, 3])
        """
        raise NotImplementedError("lesson 16, task 2: Stream.release")


# %%
def test_2_an_endless_text_in_a_small_pool() -> None:
    stream = Stream(num_blocks=6, block_size=4)
    for position in range(500):
        stream.grow(position + 1)
        before, gone = list(stream.table), spare(position + 1, window=8, sinks=3, block_size=4)
        stream.release(gone)
        told = f"table {before}, release({gone}): now it is {stream.table}, and free are {stream.free}"
        right = [0 if entry in gone else block for entry, block in enumerate(before)]
        assert stream.table == right, f"{told}. The table should be {right}"
        assert 0 not in stream.free, f"{told}. Block 0 was given back"
        held = [block for block in stream.table if block]
        assert sorted(held + stream.free) == [1, 2, 3, 4, 5], f"{told}. A block was lost, or given back twice"
    assert len(stream.table) == 125
    assert stream.table[0] != 0, "the sinks stay"


if __name__ == "__main__":
    test_2_an_endless_text_in_a_small_pool()

# %% [markdown]
# ## Task 3: `second_query`
#
# Models that use RoPE turn each query and key by an angle that grows with its position; `rotated` does it. The dot
# product of the two depends on the difference of their positions alone.
#
# Keys lie in the cache turned by their true positions, and nobody wants to turn them again for each new
# token. It is not needed. For the window, the differences within the cache are the true ones. For the sinks they are
# smaller. So make a second query, for the sinks alone: the same one, turned back, from `position` to where it stands
# within the cache (7 in the picture). That is `sinks + window - 1` at most, and `position` itself while the text is
# still shorter.
#
# Turns add up: to turn what has been turned by `a` on to `b`, turn it by `b - a`.


# %%
def rotated(x: Tensor, turns: int) -> Tensor:
    """RoPE: [..., head_dim], turned forward by so many positions, or back if it is negative."""
    half = x.shape[-1] // 2
    angle = turns * 10_000.0 ** (-torch.arange(half, dtype=x.dtype) / half)
    first, second = x.chunk(2, -1)
    return torch.cat((first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()), -1)


def second_query(q: Tensor, position: int, window: int, sinks: int) -> Tensor:
    """The query for the sinks. q [heads, head_dim] is turned by `position` already.

    >>> q = rotated(torch.ones(1, 2), 21)
    >>> torch.allclose(second_query(q, position=21, window=6, sinks=2), rotated(torch.ones(1, 2), 7), atol=1e-5)
    True
    """
    raise NotImplementedError("lesson 16, task 3: second_query")


# %%
def test_3_where_it_stands_within_the_cache() -> None:
    q = torch.randn(2, 8, dtype=torch.float64)
    for position in (0, 3, 7, 8, 9, 100, 5_000):
        out, right = second_query(rotated(q, position), position, window=6, sinks=3), min(position, 8)
        assert out.shape == q.shape
        if not torch.allclose(out, rotated(q, right), rtol=1e-7, atol=1e-7):
            near = sorted(range(-10_010, 10_010), key=lambda turns: abs(turns - right))
            stands = next((each for each in near if torch.allclose(out, rotated(q, each), atol=1e-7)), "no position")
            told = f"the query at {position}, with window 6 and sinks 3, should be turned to {right}"
            raise AssertionError(f"{told}; yours is turned to {stands}")


if __name__ == "__main__":
    test_3_where_it_stands_within_the_cache()

# %% [markdown]
# ## Task 4: `streaming_attention`
#
# Walk the table and leave out null entries. Of each other page take the positions that the query sees (`sees` says
# which). The sinks, which are the positions below `sinks`, are scored with the second query, all others with the
# query itself. Divide the scores by the root of `head_dim`; one softmax over all of them gives the weights of the values.
#
# What the query does not see may be `NaN`. Leave it out: a weight of 0 is not enough, for 0 times `NaN` is `NaN`.


# %%
def streaming_attention(
    q: Tensor, keys: Tensor, values: Tensor, table: list[int], position: int, window: int, sinks: int
) -> Tensor:
    """Attention of the token at `position`. q [heads, head_dim]; keys, values [num_blocks, block_size, heads, head_dim].

    The result is [heads, head_dim].

    >>> keys, values = torch.zeros(3, 1, 1, 2), torch.tensor([9.0, 9.0, 1.0, 5.0, 3.0, 7.0]).view(3, 1, 1, 2)
    >>> streaming_attention(torch.ones(1, 2), keys, values, [1, 0, 2], position=2, window=1, sinks=1).tolist()
    [[2.0, 6.0]]
    """
    raise NotImplementedError("lesson 16, task 4: streaming_attention")


# %%
def stream_of(length: int, window: int, sinks: int, size: int) -> tuple[float, int, float]:
    """A long text of random tokens. Returns the largest error against the definition, which is tiny or a failure; the
    most blocks held; and the seconds spent in your function."""
    noise = torch.Generator().manual_seed(length + window)
    heads, dim = 2, 8
    q, k, v = torch.randn(3, length, heads, dim, generator=noise, dtype=torch.float64).unbind(0)
    stream = Stream(length + 2, size)
    keys, values = (torch.full((length + 2, size, heads, dim), float("nan"), dtype=torch.float64) for _ in "kv")
    worst, most, spent = 0.0, 0, 0.0
    for position in range(length):
        stream.grow(position + 1)
        most = max(most, sum(block != 0 for block in stream.table))
        slot = stream.table[position // size], position % size
        keys[slot], values[slot] = rotated(k[position], position), v[position]
        turned = rotated(q[position], position)
        start = time.perf_counter()
        out = streaming_attention(turned, keys, values, stream.table, position, window, sinks)
        spent += time.perf_counter() - start
        kept = [j for j in range(position + 1) if sees(position, j, window, sinks)]
        within = torch.stack([rotated(k[j], place) for place, j in enumerate(kept)])
        scores = torch.einsum("hd,jhd->hj", rotated(q[position], len(kept) - 1), within) / dim**0.5
        expected = torch.einsum("hj,jhd->hd", scores.softmax(1), v[kept])
        told = f"the query at {position}, window {window}, sinks {sinks}, table {stream.table}, blocks of {size}"
        assert out.shape == expected.shape, (
            f"{told}: the result is {list(out.shape)}, and should be {list(expected.shape)}"
        )
        assert not out.isnan().any(), f"{told}: the result is NaN; all that it sees is {kept}"
        error = float((out - expected).abs().max())
        assert error < 1e-9, f"{told}: off by {error:.1e}; what it sees is {kept}"
        worst = max(worst, error)
        gone = spare(position + 1, window, sinks, size)
        for entry in gone:
            if stream.table[entry]:
                keys[stream.table[entry]] = values[stream.table[entry]] = float("nan")
        stream.release(gone)
    return worst, most, spent


def test_4_by_the_definition() -> None:
    """Keys are turned anew for each query there, by their places within the cache; released blocks are NaN here."""
    for length, window, sinks, size in ((60, 6, 2, 4), (50, 8, 4, 4), (40, 5, 0, 2), (40, 4, 3, 1), (30, 100, 2, 4)):
        stream_of(length, window, sinks, size)


if __name__ == "__main__":
    test_4_by_the_definition()

# %% [markdown]
# ## What was won
#
# The blocks that an endless text holds, and the time that your function takes for a token. Neither grows with the
# text, but for the null entries to step over. (The wait before each line is for the definition, which is checked at
# each token.) Then the score that the first token gets: once the window is full, it stays the same for the second
# query, however far away the text has gone.


# %%
def what_was_won() -> None:
    for length in (100, 400, 1_600):
        worst, most, spent = stream_of(length, 32, 4, 16)
        print(
            f"{length:>6,} tokens: {-(-length // 16):>4} blocks if all is kept, {most} held at most, error {worst:.0e}, "
            f"{1e3 * spent / length:.2f} ms a token"
        )

    noise = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 1, 64, generator=noise, dtype=torch.float64).unbind(0)
    print("\nthe score of the first token, with the query itself and with the second one:")
    for position in (10, 100, 10_000):
        itself = rotated(q, position)
        both = [float((each * k).sum()) / 8 for each in (itself, second_query(itself, position, 32, 4))]
        print(f"  at {position:>6,}: {both[0]:6.3f} {both[1]:6.3f}")


if __name__ == "__main__":
    what_was_won()

# %% [markdown]
# ## What real engines do
#
# - Sliding windows: Longformer (Beltagy et al. 2020, [arXiv 2004.05150](https://arxiv.org/abs/2004.05150)); Mistral 7B was trained
#   with one (Jiang et al. 2023, [arXiv 2310.06825](https://arxiv.org/abs/2310.06825)).
# - **StreamingLLM** found the sinks (Xiao et al. 2024, [arXiv 2309.17453](https://arxiv.org/abs/2309.17453)). It keeps
#   keys as they were before RoPE, and turns all of them for each new token, where we turn one query.
# - What was released is gone: a model that streams writes on fluently, and does not know what stood there.
#
# ## Where this lives in minipaged
#
# - `minipaged/memory/retention.py`: `Retention.spare` is task 1, and `Retention.most_blocks` what admission counts with.
# - `minipaged/memory/block_manager.py`: `BlockManager.release`.
# - `kernels/attention/sinks.py`: `Sinks` and `turned`, the second query.
# - `minipaged/execution/paged_kv.py`: `PagedKV.with_sinks` computes its angles, once a step.
