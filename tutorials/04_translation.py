# %% [markdown]
# # 4. Translation
#
# *20 minutes. You need lesson 3.*
#
# ## Why
#
# Lesson 3 hands out blocks in any order. So the tokens of one text lie scattered over the pool, and somebody
# must know where. That is the **block table**: one short list for each sequence. Entry 0 names the block that
# holds the first tokens, entry 1 the block with the next ones, and so on.
#
# ```
#  position        0   1   2   3 │ 4   5   6   7 │ 8   9
#  token           The cat sat on│ the mat and it│ slept .
#                  ─────┬─────── │ ──────┬────── │ ──┬──
#  block table        [ 7,               2,         5 ]
#
#  the pool       block 0 │ 1 │ 2            │ 3 │ 4 │ 5          │ 6 │ 7
#                  null   │   │the mat and it│   │   │slept . ·  ·│   │The cat sat on
#  slots           0..3     …   8..11              …   20..23           28..31
# ```
#
# A position in the text is a **logical** address; a slot in the pool is a **physical** one. Turning the first
# into the second is what the page table of an operating system does for each memory access. Here it is done
# once for each token that is written, and once for each block that is read.
#
# Nothing else in the engine may know where things lie. The model asks for positions; the pool knows blocks;
# the table stands in between. That one indirection is the whole idea of PagedAttention. All that follows
# (sharing, copy-on-write, swapping, prefix caching) is done by editing tables.
#
# ## The pain
#
# How else could a text grow whose length nobody knows? By moving: when there is no room behind it, it is
# copied to a larger place. Below, three texts grow side by side. One server copies at every token
# (concatenation), one doubles the room each time it runs out.

# %%
from __future__ import annotations

import random
import time

import numpy as np


def grow_side_by_side(answers: tuple[int, ...], growth: str) -> tuple[int, int]:
    """(tokens copied, most slots held at one moment) while texts grow from 1 token to `answers` tokens, a token each in turn."""
    rooms, moved, peak = [1] * len(answers), 0, len(answers)
    for length in range(1, max(answers)):
        for i, answer in enumerate(answers):
            if length < answer and length == rooms[i]:
                new = length + 1 if growth == "concatenate" else 2 * length
                moved += length
                peak = max(peak, sum(rooms) + new)  # the old copy and the new one both exist for a moment
                rooms[i] = new
    return moved, peak


def the_pain() -> None:
    print("three texts of 700, 800 and 900 tokens")
    for growth in ("concatenate", "double"):
        moved, peak = grow_side_by_side((700, 800, 900), growth)
        print(f"{growth:>12}: {moved:>9,} tokens moved, {peak:>6,} slots needed at the worst moment")
    print()


if __name__ == "__main__":
    the_pain()

# %% [markdown]
# A token is not four bytes here. In lesson 2 you computed what one weighs.
#
# ## Task 1: `slot`
#
# The heart of it, one line long. The position says which entry of the table, and which place inside the
# block:
#
# ```
#  position 6, blocks of 4      entry 6 // 4 = 1        place 6 % 4 = 2
#                               table[1] = 2            slot 2 * 4 + 2 = 10
# ```
#
# Refuse a position outside the table with `IndexError`. Python will not do all of it for you: `table[-1]` is
# a perfectly good expression, and it would read the end of the text.
#
# ```console
# $ python 04_translation.py
# NotImplementedError: lesson 4, task 1: slot
# ```


# %%
def slot(table: list[int], position: int, block_size: int) -> int:
    """The slot of the pool that holds the token at `position`. IndexError if the table does not reach that far.

    >>> slot([7, 2, 5], position=6, block_size=4)
    10
    """
    raise NotImplementedError("lesson 4, task 1: slot")


# %%
def test_1_the_picture() -> None:
    table = [7, 2, 5]
    assert [slot(table, p, 4) for p in range(10)] == [28, 29, 30, 31, 8, 9, 10, 11, 20, 21]


def test_1_blocks_of_one_and_one_block() -> None:
    assert [slot([3, 1, 2], p, 1) for p in range(3)] == [3, 1, 2]
    assert [slot([1], p, 16) for p in range(16)] == list(range(16, 32))


