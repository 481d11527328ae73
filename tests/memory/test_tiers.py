"""The host as a tier below the device: what is evicted is found again, with the same content, whatever else happens."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from minipaged.memory.block_manager import BlockManager
from minipaged.memory.swap import HostPool
from minipaged.memory.types import Admission

Content = tuple[int, ...]  # the tokens from the text's start to the end of a block; a part of a block holds fewer


class World:
    """A manager, the contents of both tiers as a device would hold them, and sequences that are played at random."""

    def __init__(self, seed: int, make: Callable[..., BlockManager] = BlockManager) -> None:
        self.random = random.Random(seed)
        self.size = self.random.choice([1, 2, 4])
        self.num_host = self.random.choice([1, 4, 12, 60])
        self.manager = make(
            self.random.choice([5, 9, 14]), self.size, num_host_blocks=self.num_host, host_cache=True, watermark=0.0
        )
        self.manager.end_step()
        self.device: dict[int, Content] = {}
        self.host: dict[int, Content] = {}
        self.alive: dict[int, list[int]] = {}  # tokens of each sequence on the device
        self.swapped: dict[int, list[int]] = {}
        self.stems = [[self.random.randrange(3) for _ in range(self.random.randrange(1, 20))] for _ in range(4)]
        self.next_id = self.host_hits = 0

    def step(self) -> None:
        """Plan at random, run the plan in its order, and look at everything."""
        manager, draw = self.manager, self.random
        manager.begin_step()
        outs: list[tuple[int, int]] = []
        ins: list[tuple[int, int]] = []
        copies: list[tuple[int, int]] = []
        begun = {}  # where each sequence writes from
        if self.alive and draw.random() < 0.3:
            victim = draw.choice(sorted(self.alive))
            pairs = manager.swap_out([victim])
            if pairs is not None:
                outs += pairs
                self.swapped[victim] = self.alive.pop(victim)
        for seq in sorted(self.alive):
            got = manager.append(seq, 1)
            if got is not None:
                begun[seq] = len(self.alive[seq])
                self.alive[seq].append(draw.randrange(3))
                manager.mark_computed(seq, self.alive[seq][-1:])
                copies += got.copies
        if self.swapped and draw.random() < 0.5:
            back = draw.choice(sorted(self.swapped))
            if (pairs := manager.swap_in([back])) is not None:
                ins += pairs
                self.alive[back] = self.swapped.pop(back)
        for _ in range(draw.randrange(3)):
            tokens = draw.choice(self.stems)[: draw.randrange(1, 20)] + [
                draw.randrange(3) for _ in range(draw.randrange(3))
            ]
            hit = manager.lookup(tokens)
            fits, before = manager.can_admit(len(tokens), hit=hit), manager.usage()
            found = hit.num_tokens
            got = manager.allocate(self.next_id, tokens, hit=hit)
            assert (got is None) == (fits is not Admission.OK)
            if got is None:
                assert manager.usage() == before
                continue
            assert got.cached_tokens == found  # L65: what lookup says is what allocate gives
            begun[self.next_id] = got.cached_tokens
            manager.mark_computed(self.next_id, tokens[got.cached_tokens :])
            self.alive[self.next_id] = tokens
            if draw.random() < 0.2:  # it leaves before the step is run: its moves are made all the same
                manager.free(self.next_id)
                del self.alive[self.next_id], begun[self.next_id]
            self.next_id += 1
        manager.end_step()
        spills, fetches = manager.take_moves()
        self.host_hits += len(fetches)
        self.run(outs + spills, ins + fetches, copies, begun)
        self.check()
        for seq in [seq for seq in self.alive if draw.random() < 0.3]:
            manager.free(seq)
            del self.alive[seq]

    def run(
        self,
        outs: list[tuple[int, int]],
        ins: list[tuple[int, int]],
        copies: list[tuple[int, int]],
        begun: dict[int, int],
    ) -> None:
        """L16: in this order; no batch writes a block twice."""
        for batch in (outs, ins, copies):
            targets = [target for _, target in batch]
            assert len(set(targets)) == len(targets)
        for device, host in outs:
            self.host[host] = self.device.get(device, ())
        for host, device in ins:
            self.device[device] = self.host[host]
        for source, target in copies:
            self.device[target] = self.device[source]
        for seq, start in begun.items():
            table, tokens = self.manager.table(seq), self.alive[seq]
            for at in range(start, len(tokens)):
                self.device[table[at // self.size]] = tuple(tokens[: at + 1])

    def check(self) -> None:
        """L09 L22 L70: every table reads its own tokens; L01: the host's blocks are free, cached or held, each once."""
        for seq, tokens in self.alive.items():
            for index, block in enumerate(self.manager.table(seq)):
                end = min(len(tokens), (index + 1) * self.size)
                assert self.device[block][:end] == tuple(tokens[:end]), f"sequence {seq}, entry {index}"
        usage = self.manager.usage()
        held = {block for seq in self.swapped for block in self.manager.host_table(seq)}
        assert usage.host_free == usage.host_total - len(held)
        assert 0 <= usage.host_cached <= usage.host_free
        assert usage.free + usage.referenced + usage.null == usage.total


def play(make: Callable[..., BlockManager] = BlockManager, worlds: int = 60, steps: int = 40) -> int:
    """Blocks that came back from the host in so many random worlds."""
    hits = 0
    for seed in range(worlds):
        world = World(seed, make)
        for _ in range(steps):
            world.step()
        hits += world.host_hits
    return hits


