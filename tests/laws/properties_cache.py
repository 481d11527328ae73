"""Laws of the prefix cache as functions of a block manager class."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.laws.properties import PROMPT, SIZE, Make, computed


def failing_touches_nothing(make: Make) -> None:
    """L07: a prompt that finds its beginning and then no room leaves the eviction order as it was."""

    @given(SIZE, st.integers(1, 3))
    def check(size: int, extra: int) -> None:
        manager = make(5, size)
        oldest, newest = [1] * size, [2] * size
        manager.begin_step()
        for seq, tokens in enumerate((oldest, newest)):
            computed(manager, seq, [*tokens, 0])
            manager.free(seq)
        assert manager.allocate(2, [3] * (2 * size)) is not None  # the other two blocks
        view = manager.usage()
        manager.take_events()
        assert manager.allocate(3, oldest + [4] * ((1 + extra) * size)) is None
        assert (manager.usage(), manager.take_events()) == (view, ())
        assert manager.allocate(4, [5] * size) is not None
        assert manager.match_prefix([*oldest, 0]) == 0
        assert manager.match_prefix([*newest, 0]) == size

    check()


def full_blocks_and_no_others_are_found(make: Make) -> None:
    """L21, L24, L28, L29: after n tokens are reported, exactly the full blocks among them are found, less the last token's."""

    @given(PROMPT, SIZE, st.lists(st.integers(1, 6), min_size=1, max_size=8), st.booleans())
    def check(prompt: list[int], size: int, pieces: list[int], read_cache: bool) -> None:
        manager = make(64, size)
        manager.begin_step()
        manager.allocate(0, prompt, read_cache=read_cache)
        done = 0
        for piece in [0, *pieces, len(prompt)]:
            manager.mark_computed(0, prompt[done : done + piece])
            done = min(len(prompt), done + piece)
            assert manager.match_prefix([*prompt, 9]) == done // size * size
            assert manager.match_prefix(prompt) == min(done, len(prompt) - 1) // size * size
            assert manager.match_prefix([*prompt[:done], 9]) == done // size * size
        assert manager.allocate(1, prompt, read_cache=False).cached_tokens == 0

    check()


def the_first_miss_ends_a_hit(make: Make) -> None:
    """L23: with its first block evicted, a cached second block is found by nobody."""

    @given(SIZE)
    def check(size: int) -> None:
        manager = make(5, size)
        first, second = [1] * size, [2] * size
        manager.begin_step()
        computed(manager, 0, first + second)
        manager.release(0, [0])
        assert manager.match_prefix([*first, *second, 0]) == 2 * size
        assert manager.allocate(2, [3] * (3 * size)) is not None  # evicts the first; the second is held
        assert manager.match_prefix([*first, *second, 0]) == 0
        assert manager.allocate(3, [*first, 0]) is None

    check()


def prefixes_and_salts_are_part_of_the_key(make: Make) -> None:
    """L22, L25: the same tokens behind other tokens, or under another salt, are other content."""

    @given(PROMPT, PROMPT, SIZE, st.sampled_from([None, "", "a"]), st.sampled_from([None, "", "a", "b"]))
    def check(one: list[int], other: list[int], size: int, salt: str | None, asked: str | None) -> None:
        manager = make(64, size)
        manager.begin_step()
        computed(manager, 0, one * size, salt=salt)
        common = 0
        for mine, theirs in zip(one * size, other * size, strict=False):
            if mine != theirs:
                break
            common += 1
        found = common // size * size if salt == asked else 0
        assert manager.match_prefix([*other * size, 9], salt=asked) == found

    check()


def rewritten_blocks_are_not_found(make: Make) -> None:
    """L29, L32: a sequence that rejects tokens and writes others is found by what it now holds; who shares with it keeps the old."""

    @given(st.integers(1, 3), SIZE, st.integers(0, 12), st.booleans(), st.booleans())
    def check(num_full: int, size: int, keep: int, shared: bool, same: bool) -> None:
        manager = make(64, size)
        old = [1] * (num_full * size)
        manager.begin_step()
        computed(manager, 0, old)
        if shared:
            manager.fork(0, 1)
        keep %= len(old)
        manager.truncate(0, keep)
        manager.begin_step()
        copies = manager.append(0, len(old) - keep).copies
        assert bool(copies) == (shared and keep % size > 0)
        written = old[keep:] if same else [2] * (len(old) - keep)
        manager.mark_computed(0, written)
        assert manager.match_prefix([*old[:keep], *written, 9]) == len(old)
        stays = shared or same or keep % size == 0
        assert manager.match_prefix([*old, 9]) == (len(old) if stays else keep // size * size)

    check()


def swapped_sequences_go_on_publishing(make: Make) -> None:
    """L22, L47: what a sequence computes after a swap is found behind what it computed before."""

    @given(PROMPT, SIZE, st.integers(1, 8))
    def check(prompt: list[int], size: int, more: int) -> None:
        manager = make(128, size, num_host_blocks=64)
        manager.begin_step()
        computed(manager, 0, prompt)
        manager.swap_out([0])
        manager.begin_step()
        manager.swap_in([0])
        manager.begin_step()
        manager.append(0, more)
        manager.mark_computed(0, [8] * more)
        both = prompt + [8] * more
        assert manager.match_prefix([*both, 9]) == len(both) // size * size

    check()
