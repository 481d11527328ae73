# %% [markdown]
# # 2. A KV cache by hand
#
# *20 minutes. You need to know what a query, a key and a value are.*
#
# ## Why
#
# A decoder is causal: a token looks back, never ahead. So the keys and values of a token do not depend on
# what comes after it. Once computed, they are true for ever. Without a cache we compute them again anyway, at
# every step, for every token.
#
# ```
#  step 1   T T T T            → E            computes 4 tokens
#  step 2   T T T T E          → F            computes 5 tokens, 4 of them again
#  step 3   T T T T E F        → G            computes 6 tokens, 5 of them again
#
#  with a cache
#  step 1   T T T T            → E            computes 4 tokens, keeps 4 keys and values
#  step 2   · · · · E          → F            computes 1
#  step 3   · · · · · F        → G            computes 1
# ```
#
# The first way computes a number of tokens that grows with the square of the text's length. The second
# computes each token once.
#
# The model of this lesson is `minipaged/learn/tiny_model.py`, a whole decoder on one screen (your editor's
# "go to definition" on `TinyModel` opens it). It has one unusual feature: attention is a function that you
# pass in. A call looks like this:
#
# ```
#  logits = model(tokens, first_position, attend)      tokens that stand at first_position, first_position + 1, …
#
#     in each layer the model computes q, k, v of these tokens, each [len(tokens), heads, head_dim], and calls
#     attend(layer, q, k, v)  →  what attention says, of the same shape
# ```
#
# Where keys and values are kept is that function's business. This lesson and the real engine both live behind
# that line.
#
# ## The pain
#
# The plain way keeps nothing: each step runs the whole text through the model.

# %%
from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from minipaged.learn.tiny_model import TinyModel, dense_attention

torch.set_num_threads(1)  # steady timings


def greedy(logits: Tensor) -> int:
    """The most likely next token, by the logits of the last position."""
    return int(logits[-1].argmax())


def generate_plainly(model: TinyModel, prompt: list[int], count: int) -> list[int]:
    """`count` new tokens, each from the whole text."""
    tokens = list(prompt)
    for _ in range(count):
        logits = model(tokens, 0, lambda layer, q, k, v: dense_attention(q, k, v))
        tokens.append(greedy(logits))
    return tokens[len(prompt) :]


def seconds(action: Callable[..., object], *arguments: object) -> float:
    """The fastest of five runs."""
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        action(*arguments)
        best = min(best, time.perf_counter() - start)
    return best


