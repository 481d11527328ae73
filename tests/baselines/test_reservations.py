"""Laws of the systems that reserve ahead: what they hold, and who may join.

P1 a reservation is never smaller than what is used.
P2 buddies merge back to the whole.
P3 nobody joins a static batch.
P4 the head blocks the line.
P5 the parts of the pool breakdown sum to the pool at every step.
"""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from minipaged.baselines.buddy import BuddyAllocator, next_power_of_two
from minipaged.baselines.reservations import Reservations
from minipaged.baselines.systems import RESERVING, reservations
from minipaged.errors import InputError

MAX_LEN = 64
RESERVED_AHEAD = sorted(set(RESERVING) - {"webui"})


class PoolMachine(RuleBasedStateMachine):
    """Drives one system's accounting with admissions, growth and finishes, against plain sums over its rows."""

    system = ""

    def __init__(self) -> None:
        super().__init__()
        self.next_key = 0
        self.waiting = False
        self.pool: Reservations = reservations(self.system, 333, max_len=MAX_LEN, block_size=4)
        self.started = False

    def live(self) -> list[int]:
        return [key for key, row in self.pool.rows.items() if not row.ended]

    @rule(prompt=st.integers(1, 40), output=st.integers(1, 24), more=st.integers(0, 30))
    def admit(self, prompt: int, output: int, more: int) -> None:
        before = self.pool.breakdown(waiting=True)
        alone = not self.pool.rows
        taken = self.pool.admit(self.next_key, prompt, output, output + more)
        self.waiting = not taken
        if taken:
            assert self.pool.joins or alone or not self.started, "P3: a row joined a running batch"
            self.next_key += 1
            self.started = self.started and not alone
        else:
            assert self.pool.breakdown(waiting=True) == before, "a refused row changed the pool"

    @precondition(lambda self: self.live())
    @rule(data=st.data(), steps=st.integers(1, 20))
    def grow(self, data: st.DataObject, steps: int) -> None:
        key = data.draw(st.sampled_from(self.live()))
        row = self.pool.rows[key]
        room = row.prompt + row.output - row.tokens
        if steps <= room:
            self.pool.grow(key, steps)
            self.started = True
        else:
            with pytest.raises(InputError, match="cannot grow"):
                self.pool.grow(key, steps)

    @rule(prompt=st.integers(1, 40), output=st.integers(1, 24), more=st.integers(0, 30))
    def admit_and_cancel(self, prompt: int, output: int, more: int) -> None:
        before, picture = self.pool.breakdown(waiting=True), self.pool.runs(waiting=True)
        if self.pool.admit(self.next_key, prompt, output, output + more):
            self.pool.cancel(self.next_key)
        assert self.pool.breakdown(waiting=True) == before
        assert self.pool.runs(waiting=True) == picture

    @precondition(lambda self: self.live())
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(self.live()))
        self.pool.finish(key)
        with pytest.raises(KeyError):
            self.pool.finish(key)
        if not self.live():
            self.started = False

    @invariant()
    def bands_sum_to_the_pool(self) -> None:
        for waiting in (False, True):
            parts = self.pool.breakdown(waiting=waiting)
            assert sum(parts) == self.pool.pool, f"P5: {parts} do not sum to {self.pool.pool}"
            assert min(parts) >= 0, f"P5: a part below zero in {parts}"
            assert self.pool.used() == self.pool.pool - self.pool.breakdown(waiting=False).idle

    @invariant()
    def the_picture_shows_the_same_bands(self) -> None:
        runs = self.pool.runs(waiting=self.waiting)
        assert all(a.start + a.length == b.start for a, b in itertools.pairwise(runs)), "runs overlap or leave holes"
        assert (runs[0].start, runs[-1].start + runs[-1].length) == (0, self.pool.pool)
        shown: Counter[str] = Counter()
        for run in runs:
            shown[run.kind] += run.length
        parts = self.pool.breakdown(waiting=self.waiting)._asdict()
        assert {kind: n for kind, n in parts.items() if n} == dict(shown)

    @invariant()
    def reservations_cover_use(self) -> None:
        rows = [row for row in self.pool.rows.values() if not row.ended]
        assert sum(row.tokens for row in rows) == self.pool.breakdown(waiting=True).token
        if self.system != "webui":
            for row in rows:
                assert row.tokens <= row.prompt + row.output <= row.reserved <= row.chunk, "P1: used more than reserved"
        assert self.pool.used() <= self.pool.pool

    def teardown(self) -> None:
        for key in self.live():
            self.pool.finish(key)
        parts = self.pool.breakdown(waiting=False)
        kept = self.pool.buffer_rows * MAX_LEN if self.system == "fastertransformer" else 0  # type: ignore[attr-defined]
        assert parts.idle == self.pool.pool - kept, "what was held did not come back"


