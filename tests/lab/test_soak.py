"""The soak: what it reports, and that each of the laws that it watches is found when it is broken."""

from __future__ import annotations

from typing import Any

import pytest

from minipaged.lab.measure import soak as soaking
from minipaged.lab.measure.soak import computes_the_union, soak
from minipaged.memory.blocks import PrefixIndex
from minipaged.scheduling.request import Request
from minipaged.scheduling.scheduler import Scheduler
from tests.mutants.scheduler_bugs import GroupResumesOneByOne, PrefixesMadeTwice


@pytest.mark.parametrize("depth", [0, 1])
def test_L65_L66_L67_L68_nothing_is_lost(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soaking, "BRIMFUL_EVERY", 200)
    report = soak(300, depth=depth, max_num_seqs=32)
    assert report.requests == 300
    assert report.brimful == 1
    assert report.aborted > 0
    assert report.preemptions > report.swaps > 0
    assert 0 < report.admissions_with_hits < report.admissions
    assert report.groups_looked_at > 0
    assert report.blocks_looked_up > 0
    assert report.hashed_blocks > 0
    assert report.union_requests == 3


class LooksUpEveryStep(Scheduler):
    """A request that waits is hashed anew in each step that finds no room for it."""

    def _first_tokens(self, step: Any, request: Request) -> Any:
        request.prefix = None
        return super()._first_tokens(step, request)


class TakesWhatExceedsThePool(Scheduler):
    """Nothing is ever too large."""

    def check(self, request: Request) -> None:
        pass


@pytest.mark.parametrize(
    ("mutant", "law"),
    [
        (PrefixesMadeTwice, "L65"),
        (GroupResumesOneByOne, "L67"),
        (LooksUpEveryStep, "L68"),
        (TakesWhatExceedsThePool, "L68"),
    ],
)
def test_a_broken_scheduler_is_found(mutant: type[Scheduler], law: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soaking, "Scheduler", mutant)
    monkeypatch.setattr(soaking, "BRIMFUL_EVERY", 200)
    monkeypatch.setattr(soaking, "computes_the_union", lambda *args, **options: 0)
    with pytest.raises(RuntimeError, match=law):
        soak(400, max_num_seqs=32)


def test_prefixes_made_twice_exceed_the_union(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soaking, "Scheduler", PrefixesMadeTwice)
    with pytest.raises(RuntimeError, match=r"L65: .* the union of the prefixes needs"):
        computes_the_union(60, seed=0, depth=0)


def test_a_forgotten_twin_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """L66: erasing one of two equal blocks forgets the other as well."""
    erase = PrefixIndex.erase

    def forgets_both(self: PrefixIndex, block: int) -> bool:
        for twin in list(self._twins.get(self._key_of.get(block, b""), ())):
            erase(self, twin)
        return erase(self, block)

    monkeypatch.setattr(PrefixIndex, "erase", forgets_both)
    with pytest.raises(RuntimeError, match=r"L65: .* could be found|L66"):
        soak(2000, max_num_seqs=32)
