# %% [markdown]
# # 17. Offload
#
# *35 minutes. You need lessons 2 and 11.*
#
# ## Why
#
# Keys and values that do not fit into the pool need not be lost. Lesson 11 carried them to the host. Behind the
# host there is a disk, larger again and slower again. Each such place is a **tier**, and each way between two of
# them is a **link**:
#
# ```
#  device   fast, small, dear                     the pool
#     │  host link      so many bytes a second, and a fixed time for each transfer, however small
#  host     slower, larger                        lesson 11's host pool
#     │  disk           fewer bytes a second, more time for each transfer
#  disk     slow, very large
# ```
#
# There is always another way to get keys and values back: compute them again, for the tokens are known. So for each
# request that has to make way, and for each cached prefix that somebody asks for again, there is one question:
# *is it quicker to carry, or to compute?* The answer is arithmetic, and you will do it.
#
# What decides, more than the bytes, are the *pieces*. A block's keys lie side by side, and so do its values, but each
# layer has its own pool, and the blocks of a table lie anywhere. So what can be carried in one go is one block's
# keys, or its values, of one layer:
#
# ```
#  a text of 64 tokens, 2 layers       blocks of 16:   4 blocks x 2 layers x 2 (keys, values) =  16 pieces
#                                      blocks of  1:  64 blocks x 2 layers x 2                = 256 pieces, of the same bytes in all
# ```
#
# ## The pain
#
# The same bytes, copied in one piece and in many. Measured now, on your machine.

# %%
from __future__ import annotations

import os
import random
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from minipaged.learn.tiny_model import TinyModel, dense_attention

torch.set_num_threads(1)


def seconds_of(work: Callable[[], object], times: int = 5) -> float:
    """How long it takes, at best."""
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def copy_in_pieces(source: Tensor, target: Tensor, pieces: int) -> None:
    for here, there in zip(source.chunk(pieces), target.chunk(pieces), strict=True):
        there.copy_(here)


def the_pain() -> None:
    source = torch.randn(2**20)
    target = torch.empty_like(source)
    print(f"{source.nbytes / 2**20:.0f} MiB, copied from memory to memory:")
    for pieces in (1, 64, 4096, 65536):
        seconds = seconds_of(lambda pieces=pieces: copy_in_pieces(source, target, pieces))
        print(f"{pieces:>8,} pieces {1e3 * seconds:9.2f} ms {source.nbytes / seconds / 1e9:8.2f} GB a second")
    print()


if __name__ == "__main__":
    the_pain()

# %% [markdown]
# ## Task 1: `carry_seconds`
#
# A link moves `bytes_per_second`. Each piece is a transfer of its own, and costs `seconds_per_piece` on top, for the
# call, the driver and the way. How long do `num_bytes` take in all, if they are cut into so many `pieces`?
#
# ```console
# $ python 17_offload.py
# NotImplementedError: lesson 17, task 1: carry_seconds
# ```


# %%
class Link(NamedTuple):
    """A way between two tiers."""

    name: str
    bytes_per_second: float
    seconds_per_piece: float


def carry_seconds(link: Link, num_bytes: int, pieces: int) -> float:
    """Seconds to carry so many bytes, cut into so many pieces, one after the other.

    >>> carry_seconds(Link("slow", bytes_per_second=100, seconds_per_piece=2), num_bytes=300, pieces=4)
    11.0
    """
    raise NotImplementedError("lesson 17, task 1: carry_seconds")


# %%
def test_1_bytes_and_pieces() -> None:
    link = Link("x", 1e9, 1e-5)
    for num_bytes, pieces, right in ((2_000_000_000, 1, 2.00001), (1_000, 500, 0.005001), (0, 0, 0.0)):
        said = carry_seconds(link, num_bytes, pieces)
        assert abs(said - right) < 1e-9, (
            f"{num_bytes} bytes in {pieces} pieces over {link}: you said {said:.9f} seconds, right is {right:.9f}"
        )


