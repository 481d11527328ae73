# %% [markdown]
# # 5. Paged attention
#
# *30 minutes. You need lesson 4, and softmax.*
#
# ## Why
#
# Attention wants all keys side by side: multiply the query with them, take the softmax, sum the values. After
# lesson 4 they do not lie side by side any more. There are two ways out (a **page** is what a kernel calls a
# block):
#
# ```
#  pool      │ 1      │ 2: k4 k5 k6 k7 │ 3      │ 4 │ 5: k8 k9 │ 6 │ 7: k0 k1 k2 k3 │        table [7, 2, 5]
#
#  gather    copy them together:   k0 k1 k2 k3 k4 k5 k6 k7 k8 k9   then attend as always
#
#  walk      for each page of the table: attend over that page, and merge what it says with what the pages before it said
# ```
#
# Gathering is easy to get right. But it makes a second copy of the whole context, for each token, in each
# layer, to be thrown away at once. Decoding is limited by how fast memory can be read; a copy reads, writes,
# and reads again. Walking reads everything exactly once. It needs one trick: a softmax that can be computed
# piece by piece.
#
# ## The pain

# %%
from __future__ import annotations

import random

import torch
from torch import Tensor

from minipaged.learn.tiny_model import TinyModel, dense_attention

torch.set_num_threads(1)


def the_pain() -> None:
    print("a gather for one new token copies, in one layer of a model with 32 heads of 128 numbers in 16 bits:")
    for length in (128, 1_024, 8_192):
        keys = torch.zeros(length, 32, 128, dtype=torch.float16)
        print(f"{length:>8,} tokens of context: {2 * keys.nbytes / 2**20:8.1f} MiB")
    print()


if __name__ == "__main__":
    the_pain()

# %% [markdown]
# ## Task 1: `gather`
#
# Start with the easy way. It will be your yardstick: the twin that is slow, obvious and right. The cache of
# one layer is `[num_blocks, block_size, heads, head_dim]`. Return the first `length` tokens of the sequence
# whose table is given, in order, as `[length, heads, head_dim]`.
#
# The slots behind the end of a text hold anything; here they hold `NaN`, not a number. One `NaN` in a sum
# makes the whole sum `NaN`. If you read one slot too many, you will see it.
#
# ```console
# $ python 05_paged_attention.py
# NotImplementedError: lesson 5, task 1: gather
# ```


# %%
def gather(cache: Tensor, table: list[int], length: int) -> Tensor:
    """The sequence's first `length` keys (or values) side by side: [length, heads, head_dim].

    >>> cache = torch.arange(8.0).view(4, 2, 1, 1)  # 4 blocks of 2 slots, one head of one number
    >>> gather(cache, table=[3, 1], length=3).flatten().tolist()
    [6.0, 7.0, 2.0]
    """
    raise NotImplementedError("lesson 5, task 1: gather")


