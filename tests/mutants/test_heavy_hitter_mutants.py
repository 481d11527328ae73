"""Historical bugs of heavy hitters, each put into the real parts. What is whole holds; every mutant is found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from minipaged.config import SamplingParams
from minipaged.execution.paged_kv import PagedKV
from minipaged.kernels.attention import heavy_hitters
from minipaged.memory.block_manager import BlockManager
from minipaged.memory.retention import KEEP_ALL, Retention
from minipaged.scheduling.batch import Batch
from tests.exactness.retained import engine_of, kept_by_engine, run_watched, tiny_model
from tests.exactness.test_heavy_hitters import assert_as_simulated

MODEL = tiny_model()
RETENTION = Retention(heavy=5, recent=4)
ASKED = [
    ([i % 50 for i in range(26)], SamplingParams(max_tokens=20, ignore_eos=True)),
    ([i % 50 for i in range(11)], SamplingParams(n=2, temperature=1.0, seed=1, max_tokens=9, ignore_eos=True)),
    ([9, 3, 9], SamplingParams(max_tokens=16, ignore_eos=True)),
]


def check() -> None:
    """AssertionError, or what the engine raises, unless all is as it should be."""
    limits: dict[str, Any] = {"num_host_blocks": 40, "num_blocks": 12, "block_size": 3, "max_num_batched_tokens": 8}
    engine, runner = engine_of(MODEL, RETENTION, **limits)
    with kept_by_engine(runner):
        run_watched(engine, ASKED, RETENTION)
    assert engine.scheduler.counters.swaps, "nobody was sent away"
    assert engine.scheduler.counters.copies, "nothing was shared"
    assert not engine.scheduler.manager.match_prefix(ASKED[0][0]), "L58: what depends on an eviction can be found"
    assert assert_as_simulated(runner, RETENTION).left_out == 0


Patch = Callable[[pytest.MonkeyPatch], None]


def score_lost_on_swap(patch: pytest.MonkeyPatch) -> None:
    """Keys and values come back from the host, their scores do not."""
    real = PagedKV.swap_in

    def swap_in(self: PagedKV, pairs: Any) -> None:
        before = [marks.scores.clone() for marks in self.marks]
        real(self, pairs)
        for marks, scores in zip(self.marks, before, strict=True):
            marks.scores.copy_(scores)

    patch.setattr(PagedKV, "swap_in", swap_in)


def score_lost_on_a_copy(patch: pytest.MonkeyPatch) -> None:
    """A sample starts with the scores of whoever had its blocks before."""
    real = PagedKV.copy

    def copy(self: PagedKV, pairs: Any) -> None:
        before = [marks.scores.clone() for marks in self.marks]
        real(self, pairs)
        for marks, scores in zip(self.marks, before, strict=True):
            marks.scores.copy_(scores)

    patch.setattr(PagedKV, "copy", copy)


def shared_block_overwritten(patch: pytest.MonkeyPatch) -> None:
    """Only the tail is copied before a sample goes on, as where nothing else is ever written."""

    def append(self: BlockManager, sequence: Any, num_tokens: int) -> Any:
        self.retention = KEEP_ALL
        try:
            return self.append(sequence.seq_id, num_tokens)
        finally:
            self.retention = RETENTION

    patch.setattr(BlockManager, "_append_to_own", append)


def evicted_run_published(patch: pytest.MonkeyPatch) -> None:
    """Sequences may find each other's blocks, with the scores of others in them."""
    real = BlockManager.allocate

    def allocate(self: BlockManager, seq_id: int, *arguments: Any, **named: Any) -> Any:
        found = real(self, seq_id, *arguments, **named)
        if found is not None:
            self._sequences.find(seq_id).publishes = True
        return found

    patch.setattr(BlockManager, "allocate", allocate)
    publish = "minipaged.scheduling.running_set.RunningSet.publish_full_blocks"
    patch.setattr(publish, _publish_what_is_in_the_table)


def _publish_what_is_in_the_table(self: Any, slots: Any, ends: Any) -> None:
    for slot, end in zip(slots.tolist(), ends.tolist(), strict=True):
        sequence = self.batch.sequences[slot]
        if sequence is not None and not self.batch.num_left_out[slot] and end <= sequence.request.num_prompt:
            self.publish(sequence, end // self.block_size * self.block_size)


def places_drift_by_one(patch: pytest.MonkeyPatch) -> None:
    """Behind the first eviction a token is written one slot further in each step."""

    def keep_heaviest(self: Batch, slots: Any) -> None:
        real(self, slots)
        self.num_left_out[slots] -= self.num_left_out[slots] > 1

    real = Batch.keep_heaviest
    patch.setattr(Batch, "keep_heaviest", keep_heaviest)


def newest_of_equals_goes(patch: pytest.MonkeyPatch) -> None:
    """At equal scores the newest token goes; scores are so coarse here that there are many."""
    real = heavy_hitters.dropped

    def dropped(scores: Any, positions: Any, lengths: Any, budget: Any) -> Any:
        at = positions.long()
        newest = at.masked_fill(torch.arange(at.shape[-1]) >= lengths[:, None, None], -1).amax(-1, keepdim=True)
        protected = torch.where(at > newest - (budget.recent - 1), torch.inf, scores.round())
        return real(protected, -positions, lengths, heavy_hitters.Budget(budget.heavy + budget.recent - 1, 1))

    patch.setattr(heavy_hitters, "dropped", dropped)


def evicted_between_chunks(patch: pytest.MonkeyPatch) -> None:
    """Tokens go before all of the prompt has been read."""
    real = heavy_hitters.keep_heaviest

    def keep_heaviest(*arguments: Any, **named: Any) -> None:
        changed = list(arguments)
        changed[8] = None
        real(*changed, **named)

    patch.setattr("minipaged.execution.paged_kv.keep_heaviest", keep_heaviest)


def recent_tokens_one_too_few(patch: pytest.MonkeyPatch) -> None:
    """The newest tokens but one may go."""
    real = heavy_hitters.dropped
    patch.setattr(
        heavy_hitters,
        "dropped",
        lambda scores, positions, lengths, budget: real(
            scores, positions, lengths, budget._replace(heavy=budget.heavy + 1, recent=budget.recent - 1)
        ),
    )


def first_score_is_what_stood_there(patch: pytest.MonkeyPatch) -> None:
    """A token's score is added to that of the token whose slot it took."""

    def add_scores(marks: Any, slots: Any, given: Any, lengths: Any, positions: Any) -> None:
        before = marks.scores.nan_to_num(0).view(-1)[slots]
        real(marks, slots, given, lengths, positions)
        at = torch.arange(slots.shape[-1])
        new = ((at < lengths[:, None]) & (at >= lengths[:, None] - positions.shape[1]))[:, None].expand_as(slots)
        marks.scores.view(-1)[slots[new]] += before[new]

    real = heavy_hitters.add_scores
    patch.setattr(heavy_hitters, "add_scores", add_scores)


MUTANTS: list[Patch] = [
    score_lost_on_swap,
    score_lost_on_a_copy,
    shared_block_overwritten,
    evicted_run_published,
    places_drift_by_one,
    newest_of_equals_goes,
    evicted_between_chunks,
    recent_tokens_one_too_few,
    first_score_is_what_stood_there,
]


def test_what_is_whole_holds() -> None:
    check()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_L58_L59_L70_L72_find(mutant: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant(monkeypatch)
    with pytest.raises((AssertionError, ValueError, IndexError)):
        check()
