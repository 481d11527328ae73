"""The systems that reserve ahead: the events they tell, what they refuse and with which words, pools at their edges, pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipaged.baselines.buddy import next_power_of_two
from minipaged.baselines.contiguous import Ask, ContiguousBlockManager
from minipaged.baselines.systems import RESERVING, reservations
from minipaged.errors import InputError
from minipaged.memory import Admission, BlockEvent
from minipaged.memory.types import PoolUsage, Run

MAX_LEN, BLOCK_SIZE = 64, 4


def contiguous(system: str = "orca-oracle", rows: int = 1, num_blocks: int = 65) -> ContiguousBlockManager:
    """A manager whose requests all ask for 10 tokens and `rows` sequences."""
    manager = ContiguousBlockManager(num_blocks, BLOCK_SIZE, system, max_len=MAX_LEN)
    manager.ask_of = lambda seq_id: Ask(10, 10, rows)
    return manager


def test_every_event_has_its_fields() -> None:
    """types.BlockEvent, row by row, on one history."""
    manager = contiguous(rows=2)
    manager.allocate(0, [1, 2, 3, 4, 5, 6])
    manager.mark_computed(0, [1, 2, 3, 4, 5, 6])
    a, b = manager.table(0)
    assert manager.take_events() == (
        BlockEvent("alloc", 0, a, -1, 0, "device", 0),
        BlockEvent("alloc", 0, b, -1, 1, "device", 0),
    )
    manager.fork(0, 1)
    c, d = manager.table(1)
    assert manager.take_events() == (
        BlockEvent("fork", 1, -1, 0, 2, "device", 0),
        BlockEvent("alloc", 1, c, -1, 0, "device", 0),
        BlockEvent("alloc", 1, d, -1, 1, "device", 0),
        BlockEvent("copy", 1, a, c, 0, "device", 0),
        BlockEvent("copy", 1, b, d, 1, "device", 0),
    )
    manager.truncate(1, 3)
    assert manager.take_events() == (BlockEvent("free", 1, d, -1, 1, "device", 0),)
    manager.free(0)
    assert manager.take_events() == (
        BlockEvent("free", 0, b, -1, 1, "device", 0),
        BlockEvent("free", 0, a, -1, 0, "device", 0),
    )


@given(
    system=st.sampled_from(sorted(RESERVING)),
    moves=st.lists(st.tuples(st.sampled_from("agtf"), st.integers(0, 5), st.integers(0, 9)), max_size=30),
)
def test_tables_can_be_rebuilt_from_the_events(system: str, moves: list[tuple[str, int, int]]) -> None:
    """Each entry that comes and goes is told, with its block and its place; the pool adds up and comes back."""
    manager = contiguous(system)
    told: dict[int, list[int]] = {}
    held: dict[int, int] = {}  # sequence -> tokens of room
    for move, seq, number in moves:
        manager.begin_step()
        if move == "a" and seq not in held:
            if manager.allocate(seq, [1] * (number + 1)) is not None:
                held[seq] = number + 1
        elif move == "g" and seq in held and manager.append(seq, number) is not None:
            held[seq] += number
        elif move == "t" and seq in held:
            held[seq] = min(held[seq], number)
            manager.truncate(seq, held[seq])
        elif move == "f" and held.pop(seq, None) is not None:
            manager.free(seq)
        for event in manager.take_events():
            table = told.setdefault(event.seq_id, [])
            if event.kind == "alloc":
                assert event.index == len(table)
                table.append(event.block)
            else:
                assert (event.kind, event.index, event.block) == ("free", len(table) - 1, table.pop())
        assert {seq: tuple(table) for seq, table in told.items() if table} == {
            seq: manager.table(seq) for seq in held if held[seq]
        }
        for seq, room in held.items():
            assert len(manager.table(seq)) == -(-room // BLOCK_SIZE)
        counts = [manager.ref_count(block) for block in range(65)]
        assert manager.usage() == PoolUsage(65, 1, 64 - sum(counts), 0, sum(counts), 0, 0, 0)
        assert counts[0] == 0
    for seq in held:
        manager.free(seq)
    assert manager.usage() == PoolUsage(65, 1, 64, 0, 0, 0, 0, 0)


BAD_CALLS: dict[str, Callable[[ContiguousBlockManager], Any]] = {
    "num_tokens": lambda m: m.can_admit(0),
    "max_new_tokens": lambda m: m.can_admit(1, -1),
    "num_sequences": lambda m: m.can_admit(1, 1, num_sequences=0),
    "num_tokens must be from 0 to 3": lambda m: m.allocate(1, [1, 2, 3], num_tokens=4),
    "num_tokens must be at least 0": lambda m: m.append(0, -1),
    "num_tokens must be from 0 to 5": lambda m: m.truncate(0, 6),
    "block_id must be from 0 to 64": lambda m: m.ref_count(65),
    "block_id": lambda m: m.ref_count(-1),
    "room for 0 tokens, not 1": lambda m: m.mark_computed(0, [7]),
    "sequence 0 is in use": lambda m: m.allocate(0, [1]),
    "no row for another sample": lambda m: m.fork(0, 1),
}


@pytest.mark.parametrize("words", BAD_CALLS)
def test_bad_calls_are_named_and_change_nothing(words: str) -> None:
    manager = contiguous()
    manager.allocate(0, [1, 2, 3, 4, 5])
    manager.mark_computed(0, [1, 2, 3, 4, 5])
    manager.take_events()
    before = manager.usage(), manager.table(0)
    with pytest.raises(InputError, match=words):
        BAD_CALLS[words](manager)
    assert (manager.usage(), manager.table(0)) == before
    assert manager.take_events() == ()


def test_what_these_systems_do_not_have() -> None:
    """No cache to reset or to find anything in, no host."""
    manager = contiguous()
    assert manager.reset_prefix_cache() is True
    assert manager.match_prefix([1, 2, 3, 4, 5]) == 0
    manager.allocate(0, [1])
    assert manager.host_table(0) == ()
    assert manager.swap_out([0]) is None
    assert manager.swap_in([0]) is None
    for call in (manager.host_table, manager.table, manager.free):
        with pytest.raises(KeyError):
            call(1)


def test_whole_contexts_are_refused_at_their_edge() -> None:
    """A context of 64 tokens: 60 and 4 fit, 60 and 5 never do."""
    manager = contiguous("orca-max")
    assert manager.can_admit(60, 4) is Admission.OK
    assert manager.can_admit(60, 5) is Admission.NEVER
    assert manager.can_admit(1, 1, num_sequences=4) is Admission.OK
    assert manager.can_admit(1, 1, num_sequences=5) is Admission.NEVER


@pytest.mark.parametrize("system", sorted(RESERVING))
def test_pools_as_they_begin(system: str) -> None:
    """The paper's context and blocks unless said otherwise; the first row stands at the start of the pool."""
    pool: Any = RESERVING[system](2048)
    assert (pool.max_len, pool.block_size) == (2048, 16)
    lengths = [name for name in ("longest", "buffer_rows") if hasattr(pool, name)]
    assert [getattr(pool, name) for name in lengths] == [0] * len(lengths)
    assert pool.admit(0, 5, 6, 6)
    assert pool.rows[0].start == 0
    if system == "webui":
        assert (pool.rows[0].reserved, pool.rows[0].chunk) == (0, 0)
    pool.cancel(0)
    assert getattr(pool, "longest", 0) == 0


