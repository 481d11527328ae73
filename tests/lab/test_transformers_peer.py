"""transformers beside the systems: batches by the static rule, absent or failing peers said as such, and one real run each."""

from __future__ import annotations

import math

import pytest

from minipaged.lab.measure.transformers_peer import MAX_NEW, PEERS, run_peer, static_batches

DRAWS = [([1 + i] * (4 + i), 3 + i) for i in range(4)]


def test_static_batches_fit_the_pool_and_keep_the_order() -> None:
    requests = [([1] * length, 5) for length in (10, 200, 30, 976, 10)]
    batches = static_batches(requests, 2 * (200 + MAX_NEW))
    assert batches == [[0, 1], [2], [3], [4]] or [i for b in batches for i in b] == list(range(5))
    for batch in batches:
        width = max(len(requests[i][0]) for i in batch)
        assert len(batch) == 1 or len(batch) * (width + MAX_NEW) <= 2 * (200 + MAX_NEW)
    assert static_batches(requests, 10**9, most=2) == [[0, 1], [2, 3], [4]]


@pytest.mark.slow
def test_a_peer_that_cannot_run_is_a_row_that_says_why() -> None:
    result = run_peer("generate", "toy", DRAWS, device="cpu", pool=4096, seconds=1.0)
    assert result.note.startswith("skipped: ")
    assert "random:SHAPE only" in result.note
    assert result.tokens == 0
    assert math.isnan(result.tokens_per_second)


@pytest.mark.slow
@pytest.mark.parametrize("peer", PEERS)
def test_peers_write_every_token_that_was_asked_for(peer: str) -> None:
    result = run_peer(peer, "random:toy", DRAWS, device="cpu", pool=4096, seconds=None)
    assert result.note == ""
    assert result.finished == len(DRAWS)
    assert result.tokens == sum(length for _, length in DRAWS)
    assert 0 < result.mean_rows <= len(DRAWS)
    assert 0 < result.first_token[0] <= result.first_token[1] <= result.seconds
