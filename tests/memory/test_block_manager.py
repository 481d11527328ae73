"""The block manager's own choices, beyond the laws: what it does where the contract leaves room, and what it says of bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from minipaged.errors import InputError
from minipaged.memory import BlockEvent, BlockManager


def manager_with(*prompts: list[int], **settings: Any) -> BlockManager:
    """Blocks of 4; sequence i has computed prompts[i]."""
    manager = BlockManager(settings.pop("num_blocks", 32), 4, num_host_blocks=16, **settings)
    manager.begin_step()
    for seq, tokens in enumerate(prompts):
        got = manager.allocate(seq, tokens)
        assert got is not None
        manager.mark_computed(seq, tokens[got.cached_tokens :])
    manager.take_events()
    return manager


def seen(manager: BlockManager, seqs: tuple[int, ...]) -> tuple[Any, ...]:
    """All that can be seen of it."""
    tables = [(manager.table(i), manager.host_table(i)) for i in seqs]
    counts = [manager.ref_count(b) for b in range(manager.usage().total)]
    return tables, counts, manager.usage(), manager.take_events()


BAD_SEQUENCES: list[Any] = [-1, 2**63, 10**30, 1.0, math.nan, math.inf, True, None, "1", [1]]
BAD_COUNTS: list[Any] = [-1, -(10**30), 1.0, math.nan, True, None, "1", [1]]
BAD_TOKENS: list[Any] = [
    [-1],
    [2**32],
    [10**30],
    [1.0],
    [math.nan],
    [True],
    [None],
    ["a"],
    "ab",
    b"ab",
    5,
    None,
    {}.keys,
    [[1]],
]
BAD_HITS: list[Any] = [1, [1], "1", BlockManager(4, 4).lookup([1])]  # the last is another manager's
CALLS: list[tuple[str, Callable[[BlockManager, Any], Any], list[Any]]] = [
    ("allocate", lambda m, bad: m.allocate(bad, [1]), BAD_SEQUENCES),
    ("allocate tokens", lambda m, bad: m.allocate(7, bad), BAD_TOKENS),
    (
        "allocate num_tokens",
        lambda m, bad: m.allocate(7, [1, 2], num_tokens=bad),
        [3, 10**30, *(b for b in BAD_COUNTS if b is not None)],
    ),
    ("allocate salt", lambda m, bad: m.allocate(7, [1], salt=bad), [1, b"a", 1.5, ["a"]]),
    ("allocate read_cache", lambda m, bad: m.allocate(7, [1], read_cache=bad), [0, 1, None, "yes"]),
    ("allocate again", lambda m, bad: m.allocate(bad, [1]), [0, 1]),
    ("append", lambda m, bad: m.append(bad, 1), BAD_SEQUENCES),
    ("append count", lambda m, bad: m.append(0, bad), BAD_COUNTS),
    ("mark_computed", lambda m, bad: m.mark_computed(bad, []), BAD_SEQUENCES),
    ("mark_computed tokens", lambda m, bad: m.mark_computed(0, bad), [*BAD_TOKENS, [1] * 100]),
    ("truncate", lambda m, bad: m.truncate(bad, 0), BAD_SEQUENCES),
    ("truncate count", lambda m, bad: m.truncate(0, bad), [*BAD_COUNTS, 100, 10**30]),
    ("release", lambda m, bad: m.release(bad, []), BAD_SEQUENCES),
    ("release indices", lambda m, bad: m.release(0, bad), [[-1], [2], [1.0], [True], [None], 5, None, [10**30], "a"]),
    ("fork parent", lambda m, bad: m.fork(bad, 7), BAD_SEQUENCES),
    ("fork child", lambda m, bad: m.fork(0, bad), [*BAD_SEQUENCES, 0, 1]),
    ("free", lambda m, bad: m.free(bad), BAD_SEQUENCES),
    ("pin", lambda m, bad: m.pin(bad), [*BAD_COUNTS, 0, 32, 31]),
    ("unpin", lambda m, bad: m.unpin(bad), [*BAD_COUNTS, 0, 1, 32]),
    ("swap_out", lambda m, bad: m.swap_out(bad), [[-1], [0, 0], [True], [1.0], 5, None, "a"]),
    ("swap_in", lambda m, bad: m.swap_in(bad), [[0], [-1], [True], 5, None, "a"]),
    ("table", lambda m, bad: m.table(bad), BAD_SEQUENCES),
    ("host_table", lambda m, bad: m.host_table(bad), BAD_SEQUENCES),
    ("ref_count", lambda m, bad: m.ref_count(bad), [*BAD_COUNTS, 32, 10**30]),
    ("lookup", lambda m, bad: m.lookup(bad), BAD_TOKENS),
    ("lookup salt", lambda m, bad: m.lookup([1], salt=bad), [1, b"a", math.nan]),
    ("allocate hit", lambda m, bad: m.allocate(7, [1], hit=bad), BAD_HITS),
    ("allocate hit of others", lambda m, bad: m.allocate(7, [1], hit=m.lookup(bad)), [[], [2], [1, 1]]),
    ("can_admit hit", lambda m, bad: m.can_admit(1, hit=bad), BAD_HITS),
    ("match_prefix", lambda m, bad: m.match_prefix(bad), BAD_TOKENS),
    ("match_prefix salt", lambda m, bad: m.match_prefix([1], salt=bad), [1, b"a", math.nan]),
    ("can_admit", lambda m, bad: m.can_admit(bad), BAD_COUNTS),
    ("can_admit new", lambda m, bad: m.can_admit(1, bad), BAD_COUNTS),
    ("can_admit width", lambda m, bad: m.can_admit(1, num_sequences=bad), [0, *BAD_COUNTS]),
    ("can_admit tokens", lambda m, bad: m.can_admit(1, token_ids=bad), [bad for bad in BAD_TOKENS if bad is not None]),
]


@pytest.mark.parametrize(("call", "bads"), [pytest.param(call, bads, id=name) for name, call, bads in CALLS])
def test_bad_arguments_are_named_and_change_nothing(call: Callable[[BlockManager, Any], Any], bads: list[Any]) -> None:
    """Out of range, NaN, wrong type, huge and repeated: an InputError with a word about the value, and the state as it was."""
    manager = manager_with([1, 2, 3, 4, 5], [6, 7])
    manager.fork(1, 2)
    manager.append(1, 1)
    manager.take_events()
    before = seen(manager, (0, 1, 2))
    for bad in bads:
        with pytest.raises(InputError) as error:
            call(manager, bad)
        assert str(error.value), f"no word about {bad!r}"
        assert seen(manager, (0, 1, 2)) == before, f"{bad!r} changed something"


@pytest.mark.parametrize(
    "settings",
    [
        {"num_blocks": 1},
        {"num_blocks": 10**30},
        {"num_blocks": 2.0},
        {"block_size": 0},
        {"block_size": -4},
        {"block_size": True},
        {"num_host_blocks": -1},
        {"num_host_blocks": 10**30},
        {"prefix_caching": 1},
        {"watermark": -0.1},
        {"watermark": 1.5},
        {"watermark": math.nan},
        {"watermark": "0.1"},
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any]) -> None:
    """A pool that cannot be is refused by the setting's name."""
    with pytest.raises(InputError, match=next(iter(settings))):
        BlockManager(**{"num_blocks": 8, "block_size": 4, **settings})


