# %% [markdown]
# # 10. Prefix cache
#
# *40 minutes. You need lessons 4 and 8.*
#
# ## Why
#
# Every request to a chat service begins with the same page of instructions. Every turn of a conversation
# begins with all turns before it. The keys and values of these tokens have been computed, a minute ago, for
# somebody else; the blocks may still lie in the pool. All we need is a way to **find a block by its
# content**.
#
# Which content? Not only the block's own tokens. A key or a value depends on everything before it: "on the
# mat" behind "the cat sat" and behind "the rug lay" have different ones. So the name of a block must cover
# the whole text up to its end. A **chain** of hashes does it cheaply: each block's key is a hash of the key
# before and its own tokens.
#
# ```
#  tokens     the cat sat on │ the mat and it │ slept
#  key        h(∅, ────────) │ h( ↑ , ──────) │          only full blocks have keys: the last one will still change
#                   k0       │       k1       │
# ```
#
# A new prompt computes its keys and looks them up, from the left, until the first miss. What was found, it
# shares: one holder more, as in a fork. It starts to compute behind it.
#
# And when a request ends? Its blocks become free **and stay findable**. Free memory is no use to anybody, so
# it may as well remember. Only when a block is needed for something else is its content forgotten: that is
# eviction. What goes is the block that has been free for longest, the least recently used.
#
# ## The pain
#
# Five questions to an assistant with long instructions. We measure the time to the first token of each: all
# of the prompt must go through the model before there is one.

# %%
from __future__ import annotations

import hashlib
import random
import time
from array import array
from collections import OrderedDict

import torch
from torch import Tensor

from minipaged.learn.tiny_model import TinyModel, dense_attention

torch.set_num_threads(1)
BLOCK = 16
DOLLARS_PER_HOUR = 2.0  # for one GPU: an example, chosen on 2026-11-28; put in what you pay


