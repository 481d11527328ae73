# %% [markdown]
# # 9. Beam search
#
# *30 minutes. You need lesson 8.*
#
# ## Why
#
# Greedy generation takes the likeliest token and never looks back. **Beam search** keeps the best few texts,
# the beams. At each step it extends each of them by every possible token, scores all the results, and keeps
# the best few again. So one beam may have two children among the winners, and another none:
#
# ```
#  old beams            the best four continuations        new beams     parent
#
#  0  the cat     ──┬── the cat sat     −1.1         ──►   0             0
#                   └── the cat ran     −1.4         ──►   1             0
#  1  a dog       ───── a dog is        −2.0         ──►   3             1
#  2  my cat      ───── my cat was      −1.7         ──►   2             2
#  3  no one            no child among the best: it dies
# ```
#
# For the KV cache this is much work. At every step beams swap places, double and end. A cache that keeps each
# beam's tokens in a stretch of its own has to move them: the text of the parent is copied into the place of
# the child, all of it, at every step.
#
# You have the cure already. With block tables, "the child continues the parent" is a fork: copy a list of
# block numbers, raise some counts. The keys and values stay where they are.
#
# The same picture shows why order matters. The winners' parents and the losers are both among the old beams.
# If the old beams are freed first, a block that a winner needs may reach count 0, be handed out, and be
# overwritten. So: **fork the winners before you free the losers.**
#
# ## The pain
#
# How much would have to be moved? Here is a tiny "language": the next token's probabilities depend on the
# last two tokens. The plain search keeps lists, and counts the tokens that change place.

# %%
from __future__ import annotations

import math
import random
from functools import cache
from typing import NamedTuple

from minipaged.learn.so_far import Manager

VOCAB = 40


@cache
def log_probabilities(before: int, last: int) -> tuple[float, ...]:
    """log p(next | the last two tokens): a fixed, random and fairly sure language."""
    rng = random.Random(1_000 * before + last)
    weights = [rng.random() ** 12 for _ in range(VOCAB)]
    return tuple(math.log(w / sum(weights) + 1e-9) for w in weights)


def logprobs_of(tokens: list[int]) -> tuple[float, ...]:
    return log_probabilities(*([0, 0, *tokens][-2:]))


def the_pain() -> None:
    print("tokens moved by a cache that keeps each beam in a place of its own, 20 prompt and 60 answer tokens:")
    for width in (2, 4, 6):
        texts, scores, moved = [list(range(20))] * width, [0.0] + [-1e9] * (width - 1), 0
        for _ in range(60):
            options = sorted(
                ((s + p, i, t) for i, s in enumerate(scores) for t, p in enumerate(logprobs_of(texts[i]))), reverse=True
            )[:width]
            moved += sum(len(texts[parent]) for place, (_, parent, _) in enumerate(options) if place != parent)
            texts = [[*texts[parent], token] for _, parent, token in options]
            scores = [score for score, _, _ in options]
        print(f"  {width} beams: {moved:>6,}")
    print()


if __name__ == "__main__":
    the_pain()

# %% [markdown]
# ## Task 1: `best`
#
# The search itself, without any memory. Each beam has a score: the sum of the log-probabilities of its
# tokens. Given the scores and, for each beam, the log-probabilities of its next token, find the `width` best
# continuations over all beams, best first. When two are equal, the earlier beam goes first, then the smaller
# token.
#
# ```console
# $ python 09_beam_search.py
# NotImplementedError: lesson 9, task 1: best
# ```


# %%
class Candidate(NamedTuple):
    parent: int  # which beam it continues
    token: int
    score: float


def best(scores: list[float], logprobs: list[tuple[float, ...]], width: int) -> list[Candidate]:
    """The `width` best continuations of all beams, best first.

    >>> best(scores=[-1.0, -2.0], logprobs=[(-0.5, -3.0), (-0.25, -9.0)], width=2)
    [Candidate(parent=0, token=0, score=-1.5), Candidate(parent=1, token=0, score=-2.25)]
    """
    raise NotImplementedError("lesson 9, task 1: best")


# %%
def test_1_the_best_of_all_beams() -> None:
    found = best([-1.0, -2.0], [(-0.5, -3.0, -2.0), (-0.1, -0.2, -9.0)], 3)
    assert found == [(0, 0, -1.5), (1, 0, -2.1), (1, 1, -2.2)]


def test_1_one_beam_may_win_everything_and_ties_are_settled() -> None:
    assert [c.parent for c in best([0.0, -50.0], [(-1.0, -1.0), (-1.0, -1.0)], 2)] == [0, 0]
    assert [c[:2] for c in best([-1.0, -1.0], [(-1.0, -1.0), (-1.0, -1.0)], 3)] == [(0, 0), (0, 1), (1, 0)]


