"""Laws that are shown best by themselves: functions of a block manager class, each raising if its law is broken.

test_laws_memory.py makes pytest items of them; the mutants run them too.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from minipaged.memory.types import Admission
from tests.laws.dense import DenseMemory, kv_of

Make = Callable[..., Any]
SIZE = st.integers(1, 5)
PROMPT = st.lists(st.integers(0, 3), min_size=1, max_size=16)


def computed(manager: Any, seq: int, tokens: list[int], **settings: Any) -> Any:
    """Allocate a sequence and mark its tokens computed. Returns the allocation."""
    got = manager.allocate(seq, tokens, **settings)
    assert got is not None, f"no room for {tokens}: {manager.usage()}"
    manager.mark_computed(seq, tokens[got.cached_tokens :])
    return got


def eviction_follows_the_recorded_order(make: Make) -> None:
    """L05: whatever was found, freed and pinned in between, cached blocks leave in the order in which they were last freed."""

    @given(st.lists(st.integers(0, 5), max_size=20), SIZE)
    def check(touches: list[int], size: int) -> None:
        manager = make(16, size)
        prompts = [[10 + i] * size + [0] for i in range(6)]  # one full block each
        order: list[int] = []
        for i in [*range(6), *touches]:
            manager.begin_step()
            computed(manager, i, prompts[i])
            manager.free(i)
            order = [j for j in order if j != i] + [i]
        for seq in range(100, 115):
            found = [i for i in order if manager.match_prefix(prompts[i])]
            assert found == order[len(order) - len(found) :], f"{found} are left of {order}"
            assert manager.allocate(seq, [9] * size) is not None
        assert not any(map(manager.match_prefix, prompts))

    check()


def leaving_the_middle_takes_constant_time(make: Make) -> None:
    """L05: taking a cached block out of the middle of a long line costs what it costs in a short one."""

    def seconds(num_blocks: int) -> float:
        manager = make(num_blocks + 1, 1)
        tokens = list(range(num_blocks))
        manager.begin_step()
        computed(manager, 0, tokens)
        manager.free(0)
        best = float("inf")
        for start in range(num_blocks // 4, num_blocks // 4 + 5):
            began = perf_counter()
            for block in range(start, start + 300, 5):
                manager.pin(block)
            best = min(best, perf_counter() - began)
            manager.take_events()
            for block in range(start, start + 300, 5):
                manager.unpin(block)
        return best

    short, long = seconds(1_500), seconds(150_000)
    assert long < 20 * short, f"{long:.6f} s in a line of 150,000, {short:.6f} s in one of 1,500"


def idle_pool_takes_what_fits(make: Make) -> None:
    """L08: while nobody holds blocks a prompt fits exactly if the pool is large enough, whatever of it is cached."""

    @given(PROMPT, PROMPT, SIZE, st.integers(2, 12), st.sampled_from([0.0, 0.01, 0.4]))
    def check(first: list[int], more: list[int], size: int, num_blocks: int, watermark: float) -> None:
        manager = make(num_blocks, size, watermark=watermark)
        manager.begin_step()
        if manager.allocate(0, first) is not None:
            manager.mark_computed(0, first)
            manager.free(0)
        both = first + more
        fits = -(-len(both) // size) <= num_blocks - 1
        asked = manager.can_admit(len(both), token_ids=both)
        assert (asked is Admission.OK) == fits, f"{asked}, where it fits: {fits}"
        assert (manager.allocate(1, both) is not None) == fits

    check()


def sharers_copy_once_less(make: Make) -> None:
    """L17: n sequences that go on from one prompt copy its partial tail n - 1 times, and a full one never."""

    @given(PROMPT, SIZE, st.integers(1, 5), st.booleans(), st.permutations(range(5)))
    def check(prompt: list[int], size: int, n: int, together: bool, order: list[int]) -> None:
        manager = make(64, size)
        manager.begin_step()
        computed(manager, 0, prompt)
        for child in range(1, n):
            manager.fork(0, child)
        copies = []
        for seq in [i for i in order if i < n]:
            if not together:
                manager.begin_step()
            copies += manager.append(seq, 1).copies
        assert len(copies) == (n - 1 if len(prompt) % size else 0), copies
        assert len({destination for _, destination in copies}) == len(copies)

    check()


def given_up_copies_read_the_original(make: Make) -> None:
    """L16: a victim's copy of this step is given up, and what forks from it then copies from the original."""

    @given(PROMPT, SIZE, st.integers(1, 3))
    def check(prompt: list[int], size: int, ahead: int) -> None:
        manager, dense = make(64, size), DenseMemory(64, 0, size)
        manager.begin_step()
        computed(manager, 0, prompt)
        manager.fork(0, 1)
        values = kv_of(prompt)
        before = manager.table(0)
        for position, value in enumerate(values):
            dense.write(before, position, value)
        manager.begin_step()
        free = manager.usage().free
        manager.append(0, ahead)
        manager.truncate(0, len(prompt))
        assert manager.table(0) == before
        assert manager.usage().free == free, "giving up left blocks behind"
        manager.fork(0, 2)
        copies = [pair for seq in (0, 2, 1) for pair in manager.append(seq, ahead).copies]
        assert {source for source, _ in copies} <= set(before), f"{copies} from {before}"
        dense.run((), (), copies)
        for seq in (0, 1, 2):
            table = manager.table(seq)
            for position in range(len(prompt), len(prompt) + ahead):
                dense.write(table, position, 1000 * (seq + 1) + position)
        for seq in (0, 1, 2):
            new = [1000 * (seq + 1) + position for position in range(len(prompt), len(prompt) + ahead)]
            assert dense.read(manager.table(seq), 0, len(prompt) + ahead) == values + new

    check()