def text(length: int, vocab: int = 64) -> list[int]:
    return torch.randint(vocab, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def the_pain() -> None:
    model = TinyModel(width=128, layers=4, longest=1024)
    print("one more token behind …      costs")
    for length in (64, 128, 256, 512):
        print(f"{length:>13} tokens {1e3 * seconds(generate_plainly, model, text(length), 1):13.2f} ms")
    print()


if __name__ == "__main__":
    the_pain()

# %% [markdown]
# Every token costs more than the one before it, although only one token is new.
#
# ## Task 1: `Cache.append`
#
# The cache is two tensors, allocated once, with room for the longest text:
#
# ```
#                      longest
#  keys[layer]    k0 k1 k2 k3 k4 ·  ·  ·  ·  ·  ·         each k is [heads, head_dim]
#  values[layer]  v0 v1 v2 v3 v4 ·  ·  ·  ·  ·  ·
#                                ↑
#                          lengths[layer]
# ```
#
# `append` writes the new keys and values behind those that are there, and returns all keys and all values so
# far. Return *views* (slices), so that nothing is copied twice. If they do not fit, raise `ValueError` and
# change nothing.
#
# ```console
# $ python 02_a_kv_cache_by_hand.py
# NotImplementedError: lesson 2, task 1: Cache.append
# ```


# %%
class Cache:
    """Keys and values of one sequence, for every layer."""

    def __init__(self, model: TinyModel) -> None:
        shape = (model.layers, model.longest, model.heads, model.head_dim)
        self.keys = torch.full(
            shape, float("nan")
        )  # not a number: whoever reads a slot that was never written will notice
        self.values = torch.full(shape, float("nan"))
        self.lengths = [0] * model.layers

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep k and v [n, heads, head_dim] of the next n tokens; return all of the layer's keys and values so far.

        >>> cache, k = Cache(TinyModel(heads=4, width=64)), torch.ones(3, 4, 16)
        >>> keys, values = cache.append(0, k, 2 * k)
        >>> keys.shape, cache.lengths
        (torch.Size([3, 4, 16]), [3, 0])
        """
        raise NotImplementedError("lesson 2, task 1: Cache.append")


# %%
def some_kv(n: int, model: TinyModel) -> tuple[Tensor, Tensor]:
    return torch.randn(2, n, model.heads, model.head_dim).unbind(0)


def test_1_returns_everything_so_far() -> None:
    model = TinyModel()
    cache = Cache(model)
    (k1, v1), (k2, v2) = some_kv(3, model), some_kv(2, model)
    cache.append(1, k1, v1)
    keys, values = cache.append(1, k2, v2)
    assert torch.equal(keys, torch.cat([k1, k2]))
    assert torch.equal(values, torch.cat([v1, v2]))
    assert cache.lengths == [0, 5], "only layer 1 has grown"


def test_1_nothing_moves() -> None:
    model = TinyModel()
    cache = Cache(model)
    before = cache.keys.data_ptr()
    keys, _ = cache.append(0, *some_kv(4, model))
    assert cache.keys.data_ptr() == before, "the cache was allocated again: write into the tensor that is there"
    assert keys.data_ptr() == before, "the result is a copy: return a slice of the cache"


def test_1_what_does_not_fit_changes_nothing() -> None:
    model = TinyModel(longest=4)
    cache = Cache(model)
    cache.append(0, *some_kv(3, model))
    try:
        cache.append(0, *some_kv(2, model))
    except ValueError:
        assert cache.lengths[0] == 3
        assert cache.keys[0, 3:].isnan().all(), "something was written although it did not fit"
    else:
        raise AssertionError("5 tokens went into a cache for 4")


if __name__ == "__main__":
    test_1_returns_everything_so_far()
    test_1_nothing_moves()
    test_1_what_does_not_fit_changes_nothing()

# %% [markdown]
# ## Task 2: `generate`
#
# Now generate with it. The prompt goes through the model in one call; after that, each call brings one new
# token. `dense_attention` already does the right thing when there are more keys than queries: the queries are
# the *last* tokens of the text, and each sees the keys up to its own.
#
# The function that you pass as `attend` has two jobs: put `k` and `v` into the cache, and attend over
# everything that comes back. Mind `first_position`: the model must know where the new tokens stand.


# %%
def generate(model: TinyModel, prompt: list[int], count: int) -> list[int]:
    """The same tokens as generate_plainly, but each goes through the model once.

    >>> generate(TinyModel(), [3, 1, 4], 5) == generate_plainly(TinyModel(), [3, 1, 4], 5)
    True
    """
    raise NotImplementedError("lesson 2, task 2: generate")


# %%
def test_2_same_answer_as_without() -> None:
    for seed in range(5):
        model = TinyModel(seed=seed)
        prompt = text(7 + seed)
        assert generate(model, prompt, 20) == generate_plainly(model, prompt, 20)


def test_2_each_token_is_computed_once() -> None:
    model = TinyModel()
    generate(model, text(10), 20)
    assert model.tokens_computed == 10 + 20 - 1, (
        f"{model.tokens_computed} tokens went through the model; 10 of the prompt and 19 of the answer are needed "
        "(the last one is only written down)"
    )


def test_2_any_cut_of_the_prompt_gives_the_same_logits() -> None:
    """Not your function this time, but your cache: prompts may come in pieces. Lesson 7 will need that."""
    model, prompt = TinyModel(), text(24)
    whole = model(prompt, 0, lambda layer, q, k, v: dense_attention(q, k, v))
    for cut in (1, 5, 23):
        cache = Cache(model)
        model(prompt[:cut], 0, lambda layer, q, k, v, c=cache: dense_attention(q, *c.append(layer, k, v)))
        rest = model(prompt[cut:], cut, lambda layer, q, k, v, c=cache: dense_attention(q, *c.append(layer, k, v)))
        torch.testing.assert_close(rest, whole[cut:], rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
    test_2_same_answer_as_without()
    test_2_each_token_is_computed_once()
    test_2_any_cut_of_the_prompt_gives_the_same_logits()

# %% [markdown]
# ## Task 3: `kv_bytes_per_token`
#
# Time was bought with memory. How much? For each token the cache holds a key and a value, in each layer, for
# each **KV head**, `head_dim` numbers each. (A KV head is a head of keys and values. In our model there are
# as many as heads of queries; in many models several query heads share one, so there are fewer.)


# %%
def kv_bytes_per_token(layers: int, kv_heads: int, head_dim: int, bytes_per_number: int) -> int:
    """Bytes of KV cache that one token takes.

    >>> kv_bytes_per_token(layers=2, kv_heads=4, head_dim=16, bytes_per_number=2)
    512
    """
    raise NotImplementedError("lesson 2, task 3: kv_bytes_per_token")


# %%
def test_3_agrees_with_the_cache() -> None:
    model = TinyModel(layers=3, heads=2)
    cache = Cache(model)
    allocated = cache.keys.nbytes + cache.values.nbytes
    assert kv_bytes_per_token(3, 2, model.head_dim, 4) * model.longest == allocated


if __name__ == "__main__":
    test_3_agrees_with_the_cache()

# %% [markdown]
# ## What was won
#
# Three tables: what one more token costs, plain and cached; how many tokens went through the model in all;
# and the price, which is memory. The last one is for models of real shapes.

# %%
SHAPES = {  # layers, KV heads, head dimension: from the models' published configurations
    "Llama 7B": (32, 32, 128),
    "Llama 13B": (40, 40, 128),
    "Llama 3 8B (8 KV heads)": (32, 8, 128),
    "SmolLM2 135M (3 KV heads)": (30, 3, 64),
}


def what_was_won() -> None:
    model = TinyModel(width=128, layers=4, longest=1024)
    print("one more token behind …     plain      cached")
    for length in (64, 128, 256, 512):
        prompt, cache = text(length), Cache(model)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, cache: Cache = cache, n: int = length) -> Tensor:
            cache.lengths[layer] = min(cache.lengths[layer], n)  # forget the step of the run before
            return dense_attention(q, *cache.append(layer, k, v))

        model(prompt, 0, attend)
        plain = seconds(generate_plainly, model, prompt, 1)
        cached = seconds(model, [1], length, attend)
        print(f"{length:>13} tokens {1e3 * plain:10.2f} ms {1e3 * cached:7.2f} ms")
    print("\ntokens computed to answer a prompt of 32:")
    for count in (32, 128, 256):
        model, counts = TinyModel(), []
        for way in (generate_plainly, generate):
            model.tokens_computed = 0
            way(model, text(32), count)
            counts.append(model.tokens_computed)
        print(f"{count:>13} tokens {counts[0]:10,} plain {counts[1]:7,} cached")
    print("\nKV cache of one token, and of a text of 2,048, in 16-bit numbers:")
    for name, shape in SHAPES.items():
        each = kv_bytes_per_token(*shape, 2)
        print(f"{name:>26} {each:10,} bytes {2_048 * each / 2**20:8,.0f} MiB")


if __name__ == "__main__":
    what_was_won()

# %% [markdown]
# The last table is why the rest of this course exists: that much for one text of a few pages, and a server
# has many at once. And our `Cache` makes the mistake of lesson 1: it allocates `longest` slots for a text
# that may end after ten.
#
# ## What real engines do
#
# - **Hugging Face transformers** grows its default `DynamicCache` by concatenation at every step: it never
#   holds more than it needs, but each step copies all that is there
#   ([`cache_utils.py`](https://github.com/huggingface/transformers/blob/main/src/transformers/cache_utils.py)).
#   Its `StaticCache` is what you wrote.
# - **Fewer KV heads** are the other way to save. In grouped-query attention several query heads share one KV
#   head (Ainslie et al. 2023, [arXiv 2305.13245](https://arxiv.org/abs/2305.13245)). Look at Llama 3 in the
#   table.
# - The quadratic and the linear way compute the same numbers, but sum them in another order. So logits agree
#   up to rounding, not bit for bit; engines are tested with a tolerance, as the last test of task 2 is.
#
# ## Where this lives in minipaged
#
# - `minipaged/execution/eager.py`: `TorchRunner` passes such a function to the model.
# - `minipaged/execution/paged_kv.py`: `PagedKV` holds the tensors, in blocks instead of one long row; the
#   function calls its `write` and `attend`.
# - `kernels/cache/cache_write.py`: `write_kv` puts new keys and values in their slots.
# - `minipaged/config.py`: `ModelConfig.kv_bytes_per_token` is task 3.