def test_1_refuses_what_lies_outside() -> None:
    for position in (-1, 12, 100):
        try:
            answer = slot([7, 2, 5], position, 4)
        except IndexError:
            continue
        raise AssertionError(f"position {position} is outside of the table, but slot() answered {answer}")


if __name__ == "__main__":
    test_1_the_picture()
    test_1_blocks_of_one_and_one_block()
    test_1_refuses_what_lies_outside()

# %% [markdown]
# ## Task 2: `slot_mapping`
#
# An engine never asks for one slot. In one step it computes tokens of many sequences at once: here the one
# new token of a running answer, there forty tokens of a prompt. The model sees one long row of tokens, and a
# row of slots beside it that says where the key and value of each must go. That row is called the **slot
# mapping**.
#
# ```
#  sequence  A: 1 token from position 9     B: 3 tokens from position 0
#  tokens    [ a9,                            b0, b1, b2 ]
#  mapping   [ 21,                            12, 13, 14 ]         tables  A [7, 2, 5]   B [3]
# ```


# %%
def slot_mapping(tables: list[list[int]], starts: list[int], lengths: list[int], block_size: int) -> list[int]:
    """Slots of the tokens that one step computes: for each sequence, positions starts[i] .. starts[i] + lengths[i] - 1.

    >>> slot_mapping([[7, 2, 5], [3]], starts=[9, 0], lengths=[1, 3], block_size=4)
    [21, 12, 13, 14]
    """
    raise NotImplementedError("lesson 4, task 2: slot_mapping")