if __name__ == "__main__":
    test_1_bytes_and_pieces()

# %% [markdown]
# ## Task 2: `recompute_seconds`
#
# The other way. One pass of the model over all tokens at once, as over a prompt. A pass does two things at the
# same time, and takes as long as the longer one:
#
# - it *reads* all weights once: `parameters` of 2 bytes each, at `machine.bytes_per_second`;
# - it *computes*: for each token about two operations for each parameter (a product and a sum), at
#   `machine.operations_per_second`.
#
# (Attention's own arithmetic is left out: it is small as long as the text is short against the model's width.)
# With a few tokens reading decides, with many computing. No block size occurs anywhere.


# %%
class Machine(NamedTuple):
    """What computes."""

    operations_per_second: float
    bytes_per_second: float  # from its own memory


class Model(NamedTuple):
    """A model's shape; everything in 16 bits."""

    parameters: int
    layers: int
    kv_heads: int
    head_dim: int

    @property
    def kv_bytes_per_token(self) -> int:
        """Lesson 2."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim


def recompute_seconds(machine: Machine, model: Model, tokens: int) -> float:
    """Seconds of one pass over so many tokens.

    >>> machine = Machine(operations_per_second=1000, bytes_per_second=50)
    >>> model = Model(parameters=100, layers=1, kv_heads=1, head_dim=1)
    >>> recompute_seconds(machine, model, tokens=5), recompute_seconds(machine, model, tokens=200)
    (4.0, 40.0)
    """
    raise NotImplementedError("lesson 17, task 2: recompute_seconds")


# %%
OPT_13B = Model(parameters=12_850_000_000, layers=40, kv_heads=40, head_dim=128)  # the paper's
A100 = Machine(operations_per_second=312e12, bytes_per_second=1.555e12)  # NVIDIA's data sheet, 40 GB, 16 bits
PCIE_4 = Link("host, PCIe 4 x16", 32e9, 1e-5)  # the standard's rate; the time for a piece is assumed
NVME = Link("disk, NVMe", 7e9, 1e-4)  # what PCIe 4 x4 drives state for reading; the time for a piece is assumed


def test_2_reads_or_computes() -> None:
    for tokens, right, decides in (
        (1, 25.7e9 / 1.555e12, "reading the weights, once for all tokens"),
        (100, 25.7e9 / 1.555e12, "reading the weights, once for all tokens"),
        (10_000, 2 * 12.85e9 * 10_000 / 312e12, "computing"),
    ):
        said = recompute_seconds(A100, OPT_13B, tokens)
        assert abs(said - right) < 1e-6, (
            f"{tokens} tokens of OPT-13B: you said {said:.6f} seconds, right is {right:.6f}. What decides here is {decides}"
        )


if __name__ == "__main__":
    test_2_reads_or_computes()

# %% [markdown]
# ## Task 3: `crossover`
#
# A text of so many tokens is to leave and to come back. Carrying takes the way *twice*, out and in again, and whole
# blocks are carried: a last block that is half empty has as many bytes as a full one. The pieces are those from
# above: for each block and each layer two, its keys and its values. (The bytes of all layers are in
# `model.kv_bytes_per_token`.) Computing again takes one pass over the tokens.
#
# What is the smallest block size of `SIZES` with which carrying is quicker? `None` if there is none.


# %%
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def crossover(link: Link, machine: Machine, model: Model, tokens: int) -> int | None:
    """The smallest block size with which out and in again takes less time than a pass over the tokens.

    >>> model, machine = Model(100, layers=1, kv_heads=1, head_dim=1), Machine(1000, 50)
    >>> crossover(Link("x", bytes_per_second=1000, seconds_per_piece=0.1), machine, model, tokens=64)
    4
    >>> crossover(Link("x", bytes_per_second=1000, seconds_per_piece=9.0), machine, model, tokens=64) is None
    True
    """
    raise NotImplementedError("lesson 17, task 3: crossover")


# %%
def test_3_small_blocks_are_many_pieces() -> None:
    model, machine = Model(1_000, layers=3, kv_heads=1, head_dim=2), Machine(1_000, 1e9)  # 10 tokens: 20 seconds
    for per_piece, size in ((0.1, 1), (0.2, 2), (0.3, 2), (0.4, 4), (0.8, 8), (0.9, 16), (1.7, None)):
        found = crossover(Link("x", 1e9, per_piece), machine, model, 10)
        assert found == size, (
            f"3 layers, 10 tokens, {per_piece} seconds a piece: you said {found}, right is {size}. "
            f"A pass takes 20 seconds; with blocks of 4 it is 3 blocks x 3 layers x 2 = 18 pieces, out and in"
        )


def test_3_whole_blocks_are_carried() -> None:
    model, machine = Model(500, layers=1, kv_heads=1, head_dim=1), Machine(1_000, 1e9)  # 10 tokens: 10 seconds
    found = crossover(Link("x", 9.0, 0.0), machine, model, 10)
    assert found == 1, f"40 bytes, twice, take 8.9 seconds, a pass 10: you said {found}, right is 1"
    found = crossover(Link("x", 9.0, 0.07), machine, model, 10)
    assert found is None, f"blocks of 4 carry 12 tokens' bytes, not 10: you said {found}, right is None"


if __name__ == "__main__":
    test_3_small_blocks_are_many_pieces()
    test_3_whole_blocks_are_carried()

# %% [markdown]
# ## Task 4: `Tiers.put`
#
# Now a store that does it. `Tiers` keeps blocks that have left the device, each under a key (that of a prefix cache,
# say): at most `host_blocks` of them in memory, at most `disk_blocks` as files.
#
# `put` keeps a *copy* in memory (the caller will write into its block again), as the one that was used last. If there
# are then too many in memory, the one that has not been used for longest goes down to the disk. If there are then too
# many on the disk, the one that went there first is deleted. A key is in one place at a time: one that is put again is
# first forgotten wherever it was, and so is its file. With `host_blocks=0` everything goes straight to the disk.
#
# ## Task 5: `Tiers.get`
#
# The block, or `None` if it was never there or has been deleted. What is found in memory counts as used: it becomes the one
# that was used last. What is found on the disk comes up into memory again, also as the one that was used last, and may push
# another one down: `put` does all that. With `host_blocks=0` it goes to the disk again, and `get` returns it all the same.
# No copy is needed: the caller only reads what it gets.
#
# Both tasks work on `self.host` and `self.disk`, which hold the keys in order, the one that goes first in front.
# Files are given: `_write(key, block)`, `_read(key)` and `_delete(key)`. They leave `self.disk` as it is: that is yours.


# %%
class Tiers:
    """Blocks that left the device: in memory, and behind it on a disk. Both least recently used first."""

    def __init__(self, host_blocks: int, disk_blocks: int, folder: Path) -> None:
        self.host_blocks, self.disk_blocks, self.folder = host_blocks, disk_blocks, folder
        self.host: OrderedDict[str, Tensor] = OrderedDict()
        self.disk: OrderedDict[str, None] = OrderedDict()  # the keys alone

    def _write(self, key: str, block: Tensor) -> None:
        """Write a file for the key, through to the disk."""
        with (self.folder / key).open("wb") as file:
            torch.save(block, file)
            file.flush()
            os.fsync(file.fileno())

    def _read(self, key: str) -> Tensor:
        """What the key's file holds."""
        return torch.load(self.folder / key)

    def _delete(self, key: str) -> None:
        """Delete the key's file."""
        (self.folder / key).unlink()

    def put(self, key: str, block: Tensor) -> None:
        """Keep a copy of the block.

        >>> tiers = Tiers(host_blocks=1, disk_blocks=1, folder=Path(tempfile.mkdtemp()))
        >>> for number, key in enumerate("abc"):
        ...     tiers.put(key, torch.tensor([number]))
        >>> list(tiers.host), list(tiers.disk)
        (['c'], ['b'])
        """
        raise NotImplementedError("lesson 17, task 4: Tiers.put")

    def get(self, key: str) -> Tensor | None:
        """The block that was put; None if it is not there (any more).

        >>> tiers = Tiers(host_blocks=1, disk_blocks=1, folder=Path(tempfile.mkdtemp()))
        >>> for number, key in enumerate("abc"):
        ...     tiers.put(key, torch.tensor([number]))
        >>> tiers.get("a"), tiers.get("b").tolist(), list(tiers.host), list(tiers.disk)
        (None, [1], ['b'], ['c'])
        """
        raise NotImplementedError("lesson 17, task 5: Tiers.get")


