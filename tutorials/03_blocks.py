# %% [markdown]
# # 3. Blocks
#
# *30 minutes. You need lesson 1. You meet Hypothesis here; knowing it is not required.*
#
# ## Why
#
# Lesson 1 ended with a surprise: even a server that knows the future wastes much of its memory. One reason is
# holes. Stretches of unequal length come and go, and what is free ends up in pieces that are each too short.
# Operating systems had this problem in the 1960s, and their answer was **paging**: cut memory into pieces of
# one size. Then every piece fits every need.
#
# ```
#  stretches    AAAAAAA·····BBBB···CCCCCCC·DDD······      12 tokens for E? 15 slots are free, but never 12 in a row
#
#  blocks of 4  A C · B A · D C ·                         the same tokens, the same 36 slots, three blocks free
#               A C E B A E D C E                         12 tokens for E? any three blocks will do
# ```
#
# A block holds the keys and values of a fixed number of tokens, often 16. What keeps track of the blocks is
# the **block pool**: a list of free blocks, and no more. It knows nothing of sequences, tokens or tensors. It
# must only never lie. A block that is lost makes the server smaller until somebody restarts it. A block that
# is handed out twice makes one user read another user's text.
#
# One convention before you start: **block 0 is never handed out**. It is the *null block*. Tables are padded
# with zeros, and a zero must point at something harmless.
#
# ## The pain
#
# Fill a pool with stretches, free every second one, and then ask for a longer one.

# %%
from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable
from typing import Literal

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st


def the_pain() -> None:
    rng, at, stretches = random.Random(1), 0, list[tuple[int, int]]()
    while at + (length := rng.randint(50, 600)) <= 16_000:
        stretches.append((at, length))
        at += length
    freed = stretches[::2]
    longest = max(length for _, length in freed)
    print(f"free: {sum(length for _, length in freed):,} of {at:,} slots")
    print(f"a request for {longest + 1:,} slots: does not fit, the longest hole has {longest:,}\n")


if __name__ == "__main__":
    the_pain()

# %% [markdown]
# ## Task 1: `BlockPool.allocate`
#
# Take a block from the front of `free_blocks`, note it in `held`, return its number. If there is none, raise
# `OutOfBlocks` and change nothing.
#
# ```console
# $ python 03_blocks.py
# NotImplementedError: lesson 3, task 1: BlockPool.allocate
# ```
#
# ## Task 2: `BlockPool.free`
#
# Put a block back at the end of `free_blocks`. If it is not held (it is free already, or never existed),
# raise `ValueError`. Do not be kind: a double free that is quietly ignored hides a bug somewhere else, and
# the next one will not be so lucky.
#
# Both must cost the same however large the pool is, so no searching through the list.


# %%
class OutOfBlocks(Exception):  # noqa: N818
    """No block is free."""


