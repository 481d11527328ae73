# %% [markdown]
# # 8. Fork and copy-on-write
#
# *35 minutes. You need lessons 4 and 6.*
#
# ## Why
#
# "Give me four versions of this text." Four answers, one prompt. The keys and values of the prompt are the
# same for all four: they depend on the prompt alone. Yet a server with one stretch of memory for each
# sequence must store them four times.
#
# With block tables it need not. A table is a list of block numbers, and nothing forbids two tables to name
# the same block:
#
# ```
#  A   [ 7, 8, 31 ]                         block  7   8   31
#  B   [ 7, 8, 31 ]     a fork of A         count  2   2    2        nothing was copied
# ```
#
# That is a **fork**. It costs a short list. Each block gets a **reference count**: how many tables name it.
# It is free when the count is 0, no sooner.
#
# The trouble begins when B writes. Its next token belongs into the half-filled block 31, which is A's as
# well. If B wrote there, A would read B's words. So at that moment, and only then, B gets a copy of its own:
#
# ```
#  B writes:  31 has count 2, so not in place.  Take 55, copy 31 → 55, B's entry now says 55.
#
#  A   [ 7, 8, 31 ]                         block  7   8   31   55
#  B   [ 7, 8, 55 ]                         count  2   2    1    1    one block copied; 7 and 8 stay shared
#
#  A writes:  31 has count 1 now: nobody else reads it, so A writes in place.
# ```
#
# This is **copy-on-write**, borrowed from operating systems, where it makes starting a process cheap. Full
# blocks are never written again, so they are shared for ever at no cost.
#
# ## The pain

# %%
from __future__ import annotations

import random
from collections import Counter, deque

PROMPT, ANSWER, BLOCK = 300, 100, 16