if __name__ == "__main__":
    test_1_the_best_of_all_beams()
    test_1_one_beam_may_win_everything_and_ties_are_settled()

# %% [markdown]
# ## Task 2: `reorder`
#
# Now the memory. The manager is lesson 8's, finished; it is in `minipaged/learn/so_far.py`.
#
# `beams` are the names of the sequences. `parents` says for each new beam which old one it continues, and
# `names` are the names of the new ones, none of them in use yet.
#
# ```
#              tables                              holders of block    7   4   9
#  before      b0 [7, 4]   b1 [7, 9]                                   2   1   1        parents [0, 0]
#  all forked  b0 [7, 4]   b1 [7, 9]   c0 [7, 4]   c1 [7, 4]           4   3   1
#  old freed                           c0 [7, 4]   c1 [7, 4]           2   2   0        9 is free, 7 and 4 never were
# ```
#
# Edit tables, and nothing else: no token may move. Afterwards the new beams exist and the old ones do not. It
# must work when not a single block is free. It must also work when one beam has all the children, which is
# where the wrong order would be fatal.


# %%
def reorder(manager: Manager, beams: list[str], parents: list[int], names: list[str]) -> None:
    """Replace `beams` by `names`: new beam i continues beams[parents[i]].

    >>> manager = Manager(num_blocks=6, block_size=4)
    >>> manager.add("a"), manager.add("b"), manager.append("b", 7)
    (None, None, None)
    >>> reorder(manager, beams=["a", "b"], parents=[1, 1], names=["c", "d"])
    >>> manager.tables
    {'c': [1], 'd': [1]}
    """
    raise NotImplementedError("lesson 9, task 2: reorder")


# %%
def some_beams(num_blocks: int = 12) -> tuple[Manager, list[str]]:
    """Three beams with texts of their own, in blocks of 4."""
    manager = Manager(num_blocks, 4)
    for i in range(3):
        manager.add(f"b{i}")
        for token in range(6):
            manager.append(f"b{i}", 10 * i + token)
    return manager, ["b0", "b1", "b2"]


def test_2_children_read_what_their_parents_wrote() -> None:
    manager, beams = some_beams()
    old = [manager.read(beam) for beam in beams]
    reorder(manager, beams, parents=[1, 1, 0], names=["c0", "c1", "c2"])
    assert [manager.read(name) for name in ("c0", "c1", "c2")] == [old[1], old[1], old[0]]
    assert set(manager.tables) == {"c0", "c1", "c2"}, "the old beams must be gone, the new ones there"


def test_2_no_token_moves() -> None:
    manager, beams = some_beams()
    before = [list(block) for block in manager.contents]
    reorder(manager, beams, parents=[2, 0, 2], names=["c0", "c1", "c2"])
    assert manager.contents == before
    assert manager.copied == 0


def test_2_works_without_a_free_block() -> None:
    manager, beams = some_beams(num_blocks=7)
    assert not manager.free_blocks
    reorder(manager, beams, parents=[0, 0, 0], names=["c0", "c1", "c2"])
    assert manager.read("c2") == [0, 1, 2, 3, 4, 5]
    assert len(manager.free_blocks) == 4, "the losers' blocks come back"


def test_2_step_after_step_nothing_is_lost() -> None:
    manager, beams = some_beams()
    for step in range(5):
        names = [f"{step}.{i}" for i in range(3)]
        reorder(manager, beams, parents=[step % 3, 0, 2], names=names)
        beams = names
        for i, beam in enumerate(beams):
            manager.append(beam, 100 * step + i)
    for beam in beams:
        manager.free(beam)
    assert len(manager.free_blocks) == manager.num_blocks - 1, "blocks were lost on the way"


if __name__ == "__main__":
    test_2_children_read_what_their_parents_wrote()
    test_2_no_token_moves()
    test_2_works_without_a_free_block()
    test_2_step_after_step_nothing_is_lost()

# %% [markdown]
# ## Task 3: `saved`
#
# What is the sharing worth at this moment? Count the blocks that the beams' tables name, each as often as it
# is named, and the blocks that really exist. The paper reports the share that is saved (Fig. 15), and so will
# you.


# %%
def saved(tables: list[list[int]]) -> float:
    """The share, from 0 to 1, of table entries that sharing made free of charge.

    >>> saved([[1, 2, 3], [1, 2, 4], [1, 2, 4]])  # nine entries, four blocks
    0.5555555555555556
    """
    raise NotImplementedError("lesson 9, task 3: saved")


