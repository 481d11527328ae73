"""Historical bugs of windows and sinks, each put into the real parts. What is whole holds; every mutant is found."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from minipaged.config import SamplingParams
from minipaged.execution.paged_kv import PagedKV
from minipaged.memory.block_manager import BlockManager
from minipaged.memory.retention import Retention
from minipaged.model.llama import angle_rows
from tests.exactness.retained import assert_as_defined, engine_of, run_watched, tiny_model

MODEL = tiny_model()
WINDOW, SINKS = Retention(9), Retention(9, 3)
ASKED = [
    ([i % 50 for i in range(30)], SamplingParams(max_tokens=30, ignore_eos=True)),
    ([i % 50 for i in range(21)], SamplingParams(n=3, temperature=1.0, seed=1, max_tokens=12, ignore_eos=True)),
]


def check(retention: Retention) -> None:
    """AssertionError, or what the engine raises, unless all is as it should be."""
    engine, runner = engine_of(MODEL, retention, num_blocks=60, max_num_batched_tokens=8)
    run_watched(engine, ASKED, retention)
    assert_as_defined(runner, MODEL, retention)
    if retention.sinks:
        first = retention.window + retention.sinks if retention.window is not None else 0
        found = engine.scheduler.manager.match_prefix(ASKED[0][0])
        assert found <= first + 8, "L58: what was computed after an eviction can be found"


Patch = Callable[[pytest.MonkeyPatch], None]


def released_early(patch: pytest.MonkeyPatch) -> None:
    """A block goes back while its last token is still seen."""
    real = Retention.spare_until
    patch.setattr(Retention, "spare_until", lambda self, n, size: real(self, n + 1, size))


def released_late(patch: pytest.MonkeyPatch) -> None:
    """A window that never gives anything back."""
    patch.setattr("minipaged.scheduling.running_set.RunningSet.release_spare", lambda self: None)


def released_twice(patch: pytest.MonkeyPatch) -> None:
    """A window's block loses a holder each time it is asked for, null or not."""
    real, gone = BlockManager.release, dict[tuple[int, int], int]()

    def release(self: BlockManager, seq_id: int, indices: Iterable[int]) -> None:
        for index in range(max(indices) + 1):
            block = self.table(seq_id)[index]
            if block:
                gone[seq_id, index] = block
            elif (seq_id, index) in gone:
                self._pool.drop(gone[seq_id, index])
        real(self, seq_id, indices)

    patch.setattr(BlockManager, "release", release)


def one_token_more(patch: pytest.MonkeyPatch) -> None:
    """The mask shows the token just outside the window."""
    real = PagedKV.attend

    def attend(self: PagedKV, layer: int, *arguments: Any) -> Any:
        self.windows = [10 for _ in self.windows]
        return real(self, layer, *arguments)

    patch.setattr(PagedKV, "attend", attend)


def true_positions_on_sinks(patch: pytest.MonkeyPatch) -> None:
    """The sinks drift away: the query keeps its position in the text."""
    patch.setattr(
        PagedKV,
        "with_sinks",
        lambda self, inputs, frequencies: inputs._replace(sink_turn=angle_rows(frequencies, inputs.positions * 0)),
    )


def drift_by_one(patch: pytest.MonkeyPatch) -> None:
    """Behind the first eviction positions within the cache are one too large."""

    def with_sinks(self: PagedKV, inputs: Any, frequencies: Any) -> Any:
        last = self.retention.sinks + (self.retention.window or 0)
        return inputs._replace(sink_turn=angle_rows(frequencies, inputs.positions.clamp(max=last) - inputs.positions))

    patch.setattr(PagedKV, "with_sinks", with_sinks)


def sinks_go_too(patch: pytest.MonkeyPatch) -> None:
    """The sinks' blocks are released as any others."""
    patch.setattr(Retention, "front", lambda self, size: 0)


def evicted_run_published(patch: pytest.MonkeyPatch) -> None:
    """What streams behind sinks goes on into the prefix cache."""
    patch.setattr(Retention, "publishes", property(lambda self: True))


MUTANTS: list[tuple[Retention, Patch]] = [
    *((WINDOW, mutant) for mutant in (released_early, released_late, released_twice, one_token_more)),
    *((SINKS, mutant) for mutant in (released_early, true_positions_on_sinks, drift_by_one, sinks_go_too)),
    (SINKS, evicted_run_published),
]


@pytest.mark.parametrize("retention", [WINDOW, SINKS], ids=str)
def test_what_is_whole_holds(retention: Retention) -> None:
    check(retention)


@pytest.mark.parametrize(("retention", "mutant"), [pytest.param(r, m, id=f"{m.__name__}-{r}") for r, m in MUTANTS])
def test_L56_L57_L58_L71_find(retention: Retention, mutant: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant(monkeypatch)
    with pytest.raises((AssertionError, ValueError, IndexError)):
        check(retention)