class BlockPool:
    """Blocks 1 .. num_blocks - 1, each either free or held. Block 0 is the null block."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.free_blocks = deque(range(1, num_blocks))
        self.held: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self.free_blocks)

    def allocate(self) -> int:
        """A block that nobody holds. OutOfBlocks if there is none.

        >>> pool = BlockPool(4)
        >>> pool.allocate(), pool.allocate(), pool.num_free
        (1, 2, 1)
        """
        raise NotImplementedError("lesson 3, task 1: BlockPool.allocate")

    def free(self, block: int) -> None:
        """Give a block back. ValueError if nobody holds it.

        >>> pool = BlockPool(4)
        >>> pool.free(pool.allocate())
        >>> list(pool.free_blocks)
        [2, 3, 1]
        """
        raise NotImplementedError("lesson 3, task 2: BlockPool.free")


# %%
def test_1_hands_out_each_block_once() -> None:
    pool = BlockPool(5)
    assert [pool.allocate() for _ in range(4)] == [1, 2, 3, 4]
    assert pool.num_free == 0
    assert pool.held == {1, 2, 3, 4}


def test_1_says_when_it_is_empty() -> None:
    pool = BlockPool(2)
    pool.allocate()
    for _ in range(2):
        try:
            pool.allocate()
        except OutOfBlocks:
            assert pool.held == {1}, "a failed call must change nothing"
        else:
            raise AssertionError("the pool was empty, and still handed something out")


def test_2_a_block_comes_back() -> None:
    pool = BlockPool(4)
    blocks = [pool.allocate() for _ in range(3)]
    pool.free(blocks[1])
    assert pool.num_free == 1
    assert pool.allocate() == blocks[1]


def test_2_refuses_what_is_not_held() -> None:
    pool = BlockPool(4)
    block = pool.allocate()
    pool.free(block)
    for wrong in (block, 3, 0, 4, -1):
        try:
            pool.free(wrong)
        except ValueError:
            assert pool.num_free == 3, "a refused call must change nothing"
        else:
            raise AssertionError(f"free({wrong}) was accepted, but nobody holds it")


def test_2_costs_the_same_in_a_large_pool() -> None:
    small, large = seconds_per_block(1_000), seconds_per_block(300_000)
    assert large < 20 * small, (
        f"a block costs {1e9 * small:.0f} ns in a small pool, {1e9 * large:.0f} ns in a large one"
    )


def seconds_per_block(num_blocks: int, count: int = 500) -> float:
    """Seconds for one allocate and one free."""
    pool, best = BlockPool(num_blocks), float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for block in [pool.allocate() for _ in range(count)]:
            pool.free(block)
        best = min(best, time.perf_counter() - start)
    return best / count


if __name__ == "__main__":
    test_1_hands_out_each_block_once()
    test_1_says_when_it_is_empty()
    test_2_a_block_comes_back()
    test_2_refuses_what_is_not_held()
    test_2_costs_the_same_in_a_large_pool()

# %% [markdown]
# ## Task 3: `law`
#
# The tests above are examples: five calls that somebody thought of. The bugs in allocators live in the
# sequences that nobody thought of. So now you write down what must *always* be true, and let a machine search
# for a sequence that breaks it.
#
# The machine is Hypothesis. It makes up lists of operations and calls your `law` with a new pool for each
# list. An operation is either `"allocate"`, or a number: the block to free. That number may be a held block,
# a free one, the null block, or one that does not exist; whoever calls a pool may be mistaken.
#
# Your `law` performs the operations one after another and raises `AssertionError` as soon as the pool lies.
# To know that it lies, keep your own record of what is held. Of the pool you may ask `num_blocks` (how many
# there are, the null block included), `num_free` (how many it says are free), and the two methods; what else
# it says about itself may be part of the lie. In words:
#
# - nothing handed out twice: a new block is not held already;
# - nothing invented: it is a block of this pool, and not the null block;
# - nothing lost: after each operation, what you hold and `num_free` are together all blocks but the null
#   block, and the pool refuses only when all are held;
# - nothing forgiven: freeing raises `ValueError` exactly when the block is not held.
#
# A correct pool raises `OutOfBlocks` or `ValueError` when it must, so your law has to catch both, and must
# decide whether they were right.
#
# How good is your law? Below it stand nine pools, each with one bug. The test counts how many of them your
# law finds. You pass with six; nine is possible. **Do not read the bugs yet.**

# %%
Operation = Literal["allocate"] | int


def law(pool: BlockPool, operations: list[Operation]) -> None:
    """Perform the operations; AssertionError if the pool hands out something twice, loses, invents or forgives something.

    >>> law(BlockPool(4), ["allocate", 1, "allocate"])  # nothing to complain about: it returns nothing
    """
    raise NotImplementedError("lesson 3, task 3: law")


# %% [markdown]
# The judge. `broken_by` lets Hypothesis search, and returns the shortest list of operations it could find
# that makes `law` fail, or `None`. Making a failing list shorter and shorter while it still fails is called
# **shrinking**; it is the reason why one wants such a machine.

# %%
SIZE = 4  # blocks, the null block among them: small pools find bugs fast, since everything happens soon
operation_lists = st.lists(st.one_of(st.just("allocate"), st.integers(0, SIZE)), max_size=14)


def broken_by(make_pool: Callable[[int], BlockPool], *, shrink: bool = False) -> list[Operation] | None:
    phases = [Phase.generate, Phase.shrink] if shrink else [Phase.generate]
    failing: list[list[Operation]] = []

    @settings(
        max_examples=400,
        derandomize=True,
        database=None,
        deadline=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
    )
    @given(operation_lists)
    def search(operations: list[Operation]) -> None:
        try:
            law(make_pool(SIZE), operations)
        except NotImplementedError:
            raise
        except Exception:
            failing.append(operations)
            raise

    try:
        search()
    except NotImplementedError:
        raise
    except Exception:
        return failing[-1]
    return None


def in_words(operations: list[Operation]) -> str:
    return ", ".join("allocate" if step == "allocate" else f"free({step})" for step in operations) or "nothing at all"


# %%
def test_3_your_own_pool_obeys_the_law() -> None:
    broken = broken_by(BlockPool, shrink=True)
    if broken is not None:
        try:
            law(BlockPool(SIZE), broken)
        except Exception as error:
            raise AssertionError(
                f"your own pool passed its tests, but your law complains after: {in_words(broken)}\n"
                f"it raised {type(error).__name__}: {error}"
            ) from error


def test_3_the_law_finds_bugs() -> None:
    escaped = [bug.__doc__ for bug in BUGS if broken_by(bug) is None]
    found = len(BUGS) - len(escaped)
    grade = f"your law finds {found} of {len(BUGS)} bugs" + "".join(f"\n  not found: {bug}" for bug in escaped)
    assert found >= 6, grade
    print(grade)


# %% [markdown]
# ## The nine bugs
#
# Each is a few lines around your own pool. Bugs of these kinds have been found in real allocators. Read on
# only when your law is written.


# %%
class Generous(BlockPool):
    """the generous pool: what it hands out stays on its list"""

    def allocate(self) -> int:
        block = super().allocate()
        super().free(block)
        return block


class Forgetful(BlockPool):
    """the forgetful pool: every third block that comes back is lost"""

    count = 0

    def free(self, block: int) -> None:
        super().free(block)
        self.count += 1
        if self.count % 3 == 0:
            self.free_blocks.remove(block)


class Forgiving(BlockPool):
    """the forgiving pool: a wrong free is quietly ignored"""

    def free(self, block: int) -> None:
        if block in self.held:
            super().free(block)


class Trusting(BlockPool):
    """the trusting pool: a block that is freed twice is on the list twice"""

    def free(self, block: int) -> None:
        if block in self.held:
            super().free(block)
        elif block in self.free_blocks:
            self.free_blocks.append(block)
        else:
            raise ValueError(block)


class Nullable(BlockPool):
    """the pool without a taboo: it hands out the null block when nothing else is left"""

    def allocate(self) -> int:
        if not self.free_blocks and 0 not in self.held:
            self.held.add(0)
            return 0
        return super().allocate()


class Oversized(BlockPool):
    """the pool that counts from one: its last block lies behind the end"""

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        self.free_blocks = deque(range(2, num_blocks + 1))


class Stingy(BlockPool):
    """the stingy pool: it keeps the last block for itself"""

    def allocate(self) -> int:
        if len(self.free_blocks) == 1:
            raise OutOfBlocks
        return super().allocate()


class Desperate(BlockPool):
    """the desperate pool: when it is empty, somebody else's block must do"""

    def allocate(self) -> int:
        return super().allocate() if self.free_blocks else min(self.held)