# %%
def random_tables(rng: random.Random, block_size: int) -> tuple[list[list[int]], list[int]]:
    """Tables that share no block, and how many tokens live in each sequence."""
    blocks = list(range(1, 40))
    rng.shuffle(blocks)
    tables, lengths = [], []
    for _ in range(rng.randint(1, 6)):
        length = rng.randint(1, 5 * block_size)
        tables.append([blocks.pop() for _ in range(-(-length // block_size))])
        lengths.append(length)
    return tables, lengths


def test_2_the_picture() -> None:
    assert slot_mapping([[7, 2, 5], [3]], starts=[9, 0], lengths=[1, 3], block_size=4) == [21, 12, 13, 14]


def test_2_no_two_tokens_share_a_slot() -> None:
    """The law behind all of this: the map is injective, two tokens never share a slot."""
    for seed in range(200):
        rng = random.Random(seed)
        block_size = rng.choice([1, 2, 4, 16])
        tables, lengths = random_tables(rng, block_size)
        mapping = slot_mapping(tables, [0] * len(tables), lengths, block_size)
        assert len(set(mapping)) == sum(lengths), f"two tokens in one slot: {tables=}, {lengths=}, {block_size=}"
        assert min(mapping) >= block_size, "a token lies in the null block"


def test_2_texts_can_be_read_back() -> None:
    """Three texts grow in turns and end up interleaved in one pool; each reads as it was written."""
    pool: list[str] = ["?"] * 4 * 32
    texts = ["the cat sat on the mat", "paging needs no prophet", "abc"]
    tables: list[list[int]] = [[], [], []]
    next_block = 1
    for position in range(max(map(len, texts))):
        for text, table in zip(texts, tables, strict=True):
            if position < len(text):
                if position == 4 * len(table):
                    table.append(next_block)
                    next_block += 1
                (where,) = slot_mapping([table], [position], [1], 4)
                pool[where] = text[position]
    for text, table in zip(texts, tables, strict=True):
        assert "".join(pool[slot(table, p, 4)] for p in range(len(text))) == text


if __name__ == "__main__":
    test_2_the_picture()
    test_2_no_two_tokens_share_a_slot()
    test_2_texts_can_be_read_back()

# %% [markdown]
# ## Task 3: `who_lives_at`
#
# The way back: a slot is given, who lives there? An engine never needs to know, but people do. The screen's
# inspector asks this when you point at a block. The question has one answer because no two tokens share a
# slot (a map with this property is called *injective*).
#
# A slot is nobody's if its block is in no table, or if it lies behind the end of the text that owns the
# block: `lengths` says how many tokens live in each sequence.


# %%
def who_lives_at(tables: list[list[int]], lengths: list[int], where: int, block_size: int) -> tuple[int, int] | None:
    """(sequence, position) of the token in a slot; None if the slot holds no live token.

    >>> who_lives_at([[7, 2, 5], [3]], lengths=[10, 3], where=10, block_size=4)
    (0, 6)
    >>> who_lives_at([[7, 2, 5], [3]], lengths=[10, 3], where=22, block_size=4) is None  # block 5, behind the end
    True
    """
    raise NotImplementedError("lesson 4, task 3: who_lives_at")


# %%
def test_3_is_the_inverse_of_slot() -> None:
    for seed in range(100):
        rng = random.Random(seed)
        block_size = rng.choice([1, 2, 4, 16])
        tables, lengths = random_tables(rng, block_size)
        live = {}
        for sequence, length in enumerate(lengths):
            for position in range(length):
                live[slot(tables[sequence], position, block_size)] = (sequence, position)
        for where in range(40 * block_size):
            assert who_lives_at(tables, lengths, where, block_size) == live.get(where), (
                f"{where=}, {tables=}, {lengths=}"
            )


if __name__ == "__main__":
    test_3_is_the_inverse_of_slot()

# %% [markdown]
# ## What was won
#
# The same three texts, in blocks. And what the translation costs: your Python, and the same in numpy, as
# engines do it.


# %%
def what_was_won() -> None:
    lengths, block = (700, 800, 900), 16
    needed = sum(-(-n // block) * block for n in lengths)
    print(f"in blocks of {block}: {0:>9,} tokens moved, {needed:>6,} slots needed\n")
    rng = random.Random(0)
    blocks = rng.sample(range(1, 20_000), 256 * 64)
    tables = [blocks[64 * i : 64 * i + 64] for i in range(256)]
    starts = [rng.randrange(64 * block) for _ in tables]

    def in_numpy() -> np.ndarray:
        entry, place = starts_array // block, starts_array % block
        return table_array[np.arange(256), entry] * block + place

    starts_array, table_array = np.array(starts), np.array(tables)
    assert in_numpy().tolist() == slot_mapping(tables, starts, [1] * 256, block)
    for name, action in (("yours", lambda: slot_mapping(tables, starts, [1] * 256, block)), ("numpy", in_numpy)):
        best = float("inf")
        for _ in range(20):
            start = time.perf_counter()
            action()
            best = min(best, time.perf_counter() - start)
        print(f"one decoding step of 256 sequences, translated by {name}: {1e6 * best:7.1f} microseconds")


if __name__ == "__main__":
    what_was_won()

# %% [markdown]
# ## What real engines do
#
# - **vLLM** computes the slot mapping on the GPU, in a small kernel that does your line for all tokens at
#   once, because tables live there too
#   ([`block_table.py`](https://github.com/vllm-project/vllm/blob/main/vllm/v1/worker/block_table.py)).
# - **FlashInfer** stores the tables of a batch as one long row of pages plus an offset for each sequence: no
#   padding ([page table layout](https://docs.flashinfer.ai/tutorials/kv_layout.html)).
# - **CPUs** do the same with each memory access, in hardware, with a cache of recent translations (the TLB).
#   We do not need one: a kernel translates once for a block and then reads the whole block.
# - `who_lives_at` has a real cousin in operating systems: the *reverse map* from page frames to their owners.
#
# ## Where this lives in minipaged
#
# - `minipaged/execution/step_inputs.py`: `StepInputs` turns a step's plan into a slot mapping.
# - `kernels/cache/cache_write.py`: `write_kv` takes it.
# - `minipaged/scheduling/plan.py`: `StepPlan` carries `tables`, `starts` and `lengths`, the arguments of task
#   2.
# - `minipaged/memory/tables.py`: `SequenceBlocks` owns one sequence's table.