def test_unknown_sequences_are_key_errors() -> None:
    """Freed is unknown."""
    manager = manager_with([1])
    manager.free(0)
    for name, *rest in (
        ("free",),
        ("append", 1),
        ("mark_computed", []),
        ("truncate", 0),
        ("release", []),
        ("fork", 5),
        ("table",),
    ):
        with pytest.raises(KeyError, match="sequence 0"):
            getattr(manager, name)(0, *rest)
    with pytest.raises(KeyError, match="sequence 0"):
        manager.swap_out([0])


def test_a_swapped_sequence_can_only_come_back_or_end() -> None:
    """Everything else says so."""
    manager = manager_with([1, 2, 3])
    assert manager.swap_out([0]) is not None
    for name, *rest in (("append", 1), ("mark_computed", []), ("truncate", 0), ("release", []), ("fork", 5)):
        with pytest.raises(InputError, match="swapped out"):
            getattr(manager, name)(0, *rest)
    with pytest.raises(InputError, match="swapped out"):
        manager.swap_out([0])
    manager.free(0)
    assert manager.usage().host_free == 16


def test_swap_out_gives_up_the_groups_copies() -> None:
    """A victim with a copy of this step leaves with the original, as if it had been truncated before."""
    manager = manager_with([1, 2, 3, 4, 5])
    manager.fork(0, 1)
    before = manager.table(0)
    manager.begin_step()
    assert manager.append(0, 2).copies  # type: ignore[union-attr]
    pairs = manager.swap_out([0, 1])
    assert [device for device, _ in pairs or ()] == list(before)
    manager.begin_step()
    assert manager.swap_in([0, 1]) is not None
    assert manager.table(0) == manager.table(1)
    assert manager.append(0, 1).copies  # type: ignore[union-attr]


def test_what_a_step_swaps_in_cannot_go_out_again_in_it() -> None:
    """Swap-outs run before swap-ins, so there would be nothing to read yet."""
    manager = manager_with([1, 2, 3])
    manager.swap_out([0])
    manager.begin_step()
    assert manager.swap_in([0]) is not None
    before = seen(manager, (0,))
    assert manager.swap_out([0]) is None
    assert seen(manager, (0,)) == (*before[:3], ())
    manager.begin_step()
    assert manager.swap_out([0]) is not None