# %%
def files_of(tiers: Tiers) -> set[str]:
    return {path.name for path in tiers.folder.iterdir()}


def filled(host: int, disk: int, keys: str) -> Tiers:
    tiers = Tiers(host, disk, Path(tempfile.mkdtemp()))
    for key in keys:
        tiers.put(key, torch.full((2, 4), ord(key)))
    return tiers


def test_4_down_goes_what_was_not_used_for_longest() -> None:
    tiers = filled(2, 2, "abc")
    assert (list(tiers.host), list(tiers.disk)) == (["b", "c"], ["a"])
    assert files_of(tiers) == {"a"}, "the files are not those of the keys on the disk"
    tiers.put("d", torch.zeros(1))
    assert (list(tiers.host), list(tiers.disk)) == (["c", "d"], ["a", "b"])
    tiers.put("e", torch.zeros(1))
    assert (list(tiers.host), list(tiers.disk)) == (["d", "e"], ["b", "c"])
    assert files_of(tiers) == {"b", "c"}, "the files are not those of the keys on the disk"


def test_4_a_copy_and_no_reference() -> None:
    tiers, block = Tiers(2, 2, Path(tempfile.mkdtemp())), torch.ones(3)
    tiers.put("a", block)
    block.zero_()
    assert tiers.host["a"].tolist() == [1, 1, 1], (
        "the device's block was written over, and what was kept changed with it"
    )


