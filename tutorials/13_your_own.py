# %% [markdown]
# # 13. Your own
#
# *60 minutes. You need lessons 3, 6, 8 and 10.*
#
# ## Why
#
# You have built every part of a paged memory once, in a world made for learning. Now put your parts into the
# real one. minipaged's `BlockManager` consists of parts with small contracts. In this lesson you write your
# own version of five of them and put them in, one by one:
#
# ```
#  BlockManager        fork, more_room                     task 4, task 5        lessons 8 and 6
#     │
#     ├─ PrefixIndex   which block holds this content?     task 2                lesson 10
#     │
#     └─ BlockPool     who holds each block?               task 3                lessons 3 and 8
#           │
#           └─ FreeList   which one is handed out next?    task 1                lesson 10
# ```
#
# What you do not write is what the lessons left out: sequences that are swapped as a group, copies that are
# given up when a victim leaves in the middle of a step, blocks that a step still reads. It is there, around
# your parts, in `minipaged/memory`.
#
# At the end your manager is used like minipaged's own one: all laws of the specification are tested on it, and
# it serves a model in the engine.
#
# ## The pain
#
# There is none this time. Let us measure minipaged's manager instead, at work for a batch that is decoding.
# Yours will be compared with it.

# %%
from __future__ import annotations

import random
import time
from collections import OrderedDict
from pathlib import Path

from minipaged.errors import InputError
from minipaged.memory.block_manager import BlockManager
from minipaged.memory.blocks import BlockPool
from minipaged.memory.tables import PendingCopies, SequenceBlocks
from minipaged.memory.types import NULL_BLOCK, Allocation


def decode(manager: BlockManager, sequences: int = 64, steps: int = 300) -> float:
    """Microseconds for one token of one sequence: room asked, computed, reported."""
    for seq in range(sequences):
        manager.allocate(seq, [seq] * 20)
        manager.mark_computed(seq, [seq] * 20)
    start = time.perf_counter()
    for step in range(steps):
        manager.begin_step()
        for seq in range(sequences):
            manager.append(seq, 1)
        for seq in range(sequences):
            manager.mark_computed(seq, [step])
    seconds = time.perf_counter() - start
    for seq in range(sequences):
        manager.free(seq)
    return 1e6 * seconds / steps / sequences


def the_pain() -> None:
    print(f"minipaged's manager: {decode(BlockManager(4_000, 16)):.2f} microseconds a token\n")


if __name__ == "__main__":
    the_pain()

# %% [markdown]
# ## Task 1: `MyFreeList`
#
# The blocks that nobody holds, in the order in which they are handed out again:
#
# 1. empty blocks first: nothing is lost with them. The one that was put back last goes first (it may still be
#    in some cache); those that were never used come after them, by number;
# 2. then the cached ones, whose content can still be found: the one that was put back first goes first.
#
# Every method takes the same time however long the list is, the removal from the middle too. The fields are
# up to you. Lesson 10's ordered dictionary is one way; minipaged's own `FreeList` is another.
#
# ```console
# $ python 13_your_own.py
# NotImplementedError: lesson 13, task 1: MyFreeList
# ```


# %%
class MyFreeList:
    """Blocks 1 .. num_blocks - 1, all empty and never used at first.

    >>> blocks = MyFreeList(4)
    >>> blocks.pop(), blocks.pop(), len(blocks)
    (1, 2, 1)
    >>> blocks.push_cached(1), blocks.push_empty(2), blocks.pop(), blocks.pop(), blocks.pop()
    (None, None, 2, 3, 1)
    """

    _empty: list[int]  # a suggestion: a stack,
    _cached: OrderedDict[int, None]  # and an ordered dictionary, as in lesson 10

    def __init__(self, num_blocks: int) -> None:
        raise NotImplementedError("lesson 13, task 1: MyFreeList")

    def __len__(self) -> int:
        """How many blocks can be handed out."""
        raise NotImplementedError("lesson 13, task 1: MyFreeList")

    @property
    def num_cached(self) -> int:
        """How many of them can still be found by their content."""
        raise NotImplementedError("lesson 13, task 1: MyFreeList")

    def push_empty(self, block: int) -> None:
        """Put back a block without content."""
        raise NotImplementedError("lesson 13, task 1: MyFreeList")

    def push_cached(self, block: int) -> None:
        """Put back a block whose content can be found."""
        raise NotImplementedError("lesson 13, task 1: MyFreeList")

    def remove_cached(self, block: int) -> None:
        """Take this cached block out, wherever it stands: somebody has found it."""
        raise NotImplementedError("lesson 13, task 1: MyFreeList")

    def first_cached(self) -> int:
        """The cached block that would be handed out first; 0 if there is none."""
        raise NotImplementedError("lesson 13, task 1: MyFreeList")

    def pop(self) -> int:
        """Hand out the next block. IndexError if there is none."""
        raise NotImplementedError("lesson 13, task 1: MyFreeList")