def the_original_is_kept_for_who_may_come_back(make: Make) -> None:
    """L16, L20: while a copy can be given up, nobody writes in place over slots that its writer would come back to."""

    @given(SIZE, st.integers(1, 4), st.integers(0, 4), st.booleans())
    def check(size: int, filled: int, kept: int, give_up: bool) -> None:
        filled = size + filled % size
        kept = size + kept % (filled - size + 1)
        manager, dense = make(16, size), DenseMemory(16, 0, size)
        lines = {0: [1] * filled, 1: [1] * kept}
        manager.begin_step()
        computed(manager, 0, lines[0])
        for position, value in enumerate(kv_of(lines[0])):
            dense.write(manager.table(0), position, value)
        manager.fork(0, 1)
        manager.truncate(1, kept)  # both hold the tail, the second less of it
        manager.begin_step()
        copies = {seq: manager.append(seq, 1).copies for seq in (0, 1)}
        if give_up:
            manager.truncate(0, filled)
            del copies[0]
        dense.run((), (), [pair for pairs in copies.values() for pair in pairs])
        for seq in copies:
            lines[seq].append(7 + seq)
            dense.write(manager.table(seq), len(lines[seq]) - 1, kv_of(lines[seq])[-1])
        for seq, tokens in lines.items():
            assert dense.read(manager.table(seq), 0, len(tokens)) == kv_of(tokens)

    check()


def beams_share_what_they_can(make: Make) -> None:
    """L18: winners fork before losers are freed; every beam reads its own history, and blocks that nobody holds come back."""

    @given(PROMPT, SIZE, st.lists(st.lists(st.integers(0, 2), min_size=3, max_size=3), max_size=6))
    def check(prompt: list[int], size: int, steps: list[list[int]]) -> None:
        manager, dense = make(128, size), DenseMemory(128, 0, size)
        manager.begin_step()
        computed(manager, 0, prompt)
        for position, value in enumerate(kv_of(prompt)):
            dense.write(manager.table(0), position, value)
        beams, next_id = {0: list(prompt)}, 1
        for parents in [[0, 0, 0], *steps]:
            ids = list(beams)
            winners: dict[int, list[int]] = {}
            for rank, parent in enumerate(parents):
                seq = ids[parent % len(ids)]
                if seq in winners:
                    manager.fork(seq, next_id)
                    winners[next_id] = [*beams[seq], rank]
                    next_id += 1
                else:
                    winners[seq] = [*beams[seq], rank]
            for loser in set(ids) - set(winners):
                manager.free(loser)
            beams = winners
            manager.begin_step()
            dense.run((), (), [pair for seq in beams for pair in manager.append(seq, 1).copies])
            for seq, tokens in beams.items():
                dense.write(manager.table(seq), len(tokens) - 1, kv_of(tokens)[-1])
            for seq, tokens in beams.items():
                assert dense.read(manager.table(seq), 0, len(tokens)) == kv_of(tokens)
                manager.mark_computed(seq, tokens[-1:])
            held = {block for seq in beams for block in manager.table(seq)}
            assert manager.usage().referenced == len(held)
        for seq in beams:
            manager.free(seq)
        assert manager.usage().free == 127

    check()


def keys_survive_chosen_tokens(make: Make) -> None:
    """L26: tokens chosen so that the built-in hash of their tuples is the same are not taken for one another."""
    collisions = [  # found by solving xxHash's two rounds for a difference below 2**31
        ((998104072, 1755844984), (2080556470, 0)),
        ((625890303, 1755844984), (1708342701, 0)),
        ((966789781, 1755844984), (2049242179, 0)),
    ]
    for cached, other in collisions:
        assert hash(cached) == hash(other), "these tuples no longer collide: find others for this Python"
        manager = make(8, 2)
        manager.begin_step()
        computed(manager, 0, [*cached, 5])
        assert manager.match_prefix([*cached, 5]) == 2
        assert manager.match_prefix([*other, 5]) == 0, f"{cached} is taken for {other}"


def tail_leaves_first(make: Make) -> None:
    """L30: of a freed sequence's blocks the deepest are evicted first, so that the longest prefix stays."""

    @given(st.integers(2, 8), SIZE)
    def check(num_full: int, size: int) -> None:
        manager = make(num_full + 1, size)
        prompt = [token % 7 for token in range(num_full * size)]
        manager.begin_step()
        computed(manager, 0, prompt)
        manager.free(0)
        for evicted in range(num_full):
            assert manager.match_prefix([*prompt, 0]) == (num_full - evicted) * size
            manager.allocate(1 + evicted, [9] * size)

    check()