def test_4_a_key_is_in_one_place() -> None:
    tiers = filled(2, 2, "abcd")
    tiers.put("b", torch.zeros(1))  # it was on the disk
    where = (list(tiers.host), list(tiers.disk))
    assert where == (["d", "b"], ["a", "c"]), (
        f"b was on the disk and is put again. Memory and disk: you said {where}, right is (['d', 'b'], ['a', 'c'])"
    )
    tiers.put("d", torch.zeros(1))  # it was in memory
    where = (list(tiers.host), list(tiers.disk))
    assert where == (["b", "d"], ["a", "c"]), (
        f"d was in memory and is put again. Memory and disk: you said {where}, right is (['b', 'd'], ['a', 'c'])"
    )
    assert files_of(tiers) == {"a", "c"}, "the files are not those of the keys on the disk"


def test_4_without_memory_or_without_a_disk() -> None:
    tiers = filled(0, 2, "abc")
    assert (list(tiers.host), list(tiers.disk), files_of(tiers)) == ([], ["b", "c"], {"b", "c"})
    tiers = filled(1, 0, "abc")
    assert (list(tiers.host), list(tiers.disk), files_of(tiers)) == (["c"], [], set())


def test_5_what_is_used_stays() -> None:
    tiers = filled(2, 2, "ab")
    assert tiers.get("a").tolist() == torch.full((2, 4), ord("a")).tolist()
    tiers.put("c", torch.zeros(1))
    where = (list(tiers.host), list(tiers.disk))
    assert where == (["a", "c"], ["b"]), (
        f"a has been used after b. Memory and disk: you said {where}, right is (['a', 'c'], ['b'])"
    )
    tiers.get("b")
    where = (list(tiers.host), list(tiers.disk))
    assert where == (["c", "b"], ["a"]), (
        f"b comes up, a goes down. Memory and disk: you said {where}, right is (['c', 'b'], ['a'])"
    )
    assert files_of(tiers) == {"a"}, "the files are not those of the keys on the disk"
    assert tiers.get("x") is None


