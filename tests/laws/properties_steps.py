"""More laws as functions of a block manager class: those about steps, swaps and windows."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.laws.dense import DenseMemory, kv_of
from tests.laws.properties import PROMPT, SIZE, Make, computed


def swapping_is_the_identity(make: Make) -> None:
    """L47: sequences that share blocks go out together and come back in any grouping, and read what they read before."""

    @given(PROMPT, SIZE, st.lists(st.integers(0, 3), max_size=3), st.lists(st.booleans(), min_size=4, max_size=4))
    def check(prompt: list[int], size: int, parents: list[int], later: list[bool]) -> None:
        manager = make(128, size, num_host_blocks=128)
        dense = DenseMemory(128, 128, size)
        manager.begin_step()
        computed(manager, 0, prompt)
        for position, value in enumerate(kv_of(prompt)):
            dense.write(manager.table(0), position, value)
        lines = {0: list(prompt)}
        for child, parent in enumerate(parents, 1):
            manager.begin_step()
            manager.fork(parent % child, child)
            lines[child] = [*lines[parent % child], child]
            dense.run((), (), manager.append(child, 1).copies)
            dense.write(manager.table(child), len(lines[child]) - 1, kv_of(lines[child])[-1])
            manager.mark_computed(child, [child])
        shape = [[manager.table(i).index(b) for b in manager.table(i)] for i in lines]
        distinct = {b for i in lines for b in manager.table(i)}
        manager.begin_step()
        pairs = manager.swap_out(list(lines))
        assert sorted(device for device, _ in pairs) == sorted(distinct), "each block once"
        assert manager.usage().host_free == 128 - len(distinct)
        assert all(
            manager.table(i) == () and len(manager.host_table(i)) == len(s) for i, s in zip(lines, shape, strict=True)
        )
        dense.run(pairs, (), ())
        for i in distinct:
            dense.poison([i])
        for group in ([i for i in lines if not later[i]], [i for i in lines if later[i]]):
            manager.begin_step()
            dense.run((), manager.swap_in(group), ())
        for seq, tokens in lines.items():
            assert dense.read(manager.table(seq), 0, len(tokens)) == kv_of(tokens)
        assert manager.usage().host_free == 128
        if len({later[i] for i in lines}) == 1:
            assert len({b for i in lines for b in manager.table(i)}) == len(distinct), "sharing was lost"

    check()


def what_others_hold_stays(make: Make) -> None:
    """L47: a block that somebody outside the group holds is copied out and stays where it is."""

    @given(PROMPT, SIZE)
    def check(prompt: list[int], size: int) -> None:
        manager = make(64, size, num_host_blocks=64)
        manager.begin_step()
        computed(manager, 0, prompt)
        manager.fork(0, 1)
        table = manager.table(0)
        manager.begin_step()
        assert len(manager.swap_out([1])) == len(table)
        assert manager.table(0) == table
        assert all(manager.ref_count(block) == 1 for block in table)

    check()


def swap_in_leaves_room_for_the_next_step(make: Make) -> None:
    """L49: with f blocks free a group comes back exactly if f covers its blocks, one more token each, and the watermark."""

    @given(PROMPT, SIZE, st.integers(0, 2), st.integers(0, 12), st.sampled_from([0.0, 0.1]))
    def check(prompt: list[int], size: int, children: int, spare: int, watermark: float) -> None:
        usable = 40
        manager = make(usable + 1, size, num_host_blocks=64, watermark=watermark, prefix_caching=False)
        manager.begin_step()
        computed(manager, 0, prompt)
        ids = list(range(children + 1))
        for child in ids[1:]:
            manager.fork(0, child)
        manager.swap_out(ids)
        manager.begin_step()
        blocks = -(-len(prompt) // size)
        full = len(prompt) == blocks * size
        next_step = len(ids) if full else len(ids) - 1  # a block each, or a copy for all but the last
        running = usable - blocks - spare
        assert manager.allocate(99, [7] * (running * size)) is not None
        got = manager.swap_in(ids)
        needed = next_step + int(watermark * (usable + 1))
        assert (got is not None) == (spare >= needed), f"{spare} spare, {needed} needed: {got}"
        if got is not None:
            assert all(manager.append(seq, 1) is not None for seq in ids)

    check()


def swap_in_ignores_the_watermark_when_idle(make: Make) -> None:
    """L49: while no sequence holds blocks the watermark keeps nobody out."""
    manager = make(5, 2, num_host_blocks=8, watermark=0.9, prefix_caching=False)
    manager.begin_step()
    computed(manager, 0, [1, 2, 3, 4, 5])
    manager.swap_out([0])
    manager.begin_step()
    assert manager.swap_in([0]) is not None


def sources_wait_for_the_next_step(make: Make) -> None:
    """L52: what a step swaps out or copies from is free at once, and handed out only in the next step."""

    @given(PROMPT, SIZE)
    def check(prompt: list[int], size: int) -> None:
        blocks = -(-len(prompt) // size)
        manager = make(blocks + 1, size, num_host_blocks=blocks)
        manager.begin_step()
        computed(manager, 0, prompt)
        manager.begin_step()
        sources = {device for device, _ in manager.swap_out([0])}
        assert manager.usage().free == blocks
        assert manager.allocate(1, [9]) is None, f"{sources} are being read"
        manager.begin_step()
        assert manager.allocate(1, [9]) is not None
        copying = make(4, 2, prefix_caching=False)
        copying.begin_step()
        computed(copying, 0, [1])
        copying.fork(0, 1)
        copying.begin_step()
        ((source, _),) = copying.append(0, 1).copies
        copying.free(1)
        assert copying.ref_count(source) == 0
        assert source not in copying.append(0, 2).new_blocks
        assert copying.append(0, 2) is None
        copying.begin_step()
        assert copying.append(0, 2).new_blocks == (source,)

    check()


def host_blocks_serve_one_swap_a_step(make: Make) -> None:
    """L16, L52: within a step no host block is written by two swaps, nor written after another swap has read it."""

    @given(PROMPT, SIZE, st.booleans())
    def check(prompt: list[int], size: int, back: bool) -> None:
        blocks = -(-len(prompt) // size)
        manager = make(64, size, num_host_blocks=2 * blocks)
        manager.begin_step()
        for seq in range(3):
            computed(manager, seq, prompt, read_cache=False)
        if back:
            manager.swap_out([0])
            manager.begin_step()
            busy = {host for host, _ in manager.swap_in([0])}
        else:
            manager.begin_step()
            busy = {host for _, host in manager.swap_out([0])}
            manager.free(0)
        busy_later = {host for _, host in manager.swap_out([1])}
        assert not busy & busy_later, f"{busy & busy_later} serve two swaps"
        assert manager.swap_out([2]) is None, "all host blocks are in use in this step"
        manager.begin_step()
        assert manager.swap_out([2]) is not None

    check()


def aborts_return_everything(make: Make) -> None:
    """L53: a sequence that is freed between its fork and its write gives back the copy it was promised, and the original stays whole."""

    @given(PROMPT, SIZE, st.integers(1, 4), st.booleans(), st.booleans())
    def check(prompt: list[int], size: int, n: int, swap: bool, writer_first: bool) -> None:
        manager = make(64, size, num_host_blocks=64)
        manager.begin_step()
        computed(manager, 0, prompt)
        for child in range(1, n):
            manager.fork(0, child)
        manager.begin_step()
        for seq in range(n):
            manager.append(seq, 1)
        if swap:
            for seq in range(n):
                manager.truncate(seq, len(prompt))
            manager.swap_out(list(range(n)))
        for seq in sorted(range(n), reverse=writer_first):
            manager.free(seq)
        usage = manager.usage()
        assert (usage.free, usage.host_free) == (63, 64), usage
        manager.begin_step()
        assert manager.allocate(9, [3] * (63 * size)) is not None, "some of the free blocks cannot be handed out"

    check()


def windows_stay_small(make: Make) -> None:
    """L56: behind a sliding window every block goes back once, and no more stay than the window and the chunk need."""

    @given(st.integers(1, 12), SIZE, st.integers(1, 6), st.integers(1, 12))
    def check(window: int, size: int, chunk: int, steps: int) -> None:
        manager = make(64, size)
        manager.begin_step()
        manager.allocate(0, [0], num_tokens=0)
        manager.allocate(1, [1])
        released = 0
        for step in range(1, steps + 1):
            manager.begin_step()
            assert manager.append(0, chunk) is not None
            manager.mark_computed(0, [step % 3] * chunk)
            done = step * chunk
            outside = max(0, done - window + 1) // size  # blocks that the next token's window does not touch
            manager.take_events()
            manager.release(0, range(outside))
            gone = [event for event in manager.take_events() if event.kind == "release"]
            assert len(gone) == outside - released, f"{gone}: {released} had gone before"
            released = outside
            live = sum(map(bool, manager.table(0)))
            assert live <= -(-(window - 1) // size) + 1, f"{live} blocks for a window of {window}"
            assert manager.usage().referenced == live + 1
        manager.free(0)
        assert manager.usage().referenced == 1

    check()