# %%
def test_3_counts_entries_against_blocks() -> None:
    assert saved([[1, 2], [3, 4]]) == 0.0
    assert saved([[1, 2], [1, 2]]) == 0.5
    assert abs(saved([[1, 2, 3], [1, 2, 4], [1, 5, 6]]) - (1 - 6 / 9)) < 1e-12


def search(width: int, prompt: int, answer: int, block_size: int) -> tuple[list[list[int]], Manager, float]:
    """A beam search over paged memory, with your three functions. Returns texts, the manager, and the mean share saved."""
    manager, shares = Manager(2_000, block_size), list[float]()
    manager.add("0.0")
    for token in range(prompt):
        manager.append("0.0", token)
    beams, scores = ["0.0"], [0.0]
    for step in range(1, answer + 1):
        texts = [manager.read(beam) for beam in beams]
        chosen = best(scores, [logprobs_of(text) for text in texts], width)
        names = [f"{step}.{i}" for i in range(width)]
        reorder(manager, beams, [c.parent for c in chosen], names)
        for name, candidate in zip(names, chosen, strict=True):
            manager.append(name, candidate.token)
        beams, scores = names, [c.score for c in chosen]
        shares.append(saved([manager.tables[beam] for beam in beams]))
    return [manager.read(beam) for beam in beams], manager, sum(shares) / len(shares)


def search_with_lists(width: int, prompt: int, answer: int) -> list[list[int]]:
    """The same search by copying lists: obviously right."""
    texts, scores = [list(range(prompt))], [0.0]
    for _ in range(answer):
        chosen = best(scores, [logprobs_of(text) for text in texts], width)
        texts = [[*texts[c.parent], c.token] for c in chosen]
        scores = [c.score for c in chosen]
    return texts


def test_3_the_same_beams_as_with_lists() -> None:
    for width in (1, 2, 5):
        for block_size in (1, 4, 16):
            assert search(width, 7, 25, block_size)[0] == search_with_lists(width, 7, 25)


if __name__ == "__main__":
    test_3_counts_entries_against_blocks()
    test_3_the_same_beams_as_with_lists()

# %% [markdown]
# ## What was won
#
# Prompts and answers as long as those of the paper's Alpaca set, on average. Beside your share of saved
# blocks stands the paper's. They come from different models: theirs is a real one, yours knows two tokens of
# context. How long ago the beams' common ancestor lived depends on the language, and with it the share.

# %%
PROMPT, ANSWER = 19, 58  # mean lengths of Alpaca, paper section 6.1
PAPER_SAVED = {2: 0.3756, 4: 0.5313, 6: 0.5516}  # beam search on Alpaca, paper Fig. 15b


def what_was_won() -> None:
    print("beams   tokens moved: by place   by tables (copy-on-write)   blocks saved   paper, Fig. 15")
    for width, paper in PAPER_SAVED.items():
        texts, manager, share = search(width, PROMPT, ANSWER, block_size=16)
        by_place = 0
        alive, scores = [list(range(PROMPT))], [0.0]
        for _ in range(ANSWER):
            chosen = best(scores, [logprobs_of(text) for text in alive], width)
            by_place += sum(len(alive[c.parent]) for place, c in enumerate(chosen) if place != c.parent)
            alive = [[*alive[c.parent], c.token] for c in chosen]
            scores = [c.score for c in chosen]
        assert texts == alive
        print(f"{width:>5}{by_place:>24,}{'at most':>16}{16 * manager.copied:>8,}{share:>18.1%}{paper:>17.1%}")


if __name__ == "__main__":
    what_was_won()

# %% [markdown]
# The few tokens that are copied are those of half-filled last blocks, where two children of one beam must
# part.
#
# ## What real engines do
#
# - **Hugging Face transformers** reorders by copying: `reorder_cache` selects the parents' rows of every key
#   and value tensor, at every step
#   ([`cache_utils.py`](https://github.com/huggingface/transformers/blob/main/src/transformers/cache_utils.py)).
# - **The vLLM paper** forks as you do (Kwon et al. 2023, section 4.4, Fig. 9). vLLM has since moved beam
#   search out of its core and builds it from single-token requests on top of the prefix cache ([RFC
#   8306](https://github.com/vllm-project/vllm/issues/8306)).
# - Real beam searches also handle texts that end: finished beams leave the memory and compete by a score that
#   is normalized for length. That is bookkeeping, not memory.
#
# ## Where this lives in minipaged
#
# - `minipaged/scheduling/beam.py`: `BeamSearch.advance` is task 1, with ends and length penalties, equal to
#   transformers'.
# - `minipaged/scheduling/groups.py`: `_commit_beams` is task 2. It spares itself the fork for a beam's first
#   child, which simply goes on.
# - `minipaged/lab/simulation/beams.py`: `beam_tree`, a model of beams that die and double, fitted to the paper's Fig.
#   15.
