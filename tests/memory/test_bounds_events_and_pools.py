"""The block manager at the bounds of what it accepts, the events it tells, its pins and copies; the pools and lists it is made of."""

from __future__ import annotations

import math
from array import array
from hashlib import blake2b
from typing import Any

import pytest

from minipaged.errors import InputError
from minipaged.memory import Admission, BlockEvent, BlockManager
from minipaged.memory.blocks import BlockPool, FreeList, PrefixIndex, next_key, root_key
from minipaged.memory.swap import HostPool


def manager_with(num_tokens: int, num_blocks: int = 12, **settings: Any) -> BlockManager:
    """Blocks of 4; sequence 0 has computed num_tokens tokens, and nothing of it is left to be told."""
    manager = BlockManager(num_blocks, 4, **{"num_host_blocks": 8, "watermark": 0.0, **settings})
    manager.begin_step()
    tokens = list(range(num_tokens))
    assert manager.allocate(0, tokens) is not None
    manager.mark_computed(0, tokens)
    manager.take_events()
    return manager


# ---- edges


@pytest.mark.parametrize(
    ("name", "last"),
    [("num_blocks", 2**26), ("block_size", 2**16), ("num_host_blocks", 2**26), ("watermark", 1.0)],
)
def test_settings_up_to_their_bound(name: str, last: Any) -> None:
    """One more than the most is refused, the most is not (the largest pool is not made here)."""
    settings: dict[str, Any] = {"num_blocks": 4, "block_size": 4}
    over = math.nextafter(last, 9.0) if isinstance(last, float) else last + 1
    with pytest.raises(InputError, match=name):
        BlockManager(**{**settings, name: over})
    if name != "num_blocks":
        BlockManager(**{**settings, name: last})
    least = {"num_blocks": 2, "block_size": 1, "num_host_blocks": 0, "watermark": 0.0}[name]
    BlockManager(**{**settings, name: least})


def test_the_defaults() -> None:
    """No host, a cache, one block in a hundred kept free."""
    manager = BlockManager(300, 4)
    assert manager.usage().host_total == 0
    manager.begin_step()
    manager.allocate(0, [1, 2, 3, 4, 5])
    manager.mark_computed(0, [1, 2, 3, 4, 5])
    assert manager.match_prefix([1, 2, 3, 4, 5]) == 4
    free = manager.usage().free
    assert manager.can_admit((free - 3) * 4) is Admission.OK
    assert manager.can_admit((free - 3) * 4 + 1) is Admission.LATER


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        ([3, 0, -5], "-5"),
        ([0, 2**32 - 1, 2**32], str(2**32)),
        ([0, 1, 1.5], "1.5"),
        ([0, 1, True], "True"),
        (["x", 1], "'x'"),
        (7, "not 7"),
    ],
)
def test_the_bad_token_is_named(bad: Any, word: str) -> None:
    """Not its good neighbours."""
    manager = manager_with(3)
    for call in (
        manager.match_prefix,
        lambda tokens: manager.allocate(1, tokens),
        lambda t: manager.mark_computed(0, t),
    ):
        with pytest.raises(InputError) as error:
            call(bad)
        assert str(error.value).split("not ")[-1] == word.removeprefix("not ")
    assert manager.match_prefix([0, 2**32 - 1]) == 0


def test_sequence_numbers_at_their_edges() -> None:
    """0 and 2**63 - 1 are numbers of sequences."""
    manager = BlockManager(6, 4)
    for seq in (0, 2**63 - 1):
        assert manager.allocate(seq, [1]) is not None
        manager.free(seq)


# ---- what is told