@pytest.mark.parametrize("system", ["static", "fastertransformer"])
def test_a_batch_that_has_ended_lets_the_next_one_in_at_once(system: str) -> None:
    pool = reservations(system, 333, max_len=MAX_LEN)
    assert pool.admit(0, 4, 4, 4)
    pool.grow(0, 8)
    assert not pool.admit(1, 4, 4, 4)
    pool.finish(0)
    assert pool.admit(1, 4, 4, 4)


def test_fastertransformers_buffer_stays_at_its_largest() -> None:
    """Three rows once, one now: the other two rows are padding, in the sums and in the picture."""
    pool = reservations("fastertransformer", 333, max_len=MAX_LEN)
    for key in range(3):
        assert pool.admit(key, 4, 4, 4)
    pool.close()
    for key in range(3):
        pool.finish(key)
    assert pool.breakdown(waiting=False).padding == 3 * MAX_LEN
    assert pool.admit(3, 4, 4, 4)
    pool.close()
    assert pool.breakdown(waiting=False).padding == 2 * MAX_LEN
    assert Run(MAX_LEN, 2 * MAX_LEN, "padding", -1) in pool.runs(waiting=False)


def test_webui_needs_two_copies() -> None:
    """A pool of 20: ten tokens stand twice in it, eleven do not."""
    assert reservations("webui", 20).admit(0, 5, 5, 5)
    assert not reservations("webui", 20).admit(0, 5, 6, 6)


def test_paged_tgi_uses_its_last_block() -> None:
    """Four blocks for four requests of one block, none for a fifth."""
    pool = reservations("tgi-paged", 64)
    assert [pool.admit(key, 8, 8, 8) for key in range(5)] == [True] * 4 + [False]
    pool.finish(2)
    assert pool.admit(5, 8, 8, 8)


@pytest.mark.parametrize("system", sorted(RESERVING))
def test_pictures_have_no_empty_runs_and_gaps_belong_to_nobody(system: str) -> None:
    pool = reservations(system, 333, max_len=MAX_LEN, block_size=4)
    for key in range(3, 6):
        pool.admit(key, 6, 5, 9)
    pool.close()
    for key in list(pool.rows):
        for written in (0, 1, 5, 5):
            pool.grow(key, written)
            for waiting, gap in ((False, "idle"), (True, "external")):
                runs = pool.runs(waiting=waiting)
                assert all(run.length > 0 for run in runs)
                assert {run.sequence for run in runs} <= {-1, *pool.rows}
                assert all(run.sequence == -1 for run in runs if run.kind == "idle")
                assert runs[-1].kind == gap
                assert runs[-1].sequence == -1 or system == "webui"


def test_powers_of_two() -> None:
    assert [next_power_of_two(n) for n in (0, 1, 2, 3, 4, 5, 1024, 1025)] == [1, 1, 2, 4, 4, 8, 1024, 2048]


def test_a_hole_between_rows_belongs_to_nobody() -> None:
    """The middle one of three rows has ended: what it leaves is a gap like the one at the end."""
    pool = reservations("orca-oracle", 64, max_len=MAX_LEN)
    for key in (1, 2, 3):
        assert pool.admit(key, 8, 8, 8)
    pool.finish(2)
    assert [(run.start, run.length, run.sequence) for run in pool.runs(waiting=False) if run.kind == "idle"] == [
        (16, 16, -1),
        (48, 16, -1),
    ]