# %%
class Scene:
    """A random sequence, once dense and once scattered over a pool full of NaN."""

    def __init__(
        self,
        seed: int,
        *,
        length: int | None = None,
        block_size: int | None = None,
        shape: tuple[int, int] | None = None,
    ) -> None:
        rng, noise = random.Random(seed), torch.Generator().manual_seed(seed)
        self.block_size = block_size or rng.choice([1, 3, 4, 16])
        self.length = length or rng.randint(1, 5 * self.block_size)
        self.heads, self.head_dim = shape or (rng.choice([1, 2, 4]), rng.choice([2, 8]))
        self.q = torch.randn(self.heads, self.head_dim, generator=noise)
        self.k, self.v = torch.randn(2, self.length, self.heads, self.head_dim, generator=noise).unbind(0)
        entries = -(-self.length // self.block_size)
        self.place(rng.sample(range(1, 60 + entries), entries))

    def place(self, table: list[int]) -> None:
        """Scatter the sequence over these blocks."""
        self.table = table
        self.key_cache, self.value_cache = (scatter(dense, table, self.block_size) for dense in (self.k, self.v))

    def dense(self) -> Tensor:
        return dense_attention(self.q[None], self.k, self.v)[0]


def scatter(dense: Tensor, table: list[int], block_size: int) -> Tensor:
    """The opposite of gather: a pool that holds `dense` where `table` says, and NaN elsewhere."""
    cache = torch.full((max(60, *table) + 1, block_size, *dense.shape[1:]), float("nan"))
    for position, numbers in enumerate(dense):
        cache[table[position // block_size], position % block_size] = numbers
    return cache


def test_1_gathers_in_the_order_of_the_text() -> None:
    for seed in range(50):
        scene = Scene(seed)
        assert torch.equal(gather(scene.key_cache, scene.table, scene.length), scene.k)


if __name__ == "__main__":
    test_1_gathers_in_the_order_of_the_text()

# %% [markdown]
# ## Task 2: `OnlineSoftmax.add`
#
# The output of attention is a weighted mean of the values:
#
# ```
#            Σ exp(sᵢ) vᵢ
#   out  =  ──────────────          sᵢ = q · kᵢ / √head_dim
#             Σ exp(sᵢ)
# ```
#
# Two sums. Sums can be computed piece by piece: keep a `total` (below the line) and a `weighted` sum (above),
# add each page's part, divide at the end. The only trouble is `exp`: a large score overflows. So everybody
# subtracts the largest score first, which cancels in the fraction. But when you walk, you do not know the
# largest score yet.
#
# The trick: subtract the largest *so far*. When a page brings a larger one, everything that was summed before
# is too large by the factor `exp(new top − old top)`. Shrink it by that factor, and go on:
#
# ```
#   new_top   =  max(top, largest score of this page)
#   shrink    =  exp(top − new_top)                        1 if the top stays, less if it rises
#   weights   =  exp(scores − new_top)
#   total     =  total · shrink     +  Σ weights
#   weighted  =  weighted · shrink  +  Σ weights · values
# ```
#
# Before the first page the top is −∞, and `exp(−∞)` is 0: the empty sums shrink to nothing, as they should.
# Do it for all heads at once; the shapes stand beside the names.


# %%
class OnlineSoftmax:
    """A weighted mean of values under a softmax, fed piece by piece."""

    def __init__(self, heads: int, head_dim: int) -> None:
        self.top = torch.full((heads,), float("-inf"))  # [heads] largest score so far
        self.total = torch.zeros(heads)  # [heads] sum of exp(score - top)
        self.weighted = torch.zeros(heads, head_dim)  # [heads, head_dim] sum of exp(score - top) * value

    def add(self, scores: Tensor, values: Tensor) -> None:
        """Take in n more tokens. scores [heads, n]; values [n, heads, head_dim].

        >>> online = OnlineSoftmax(heads=1, head_dim=1)
        >>> online.add(torch.tensor([[0.0, 0.0]]), torch.tensor([[[1.0]], [[3.0]]]))
        >>> online.result().item()  # equal scores: the plain mean
        2.0
        """
        raise NotImplementedError("lesson 5, task 2: OnlineSoftmax.add")

    def result(self) -> Tensor:
        """The mean: [heads, head_dim]."""
        return self.weighted / self.total[:, None]


# %%
def test_2_in_one_piece_it_is_a_softmax() -> None:
    scores, values = torch.randn(2, 6), torch.randn(6, 2, 8)
    online = OnlineSoftmax(2, 8)
    online.add(scores, values)
    torch.testing.assert_close(online.result(), torch.einsum("hn,nhd->hd", scores.softmax(1), values))


def test_2_any_cut_gives_the_same() -> None:
    for seed in range(50):
        rng, noise = random.Random(seed), torch.Generator().manual_seed(seed)
        n = rng.randint(1, 30)
        scores = 5 * torch.randn(2, n, generator=noise)
        values = torch.randn(n, 2, 8, generator=noise)
        online, at = OnlineSoftmax(2, 8), 0
        while at < n:
            end = min(n, at + rng.randint(1, 7))
            online.add(scores[:, at:end], values[at:end])
            at = end
        torch.testing.assert_close(online.result(), torch.einsum("hn,nhd->hd", scores.softmax(1), values))


def test_2_large_scores_do_not_overflow() -> None:
    online, values = OnlineSoftmax(1, 1), torch.tensor([[[1.0]], [[3.0]]])
    for at, score in enumerate((1000.0, 1000.0)):
        online.add(torch.tensor([[score]]), values[at : at + 1])
    assert online.result().item() == 2.0, "two equal scores of 1000 must give the plain mean of 1 and 3"
    online.add(torch.tensor([[2000.0]]), torch.tensor([[[7.0]]]))
    assert online.result().item() == 7.0, "a score of 2000 outweighs both"


if __name__ == "__main__":
    test_2_in_one_piece_it_is_a_softmax()
    test_2_any_cut_gives_the_same()
    test_2_large_scores_do_not_overflow()

# %% [markdown]
# ## Task 3: `paged_attention`
#
# Now walk. For each entry of the table: take that block's keys and values, as many as belong to the text (the
# last block may be partly filled), compute the scores, feed the softmax. Nothing of the size of the whole
# context may come into being.


# %%
def paged_attention(q: Tensor, key_cache: Tensor, value_cache: Tensor, table: list[int], length: int) -> Tensor:
    """Attention of one token over a paged context. q [heads, head_dim]; caches [num_blocks, block_size, heads, head_dim].

    The result is [heads, head_dim].

    >>> keys, values = torch.zeros(2, 2, 1, 1), torch.tensor([0.0, 0.0, 1.0, 3.0]).view(2, 2, 1, 1)
    >>> paged_attention(torch.ones(1, 1), keys, values, table=[1], length=2).tolist()  # block 1, equal scores
    [[2.0]]
    """
    raise NotImplementedError("lesson 5, task 3: paged_attention")


# %%
def test_3_equals_dense_attention_for_random_tables() -> None:
    for seed in range(100):
        scene = Scene(seed)
        out = paged_attention(scene.q, scene.key_cache, scene.value_cache, scene.table, scene.length)
        torch.testing.assert_close(out, scene.dense(), rtol=1e-4, atol=1e-5)


def test_3_a_table_may_be_longer_than_the_text() -> None:
    """An engine promises room ahead: the blocks at the end may hold nothing yet."""
    scene = Scene(3, length=5, block_size=4)
    out = paged_attention(scene.q, scene.key_cache, scene.value_cache, [*scene.table, 60], scene.length)
    torch.testing.assert_close(out, scene.dense(), rtol=1e-4, atol=1e-5)


def test_3_where_the_blocks_lie_does_not_matter_at_all() -> None:
    for seed in range(20):
        here, there = Scene(seed), Scene(seed)
        there.place(random.Random(-seed).sample(range(1, 60), len(here.table)))
        one, two = (paged_attention(s.q, s.key_cache, s.value_cache, s.table, s.length) for s in (here, there))
        assert torch.equal(one, two), "the same numbers in the same order: bit for bit the same result"


def test_3_no_copy_of_the_context_is_made() -> None:
    s = Scene(0, length=4096, block_size=16)
    biggest = largest_tensor(lambda: paged_attention(s.q, s.key_cache, s.value_cache, s.table, s.length))
    assert biggest < s.k.nbytes / 8, f"a tensor of {biggest:,} bytes was made; all keys together have {s.k.nbytes:,}"


def largest_tensor(action) -> int:
    """Bytes of the largest tensor with memory of its own that comes into being while `action` runs."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
            if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in known:
                largest = max(largest, out.nbytes)
            return out

    with Watch():
        action()
    return largest


if __name__ == "__main__":
    test_3_equals_dense_attention_for_random_tables()
    test_3_a_table_may_be_longer_than_the_text()
    test_3_where_the_blocks_lie_does_not_matter_at_all()
    test_3_no_copy_of_the_context_is_made()

# %% [markdown]
# ## What was won
#
# First the proof that matters: a whole model, once with a dense cache and once over pages scattered by dice,
# writing the same text. Then what each way allocates for one token, and how far its result is from one
# computed with twice the digits.


# %%
def write(model: TinyModel, prompt: list[int], count: int, block_size: int | None) -> list[int]:
    """`count` new tokens, token by token. block_size: pages of that size in random order; None: a dense cache."""
    shape = (model.heads, model.head_dim)
    dense = [(torch.zeros(0, *shape), torch.zeros(0, *shape)) for _ in range(model.layers)]
    paged = [torch.full((2, 99, block_size or 1, *shape), float("nan")) for _ in range(model.layers)]
    table = random.Random(0).sample(range(1, 99), 98)
    tokens = list(prompt)
    for position in range(len(prompt) + count - 1):

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, position: int = position) -> Tensor:
            if block_size is None:
                dense[layer] = (torch.cat([dense[layer][0], k]), torch.cat([dense[layer][1], v]))
                return dense_attention(q, *dense[layer])
            keys, values = paged[layer]
            block, place = table[position // block_size], position % block_size
            keys[block, place], values[block, place] = k[0], v[0]
            return paged_attention(q[0], keys, values, table[: position // block_size + 1], position + 1)[None]

        logits = model([tokens[position]], position, attend)
        if position == len(tokens) - 1:
            tokens.append(int(logits[-1].argmax()))
    return tokens[len(prompt) :]


def test_3_a_model_does_not_notice() -> None:
    model, prompt = TinyModel(), [3, 1, 4, 1, 5, 9, 2, 6]
    assert write(model, prompt, 20, block_size=4) == write(model, prompt, 20, block_size=None)


def what_was_won() -> None:
    model, prompt = TinyModel(), [3, 1, 4, 1, 5, 9, 2, 6]
    print("dense  ", *write(model, prompt, 16, block_size=None))
    for block_size in (1, 4, 16):
        print(f"pages{block_size:>2}", *write(model, prompt, 16, block_size=block_size))
    print("\nbytes of the largest tensor made for one new token, and the largest error:")
    for length in (64, 512, 4_096):
        scene = Scene(1, length=length, block_size=16, shape=(8, 64))
        exact = dense_attention(scene.q[None].double(), scene.k.double(), scene.v.double())[0]

        def gathered(s: Scene = scene) -> Tensor:
            keys, values = (gather(cache, s.table, s.length) for cache in (s.key_cache, s.value_cache))
            return dense_attention(s.q[None], keys, values)[0]

        def walked(s: Scene = scene) -> Tensor:
            return paged_attention(s.q, s.key_cache, s.value_cache, s.table, s.length)

        sizes = [largest_tensor(way) for way in (gathered, walked)]
        errors = [float((way().double() - exact).abs().max()) for way in (gathered, walked)]
        print(
            f"{length:>6,} tokens   gather {sizes[0]:>9,} bytes, {errors[0]:.0e}"
            f"   walk {sizes[1]:>6,} bytes, {errors[1]:.0e}"
        )


if __name__ == "__main__":
    test_3_a_model_does_not_notice()
    what_was_won()

# %% [markdown]
# We did not print times. A Python loop over pages is slow, and says nothing about a GPU, where all pages are
# walked side by side. Lesson 12 puts your loop where it belongs.
#
# ## What real engines do
#
# - The **online softmax** is from Milakov and Gimelshein 2018 ([arXiv
#   1805.02867](https://arxiv.org/abs/1805.02867)). **FlashAttention** made it the heart of every attention
#   kernel (Dao et al. 2022, [arXiv 2205.14135](https://arxiv.org/abs/2205.14135)): tiles of a long dense row,
#   or pages of a table, it is the same loop.
# - **vLLM's** first kernel gave each warp of the GPU its own blocks and paid for the table look-ups; the
#   authors measured what it cost (Kwon et al. 2023, section 7.1, Fig. 18a). **FlashAttention 3** and
#   **FlashInfer** read pages at the speed of dense memory.
# - A long context can be cut into chunks that are walked in parallel; the partial results merge by the same
#   formula, with `top` and `total` in hand
#   ([Flash-Decoding](https://crfm.stanford.edu/2023/10/12/flashdecoding.html)).
#
# ## Where this lives in minipaged
#
# - `kernels/attention/decode.py`: `paged_decode_torch` gathers, for a few rows at a time: on a CPU that is the faster
#   way. `gather_pages` is task 1.
# - `kernels/attention/decode_tile.py`: `attend_tile` is task 2, in base 2 and with several pages at once.
# - `kernels/attention/prefill.py`: `paged_prefill`, the same for many new tokens.
# - `tests/kernels`: each kernel against its twin, tables permuted, unused slots poisoned, as you did.