def test_L09_L16_L22_L70_what_comes_back_from_the_host_is_what_left() -> None:
    assert play() > 200  # else nothing was tried


def run_alone(manager: BlockManager, seq: int, tokens: list[int]) -> tuple[int, tuple[list[tuple[int, int]], ...]]:
    """One sequence in a step of its own, freed at once. Returns (tokens found, the step's moves)."""
    manager.begin_step()
    got = manager.allocate(seq, tokens)
    assert got is not None
    manager.mark_computed(seq, tokens[got.cached_tokens :])
    manager.end_step()
    moves = manager.take_moves()
    manager.free(seq)
    return got.cached_tokens, moves


def tiered(num_blocks: int = 5, num_host_blocks: int = 8) -> BlockManager:
    manager = BlockManager(num_blocks, 2, num_host_blocks=num_host_blocks, host_cache=True, watermark=0.0)
    manager.end_step()
    return manager


def test_L23_L24_a_prefix_outlives_the_device() -> None:
    """Four blocks: the second prompt evicts the first, which comes back by moves alone."""
    manager, first, second = tiered(), list(range(8)), list(range(10, 18))
    assert run_alone(manager, 0, first) == (0, ([], []))
    cached, (spills, fetches) = run_alone(manager, 1, second)
    assert (cached, len(spills), fetches) == (0, 4, [])
    assert manager.usage().host_cached == 4
    assert manager.match_prefix(first) == 6
    cached, (spills, fetches) = run_alone(manager, 2, first)
    assert (cached, len(fetches)) == (6, 3)
    # What is on the host already is not moved a second time.
    assert len(spills) == 4
    cached, (spills, fetches) = run_alone(manager, 3, second)
    assert (cached, len(spills), len(fetches)) == (6, 0, 3)


def test_L47_L48_swapped_sequences_take_the_place_of_what_is_cached() -> None:
    manager = tiered(num_host_blocks=4)
    run_alone(manager, 0, list(range(8)))
    run_alone(manager, 1, list(range(10, 18)))
    assert manager.usage().host_cached == 4
    manager.begin_step()
    assert manager.allocate(2, list(range(20, 28))) is not None
    manager.mark_computed(2, list(range(20, 28)))
    manager.end_step()
    manager.take_moves()
    manager.begin_step()
    pairs = manager.swap_out([2])
    assert pairs is not None
    assert len(pairs) == 4
    assert manager.usage().host_cached == 0
    assert manager.match_prefix(list(range(8))) == 0


def test_L34_a_reset_forgets_the_host_too() -> None:
    manager = tiered()
    run_alone(manager, 0, list(range(8)))
    run_alone(manager, 1, list(range(10, 18)))
    assert manager.reset_prefix_cache()
    assert manager.match_prefix(list(range(8))) == 0
    assert manager.usage().host_cached == 0
    assert manager.take_moves() == ([], [])


def test_L25_a_salt_is_kept_apart_on_the_host() -> None:
    manager, first = tiered(), list(range(8))
    run_alone(manager, 0, first)
    run_alone(manager, 1, list(range(10, 18)))
    assert manager.match_prefix(first, salt="x") == 0
    assert manager.match_prefix(first) == 6


# ---- bugs that the play above must find


class NoTouch(HostPool):
    """Content may be overwritten in the step that reads it."""

    def touch(self, block: int) -> None:
        """Nothing is noted."""


class KeepsTheKey(HostPool):
    """A cached block is handed out with its old key still to be found."""

    def _take(self) -> int:
        key = {block: self.index.key_of(block) for block in self._cached}
        block = super()._take()
        if key.get(block) is not None:
            self.index.publish(key[block], block)  # type: ignore[arg-type]
            self._cached[block] = None
        return block


class DropsTheMove(BlockManager):
    """What is evicted is never moved."""

    def take_moves(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """The spills are lost."""
        return [], super().take_moves()[1]


class LosesTheFetch(BlockManager):
    """What is found on the host is never brought back."""

    def take_moves(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """The fetches are lost."""
        return super().take_moves()[0], []


class CountsHostAsRoom(BlockManager):
    """Blocks found on the host are taken for blocks of the device."""

    def can_admit(self, *args: int, **options: object) -> Admission:
        """LATER is never said."""
        found = super().can_admit(*args, **options)  # type: ignore[arg-type]
        return Admission.OK if found is Admission.LATER else found


def with_host(kind: type[HostPool]) -> Callable[..., BlockManager]:
    """A manager over such a host pool."""

    def make(num_blocks: int, block_size: int, **settings: object) -> BlockManager:
        manager = BlockManager(num_blocks, block_size, **settings)  # type: ignore[arg-type]
        manager._host = kind(manager._host.num_blocks)
        manager._host_index = manager._host.index
        return manager

    return make


@pytest.mark.parametrize(
    "make",
    [with_host(NoTouch), with_host(KeepsTheKey), DropsTheMove, LosesTheFetch, CountsHostAsRoom],
    ids=["no touch", "keeps the key", "drops the move", "loses the fetch", "counts host blocks as room"],
)
def test_the_play_finds_bugs(make: Callable[..., BlockManager]) -> None:
    with pytest.raises((AssertionError, KeyError, IndexError)):
        play(make)