class PagedCache:
    """Keys and values of a tiny model in blocks, and an `attend` over them (lesson 5, task 1)."""

    def __init__(self, model: TinyModel, num_blocks: int) -> None:
        shape = (2, num_blocks, BLOCK, model.heads, model.head_dim)
        self.model, self.layers = model, [torch.full(shape, float("nan")) for _ in range(model.layers)]

    def first_token(self, prompt: list[int], table: list[int], cached: int) -> int:
        """Compute the prompt from position `cached` on; the blocks before hold its beginning already."""
        where = torch.tensor(table)
        positions = torch.arange(cached, len(prompt))
        slots = where[positions // BLOCK] * BLOCK + positions % BLOCK

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache = self.layers[layer]
            cache.view(2, -1, *k.shape[1:])[:, slots] = torch.stack([k, v])
            keys, values = cache[:, where].flatten(1, 2)[:, : len(prompt)]
            return dense_attention(q, keys, values)

        return int(self.model(prompt[cached:], cached, attend)[-1].argmax())


def questions(count: int, instructions: int = 500, question: int = 20) -> list[list[int]]:
    rng = random.Random(0)
    start = [rng.randrange(64) for _ in range(instructions)]
    return [start + [rng.randrange(64) for _ in range(question)] for _ in range(count)]


def the_pain() -> None:
    cache = PagedCache(TinyModel(width=192, heads=6, layers=4, longest=1024), num_blocks=100)
    print("time to the first token, everything computed each time:")
    for number, prompt in enumerate(questions(5), 1):
        start = time.perf_counter()
        cache.first_token(prompt, list(range(1, 1 + -(-len(prompt) // BLOCK))), cached=0)
        print(f"  question {number}: {1e3 * (time.perf_counter() - start):7.1f} ms for {len(prompt)} tokens")
    print()


if __name__ == "__main__":
    the_pain()

# %% [markdown]
# ## Task 1: `keys`
#
# The keys of a text's full blocks. Every key is the digest of the key before it, followed by the block's own
# tokens as bytes (bytes are joined with `+`). The first block has no key before it: take 32 zero bytes,
# `bytes(32)`. `digest` and `as_bytes` are given.
#
# Why cryptographic? If two texts had the same key, one user would be answered from another's text. Python's
# `hash` is short and predictable, so such texts can be searched for. A real engine had this hole
# (CVE-2025-25183, below).
#
# ```console
# $ python 10_prefix_cache.py
# NotImplementedError: lesson 10, task 1: keys
# ```


# %%
def digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def as_bytes(tokens: list[int]) -> bytes:
    """Four bytes a token: with digits, [1, 23] and [12, 3] would look the same."""
    return array("I", tokens).tobytes()


def keys(tokens: list[int], block_size: int) -> list[bytes]:
    """One key for each full block of the text; it covers the block and all that came before.

    >>> first, second = keys([1, 2, 3, 4, 5], block_size=2)  # the 5 stands in a block that is not full
    >>> second == digest(first + as_bytes([3, 4]))
    True
    """
    raise NotImplementedError("lesson 10, task 1: keys")


# %%
def test_1_only_full_blocks_have_keys() -> None:
    assert [len(keys(list(range(n)), 4)) for n in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]
    assert all(isinstance(key, bytes) and len(key) >= 16 for key in keys(list(range(8)), 4)), (
        "a digest, not Python's hash()"
    )


def test_1_a_key_covers_all_that_came_before() -> None:
    one, other = keys([1, 2, 3, 4, 5, 6, 7, 8], 4), keys([1, 2, 3, 9, 5, 6, 7, 8], 4)
    assert one == keys([1, 2, 3, 4, 5, 6, 7, 8, 9], 4), "the same text has the same keys"
    assert one[0] != other[0]
    assert one[1] != other[1], "5 6 7 8 behind another beginning has other keys and values"
    assert keys([5, 6, 7, 8], 4)[0] != one[1]
    assert keys([1, 2, 1, 2], 2)[0] != keys([1, 2, 1, 2], 2)[1], "the same tokens, later in the text"


def test_1_tokens_do_not_run_together() -> None:
    assert keys([1, 23], 2) != keys([12, 3], 2)


if __name__ == "__main__":
    test_1_only_full_blocks_have_keys()
    test_1_a_key_covers_all_that_came_before()
    test_1_tokens_do_not_run_together()

# %% [markdown]
# ## The cache
#
# The class below has four parts. `start` and `publish` are given; read them, they show how the rest is used.
# `free_blocks` is an ordered dictionary: its front is the block that has been free for longest, and a block
# in the middle can be removed at once.
#
# ## Task 2: `PrefixCache.match`
#
# The blocks that hold the longest known beginning of a text. From the left, until the first miss: a block
# behind a miss is of no use, even if it is there. And one rule that everybody forgets: **never all of the
# text**. The first new token is chosen by the logits of the last prompt token, and logits are not cached. At
# least one token must be left to compute.
#
# ## Task 3: `PrefixCache.take`
#
# Hand out the block that has been free for longest (`free_blocks.popitem(last=False)` takes from the front)
# and count one holder; `OutOfBlocks` if there is none. If the block could still be found by a key, it no
# longer can: erase its entries in `block_of` and `key_of`, and count it in `evicted`. Forget this, and some
# later request will find a block full of something else. That is the worst bug of this lesson, since nothing
# crashes.
#
# ## Task 4: `PrefixCache.finish`
#
# A request ends: each of its blocks loses a holder, and those without any become free. In which order? The
# first block of a text is worth more than the last one: without it, the others cannot be found. So the last
# block should be evicted first, and must stand nearer to the front.


# %%
class OutOfBlocks(Exception):  # noqa: N818
    """No block is free."""


class PrefixCache:
    """Blocks 1 .. num_blocks - 1, shared by content. A free block can be found until it is handed out for something else."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self.free_blocks = OrderedDict.fromkeys(
            range(1, num_blocks)
        )  # the one that has been free for longest comes first
        self.ref_counts = [0] * num_blocks
        self.block_of: dict[bytes, int] = {}  # key -> block
        self.key_of: dict[int, bytes] = {}  # block -> key
        self.evicted = 0

    def start(self, tokens: list[int]) -> tuple[list[int], int]:
        """A table for a new request, and how many leading tokens are there already. OutOfBlocks, and nothing changed, if none fits."""
        hits = self.match(tokens)
        missing = -(-len(tokens) // self.block_size) - len(hits)
        free_hits = sum(self.ref_counts[block] == 0 for block in hits)
        if missing > len(self.free_blocks) - free_hits:  # what is found must not be counted as room for the rest
            raise OutOfBlocks
        for block in hits:  # hold all that was found before anything is taken: or the rest might evict it
            if self.ref_counts[block] == 0:
                del self.free_blocks[block]
            self.ref_counts[block] += 1
        return hits + [self.take() for _ in range(missing)], len(hits) * self.block_size

    def publish(self, tokens: list[int], table: list[int]) -> None:
        """The text is computed: its full blocks can be found from now on. Where the content is known already, the older block stays."""
        for key, block in zip(keys(tokens, self.block_size), table, strict=False):
            if key not in self.block_of and block not in self.key_of:
                self.block_of[key], self.key_of[block] = block, key

    def match(self, tokens: list[int]) -> list[int]:
        """Blocks of the longest known beginning; at least one token is left over.

        >>> cache = PrefixCache(num_blocks=10, block_size=2)
        >>> cache.block_of[keys([1, 2], 2)[0]] = 7  # block 7 holds the text 1, 2
        >>> cache.match([1, 2, 3]), cache.match([1, 9, 3]), cache.match([1, 2])
        ([7], [], [])
        """
        raise NotImplementedError("lesson 10, task 2: PrefixCache.match")

    def take(self) -> int:
        """The block that has been free for longest, held once from now on; what it held can no longer be found.

        OutOfBlocks if there is none.

        >>> cache = PrefixCache(num_blocks=3, block_size=2)
        >>> cache.take(), cache.take(), list(cache.free_blocks), cache.ref_counts
        (1, 2, [], [0, 1, 1])
        """
        raise NotImplementedError("lesson 10, task 3: PrefixCache.take")

    def finish(self, table: list[int]) -> None:
        """A request ends. Its last block is the first to be evicted.

        >>> cache = PrefixCache(num_blocks=4, block_size=2)
        >>> table = [cache.take(), cache.take()]
        >>> cache.finish(table)
        >>> list(cache.free_blocks), cache.ref_counts
        ([3, 2, 1], [0, 0, 0, 0])
        """
        raise NotImplementedError("lesson 10, task 4: PrefixCache.finish")


# %%
def remember(cache: PrefixCache, tokens: list[int], table: list[int]) -> None:
    """Put a finished text into the cache by hand."""
    for key, block in zip(keys(tokens, cache.block_size), table, strict=False):
        cache.block_of[key], cache.key_of[block] = block, key


def test_2_finds_the_longest_known_beginning() -> None:
    cache = PrefixCache(10, 4)
    remember(cache, list(range(12)), [7, 3, 5])
    assert cache.match([*range(12), 99]) == [7, 3, 5]
    assert cache.match([*range(8), 50, 51, 52, 53, 54]) == [7, 3]
    assert cache.match([99, *range(12)]) == []


def test_2_a_full_hit_leaves_a_token_to_compute() -> None:
    cache = PrefixCache(10, 4)
    remember(cache, list(range(12)), [7, 3, 5])
    assert cache.match(list(range(12))) == [7, 3], "12 tokens, 12 known: the last block must be computed again"
    assert cache.match(list(range(9))) == [7, 3]
    assert cache.match([]) == []


def test_2_the_first_miss_ends_it() -> None:
    cache = PrefixCache(10, 4)
    remember(cache, list(range(12)), [7, 3, 5])
    del cache.block_of[cache.key_of.pop(3)]
    assert cache.match(list(range(13))) == [7], "block 5 is there, but not the one before it"


def test_3_the_longest_free_goes_first() -> None:
    cache = PrefixCache(4, 4)
    assert [cache.take() for _ in range(3)] == [1, 2, 3]
    assert cache.ref_counts[1:] == [1, 1, 1]
    try:
        cache.take()
    except OutOfBlocks:
        pass
    else:
        raise AssertionError("there was nothing left to take")


def test_3_what_is_handed_out_cannot_be_found() -> None:
    cache = PrefixCache(4, 4)
    remember(cache, list(range(8)), [1, 2])
    assert cache.take() == 1
    assert 1 not in cache.key_of
    assert list(cache.block_of.values()) == [2]
    assert cache.match(list(range(9))) == []
    assert cache.evicted == 1


def test_4_the_end_of_a_text_is_forgotten_before_its_beginning() -> None:
    cache = PrefixCache(4, 4)
    text = list(range(12))
    table, _ = cache.start(text)
    cache.publish(text, table)
    cache.finish(table)
    for left in (2, 1, 0):
        cache.take()
        assert len(cache.match([*text, 99])) == left, "the beginning went before the end"


def test_4_shared_blocks_stay_until_the_last_holder_leaves() -> None:
    cache = PrefixCache(8, 4)
    text = list(range(9))
    one, _ = cache.start(text)
    cache.publish(text, one)
    two, cached = cache.start(text)
    assert cached == 8
    assert two[:2] == one[:2]
    cache.finish(one)
    assert not set(two) & set(cache.free_blocks)
    cache.finish(two)
    assert len(cache.free_blocks) == 7
    assert cache.ref_counts == [0] * 8


def test_4_a_hit_makes_a_text_recent_again() -> None:
    cache = PrefixCache(5, 2)
    for text in ([1, 1, 0], [2, 2, 0]):
        table, _ = cache.start(text)
        cache.publish(text, table)
        cache.finish(table)
    table, cached = cache.start([1, 1, 5])
    assert cached == 2
    cache.finish(table)
    cache.start([3, 3, 3, 3, 3])
    assert cache.match([1, 1, 9]), "the text that was used last has been forgotten first"


def test_4_a_hit_is_never_a_lie() -> None:
    """Random texts over a small alphabet, so that many begin alike. Each block knows which text it holds; every hit must hold its own."""
    for seed in range(60):
        rng = random.Random(seed)
        cache, running = PrefixCache(rng.randint(6, 16), 2), list[tuple[list[int], list[int]]]()
        holds: dict[int, tuple[int, ...]] = {}
        for _ in range(120):
            if running and rng.random() < 0.5:
                _, table = running.pop(rng.randrange(len(running)))
                cache.finish(table)
            else:
                text = [rng.randrange(2) for _ in range(rng.randint(1, 9))]
                try:
                    table, cached = cache.start(text)
                except OutOfBlocks:
                    continue
                for i, block in enumerate(table):
                    beginning = tuple(text[: 2 * i + 2])
                    if 2 * i < cached:
                        assert holds[block] == beginning, (
                            f"block {block} holds {holds[block]}, not {beginning} (seed {seed})"
                        )
                    holds[block] = beginning
                cache.publish(text, table)
                running.append((text, table))
            held = [block for _, table in running for block in table]
            for block in range(1, cache.num_blocks):
                assert cache.ref_counts[block] == held.count(block)
                assert (block in cache.free_blocks) == (block not in held)


if __name__ == "__main__":
    test_2_finds_the_longest_known_beginning()
    test_2_a_full_hit_leaves_a_token_to_compute()
    test_2_the_first_miss_ends_it()
    test_3_the_longest_free_goes_first()
    test_3_what_is_handed_out_cannot_be_found()
    test_4_the_end_of_a_text_is_forgotten_before_its_beginning()
    test_4_shared_blocks_stay_until_the_last_holder_leaves()
    test_4_a_hit_makes_a_text_recent_again()
    test_4_a_hit_is_never_a_lie()

# %% [markdown]
# ## What was won
#
# The same five questions through your cache, with the same first tokens as before. Then a small pool and many
# different conversations, to see the price of forgetting; and what a block's key costs.
#
# Below the questions stand the blocks that were computed, the seconds measured here, and what a million such
# rounds would cost on a machine of this speed. The price of an hour, `DOLLARS_PER_HOUR` at the top of the file,
# is an example of 2026-11-28 and not an offer: write your own there.


# %%
def what_was_won() -> None:
    model = TinyModel(width=192, heads=6, layers=4, longest=1024)
    memory, cache = PagedCache(model, num_blocks=100), PrefixCache(100, BLOCK)
    print("            without     with   found in the cache")
    blocks, seconds = [0, 0], [0.0, 0.0]  # without, with
    for number, prompt in enumerate(questions(5), 1):
        table, cached = cache.start(prompt)
        start = time.perf_counter()
        token = memory.first_token(prompt, table, cached)
        with_cache = time.perf_counter() - start
        cache.publish(prompt, table)
        cache.finish(table)
        start = time.perf_counter()
        again = PagedCache(model, num_blocks=100).first_token(prompt, list(range(1, 1 + len(table))), cached=0)
        without = time.perf_counter() - start
        assert token == again, "a cache must not change the answer"
        print(f"question {number} {1e3 * without:8.1f} {1e3 * with_cache:8.1f} ms   {cached} of {len(prompt)} tokens")
        blocks = [blocks[0] + len(table), blocks[1] + len(table) - cached // BLOCK]
        seconds = [seconds[0] + without, seconds[1] + with_cache]
    print(f"\n           blocks computed   seconds   dollars for a million rounds, at {DOLLARS_PER_HOUR:.2f} an hour")
    for name, count, taken in zip(("without", "with"), blocks, seconds, strict=True):
        print(f"{name:<10}{count:>16}{taken:>10.3f}{1e6 * taken * DOLLARS_PER_HOUR / 3_600:>10,.0f}")
    print("\n30 conversations take turns at random, each turn adds 40 tokens:")
    for num_blocks in (50, 200, 800):
        rng, cache = random.Random(1), PrefixCache(num_blocks, BLOCK)
        texts, found, asked = [[i] * 100 for i in range(30)], 0, 0
        for _ in range(200):
            who = rng.randrange(30)
            texts[who] = (texts[who] + [rng.randrange(64) for _ in range(40)])[: (num_blocks - 2) * BLOCK]
            table, cached = cache.start(texts[who])
            cache.publish(texts[who], table)
            cache.finish(table)
            found, asked = found + cached, asked + len(texts[who])
        print(
            f"  pool of {num_blocks:>3} blocks: {found / asked:6.1%} of the tokens found, {cache.evicted:>5,} blocks forgotten"
        )
    text = [5] * 8_192
    start = time.perf_counter()
    count = len(keys(text, BLOCK))
    print(
        f"\nkeys of a text of {len(text):,} tokens: {1e6 * (time.perf_counter() - start) / count:.2f} microseconds a block"
    )


if __name__ == "__main__":
    what_was_won()

# %% [markdown]
# ## What real engines do
#
# - **vLLM** chains hashes as you do, block by block, and keeps free blocks findable in the same queue from
#   which it evicts ([design](https://docs.vllm.ai/en/latest/design/prefix_caching.html)). It began with
#   Python's `hash`. With Python 3.12 the chain's first value became a known constant, and collisions could be
#   prepared ([CVE-2025-25183](https://nvd.nist.gov/vuln/detail/CVE-2025-25183)).
# - **SGLang** keeps a radix tree of texts instead of a table of hashes; with blocks of one token it shares up
#   to the very token where two texts part, and it sees at once which requests have most in common (Zheng et
#   al. 2023, [arXiv 2312.07104](https://arxiv.org/abs/2312.07104)).
# - A cache hit is faster than a miss, and that can be measured from outside: a curious user can find out what
#   others have asked. So services put a **salt**, one for each customer, into the first key.
# - Providers of language models sell this by the token: look for "cached input" on their price lists.
#
# ## Where this lives in minipaged
#
# - `minipaged/memory/blocks.py`: `next_key` is one link of task 1, `PrefixHit.find` is task 2,
#   `root_key` takes the salt.
# - `minipaged/memory/blocks.py`: `BlockPool.take` is task 3.
# - `minipaged/memory/block_manager.py`: `BlockManager.allocate` is your start, with the same order: hold what
#   was found, then take.
# - `minipaged/memory/block_manager.py`: `BlockManager.mark_computed` publishes, and never before the block is
#   written.
# - `minipaged/laws.py`: `LAWS`, laws L21 to L36.