def test_swapped_blocks_stay_findable_and_return_under_their_keys() -> None:
    """On the device until they are handed out; after a swap-in again, where nobody else has the content."""
    manager = manager_with(list(range(12)), num_blocks=5)
    manager.swap_out([0])
    manager.begin_step()
    assert manager.match_prefix([*range(12), 0]) == 12
    assert manager.allocate(1, [50] * 16) is not None  # all four blocks
    assert manager.match_prefix([*range(12), 0]) == 0
    manager.free(1)
    manager.begin_step()
    assert manager.swap_in([0]) is not None
    assert manager.match_prefix([*range(12), 0]) == 12


def test_found_blocks_lie_inside_the_first_chunk() -> None:
    """num_tokens bounds what is found; the rest is found by nobody, and comes with append."""
    manager = manager_with(list(range(12)))
    got = manager.allocate(1, list(range(12)), num_tokens=7)
    assert got is not None
    assert (got.cached_tokens, len(manager.table(1))) == (4, 2)


def test_empty_blocks_go_before_cached_ones() -> None:
    """No content is lost while an empty block is left."""
    manager = manager_with(list(range(8)), num_blocks=6)
    manager.free(0)
    assert manager.allocate(1, [90] * 12) is not None
    assert manager.match_prefix([*range(8), 0]) == 8


def test_truncation_into_a_released_entry_is_refused() -> None:
    """There is nothing left to write after."""
    manager = manager_with(list(range(10)))
    manager.release(0, [0])
    with pytest.raises(InputError, match="released"):
        manager.truncate(0, 2)
    manager.truncate(0, 4)
    assert manager.table(0) == (0,)


def test_pins_are_told_and_keep_the_cache_from_a_reset() -> None:
    """A pin is an event of no sequence, and holds its block as a request does."""
    manager = manager_with(list(range(8)))
    block = manager.table(0)[0]
    manager.free(0)
    manager.take_events()
    manager.pin(block)
    assert manager.take_events() == (BlockEvent("pin", -1, block, -1, -1, "device", 0),)
    assert not manager.reset_prefix_cache()
    manager.unpin(block)
    assert manager.reset_prefix_cache()
    assert manager.match_prefix([*range(8), 0]) == 0
    assert manager.usage().cached == 0


def test_without_a_cache_nothing_is_kept() -> None:
    """prefix_caching=False: no hits, no cached blocks, no publish."""
    manager = manager_with(list(range(8)), prefix_caching=False)
    assert manager.match_prefix(list(range(9))) == 0
    manager.free(0)
    assert manager.usage().cached == 0
    assert {event.kind for event in manager.take_events()} == {"free"}


def test_a_caller_that_never_ends_its_steps_takes_nothing_back() -> None:
    """It marks what it has written, so who leaves in the same step stays findable; so does who leaves after end_step."""
    manager = manager_with(list(range(8)))
    manager.free(0)
    assert manager.match_prefix([*range(8), 0]) == 8
    manager.end_step()
    manager.begin_step()
    manager.allocate(1, [5] * 8)
    manager.mark_computed(1, [5] * 8)
    manager.end_step()
    manager.free(1)
    assert manager.match_prefix([5] * 9) == 8


def test_a_step_that_begins_ends_the_one_before() -> None:
    """Though nobody said that its plan was final."""
    manager = BlockManager(8, 4)
    manager.end_step()
    manager.begin_step()
    manager.allocate(0, [5] * 4)
    manager.mark_computed(0, [5] * 4)
    manager.begin_step()
    manager.free(0)
    assert manager.match_prefix([5] * 5) == 4


def test_a_withdrawal_is_told_before_the_blocks_leave() -> None:
    """The evict event names the writer, its block and its entry; a promise that ends before the cut stays."""
    manager = BlockManager(8, 4)
    manager.end_step()
    manager.begin_step()
    manager.allocate(0, list(range(8)))
    manager.mark_computed(0, list(range(8)))
    manager.take_events()
    manager.truncate(0, 6)
    assert manager.take_events() == (BlockEvent("evict", 0, 2, -1, 1, "device", 0),)
    manager.truncate(0, 4)
    assert manager.take_events() == (BlockEvent("free", 0, 2, -1, 1, "device", 0),)
    assert manager.match_prefix(list(range(9))) == 4
    manager.free(0)
    assert manager.take_events() == (
        BlockEvent("evict", 0, 1, -1, 0, "device", 0),
        BlockEvent("free", 0, 1, -1, 0, "device", 0),
    )


def test_who_copied_from_a_block_may_come_back_to_it() -> None:
    """It counts on older slots of the block alone; the last holder, which writes behind them in this step, is bound all the same."""
    manager = manager_with([1, 2, 3])
    manager.fork(0, 1)
    manager.end_step()
    manager.begin_step()
    assert manager.append(1, 1).copies  # type: ignore[union-attr]
    assert manager.append(0, 1) == (0, (), ())
    manager.mark_computed(0, [4])
    manager.truncate(1, 3)
    assert manager.table(1) == manager.table(0)
    manager.truncate(1, 3)
    with pytest.raises(InputError, match="somebody else holds"):
        manager.free(0)
    manager.free(1)
    manager.free(0)
    assert manager.match_prefix([1, 2, 3, 4, 5]) == 0