def test_every_event_has_the_fields_of_its_table() -> None:
    """types.BlockEvent, row by row, on one history; tier and group too."""
    manager = manager_with(6, num_blocks=4)
    manager.fork(0, 1)
    manager.begin_step()
    copied = manager.append(1, 1)
    assert copied is not None
    manager.truncate(1, 6)
    assert manager.take_events() == (
        BlockEvent("fork", 1, -1, 0, 2, "device", 0),
        BlockEvent("copy", 1, 2, 3, 1, "device", 0),
        BlockEvent("free", 1, 3, -1, 1, "device", 0),
        BlockEvent("fork", 1, 2, -1, 1, "device", 0),
    )
    manager.free(1)
    manager.pin(1)
    manager.release(0, [0])
    manager.unpin(1)
    assert manager.take_events() == (
        BlockEvent("free", 1, 2, -1, 1, "device", 0),
        BlockEvent("free", 1, 1, -1, 0, "device", 0),
        BlockEvent("pin", -1, 1, -1, -1, "device", 0),
        BlockEvent("release", 0, 1, -1, 0, "device", 0),
        BlockEvent("unpin", -1, 1, -1, -1, "device", 0),
    )
    manager.begin_step()
    assert manager.swap_out([0]) == [(2, 0)]
    manager.begin_step()
    assert manager.host_table(0) == (-1, 0)
    assert manager.swap_in([0]) is not None
    block = manager.table(0)[1]
    assert manager.take_events() == (
        BlockEvent("swap_out", 0, 2, 0, 1, "device", 0),
        BlockEvent("swap_in", 0, block, 0, 1, "device", 0),
    )
    manager.begin_step()
    assert manager.swap_out([0]) is not None
    manager.take_events()
    manager.free(0)
    assert manager.take_events()[-1:] == (BlockEvent("free", 0, 0, -1, 1, "host", 0),)
    assert manager.reset_prefix_cache()
    assert manager.take_events() == (BlockEvent("evict", -1, 1, -1, -1, "device", 0),)


def test_hits_publications_and_evictions_are_told() -> None:
    """Of found blocks, of a full block's key, and of a key that goes as its block is written again or handed out."""
    manager = manager_with(9, num_blocks=4)
    manager.free(0)
    manager.take_events()
    manager.begin_step()
    got = manager.allocate(5, [0, 1, 2, 3, 9, 9, 9, 9])
    assert got is not None
    assert manager.take_events() == (
        BlockEvent("cache_hit", 5, 1, -1, 0, "device", 0),
        BlockEvent("alloc", 5, 3, -1, 1, "device", 0),
    )
    manager.mark_computed(5, [9, 9, 9, 9])
    assert manager.take_events() == (BlockEvent("publish", 5, 3, -1, 1, "device", 0),)
    manager.truncate(5, 6)
    assert manager.append(5, 1) == (0, (), ())
    assert manager.take_events() == (BlockEvent("evict", 5, 3, -1, 1, "device", 0),)
    assert manager.append(5, 2) == (0, (2,), ())
    assert manager.take_events() == (
        BlockEvent("evict", 5, 2, -1, -1, "device", 0),
        BlockEvent("alloc", 5, 2, -1, 2, "device", 0),
    )


def test_keys_are_as_documented() -> None:
    """BLAKE2b-256 of the parent's key and the tokens; the salt gives the first parent."""
    tokens = array("I", [1, 2]).tobytes()
    assert root_key(None) == bytes(32)
    assert root_key("s") == blake2b(b"s", digest_size=32, person=b"salt").digest()
    assert next_key(bytes(32), tokens) == blake2b(bytes(32) + tokens, digest_size=32).digest()


def test_the_index_remembers_every_copy() -> None:
    """A block has one key, a key any number of blocks: the first published is found, then the next, in their order."""
    index = PrefixIndex()
    assert all(index.publish(b"key", block) for block in (3, 4, 5))
    assert not index.publish(b"other", 3)
    assert index.find(b"key") == 3
    assert (index.blocks(), 3 in index, 6 in index) == ([3, 4, 5], True, False)
    assert index.erase(4)
    assert not index.erase(4)
    assert index.find(b"key") == 3
    assert index.erase(3)
    assert index.find(b"key") == 5
    assert index.publish(b"key", 3)
    assert index.find(b"key") == 5
    assert index.erase(5)
    assert index.erase(3)
    assert index.find(b"key") is None
    assert index.blocks() == []