class Flattering(BlockPool):
    """the flattering pool: it says that it has more than it has"""

    @property
    def num_free(self) -> int:
        return max(1, len(self.free_blocks))


BUGS: list[type[BlockPool]] = [
    Generous,
    Forgetful,
    Forgiving,
    Trusting,
    Nullable,
    Oversized,
    Stingy,
    Desperate,
    Flattering,
]

if __name__ == "__main__":
    test_3_your_own_pool_obeys_the_law()
    test_3_the_law_finds_bugs()

# %% [markdown]
# ## What was won
#
# First your law's mark, and the shortest story that Hypothesis could find for each bug. Read a few: each is a
# bug report that a colleague could act on. Then the price of a block, which must not depend on how many there
# are; and the holes, which are gone.


# %%
def what_was_won() -> None:
    stories = {bug.__doc__: broken_by(bug, shrink=True) for bug in BUGS}
    found = {name: story for name, story in stories.items() if story is not None}
    print(f"your law finds {len(found)} of {len(BUGS)} bugs:")
    for name, story in found.items():
        print(f"  {name}\n      {in_words(story)}")
    for name in stories.keys() - found.keys():
        print(f"  NOT FOUND: {name}")
    for num_blocks in (1_000, 1_000_000):
        print(f"one allocate and free in a pool of {num_blocks:>9,}: {1e9 * seconds_per_block(num_blocks):6.0f} ns")
    pool = BlockPool(1_001)
    blocks = [pool.allocate() for _ in range(1_000)]
    for block in blocks[::2]:
        pool.free(block)
    got = sum(1 for _ in range(pool.num_free) if pool.allocate())
    print(f"every second block of 1,000 freed, then one request for all that is free: it gets {got}")


if __name__ == "__main__":
    what_was_won()

# %% [markdown]
# ## What real engines do
#
# - **vLLM** keeps its free blocks in a doubly linked list, so that a block in the middle can be taken out in
#   one step when the prefix cache finds it useful after all
#   ([`FreeKVCacheBlockQueue`](https://github.com/vllm-project/vllm/blob/main/vllm/v1/core/kv_cache_utils.py)).
#   Lesson 10 will show why one wants that.
# - **SGLang** hands out single tokens' slots by default, a block of one
#   ([`mem_cache`](https://github.com/sgl-project/sglang/tree/main/python/sglang/srt/mem_cache)).
# - **Linux** and every other operating system with paging has the same list, of page frames.
# - **Hypothesis** shrinks as you saw; its stateful tests (`RuleBasedStateMachine`) are the grown-up form of
#   your list of operations ([documentation](https://hypothesis.readthedocs.io/en/latest/stateful.html)).
#
# ## Where this lives in minipaged
#
# - `minipaged/memory/blocks.py`: `BlockPool.take` and `BlockPool.drop` are your two methods, with a count
#   of holders in place of the set (lesson 8).
# - `minipaged/memory/blocks.py`: `FreeList`, the list itself.
# - `minipaged/memory/types.py`: `NULL_BLOCK`.
# - `minipaged/laws.py`: `LAWS`, what you wrote as a function, written as sentences.
# - `tests/laws`: the tests that hold minipaged to them, as yours held the pool.