def test_5_without_memory() -> None:
    tiers = filled(0, 2, "ab")
    found = tiers.get("a")
    assert found is not None, "a was on the disk: get said None"
    assert found.tolist() == torch.full((2, 4), ord("a")).tolist()
    assert (list(tiers.host), list(tiers.disk), files_of(tiers)) == ([], ["b", "a"], {"a", "b"})


def test_5_what_comes_back_is_what_was_put() -> None:
    """Random work on several sizes, compared with dictionaries that know what must be where."""
    for seed in range(12):
        rng = random.Random(seed)
        hosts, disks = rng.randint(0, 3), rng.randint(0, 3)
        tiers, kept = Tiers(hosts, disks, Path(tempfile.mkdtemp())), dict[str, int]()
        for number in range(40):
            key = rng.choice("abcdefgh")
            if rng.random() < 0.5:
                tiers.put(key, torch.tensor([number]))
                kept[key] = number
            else:
                there = key in tiers.host or key in tiers.disk
                found = tiers.get(key)
                assert (found is not None) == there, f"{key} was {'' if there else 'not '}there, and get said otherwise"
                assert found is None or found.tolist() == [kept[key]], f"{key} came back as another block"
            assert len(tiers.host) <= hosts, "more blocks in memory than allowed"
            assert len(tiers.disk) <= disks, "more blocks on the disk than allowed"
            assert not tiers.host.keys() & tiers.disk.keys(), "a key in two places"
            assert files_of(tiers) == set(tiers.disk), "the files are not those of the keys on the disk"


if __name__ == "__main__":
    test_4_down_goes_what_was_not_used_for_longest()
    test_4_a_copy_and_no_reference()
    test_4_a_key_is_in_one_place()
    test_4_without_memory_or_without_a_disk()
    test_5_what_is_used_stays()
    test_5_without_memory()
    test_5_what_comes_back_is_what_was_put()

# %% [markdown]
# ## What was won
#
# First the calculation, from the rates above: the paper's Fig. 19, and the same for a disk. Then this machine, where
# everything is timed while you wait: a small model computes the keys and values of a text again, and they are
# carried out of a pool and back into it, piece by piece, for each block size. Last your store: how long a block takes to come back
# from each tier.


