"""`minipaged lab retention`: what is summed and counted, on a toy model and the shipped text."""

from __future__ import annotations

import math

import pytest
import torch

from minipaged.errors import InputError
from minipaged.lab.measure import retention
from minipaged.lab.measure.quality import TEXT
from minipaged.memory.retention import Retention
from minipaged.model.loading import zoo
from tests.exactness.retained import by_definition, heaviest_by_definition


def test_perplexity_is_the_definitions_and_fewer_blocks_are_held() -> None:
    loaded = zoo.load("random:toy", device="cpu", dtype=torch.float32)
    text = loaded.tokenizer.encode(TEXT.read_text(encoding="utf-8"))[:150]
    names = retention.policies(40)
    assert names == ("all", "window:40", "sinks:4+window:36", "h2o:20+20")
    rows = list(retention.measure("random:toy", names, tokens=150, device="cpu"))
    for row in rows:
        policy = Retention.parse(row.retention)
        if policy.heavy:
            hidden, _ = heaviest_by_definition(loaded.model, text, policy, 1)
        else:
            hidden = by_definition(loaded.model, text, policy)
        losses = loaded.model.logits(hidden).log_softmax(-1)[:-1].gather(1, torch.tensor(text[1:])[:, None])
        assert row.perplexity == pytest.approx(math.exp(-losses.mean().item()), rel=1e-4)
        assert (row.tokens, row.all_blocks) == (149, 10)
    assert rows[0].most_blocks == 10
    assert all(row.most_blocks <= 6 for row in rows[1:])
    assert rows[0].kv_bytes == 10 * 16 * loaded.config.kv_bytes_per_token("float32")


def test_a_stream_is_told_of_at_ten_places_and_holds_the_same() -> None:
    marks = list(retention.stream("random:toy", "sinks:4+window:28", tokens=2000, device="cpu"))
    assert [mark.tokens for mark in marks] == list(range(200, 2000, 200))
    assert max(mark.blocks for mark in marks) <= 4
    assert all(mark.step_ms > 0 for mark in marks)


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(InputError, match="budget"):
        retention.policies(8)
    with pytest.raises(InputError, match="a policy that forgets"):
        list(retention.stream("random:toy", "all", tokens=10, device="cpu"))
    with pytest.raises(InputError, match="the text has"):
        list(retention.measure("random:toy", ["all"], tokens=10**6, device="cpu"))