# ---- the parts


def test_pins_are_counted() -> None:
    """Two pins are undone by two; a pinned block is one, however often it is pinned."""
    manager = manager_with(5)
    manager.pin(1)
    manager.pin(1)
    assert (manager.ref_count(1), manager.usage().pinned) == (3, 1)
    manager.free(0)
    manager.unpin(1)
    assert (manager.ref_count(1), manager.usage().pinned) == (1, 1)
    manager.unpin(1)
    assert (manager.ref_count(1), manager.usage().pinned) == (0, 0)
    with pytest.raises(InputError, match="not pinned"):
        manager.unpin(1)
    manager.pin(1)
    assert manager.usage().pinned == 1


def test_after_a_reset_every_block_can_be_had() -> None:
    """Cached blocks become empty ones; none is lost."""
    manager = manager_with(40, num_blocks=12)
    manager.free(0)
    assert manager.usage().cached == 10
    assert manager.reset_prefix_cache()
    assert (manager.usage().free, manager.usage().cached) == (11, 0)
    got = manager.allocate(1, [7] * 44)
    assert got is not None
    assert sorted(got.new_blocks) == list(range(1, 12))
    assert manager.allocate(2, [7]) is None


def test_a_copy_given_up_sets_its_source_free_in_the_same_step() -> None:
    """Nothing reads it any more, so nothing needs it to wait for the next step."""
    manager = manager_with(6, num_blocks=4, prefix_caching=False)
    manager.fork(0, 1)
    manager.begin_step()
    copied = manager.append(1, 1)
    assert copied is not None
    assert copied.copies == ((2, 3),)
    manager.truncate(1, 6)
    manager.free(1)
    manager.free(0)
    assert manager.allocate(2, [7] * 12) is not None


def test_two_readers_guard_a_block_until_both_gave_up() -> None:
    """And the next step ends all guards; what became free meanwhile returns in its order."""
    pool = BlockPool(4, PrefixIndex())
    blocks = [pool.take() for _ in range(3)]
    assert pool.num_available == 0
    pool.guard(blocks[0])
    pool.guard(blocks[0])
    pool.drop(blocks[0])
    assert (pool.num_free, pool.num_available, pool.is_available(blocks[0])) == (1, 0, False)
    pool.unguard(blocks[0])
    assert pool.num_available == 0
    pool.unguard(blocks[0])
    assert (pool.num_available, pool.is_available(blocks[0])) == (1, True)
    assert pool.take() == blocks[0]
    for block in blocks:
        pool.guard(block)
        pool.drop(block)
    assert pool.num_available == 0
    pool.begin_step()
    assert (pool.num_available, pool.num_free) == (3, 3)
    assert [pool.take() for _ in range(3)] == blocks[::-1]
    with pytest.raises(IndexError):
        pool.take()
    for block in blocks:
        pool.drop(block)
        with pytest.raises(ValueError, match="free already"):
            pool.drop(block)


def test_the_free_lists_order() -> None:
    """Empty ones last in first out, then fresh ones by number, then cached ones first in first out, the middle removed."""
    free = FreeList(8)
    assert len(free) == 7
    assert [free.pop() for _ in range(6)] == [1, 2, 3, 4, 5, 6]
    for block in (2, 3, 4, 5):
        free.push_cached(block)
    free.push_empty(1)
    free.push_empty(6)
    assert (len(free), free.num_cached, free.first_cached()) == (7, 4, 2)
    free.remove_cached(3)
    free.remove_cached(5)
    free.push_cached(3)
    assert (len(free), free.num_cached) == (6, 3)
    assert [free.pop() for _ in range(6)] == [6, 1, 7, 2, 4, 3]
    assert (len(free), free.num_cached, free.first_cached()) == (0, 0, 0)
    with pytest.raises(IndexError):
        free.pop()