def _case(system: str) -> Any:
    machine = type(f"Pool_{system}", (PoolMachine,), {"system": system})
    case = machine.TestCase
    case.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
    return case


TestWebUI = _case("webui")
TestStatic = _case("static")
TestFasterTransformer = _case("fastertransformer")
TestOrcaMax = _case("orca-max")
TestOrcaPow2 = _case("orca-pow2")
TestOrcaOracle = _case("orca-oracle")
TestEarlyTGI = _case("tgi-early")
TestPagedTGI = _case("tgi-paged")


@given(
    total=st.integers(1, 20_000),
    log_largest=st.integers(0, 12),
    moves=st.lists(st.tuples(st.booleans(), st.integers(1, 3000)), max_size=60),
)
def test_p2_buddies_merge_back_to_the_whole(total: int, log_largest: int, moves: list[tuple[bool, int]]) -> None:
    buddy = BuddyAllocator(total, 1 << log_largest)
    whole = buddy.free_runs()
    live: dict[int, int] = {}
    for give_back, number in moves:
        if give_back and live:
            start = sorted(live)[number % len(live)]
            buddy.free(start)
            del live[start]
            continue
        taken = buddy.allocate(number)
        if taken is not None:
            live[taken] = next_power_of_two(number)
        runs = sorted([*live.items(), *buddy.free_runs()])
        assert sum(size for _, size in runs) == total
        assert all(a + size == b for (a, size), (b, _) in itertools.pairwise(runs)), "runs overlap"
        assert all(start % size == 0 for start, size in runs), "a run is not aligned to its size"
        assert buddy.free_slots == total - sum(live.values())
    for start in live:
        buddy.free(start)
    assert buddy.free_runs() == whole
    assert buddy.free_slots == total


def test_p2_the_papers_pool_is_seven_chunks_and_the_binary_remainder() -> None:
    sizes = [size for _, size in BuddyAllocator(15_728).chunks]
    assert sizes == [2048] * 7 + [1024, 256, 64, 32, 16]


def test_p2_a_failed_request_changes_nothing_and_a_double_free_raises() -> None:
    buddy = BuddyAllocator(96, 64)
    start = buddy.allocate(33)
    assert start == 0
    before = buddy.free_runs()
    assert buddy.allocate(64) is None
    assert buddy.free_runs() == before
    buddy.free(start)
    with pytest.raises(KeyError):
        buddy.free(start)


@given(prompt=st.integers(1, 1024), output=st.integers(1, 1024), more=st.integers(0, 1024))
def test_p1_each_rule_reserves_what_its_table_says(prompt: int, output: int, more: int) -> None:
    taken = {}
    for system in RESERVED_AHEAD:
        pool = reservations(system, 15_728)
        assert pool.admit(0, prompt, output, output + more)
        taken[system] = (pool.rows[0].reserved, pool.rows[0].chunk)
    limit = min(output + more, 2048 - prompt)
    power = min(2048, prompt + next_power_of_two(output))
    assert taken == {
        "static": (prompt + limit,) * 2,
        "fastertransformer": (2048, 2048),
        "orca-max": (2048, 2048),
        "orca-pow2": (power, next_power_of_two(power)),
        "orca-oracle": (prompt + output, next_power_of_two(prompt + output)),
        "tgi-early": (prompt + limit,) * 2,
        "tgi-paged": (-(-(prompt + limit) // 16) * 16,) * 2,
    }


@pytest.mark.parametrize("system", sorted(RESERVING))
@pytest.mark.parametrize(
    ("row", "word"),
    [
        ((0, 1, 1), "prompt"),
        ((1, 0, 1), "output"),
        ((1, 5, 4), "max_new"),
        ((40, 30, 30), "context"),
        ((1.5, 1, 1), "prompt"),
    ],
)
def test_rows_that_cannot_be_are_refused_and_change_nothing(system: str, row: tuple[Any, Any, Any], word: str) -> None:
    pool = reservations(system, 333, max_len=MAX_LEN, block_size=4)
    before = pool.breakdown(waiting=False)
    with pytest.raises(InputError, match=word):
        pool.admit(0, *row)
    assert pool.breakdown(waiting=False) == before


def test_unknown_systems_pools_and_repeated_rows_are_named() -> None:
    with pytest.raises(InputError, match="orca-max"):
        reservations("orca", 100)
    with pytest.raises(InputError, match="pool"):
        reservations("static", 0)
    with pytest.raises(InputError, match="power of two"):
        BuddyAllocator(100, 48)
    pool = reservations("orca-oracle", 333, max_len=MAX_LEN)
    assert pool.admit(7, 4, 4, 4)
    with pytest.raises(InputError, match="row 7"):
        pool.admit(7, 4, 4, 4)