# %%
def test_1_empty_blocks_first_then_the_longest_free() -> None:
    blocks = MyFreeList(7)
    assert [blocks.pop() for _ in range(6)] == [1, 2, 3, 4, 5, 6]
    blocks.push_cached(4)
    blocks.push_cached(2)
    blocks.push_empty(5)
    blocks.push_empty(3)
    assert (len(blocks), blocks.num_cached, blocks.first_cached()) == (4, 2, 4)
    assert [blocks.pop() for _ in range(4)] == [3, 5, 4, 2]


def test_1_a_found_block_leaves_the_middle() -> None:
    blocks = MyFreeList(6)
    for _ in range(5):
        blocks.pop()
    for block in (1, 2, 3):
        blocks.push_cached(block)
    blocks.remove_cached(2)
    assert (len(blocks), blocks.num_cached) == (2, 2)
    blocks.push_cached(2)
    assert [blocks.pop() for _ in range(3)] == [1, 3, 2], "block 2 has been used again, so it goes last"


def test_1_an_empty_list_says_so() -> None:
    blocks = MyFreeList(2)
    blocks.pop()
    assert blocks.first_cached() == 0
    try:
        blocks.pop()
    except IndexError:
        return
    raise AssertionError("there was nothing to hand out")


def test_1_the_middle_is_not_searched() -> None:
    def seconds(n: int) -> float:
        best = float("inf")
        for _ in range(3):
            blocks = MyFreeList(n)
            for _ in range(n - 1):
                blocks.push_cached(blocks.pop() if len(blocks) > blocks.num_cached else 0)
            start = time.perf_counter()
            for block in range(n // 2, n // 2 + 100):
                blocks.remove_cached(block)
            best = min(best, time.perf_counter() - start)
        return best

    small, large = seconds(300), seconds(60_000)
    assert large < 30 * small + 1e-4, f"removing a block takes {large / small:.0f} times longer in a long list"


if __name__ == "__main__":
    test_1_empty_blocks_first_then_the_longest_free()
    test_1_a_found_block_leaves_the_middle()
    test_1_an_empty_list_says_so()
    test_1_the_middle_is_not_searched()

# %% [markdown]
# ## Task 2: `MyPrefixIndex`
#
# Content to blocks. The keys are made elsewhere, one link of a chain for each block (lesson 10); here a key is
# some bytes.
#
# Two rules. A block has one key: `publish` returns `False` and changes nothing where it has one already. And a key
# may belong to several blocks, as two sequences that compute the same text side by side make two copies of it:
# all are remembered, the one published first is found, and when it is erased the next one is.


# %%
class MyPrefixIndex:
    """Keys and the blocks that hold their content.

    >>> index = MyPrefixIndex()
    >>> index.publish(b"some key", 3), index.publish(b"some key", 4), index.find(b"some key")
    (True, True, 3)
    >>> index.erase(3), index.find(b"some key"), index.find(b"another"), 3 in index, len(index)
    (True, 4, None, False, 1)
    """

    def __init__(self) -> None:
        raise NotImplementedError("lesson 13, task 2: MyPrefixIndex")

    def __len__(self) -> int:
        """How many blocks can be found."""
        raise NotImplementedError("lesson 13, task 2: MyPrefixIndex")

    def __contains__(self, block: int) -> bool:
        """Whether this block can be found."""
        raise NotImplementedError("lesson 13, task 2: MyPrefixIndex")

    def blocks(self) -> list[int]:
        """All blocks that can be found, in the order they were published."""
        raise NotImplementedError("lesson 13, task 2: MyPrefixIndex")

    def publish(self, key: bytes, block: int) -> bool:
        """`block` holds the content of `key` from now on; False, and nothing changed, if the block has a key."""
        raise NotImplementedError("lesson 13, task 2: MyPrefixIndex")

    def erase(self, block: int) -> bool:
        """The block can no longer be found (another with its content still can); False if it could not anyway."""
        raise NotImplementedError("lesson 13, task 2: MyPrefixIndex")

    def find(self, key: bytes) -> int | None:
        """The block that is found by the key; None if there is none."""
        raise NotImplementedError("lesson 13, task 2: MyPrefixIndex")


# %%
def test_2_a_block_has_one_key() -> None:
    index = MyPrefixIndex()
    assert index.find(b"key") is None
    assert index.publish(b"key", 4)
    assert index.publish(b"another", 4) is False, "the block has a key"
    assert index.find(b"key") == 4
    assert index.find(b"another") is None
    assert (len(index), 4 in index, 9 in index, index.blocks()) == (1, True, False, [4])
    assert index.erase(4) is True
    assert index.erase(4) is False
    assert (len(index), index.find(b"key")) == (0, None)


def test_2_equal_content_is_remembered_twice() -> None:
    index = MyPrefixIndex()
    assert all(index.publish(b"key", block) for block in (4, 9, 2))
    assert (index.find(b"key"), index.blocks()) == (4, [4, 9, 2]), "the one published first is found"
    assert index.erase(9)
    assert index.find(b"key") == 4
    assert index.erase(4)
    assert index.find(b"key") == 2, "the copy that is left"
    assert index.publish(b"key", 4)
    assert index.find(b"key") == 2


if __name__ == "__main__":
    test_2_a_block_has_one_key()
    test_2_equal_content_is_remembered_twice()

# %% [markdown]
# ## Task 3: `MyBlockPool`
#
# Three methods, `take`, `share` and `drop`, over reference counts in `self.refs`, one number for each block.
# The rest of the class is minipaged's. Two helpers are given, since they know of blocks that a step still
# reads and that are kept back until it is over:
#
# - `withdraw(block)`: a free block has been found; it leaves the list of free ones;
# - `put_back(block)`: a block has lost its last holder.
#
# `drop` of a block that nobody holds raises `ValueError`. You know why.


# %%
class MyBlockPool(BlockPool):
    """Who holds each block. Your list and your index are inside.

    >>> pool = MyBlockPool(4, MyPrefixIndex())
    >>> block = pool.take()
    >>> pool.share(block), pool.drop(block), pool.refs, pool.num_free
    (None, None, [0, 1, 0, 0], 2)
    """

    def __init__(self, num_blocks: int, index: MyPrefixIndex) -> None:
        super().__init__(num_blocks, index)
        self._free = MyFreeList(num_blocks)

    def withdraw(self, block: int) -> None:
        """A free block is found by its content."""
        if block in self._held_back:
            del self._held_back[block]
        else:
            self._free.remove_cached(block)

    def put_back(self, block: int) -> None:
        """Nobody holds the block any more."""
        if block in self.guards:
            self._held_back[block] = None
        else:
            self._push(block)

    def take(self) -> int:
        """Hand out the next free block, with one holder. (Its key is erased by the caller.)"""
        raise NotImplementedError("lesson 13, task 3: MyBlockPool")

    def share(self, block: int) -> None:
        """One more holder; it may have had none."""
        raise NotImplementedError("lesson 13, task 3: MyBlockPool")

    def drop(self, block: int) -> None:
        """One holder less. ValueError if it has none."""
        raise NotImplementedError("lesson 13, task 3: MyBlockPool")


# %%
def test_3_counts() -> None:
    pool = MyBlockPool(4, MyPrefixIndex())
    block = pool.take()
    pool.share(block)
    assert pool.refs[block] == 2
    pool.drop(block)
    assert (pool.refs[block], pool.num_free) == (1, 2)
    pool.drop(block)
    assert (pool.refs[block], pool.num_free) == (0, 3)
    try:
        pool.drop(block)
    except ValueError:
        assert (pool.refs[block], pool.num_free) == (0, 3)
    else:
        raise AssertionError("a block was dropped once more than it was held")


def test_3_a_free_block_can_be_found_again() -> None:
    index = MyPrefixIndex()
    pool = MyBlockPool(4, index)
    block = pool.take()
    index.publish(b"key", block)
    pool.drop(block)
    assert (pool.num_free, pool.num_cached) == (3, 1)
    pool.share(block)
    assert (pool.refs[block], pool.num_free, pool.num_cached) == (1, 2, 0)
    assert block not in [pool.take(), pool.take()]


if __name__ == "__main__":
    test_3_counts()
    test_3_a_free_block_can_be_found_again()

# %% [markdown]
# ## Task 4: `MyBlockManager.fork`
#
# `__init__` puts your parts in the place of minipaged's. A sequence is an object here, and the checks of `fork` are given. What is
# left:
#
# 1. `parent.child(child_id)` makes the child, with lists of its own; `child.table` are its blocks;
# 2. each of these blocks gains a holder (task 3), except the null block, which nobody holds;
# 3. the child goes into the directory: `self._sequences.add(child)`;
# 4. report the event: `self._editor.emit("fork", child_id, -1, parent_id, len(child.table))`. The screen, the
#    trace and the specification read nothing but these events.
#
# ## Task 5: `MyBlockManager.more_room`
#
# Lesson 6 and lesson 8 in one method; `append` checks its arguments and calls it. The sequence has
# `sequence.reserved` for so many tokens, `num_tokens` more are wanted:
#
# ```
#  size 4        table [ 7,         8 ]                have = 2 entries, 8 slots
#                        █ █ █ █    █ █ · ·            reserved = 6 < 8: the new tokens begin in the tail, at its slot 2
#  num_tokens 7                     · · 6 7 8 9 …      need = blocks for 6 + 7 tokens = 4: grow by 2
#                                                      if others hold block 8: copy it first, so 3 blocks must be free
# ```
#
# In this order, so that a refusal changes nothing:
#
# 1. count: `need` is the blocks for the new room, `have` the entries of `sequence.table`, and
#    `self._block_size` the tokens of a block;
# 2. does the first new token fall into the tail (`reserved < have * size`), and must the tail be copied first?
#    `self._editor.copies.must_copy(tail, slot)` says so: it looks at the count. `slot` is the first new
#    token's place in the block;
# 3. are there enough blocks, the copy included? `self._pool.num_available` can be taken. If not: return
#    `None`. Nothing has been changed so far;
# 4. if the tail must be copied: `self._editor.copy_tail(sequence)` does it, and returns the pair (source,
#    destination);
# 5. if you write into the tail in place instead, nobody may find it by its old content any more: call
#    `self._editor.index.erase(tail)`, and when that returns `True`,
#    `self._editor.emit("evict", sequence.seq_id, tail, -1, have - 1)`;
# 6. `self._editor.grow(sequence, count)` takes blocks, appends them to the table, and returns them;
# 7. set `sequence.reserved`, return `Allocation(0, new_blocks, copies)`, both tuples.


# %%
class MyBlockManager(BlockManager):
    """minipaged's manager with your parts."""

    def __init__(self, num_blocks: int, block_size: int, **settings) -> None:
        super().__init__(num_blocks, block_size, **settings)
        self._editor.index = MyPrefixIndex()
        self._editor.pool = self._pool = MyBlockPool(num_blocks, self._editor.index)
        self._editor.copies = PendingCopies(self._pool)

    def fork(self, parent_id: int, child_id: int) -> None:
        """A child with the parent's table. InputError while the parent has tokens that are not written yet.

        >>> manager = MyBlockManager(num_blocks=9, block_size=4)
        >>> allocation = manager.allocate(1, [5, 6, 7])
        >>> manager.mark_computed(1, [5, 6, 7])
        >>> manager.fork(1, 2)
        >>> manager.table(2) == manager.table(1) == allocation.new_blocks, manager.ref_count(allocation.new_blocks[0])
        (True, 2)
        """
        parent = self._sequences.on_device(parent_id)
        self._sequences.check_new(child_id)
        parent.check_fork()
        raise NotImplementedError("lesson 13, task 4: MyBlockManager.fork")

    def append(self, seq_id: int, num_tokens: int) -> Allocation | None:
        """Room for `num_tokens` more tokens; None, and nothing changed, if there is none."""
        sequence = self._sequences.on_device(seq_id)
        if type(num_tokens) is not int or num_tokens < 0:
            raise InputError(f"num_tokens must be a whole number, at least 0, not {num_tokens!r}")
        return self.more_room(sequence, num_tokens)

    def more_room(self, sequence: SequenceBlocks, num_tokens: int) -> Allocation | None:
        """Need, have, copy, grow.

        The whole of `append`: an Allocation of what is new, or None.

        >>> manager = MyBlockManager(num_blocks=9, block_size=4)
        >>> manager.allocate(1, [5, 6, 7])
        Allocation(cached_tokens=0, new_blocks=(1,), copies=())
        >>> manager.mark_computed(1, [5, 6, 7])
        >>> manager.append(1, 4)
        Allocation(cached_tokens=0, new_blocks=(2,), copies=())
        """
        raise NotImplementedError("lesson 13, task 5: MyBlockManager.more_room")


# %%
def grown(num_blocks: int = 9, **settings) -> MyBlockManager:
    """A manager with one sequence of 6 tokens in blocks of 4, put there without your append."""
    manager = MyBlockManager(num_blocks, 4, **settings)
    manager.allocate(1, [1, 2, 3, 4, 5, 6])
    manager.mark_computed(1, [1, 2, 3, 4, 5, 6])
    manager.take_events()
    return manager


def test_4_a_child_shares_everything() -> None:
    manager = grown()
    manager.fork(1, 2)
    assert manager.table(2) == manager.table(1)
    assert [manager.ref_count(block) for block in manager.table(1)] == [2, 2]
    (event,) = manager.take_events()
    assert event[:5] == ("fork", 2, -1, 1, 2)
    manager.free(1)
    assert [manager.ref_count(block) for block in manager.table(2)] == [1, 1]


def test_4_the_null_block_is_nobodys() -> None:
    manager = grown()
    manager.release(1, [0])
    manager.fork(1, 2)
    assert manager.ref_count(NULL_BLOCK) == 0


def test_5_need_and_have() -> None:
    manager = MyBlockManager(9, 4)
    manager.allocate(1, [5])
    sizes = []
    for token in range(8):
        manager.mark_computed(1, [token])
        allocation = manager.append(1, 1)
        assert allocation is not None
        sizes.append((len(manager.table(1)), len(allocation.new_blocks)))
    assert sizes == [(1, 0), (1, 0), (1, 0), (2, 1), (2, 0), (2, 0), (2, 0), (3, 1)]
    assert manager.append(1, 0) == Allocation(0, (), ())
    assert len(manager.append(1, 9).new_blocks) == 2


def test_5_copies_when_shared_and_only_then() -> None:
    manager = grown()
    manager.fork(1, 2)
    tail = manager.table(1)[1]
    allocation = manager.append(2, 3)
    assert allocation.copies == ((tail, manager.table(2)[1]),)
    assert len(allocation.new_blocks) == 1
    assert manager.append(1, 1) == Allocation(0, (), ()), "the last holder writes in place"
    assert manager.table(1)[1] == tail


def test_5_no_room_changes_nothing() -> None:
    manager = grown(num_blocks=4)
    manager.fork(1, 2)
    before = (manager.table(1), manager.table(2), manager.usage())
    manager.take_events()
    assert manager.append(2, 7) is None, "a copy and two more blocks, and there is one"
    assert (manager.table(1), manager.table(2), manager.usage()) == before
    assert manager.take_events() == ()
    assert manager.append(2, 2) is not None, "the copy alone fits"


def test_5_what_is_written_over_cannot_be_found() -> None:
    manager = MyBlockManager(9, 4)
    manager.allocate(1, [1, 2, 3, 4, 5, 6, 7, 8])
    manager.mark_computed(1, [1, 2, 3, 4, 5, 6, 7, 8])
    manager.truncate(1, 7)
    assert manager.match_prefix([1, 2, 3, 4, 5, 6, 7, 8, 9]) == 8, "cut, but not written over yet"
    manager.append(1, 1)
    assert manager.match_prefix([1, 2, 3, 4, 5, 6, 7, 8, 9]) == 4


class Both:
    """minipaged's manager and yours side by side: every call goes to both, and they must agree."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.theirs, self.mine = (
            kind(num_blocks, block_size, num_host_blocks=6) for kind in (BlockManager, MyBlockManager)
        )

    def __call__(self, name: str, *arguments: object) -> object:
        theirs, mine = (getattr(manager, name)(*arguments) for manager in (self.theirs, self.mine))
        assert mine == theirs, f"{name}{arguments} gave {mine}, and should give {theirs}"
        their_events, my_events = self.theirs.take_events(), self.mine.take_events()
        assert my_events == their_events, f"{name}{arguments} reported {my_events}, and should report {their_events}"
        assert self.mine.usage() == self.theirs.usage(), f"after {name}{arguments}"
        return theirs


def test_5_decides_as_minipaged_does() -> None:
    """Random work on both: the same answers, the same events, the same use of the pool."""
    for seed in range(60):
        rng = random.Random(seed)
        both, alive, swapped, born = Both(rng.randint(6, 20), rng.choice([1, 2, 4])), list[int](), list[int](), 0
        for _ in range(80):
            action = rng.choice(["allocate", "append", "append", "fork", "free", "swap_out", "swap_in", "begin_step"])
            tokens = [rng.randrange(2) for _ in range(rng.randint(1, 8))]
            one = rng.choice(alive) if alive else None
            if action == "begin_step":
                both("begin_step")
            elif action == "allocate":
                allocation = both("allocate", born, tokens)
                if allocation is not None:
                    both("mark_computed", born, tokens[allocation.cached_tokens :])
                    alive.append(born)
                born += 1
            elif action == "swap_in" and swapped:
                if both("swap_in", swapped[:1]) is not None:
                    alive.append(swapped.pop(0))
            elif one is not None and action == "append":
                if both("append", one, len(tokens)) is not None:
                    both("mark_computed", one, tokens)
            elif one is not None and action == "fork":
                both("fork", one, born)
                alive.append(born)
                born += 1
            elif one is not None and action == "free":
                both("free", one)
                alive.remove(one)
            elif one is not None and action == "swap_out" and both("swap_out", [one]) is not None:
                alive.remove(one)
                swapped.append(one)


if __name__ == "__main__":
    test_4_a_child_shares_everything()
    test_4_the_null_block_is_nobodys()
    test_5_need_and_have()
    test_5_copies_when_shared_and_only_then()
    test_5_no_room_changes_nothing()
    test_5_what_is_written_over_cannot_be_found()
    test_5_decides_as_minipaged_does()

# %% [markdown]
# ## What was won
#
# Your manager in the engine: a real scheduler, a small model that is picky about every key and value (`toy`),
# a pool so small that requests must make way, samples and beams that share. The texts must be those that
# minipaged's own manager gives. In your lessons' folder the run is recorded; `minipaged learn show 13` plays
# it.
#
# Then the time that your parts take, measured as above.
#
# Then the commands of the last checkpoint: your class under every law of the specification. A state machine
# will do all it can think of to your manager, with all laws watched after every call. If it finds a weakness,
# it names the law, shrinks the story, and leaves a replay; the last line of the failure says how to see it on
# the screen.


# %%
def in_the_engine(kind: type[BlockManager], record_to: Path | None = None) -> tuple[list[str], object]:
    """Several requests through an engine with this block manager. Returns the texts and the scheduler's counters."""
    import torch

    from minipaged.config import EngineConfig, SamplingParams
    from minipaged.engine import Engine
    from minipaged.execution.eager import TorchRunner
    from minipaged.execution.paged_kv import PagedKV
    from minipaged.model.loading import zoo
    from minipaged.scheduling.scheduler import Scheduler
    from minipaged.trace.file import open_recorder

    num_blocks, block_size, toy = 52, 4, zoo.load("toy", device="cpu", dtype="float32")
    kv = PagedKV(toy.config, num_blocks, block_size, dtype=torch.float32, device=torch.device("cpu"))
    config = EngineConfig(max_model_len=150, preemption="recompute")
    scheduler = Scheduler(config, kind(num_blocks, block_size), block_size)
    engine = Engine(scheduler, TorchRunner(toy.model, kv, config.max_num_seqs), codec=toy.tokenizer)
    recorder = open_recorder(record_to, engine) if record_to is not None else None
    if recorder is not None:
        engine.trace.subscribe(recorder.write)
    story = "a list says where each page lies, "
    asked = [
        (story + "so", SamplingParams(max_tokens=60)),
        (story + "and", SamplingParams(n=3, temperature=0.6, seed=1, max_tokens=30)),
        ("the best of four", SamplingParams(beam_width=4, n=2, max_tokens=20)),
        (story + "but", SamplingParams(max_tokens=60)),
    ]
    outputs = []
    for prompt, params in asked:
        outputs.append(engine.ask(prompt, params))
        engine.step()  # the next one comes a step later
    while engine.has_work:
        engine.step()
    if recorder is not None:
        recorder.close()
    return [completion.text for output in outputs for completion in output.outputs], scheduler.counters


def test_5_the_engine_writes_the_same() -> None:
    assert in_the_engine(MyBlockManager) == in_the_engine(BlockManager)


def what_was_won() -> None:
    folder = Path(".recordings") if Path(".minipaged-lessons.json").is_file() else None
    if folder is not None:
        folder.mkdir(exist_ok=True)
    texts, counters = in_the_engine(MyBlockManager, folder / "13_your_own.trace" if folder is not None else None)
    expected, _ = in_the_engine(BlockManager)
    for mine, theirs in zip(texts, expected, strict=True):
        print(f"{'same ' if mine == theirs else 'OTHER'}  {mine!r}")
    print(f"copies {counters.copies}, tokens found {counters.hit_tokens}, preemptions {counters.preemptions}\n")
    print(f"minipaged's manager: {decode(BlockManager(4_000, 16)):.2f} microseconds a token")
    print(f"         and yours: {decode(MyBlockManager(4_000, 16)):.2f}\n")
    tests = Path(BlockManager.__init__.__code__.co_filename).parents[2] / "tests" / "laws"
    where = f"{tests}" if tests.is_dir() else "CLONE/tests/laws"
    print(
        "the last checkpoint, from this folder" + ("" if tests.is_dir() else "; the tests are in a clone of minipaged")
    )
    print("\nfirst the laws of memory, with few examples of each:\n")
    print(
        f'  HYPOTHESIS_PROFILE=quick pytest {where} -k "laws_memory or laws_machine" --block-manager 13_your_own:MyBlockManager'
    )
    print("\nthen everything, a scheduler on top of your memory too:\n")
    print(f"  pytest {where} --block-manager 13_your_own:MyBlockManager\n")
    print("and a conversation that lies in your memory; /ours compares its cost with minipaged's:\n")
    print("  minipaged chat --block-manager 13_your_own.py:MyBlockManager\n")


if __name__ == "__main__":
    test_5_the_engine_writes_the_same()
    what_was_won()

# %% [markdown]
# When the second command passes, you have built PagedAttention. The third lets you talk through it: a language
# model that has learned to speak, SmolLM2, keeps its keys and values where your manager says. Each answer's line
# shows its speed and its waste, and `/ours` asks the same of minipaged's manager. `minipaged generate` and `minipaged tui`
# take `--block-manager` too: the first compares by itself, the second shows your tables as they grow. If your
# class fails on the way, the message names its method and the line.
#
# From here on the code of minipaged should hold no secrets. Some things to try: break one of your parts on
# purpose, in a way that all tests of this file overlook, and see how long the specification needs. Or give
# `MyFreeList` another order of eviction and watch the hit rate. Or read `PendingCopies` in `minipaged/memory/tables.py`,
# the hardest class of this project.
#
# ## What real engines do
#
# - **vLLM** is built from the same parts: a block pool with a free queue, a map from hashes to blocks,
#   managers of block tables on top
#   ([`vllm/v1/core`](https://github.com/vllm-project/vllm/tree/main/vllm/v1/core)). You can read it now.
# - The idea of testing an implementation against a simple model, with random commands and shrinking, is from
#   QuickCheck (Claessen and Hughes, ICFP 2000, [paper](https://dl.acm.org/doi/10.1145/351240.351266)).
#
# ## Where this lives in minipaged
#
# - `minipaged/memory/block_manager.py`: `BlockManager`, whose parts you have just replaced.
# - `minipaged/memory/blocks.py`: `FreeList`, `PrefixIndex` and `BlockPool`.
# - `minipaged/memory/tables.py`: `TableEditor`.
# - `minipaged/memory/own_manager.py`: `find_class` and `own_manager` put your class into the engine.
# - `tests/laws`: the specification. `tests/mutants`: the bugs that it is known to find.