def the_pain() -> None:
    print(f"a prompt of {PROMPT} tokens, answers of {ANSWER}, every sequence on its own:")
    for n in (1, 2, 4, 8):
        blocks = n * -(-(PROMPT + ANSWER) // BLOCK)
        print(
            f"  {n} answers: {blocks:>4} blocks, of which {(n - 1) * (PROMPT // BLOCK):>4} repeat what is there already"
        )
    print()


if __name__ == "__main__":
    the_pain()

# %% [markdown]
# ## Task 1: `Manager.fork`
#
# The class below is the one of lesson 6, with counts in place of a plain free list, and with contents: each
# slot holds one number, which stands for a token's keys and values. So a test can read a text back through
# its table, and will see whether somebody else wrote into it. `take` and `drop` are given.
#
# A fork gives the child a table of its own (a new list, or the two will share more than you want) with the
# same blocks, and each of them gains one holder. No block is taken: a fork works even when the pool is empty.
#
# ```console
# $ python 08_fork_and_copy_on_write.py
# NotImplementedError: lesson 8, task 1: Manager.fork
# ```
#
# ## Task 2: `Manager.append`
#
# One more token. Three cases, decided by state:
#
# - the table has no entry for this position: take a block (need against have, as ever);
# - it has one, and others hold that block too: take a block, copy the contents, drop the old one, change the
#   entry, count the copy;
# - it has one, and nobody else holds it: write.
#
# `take` raises `OutOfBlocks` when there is nothing left. Call it before you change anything, and a failed
# append has changed nothing.
#
# ## Task 3: `Manager.free`
#
# The sequence leaves. Each of its blocks loses one holder. A sequence that is not there is a `KeyError`:
# freeing twice is a bug of the caller, and must not be absorbed. With counts it would even be fatal: the
# second free takes somebody else's block away.


# %%
class OutOfBlocks(Exception):  # noqa: N818
    """No block is free."""


class Manager:
    """Blocks 1 .. num_blocks - 1, shared among sequences by reference counts. Block 0 is the null block."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self.free_blocks = deque(range(1, num_blocks))
        self.ref_counts = [0] * num_blocks
        self.contents: list[list[int | None]] = [[None] * block_size for _ in range(num_blocks)]
        self.tables: dict[str, list[int]] = {}
        self.lengths: dict[str, int] = {}
        self.copied = 0  # blocks copied since the start

    def take(self) -> int:
        """A free block, held once from now on. OutOfBlocks if there is none."""
        if not self.free_blocks:
            raise OutOfBlocks
        block = self.free_blocks.popleft()
        self.ref_counts[block] = 1
        return block

    def drop(self, block: int) -> None:
        """One holder less; free when it was the last."""
        self.ref_counts[block] -= 1
        if self.ref_counts[block] == 0:
            self.free_blocks.append(block)

    def add(self, sequence: str) -> None:
        """A new sequence without tokens."""
        self.tables[sequence], self.lengths[sequence] = [], 0

    def read(self, sequence: str) -> list[int | None]:
        """The sequence's tokens, through its table."""
        tokens = [token for block in self.tables[sequence] for token in self.contents[block]]
        return tokens[: self.lengths[sequence]]

    def fork(self, parent: str, child: str) -> None:
        """A child that shares all blocks of its parent. Takes no block.

        >>> manager = Manager(num_blocks=6, block_size=4)
        >>> manager.tables["A"], manager.lengths["A"], manager.ref_counts[5] = [5], 3, 1
        >>> manager.fork("A", "B")
        >>> manager.tables["B"], manager.lengths["B"], manager.ref_counts[5]
        ([5], 3, 2)
        """
        raise NotImplementedError("lesson 8, task 1: Manager.fork")

    def append(self, sequence: str, token: int) -> None:
        """Write one token. OutOfBlocks, and nothing changed, if it needs a block and none is free.

        >>> manager = Manager(num_blocks=6, block_size=4)
        >>> manager.add("A")
        >>> manager.append("A", 60)
        >>> manager.tables["A"], manager.read("A")
        ([1], [60])
        """
        raise NotImplementedError("lesson 8, task 2: Manager.append")

    def free(self, sequence: str) -> None:
        """The sequence is gone. KeyError if it is unknown.

        >>> manager = Manager(num_blocks=6, block_size=4)
        >>> manager.tables["A"], manager.lengths["A"], manager.ref_counts[5] = [5], 3, 2  # somebody else holds 5 too
        >>> manager.free("A")
        >>> manager.tables, manager.ref_counts[5]
        ({}, 1)
        """
        raise NotImplementedError("lesson 8, task 3: Manager.free")


# %%
def check(manager: Manager) -> None:
    """What must hold at any time: counts are occurrences in tables, and what is not held is free."""
    occurrences = Counter(block for table in manager.tables.values() for block in table)
    for block in range(1, manager.num_blocks):
        count = manager.ref_counts[block]
        assert count == occurrences[block], f"block {block} has count {count} and stands in {occurrences[block]} tables"
    free = sorted(manager.free_blocks)
    assert free == [b for b in range(1, manager.num_blocks) if not occurrences[b]], (
        "free blocks and held ones do not add up"
    )
    assert set(manager.lengths) == set(manager.tables), "lengths and tables are not of the same sequences"
    for name, table in manager.tables.items():
        assert len(table) == -(-manager.lengths[name] // manager.block_size), f"{name}'s table does not fit its text"


def by_hand(manager: Manager, name: str, tokens: list[int], blocks: list[int]) -> None:
    """Put a sequence into the pool without any of your methods."""
    for index, block in enumerate(blocks):
        manager.free_blocks.remove(block)
        manager.ref_counts[block] = 1
        part = tokens[index * manager.block_size : (index + 1) * manager.block_size]
        manager.contents[block] = part + [None] * (manager.block_size - len(part))
    manager.tables[name], manager.lengths[name] = list(blocks), len(tokens)


def test_1_a_fork_shares_everything_and_takes_nothing() -> None:
    manager = Manager(6, 4)
    by_hand(manager, "A", [1, 2, 3, 4, 5, 6], [5, 2])
    manager.free_blocks.clear()
    manager.free_blocks.extend([1, 3, 4])
    manager.fork("A", "B")
    assert manager.tables["B"] == [5, 2]
    assert manager.read("B") == [1, 2, 3, 4, 5, 6]
    assert len(manager.free_blocks) == 3
    check(manager)
    manager.fork("B", "C")
    assert manager.ref_counts[5] == manager.ref_counts[2] == 3


def test_1_the_tables_are_two_lists() -> None:
    manager = Manager(6, 4)
    by_hand(manager, "A", [1, 2], [3])
    manager.fork("A", "B")
    manager.tables["B"].append(99)
    assert manager.tables["A"] == [3], "A and B have the same list object: a change to one is a change to both"


def test_2_a_text_of_its_own() -> None:
    manager = Manager(6, 4)
    manager.add("A")
    for token in range(9):
        manager.append("A", token)
        check(manager)
    assert manager.read("A") == list(range(9))
    assert manager.copied == 0


def test_2_the_picture() -> None:
    manager = Manager(9, 4)
    by_hand(manager, "A", [1, 2, 3, 4, 5, 6], [7, 8])
    manager.fork("A", "B")
    manager.append("B", 60)
    assert manager.tables["A"] == [7, 8]
    assert manager.tables["B"][0] == 7
    assert manager.tables["B"][1] != 8, "B wrote into a block that A reads"
    assert manager.copied == 1
    manager.append("A", 70)
    assert manager.tables["A"] == [7, 8], "nobody else held block 8 any more: A writes in place"
    assert manager.copied == 1
    assert manager.read("A") == [1, 2, 3, 4, 5, 6, 70]
    assert manager.read("B") == [1, 2, 3, 4, 5, 6, 60]
    check(manager)


def test_2_a_prompt_that_fills_its_blocks_costs_no_copy() -> None:
    manager = Manager(9, 4)
    by_hand(manager, "A", list(range(8)), [1, 2])
    manager.fork("A", "B")
    manager.append("A", 8)
    manager.append("B", 9)
    assert manager.copied == 0
    assert manager.tables["A"][:2] == manager.tables["B"][:2] == [1, 2]


def test_2_no_room_changes_nothing() -> None:
    manager = Manager(3, 4)
    by_hand(manager, "A", [1, 2, 3, 4, 5, 6], [1, 2])
    manager.fork("A", "B")
    try:
        manager.append("B", 60)
    except OutOfBlocks:
        assert manager.read("B") == manager.read("A") == [1, 2, 3, 4, 5, 6]
        assert manager.tables["B"] == [1, 2]
        check(manager)
    else:
        raise AssertionError("there was no block for a copy")


def test_3_blocks_come_back_when_the_last_holder_leaves() -> None:
    manager = Manager(9, 4)
    by_hand(manager, "A", [1, 2, 3, 4, 5, 6], [7, 8])
    manager.fork("A", "B")
    manager.free("A")
    check(manager)
    assert manager.read("B") == [1, 2, 3, 4, 5, 6], "A's leaving must not hurt B"
    manager.free("B")
    check(manager)
    assert len(manager.free_blocks) == 8


def test_3_freeing_twice_is_an_error() -> None:
    manager = Manager(9, 4)
    by_hand(manager, "A", [1], [7])
    manager.free("A")
    try:
        manager.free("A")
    except KeyError:
        check(manager)
    else:
        raise AssertionError("A was freed twice, and no KeyError was raised")


def test_3_any_story_ends_well() -> None:
    """Random forks, writes and frees, beside a model that simply copies lists."""
    for seed in range(150):
        rng = random.Random(seed)
        manager, texts, born = Manager(rng.randint(3, 14), rng.choice([1, 2, 4])), dict[str, list[int]](), 0
        for step in range(60):
            names = sorted(texts)
            action = rng.choice(["add", "fork", "free", "append", "append", "append", "append"])
            if action == "add" or not names:
                manager.add(f"s{born}")
                texts[f"s{born}"] = []
                born += 1
            elif action == "fork":
                parent = rng.choice(names)
                manager.fork(parent, f"s{born}")
                texts[f"s{born}"] = list(texts[parent])
                born += 1
            elif action == "free":
                name = rng.choice(names)
                manager.free(name)
                del texts[name]
            else:
                name = rng.choice(names)
                try:
                    manager.append(name, step)
                except OutOfBlocks:
                    assert not manager.free_blocks, "there was a free block"
                else:
                    texts[name].append(step)
            check(manager)
            for name, text in texts.items():
                assert manager.read(name) == text, (
                    f"{name} should read {text} and reads {manager.read(name)} (seed {seed})"
                )


if __name__ == "__main__":
    test_1_a_fork_shares_everything_and_takes_nothing()
    test_1_the_tables_are_two_lists()
    test_2_a_text_of_its_own()
    test_2_the_picture()
    test_2_a_prompt_that_fills_its_blocks_costs_no_copy()
    test_2_no_room_changes_nothing()
    test_3_blocks_come_back_when_the_last_holder_leaves()
    test_3_freeing_twice_is_an_error()
    test_3_any_story_ends_well()

# %% [markdown]
# ## What was won
#
# n answers on one prompt: blocks with sharing and without, and tokens copied by copy-on-write against tokens
# copied if the prompt's cache were duplicated for each answer. The second table moves the prompt's end
# through a block: only a half-filled last block costs a copy, and the last one to write never pays.


# %%
def sample(n: int, prompt: int, answer: int) -> Manager:
    """n answers of one prompt, written in turns."""
    manager = Manager(4_000, BLOCK)
    manager.add("0")
    for token in range(prompt):
        manager.append("0", token)
    for i in range(1, n):
        manager.fork("0", str(i))
    for step in range(answer):
        for i in range(n):
            manager.append(str(i), 1_000 * (i + 1) + step)
    check(manager)
    return manager


def what_was_won() -> None:
    print(f"a prompt of {PROMPT} tokens, answers of {ANSWER}, blocks of {BLOCK}")
    print("   n    blocks alone   shared    saved    tokens copied: whole prompts   on write")
    for n in (1, 2, 4, 8, 16):
        manager = sample(n, PROMPT, ANSWER)
        alone = n * -(-(PROMPT + ANSWER) // BLOCK)
        shared = manager.num_blocks - 1 - len(manager.free_blocks)
        print(
            f"{n:>4}{alone:>16,}{shared:>9,}{1 - shared / alone:>9.1%}"
            f"{(n - 1) * PROMPT:>30,}{manager.copied * (PROMPT % BLOCK):>11,}"
        )
    print("\ncopies of four answers, by where the prompt ends in its last block:")
    ends = range(0, BLOCK + 1, 4)
    print("  slots filled " + "".join(f"{(PROMPT // BLOCK * BLOCK + end) % BLOCK:>5}" for end in ends))
    print("  blocks copied" + "".join(f"{sample(4, PROMPT // BLOCK * BLOCK + end, 20).copied:>5}" for end in ends))


if __name__ == "__main__":
    what_was_won()

# %% [markdown]
# ## What real engines do
#
# - **The vLLM paper** introduced this to KV caches (Kwon et al. 2023, section 4.4, Figs. 8 and 9), and vLLM's
#   first scheduler did it: sequence groups, forks, reference counts.
# - **vLLM today** has let go of it: n samples are n requests, and the prefix cache finds the shared blocks
#   (lesson 10). Full blocks are shared; the partial last block is computed again by each. Simpler, at the
#   price of up to one block of prefill for a sample
#   ([`parallel_sampling.py`](https://github.com/vllm-project/vllm/blob/main/vllm/v1/engine/parallel_sampling.py)).
# - **Operating systems** copy on write since the 1970s: `fork()` on Linux shares all pages until somebody
#   writes.
# - On a GPU the copies of one step are collected and done by one kernel, before anything is written in that
#   step. The order matters: a copy that runs after the write copies the wrong thing.
#
# ## Where this lives in minipaged
#
# - `minipaged/memory/block_manager.py`: `BlockManager.fork`, `BlockManager.append` and `BlockManager.free`.
# - `minipaged/memory/tables.py`: `TableEditor.copy_tail` does what your second case does, and reports
#   the pair.
# - `minipaged/memory/tables.py`: a copy can still be given up before it ran; you did not need to
#   care.
# - `kernels/cache/block_copy.py`: `copy_blocks`, the copies of one step.
# - `minipaged/laws.py`: `LAWS`, laws L12 to L20.
