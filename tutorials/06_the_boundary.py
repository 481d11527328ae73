# %% [markdown]
# # 6. The boundary
#
# *30 minutes. You need lessons 3 and 4.*
#
# ## Why
#
# A text grows by a token, and sometimes it needs a new block. When? "When the last block is full" is easily
# said. Here are three ways to write it, all found in the wild:
#
# ```
#  if length % block_size == 0:                   take a block        # length before the new token, or with it?
#  if length % block_size == 1:                   take a block        # right for one of the two, wrong for the other
#  if blocks_for(length + 1) > len(table):        take a block        # need against have
# ```
#
# The first two are right at one moment only, and that moment depends on who calls whom: has the new token
# been counted yet? Somebody moves a line, adds chunked prompts, or copies the function into another engine,
# and the rule is off by one. It works for most lengths. It fails at the boundary, and only then.
#
# The third way cannot go wrong like that. It compares what is **needed** for a length with what is **there**.
# It may be called twice, early, late, for one token or for a thousand. This lesson is about that habit of
# mind: decide by state, never by the moment.
#
# ## The pain
#
# Here is a manager that decides by a modulo. Two texts go in, token by token. What comes out?

# %%
from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Literal

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from minipaged.learn.tape import Tape


class Blocks:
    """What all managers of this lesson have: free blocks, and for each sequence a table and a length. Block 0 is the null block."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self.free_blocks = deque(range(1, num_blocks))
        self.tables: dict[str, list[int]] = {}
        self.lengths: dict[str, int] = {}

    def free(self, sequence: str) -> None:
        """The sequence is gone, its blocks come back."""
        self.free_blocks.extend(self.tables.pop(sequence))
        del self.lengths[sequence]


class ByModulo(Blocks):
    """As it is often written: a prompt is rounded up, a single token asks the modulo."""

    def grow(self, sequence: str, count: int) -> bool:
        """Room for `count` more tokens; False if there is none."""
        table = self.tables.setdefault(sequence, [])
        length = self.lengths.setdefault(sequence, 0)
        wanted = 1 if length % self.block_size == 1 else 0
        if count > 1 or not table:
            wanted = -(-count // self.block_size)
        if wanted > len(self.free_blocks):
            return False
        table += [self.free_blocks.popleft() for _ in range(wanted)]
        self.lengths[sequence] += count
        return True


def through_the_pool(manager: Blocks, texts: dict[str, str], prompt: int) -> dict[str, str]:
    """Write texts into a pool, token by token in turns, and read them back. A table that is too short reads as padded with 0."""
    slots = manager.num_blocks * manager.block_size
    pool = list((LEFT_BEHIND * slots)[:slots])

    def slot(name: str, position: int) -> int:
        table = [*manager.tables[name], *[0] * 99]
        return table[position // manager.block_size] * manager.block_size + position % manager.block_size

    for position in range(max(map(len, texts.values()))):
        for name, text in texts.items():
            if position < len(text):
                if position == 0:
                    manager.grow(name, prompt)
                elif position >= prompt:
                    manager.grow(name, 1)
                pool[slot(name, position)] = text[position]
    return {name: "".join(pool[slot(name, p)] for p in range(len(text))) for name, text in texts.items()}


TEXTS = {"A": "the cat sat on the mat and slept", "B": "PAGES NEED NO PROPHET AT ALL!!!!"}
LEFT_BEHIND = "0123456789"  # what an earlier user wrote into these blocks; nobody wipes memory between requests


def the_pain() -> None:
    for name, text in through_the_pool(ByModulo(32, 4), TEXTS, prompt=6).items():
        wrong = sum(a != b for a, b in zip(text, TEXTS[name], strict=True))
        print(f"{name} wrote {TEXTS[name]!r}\n  reads {text!r}: {wrong} of {len(text)} letters are not its own")
    print()


if __name__ == "__main__":
    the_pain()

# %% [markdown]
# Nothing crashed. But some tokens came one step before their block: they went through the padding of the
# table into the null block. The digits are what somebody else had left in the place where they should have
# gone. A real model would write slightly odd sentences, and nobody would know why.
#
# ## Task 1: `blocks_for`
#
# How many blocks do `tokens` tokens need? Whole numbers only: `math.ceil(tokens / block_size)` goes through a
# float, and floats have an end.
#
# ```console
# $ python 06_the_boundary.py
# NotImplementedError: lesson 6, task 1: blocks_for
# ```


# %%
def blocks_for(tokens: int, block_size: int) -> int:
    """The fewest blocks that hold `tokens` tokens.

    >>> blocks_for(9, block_size=4)
    3
    """
    raise NotImplementedError("lesson 6, task 1: blocks_for")


# %%
def test_1_at_and_around_the_boundary() -> None:
    assert [blocks_for(n, 4) for n in (0, 1, 3, 4, 5, 8, 9)] == [0, 1, 1, 1, 2, 2, 3]
    assert blocks_for(10**18 + 1, 10**9) == 10**9 + 1


if __name__ == "__main__":
    test_1_at_and_around_the_boundary()

# %% [markdown]
# ## Task 2: `Manager.grow`
#
# One method for everything: a prompt, a piece of a prompt, one more token. Count what is needed for the new
# length and what the table has. Take the difference. If there are not enough free blocks, return `False` and
# leave everything as it was, including a sequence that does not exist yet: it still does not.


# %%
class Manager(Blocks):
    """Decides by need and have."""

    def grow(self, sequence: str, count: int) -> bool:
        """Room for `count` more tokens of a sequence, new or known. False, and nothing changed, if there is none.

        >>> manager = Manager(num_blocks=10, block_size=4)
        >>> manager.grow("A", 3), manager.grow("A", 2), manager.tables, manager.lengths
        (True, True, {'A': [1, 2]}, {'A': 5})
        """
        raise NotImplementedError("lesson 6, task 2: Manager.grow")


# %%
def test_2_a_block_comes_with_the_token_that_needs_it() -> None:
    manager = Manager(10, 4)
    assert manager.grow("A", 3)
    sizes = []
    for _ in range(6):
        assert manager.grow("A", 1)
        sizes.append(len(manager.tables["A"]))
    assert sizes == [1, 2, 2, 2, 2, 3], "lengths 4, 5, 6, 7, 8, 9 in blocks of 4"


def test_2_prompts_may_come_in_pieces() -> None:
    whole, pieces = Manager(20, 4), Manager(20, 4)
    whole.grow("A", 21)
    for count in (5, 1, 7, 8):
        pieces.grow("A", count)
    assert pieces.tables == whole.tables
    assert pieces.lengths == {"A": 21}


def test_2_no_room_changes_nothing() -> None:
    manager = Manager(4, 4)
    assert manager.grow("A", 6)
    before = (dict(manager.tables), dict(manager.lengths), list(manager.free_blocks))
    assert manager.grow("B", 5) is False
    assert manager.grow("A", 7) is False
    assert (manager.tables, manager.lengths, list(manager.free_blocks)) == before
    assert manager.grow("A", 6), "12 tokens fit exactly"


def test_2_texts_come_back_as_they_were_written() -> None:
    for prompt in range(1, 10):
        assert through_the_pool(Manager(32, 4), TEXTS, prompt) == TEXTS


if __name__ == "__main__":
    test_2_a_block_comes_with_the_token_that_needs_it()
    test_2_prompts_may_come_in_pieces()
    test_2_no_room_changes_nothing()
    test_2_texts_come_back_as_they_were_written()

# %% [markdown]
# ## Task 3: `law`
#
# You know the game from lesson 3: write what must always be true, and be judged by the bugs that it finds.
# Operations are `("grow", name, count)` and `("free", name, 0)`; the judge frees only what exists. You may
# look at `tables`, `lengths` and `free_blocks`, but keep your own lengths too: a manager that miscounts will
# miscount everywhere.
#
# What must hold after each operation?
#
# - every table is exactly as long as its text needs: neither late nor early;
# - no block is in two tables, or twice in one, and none is the null block;
# - what is in tables and what is free are together all blocks;
# - `grow` refuses only when there really is too little, and a refusal changes nothing.
#
# You pass with six of nine bugs. Do not read them yet.

# %%
Operation = tuple[Literal["grow", "free"], str, int]


def law(manager: Manager, operations: list[Operation]) -> None:
    """Perform the operations; AssertionError as soon as the manager breaks a rule.

    >>> law(Manager(7, 3), [("grow", "A", 4), ("free", "A", 0)])  # nothing to complain about: it returns nothing
    """
    raise NotImplementedError("lesson 6, task 3: law")


# %% [markdown]
# The judge: small pools, short lists, blocks of three, so that boundaries are everywhere.

# %%
NUM_BLOCKS, BLOCK_SIZE = 7, 3
operation_lists = st.lists(
    st.tuples(st.sampled_from(["grow", "grow", "grow", "free"]), st.sampled_from("ABC"), st.integers(1, 8)), max_size=12
)


def sensible(make: Callable[[int, int], Blocks], raw: list[Operation]) -> list[Operation]:
    """Without the frees of what does not exist: a dry run on a manager of its own finds out."""
    dry, kept = make(NUM_BLOCKS, BLOCK_SIZE), list[Operation]()
    for kind, name, count in raw:
        if kind == "grow":
            dry.grow(name, count)
            kept.append((kind, name, count))
        elif name in dry.tables:
            dry.free(name)
            kept.append((kind, name, 0))
    return kept


def broken_by(make: Callable[[int, int], Blocks], *, shrink: bool = False) -> list[Operation] | None:
    """The shortest operations found that break the law, or None."""
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
    def search(raw: list[Operation]) -> None:
        operations = sensible(make, raw)
        try:
            law(make(NUM_BLOCKS, BLOCK_SIZE), operations)
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


# %%
def test_3_your_own_manager_obeys_the_law() -> None:
    broken = broken_by(Manager, shrink=True)
    if broken is not None:
        try:
            law(Manager(NUM_BLOCKS, BLOCK_SIZE), broken)
        except Exception as error:
            raise AssertionError(
                f"your own manager passed its tests, but your law complains after: {broken}\n"
                f"it raised {type(error).__name__}: {error}"
            ) from error


def test_3_the_law_finds_the_modulo() -> None:
    assert broken_by(ByModulo) is not None, "the manager that garbled the two texts gets through your law"


def test_3_the_law_finds_bugs() -> None:
    escaped = [bug.__doc__ for bug in BUGS if broken_by(bug) is None]
    found = len(BUGS) - len(escaped)
    grade = f"your law finds {found} of {len(BUGS)} bugs" + "".join(f"\n  not found: {bug}" for bug in escaped)
    assert found >= 6, grade
    print(grade)


# %% [markdown]
# ## The nine bugs
#
# Read on only when your law is written.


# %%
class Late(Manager):
    """the late one: a new block comes one token after it is needed"""

    def grow(self, sequence: str, count: int) -> bool:
        done = super().grow(sequence, count)
        if done and self.lengths[sequence] % self.block_size == 1:
            self.free_blocks.appendleft(self.tables[sequence].pop())
        return done


class Early(Manager):
    """the early one: a full text gets a block for a token that may never come"""

    def grow(self, sequence: str, count: int) -> bool:
        done = super().grow(sequence, count)
        if done and self.lengths[sequence] % self.block_size == 0 and self.free_blocks:
            self.tables[sequence].append(self.free_blocks.popleft())
        return done


class Single(Manager):
    """the one at a time: however many blocks are missing, it takes one"""

    def grow(self, sequence: str, count: int) -> bool:
        have = len(self.tables.get(sequence, []))
        done = super().grow(sequence, count)
        while done and len(self.tables[sequence]) > have + 1:
            self.free_blocks.appendleft(self.tables[sequence].pop())
        return done


class Leaky(Manager):
    """the leaky one: a refusal costs a block"""

    def grow(self, sequence: str, count: int) -> bool:
        done = super().grow(sequence, count)
        if not done and self.free_blocks:
            self.free_blocks.popleft()
        return done


class Hopeful(Manager):
    """the hopeful one: tokens count even when there was no room for them"""

    def grow(self, sequence: str, count: int) -> bool:
        done = super().grow(sequence, count)
        if not done and sequence in self.lengths:
            self.lengths[sequence] += count
        return done


class Lazy(Manager):
    """the lazy one: of a long text, the last block is not freed"""

    def free(self, sequence: str) -> None:
        if len(self.tables[sequence]) > 2:
            self.tables[sequence].pop()
        super().free(sequence)


class Shy(Manager):
    """the shy one: it never touches the last free block"""

    def grow(self, sequence: str, count: int) -> bool:
        missing = blocks_for(self.lengths.get(sequence, 0) + count, self.block_size) - len(
            self.tables.get(sequence, [])
        )
        return missing < max(1, len(self.free_blocks)) and super().grow(sequence, count)


class Nullified(Manager):
    """the one without a taboo: when one block is missing, the null block will do"""

    def grow(self, sequence: str, count: int) -> bool:
        missing = blocks_for(self.lengths.get(sequence, 0) + count, self.block_size) - len(
            self.tables.get(sequence, [])
        )
        if missing == 1 and not self.free_blocks:
            self.free_blocks.append(0)
        return super().grow(sequence, count)


class Borrower(Manager):
    """the borrower: when no block is left, it takes somebody else's last one, who keeps it too"""

    def grow(self, sequence: str, count: int) -> bool:
        missing = blocks_for(self.lengths.get(sequence, 0) + count, self.block_size) - len(
            self.tables.get(sequence, [])
        )
        others = [table for name, table in self.tables.items() if name != sequence and table]
        if missing == 1 and not self.free_blocks and others:
            self.free_blocks.append(others[0][-1])
        return super().grow(sequence, count)