def test_the_host_pool() -> None:
    """Counts, what is free, and what this step has touched."""
    host = HostPool(2)
    first, second = host.take(), host.take()
    assert (first, second, host.num_available, host.num_free) == (0, 1, 0, 0)
    with pytest.raises(IndexError):
        host.take()
    host.share(first)
    host.share(first)
    host.drop(first)
    assert host.num_free == 0
    host.drop(first)
    assert (host.num_free, host.num_available) == (1, 0)
    host.begin_step()
    assert (host.num_free, host.num_available) == (1, 1)
    host.share(second)
    host.touch(second)
    host.drop(second)
    assert host.num_available == 1
    host.begin_step()
    assert host.num_available == 2
    assert {host.take(), host.take()} == {0, 1}


def test_minus_one_is_the_bad_token() -> None:
    """Just below the first token there is."""
    with pytest.raises(InputError, match=r"not -1$"):
        manager_with(3).match_prefix([4, -1])


def test_nothing_new_is_asked_for_unless_said() -> None:
    """A prompt that fills the pool can be admitted where no new tokens are named, and never with one."""
    manager = BlockManager(6, 4, watermark=0.0)
    assert manager.can_admit(20) is Admission.OK
    assert manager.can_admit(20, 1) is Admission.NEVER


@pytest.mark.parametrize("caching", [True, False])
def test_admission_counts_on_what_is_found(caching: bool) -> None:
    """Two of three blocks are held by another: one free block is enough, if there is a cache."""
    manager = manager_with(8, num_blocks=4, prefix_caching=caching)
    expected = Admission.OK if caching else Admission.LATER
    assert manager.can_admit(9, token_ids=range(9)) is expected
    assert manager.can_admit(9) is Admission.LATER


def test_a_copy_that_was_written_to_is_not_given_up() -> None:
    """L14: after the write the copy was made; giving the room back leaves the copy in the table."""
    manager = manager_with(6)
    manager.fork(0, 1)
    manager.begin_step()
    copied = manager.append(1, 1)
    assert copied is not None
    [(source, target)] = copied.copies
    manager.mark_computed(1, [6])
    manager.truncate(1, 6)
    assert manager.table(1)[-1] == target
    assert manager.table(0)[-1] == source
    assert (manager.ref_count(source), manager.ref_count(target)) == (1, 1)


def test_the_original_stays_as_whoever_may_come_back_needs_it() -> None:
    """L16, L20: while a child's copy can be given up, the last holder may go on behind the child's slots, and not inside them."""
    behind, inside = manager_with(6), manager_with(6)
    for manager in (behind, inside):
        manager.fork(0, 1)
        manager.begin_step()
        assert manager.append(1, 1) is not None
    after = behind.append(0, 1)
    assert after is not None
    assert after.copies == ()
    inside.truncate(0, 5)
    within = inside.append(0, 1)
    assert within is not None
    assert len(within.copies) == 1


def test_a_copy_of_what_this_step_brings_in_cannot_leave() -> None:
    """L16, L47: given up, the copy leads back to a block that the step's swap-ins have yet to write, after its swap-outs have read."""
    manager = BlockManager(8, 4, num_host_blocks=4)
    manager.allocate(0, [5])
    manager.mark_computed(0, [5])
    assert manager.swap_out([0]) is not None
    manager.begin_step()
    assert manager.swap_in([0]) is not None
    manager.fork(0, 1)
    copied = manager.append(1, 1)
    assert copied is not None
    assert len(copied.copies) == 1
    before = (manager.table(0), manager.table(1), manager.usage())
    manager.take_events()
    assert manager.swap_out([1]) is None
    assert (manager.table(0), manager.table(1), manager.usage()) == before
    assert not manager.take_events()
    manager.begin_step()
    assert manager.swap_out([1]) is not None