# %%
def calculated(tokens: int) -> None:
    print(f"calculated, {tokens} tokens of OPT-13B, in ms (compute again: one pass; carry: out and in)")
    print(f"{'blocks of':>22}" + "".join(f"{size:>8}" for size in SIZES))
    again = 1e3 * recompute_seconds(A100, OPT_13B, tokens)
    print(f"{'compute again':>22}" + f"{again:8.0f}" * len(SIZES))
    for link in (PCIE_4, NVME):
        row = []
        for size in SIZES:
            blocks = -(-tokens // size)
            num_bytes = blocks * size * OPT_13B.kv_bytes_per_token
            row.append(2e3 * carry_seconds(link, num_bytes, 2 * OPT_13B.layers * blocks))
        print(f"{link.name:>22}" + "".join(f"{ms:8.0f}" for ms in row))
        first = crossover(link, A100, OPT_13B, tokens)
        print(f"{'':>22} carrying wins " + (f"from blocks of {first}" if first else "with no block size"))


def measured(tokens: int = 256) -> None:
    model = TinyModel(width=128, layers=4)

    def again() -> None:
        model(list(range(64)) * (tokens // 64), 0, lambda layer, q, k, v: dense_attention(q, k, v))

    print(f"\nmeasured here, {tokens} tokens of a tiny model, in ms")
    print(f"{'blocks of':>22}" + "".join(f"{size:>8}" for size in SIZES))
    print(f"{'compute again':>22}" + f"{1e3 * seconds_of(again):8.2f}" * len(SIZES))
    row = []
    for size in SIZES:
        blocks = -(-tokens // size)
        pool = [torch.randn(2 * blocks, size, model.heads, model.head_dim) for _ in range(2 * model.layers)]
        away = [torch.empty(blocks, size, model.heads, model.head_dim) for _ in range(2 * model.layers)]
        table = random.Random(0).sample(range(2 * blocks), blocks)

        def carry(pool: list[Tensor] = pool, away: list[Tensor] = away, table: list[int] = table) -> None:
            for here, there in zip(pool, away, strict=True):
                for i, block in enumerate(table):
                    there[i].copy_(here[block])
                for i, block in enumerate(table):
                    here[block].copy_(there[i])

        row.append(1e3 * seconds_of(carry, times=3))
    print(f"{'carry, out and in':>22}" + "".join(f"{ms:8.2f}" for ms in row))


def from_each_tier() -> None:
    tiers = Tiers(1, 1, Path(tempfile.mkdtemp()))
    block = torch.randn(2, 40, 16, 8, 128, dtype=torch.float16)  # keys and values of 16 tokens, 40 layers of 8 heads
    tiers.put("a", block)
    print(f"\nyour store, a block of {block.nbytes / 2**20:.1f} MiB comes back:")
    print(f"{'from memory':>22}{1e3 * seconds_of(lambda: block.copy_(tiers.get('a'))):8.2f} ms")
    tiers.put("b", block)
    other = ["a", "b"]

    def up() -> None:
        other.reverse()
        block.copy_(tiers.get(other[1]))

    print(f"{'from a file':>22}{1e3 * seconds_of(up, times=4):8.2f} ms (another one is written meanwhile)")


def what_was_won() -> None:
    for tokens in (64, 512):
        calculated(tokens)
    measured()
    from_each_tier()


if __name__ == "__main__":
    what_was_won()

# %% [markdown]
# Three things to see. Computing again is a flat line: it knows no blocks. Carrying falls as blocks grow, until only
# bytes are left, and rises again where blocks are so large that mostly empty ones are carried. And where the lines
# cross depends on the machine: a faster link moves it to smaller blocks, a larger model with few heads too,
# since it computes more for each byte it keeps.
#
# Engines that carry much therefore gather: many small pieces are first copied together on the device, which is quick
# there, and cross the link as one.
#
# ## What real engines do
#
# - **The vLLM paper** measures both ways (Kwon et al. 2023, section 7.3 and Fig. 19,
#   [arXiv 2309.06180](https://arxiv.org/abs/2309.06180)): small blocks make swapping slow, recomputing is the same for all, and for
#   middling ones they are alike.
# - **vLLM today** offloads cached blocks to the host, or through connectors such as LMCache to disks and other machines
#   ([docs](https://docs.vllm.ai/en/v0.25.0/examples/disaggregated/lmcache/)).
# - **CachedAttention** keeps conversations in host memory and on disks between two turns, and fetches them ahead of need
#   (Gao et al. 2024, [arXiv 2403.19708](https://arxiv.org/abs/2403.19708)).
#
# ## Where this lives in minipaged
#
# - `minipaged/scheduling/policies.py`: `PreemptionCost.swap_is_cheaper`, the same comparison for each victim.
# - `minipaged/memory/swap.py`: `HostPool`, the second tier.
# - `minipaged/execution/disk_tier.py`: `DiskTier`, the third; its files are in `minipaged/execution/disk_store.py`: `DiskStore`.
# - `minipaged/execution/eager.py`: `TorchRunner._move_blocks` carries them.
# - `minipaged/lab/paper/figures_costs.py`: `figure_19`.