BUGS: list[type[Manager]] = [Late, Early, Single, Leaky, Hopeful, Lazy, Shy, Nullified, Borrower]

if __name__ == "__main__":
    test_3_your_own_manager_obeys_the_law()
    test_3_the_law_finds_the_modulo()
    test_3_the_law_finds_bugs()

# %% [markdown]
# ## What was won
#
# Your mark, and the shortest counterexample against the manager with the modulo. It is also recorded: in your
# lessons' folder, `minipaged learn show 6` replays it on the screen, operation by operation. In the last
# picture the table does not fit its text. At one length the modulo comes too early, at another too late.


# %%
def picture(manager: Blocks) -> str:
    lines = []
    for name, table in manager.tables.items():
        length, size = manager.lengths[name], manager.block_size
        cells = []
        for entry in range(max(len(table), blocks_for(length, size))):
            filled = min(max(length - entry * size, 0), size)
            where = f"{table[entry]}" if entry < len(table) else "no block!"
            cells.append(f"{where}[{'#' * filled}{'.' * (size - filled)}]")
        lines.append(f"      {name}: {length} tokens  {' '.join(cells)}")
    return "\n".join(lines)


def what_was_won() -> None:
    escaped = [bug.__doc__ for bug in BUGS if broken_by(bug) is None]
    print(
        f"your law finds {len(BUGS) - len(escaped)} of {len(BUGS)} bugs",
        *(f"\n  not found: {name}" for name in escaped),
    )
    story = broken_by(ByModulo, shrink=True) or []
    print("\nthe shortest way to break the modulo:")
    manager, tape = ByModulo(NUM_BLOCKS, BLOCK_SIZE), Tape(NUM_BLOCKS, BLOCK_SIZE)
    for kind, name, count in story:
        if kind == "grow":
            manager.grow(name, count)
        else:
            manager.free(name)
        tape.note(manager.tables, manager.lengths)
        print(f"  {kind}({name!r}{f', {count}' if count else ''})\n{picture(manager)}")
    saved = tape.save("06_the_boundary")
    if saved is not None:
        print(f"\nrecorded: minipaged learn show 6   ({saved})")


if __name__ == "__main__":
    what_was_won()

# %% [markdown]
# ## What real engines do
#
# - **nano-vllm** decides by `len(seq) % block_size == 1`: correct there, since its sequence counts the new
#   token before it asks. Copies of it that changed the order of those two lines got the bug you fixed
#   ([`block_manager.py`](https://github.com/GeeeekExplorer/nano-vllm/blob/main/nanovllm/engine/block_manager.py)).
# - **vLLM** rounds up the tokens that are needed and subtracts the blocks that are there
#   ([`single_type_kv_cache_manager.py`](https://github.com/vllm-project/vllm/blob/main/vllm/v1/core/single_type_kv_cache_manager.py)).
# - Off-by-one errors at a power of two have a long history. What is new is how cheap it has become to find
#   them: a law, and a machine that searches.
#
# ## Where this lives in minipaged
#
# - `minipaged/memory/block_manager.py`: `BlockManager.append` compares need with have.
# - `minipaged/laws.py`: `LAWS` says it as laws L07 (a failed allocation changes nothing), L10 and L11 (need
#   and have).
# - `tests/mutants`: the same game with minipaged's own classes: each historical bug is put in, and the laws
#   must find it.
