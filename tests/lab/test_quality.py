"""The quality of number formats: what is summed, on a toy model and the shipped text."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from minipaged.errors import InputError
from minipaged.lab.measure import quality
from minipaged.lab.measure.quality import FORMATS, Quality, measure, predictions, windows_of
from minipaged.model.loading import zoo


@pytest.fixture(scope="module")
def rows() -> dict[str, Quality]:
    return {row.format: row for row in measure("random:toy", window=40, most_windows=2, device="cpu")}


def test_every_format_is_measured_and_the_reference_is_itself(rows: dict[str, Quality]) -> None:
    assert list(rows) == list(FORMATS)
    plain = rows["float32"]
    assert (plain.ratio, plain.same, plain.tokens) == (1.0, 1.0, 78)
    assert abs(plain.kl) < 1e-6
    config = zoo.load("random:toy", device="cpu", dtype="float32").config
    for name, row in rows.items():
        assert row.kv_bytes_per_token == config.kv_bytes_per_token(FORMATS[name].kv_dtype)
        assert row.tokens_per_second > 0


def test_fewer_bits_move_the_predictions_further(rows: dict[str, Quality]) -> None:
    assert rows["bfloat16"].kl < rows["int8"].kl < rows["fp8"].kl
    assert rows["fp8-tensor"].kl > rows["int8"].kl
    assert all(0.5 < row.same <= 1 for row in rows.values())


def test_perplexity_and_kl_by_hand() -> None:
    loaded = zoo.load("random:toy", device="cpu", dtype=torch.float32)
    tokens = windows_of(loaded, quality.TEXT.read_text(encoding="utf-8"), 40)[0]
    plain, coded = (
        predictions(loaded.model, FORMATS[n].store(loaded, 4, torch.device("cpu")), tokens)[:-1]
        for n in ("float32", "int8")
    )
    found = {row.format: row for row in measure("random:toy", ["int8"], window=40, most_windows=1, device="cpu")}
    losses = [-float(coded[i, tokens[i + 1]]) for i in range(39)]
    assert found["int8"].perplexity == pytest.approx(math.exp(sum(losses) / 39), rel=1e-5)
    kl = torch.nn.functional.kl_div(coded, plain, log_target=True, reduction="batchmean")
    assert found["int8"].kl == pytest.approx(float(kl), rel=1e-3, abs=1e-7)


def test_one_scale_for_all_is_one() -> None:
    loaded = zoo.load("random:toy", device="cpu", dtype=torch.float32)
    store = FORMATS["fp8-tensor"].store(loaded, 4, torch.device("cpu"))
    predictions(loaded.model, store, list(range(20)))
    assert all((scale == 1).all() for pair in store.scales if pair is not None for scale in pair)
    assert store.keys[0][1].float().any()


def test_the_text_has_its_source_and_is_long_enough() -> None:
    text = quality.TEXT.read_text(encoding="utf-8")
    assert text.startswith("When in the Course of human events")
    assert len(text) > 9000
    assert "public domain" in str(quality.__doc__)


def test_what_cannot_be_measured_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="format must be one of"):
        list(measure("random:toy", ["int3"], device="cpu"))
    short = tmp_path / "short.txt"
    short.write_text("a few words")
    monkeypatch.setattr(quality, "TEXT", short)
    with pytest.raises(InputError, match="not one window of 512"):
        list(measure("random:toy", device="cpu"))
