"""Results files speak to claims; without them the claims say what would measure them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minipaged.lab.measure.ablate import CONSECUTIVE, SHUFFLED
from minipaged.lab.paper import claims, measured


def document(rows: list[dict[str, Any]], *, date: str = "2026-01-02", device: str = "NVIDIA X") -> dict[str, Any]:
    return {"command": "c", "date": date, "device": device, "versions": {}, "python": "3", "rows": rows}


LAYOUT = [
    {"section": "layout", "name": f"2 x 3, one layer: {CONSECUTIVE}", "seconds": 2.0, "ratio": 1.0},
    {"section": "layout", "name": f"2 x 3, one layer: {SHUFFLED}", "seconds": 2.05, "ratio": 1.0},
    *({"section": "together", "name": "", "seconds": 1.0, "ratio": ratio} for ratio in (1.0, 1.5, 4.0, 5.0, 6.0)),
]
KERNELS = [
    {"kernel": "decode", "shape": shape, "contender": contender, "microseconds": us}
    for shape, contender, us in (
        ("a", "minipaged", 11.0), ("a", "torch flash, dense", 10.0), ("a", "torch cuDNN, dense", 8.0), ("a", "fa3", 1.0),
        ("b", "minipaged", 5.0),
    )
]  # fmt: skip
SYSTEMS = [
    {"system": system, "pool": pool, "tokens": tokens, "tokens_per_second": speed, "token_share": share}
    for system, pool, tokens, speed, share in (
        ("transformers generate", 0, 9, 5.0, None), ("static", 64, 9, 10.0, 0.2), ("paged", 64, 9, 40.0, 0.9), ("paged", 640, 9, 90.0, 0.8),
        ("transformers continuous", 0, 0, None, None),
    )
]  # fmt: skip


def test_numbers_are_read_from_the_rows() -> None:
    assert measured.layout_cost(document(LAYOUT)) == pytest.approx(0.025)
    assert measured.factors(document(LAYOUT)) == (1.5, 4.0, 5.0)
    assert measured.layout_cost(document(LAYOUT[:1])) is None, "cut short"
    assert measured.factors(document(LAYOUT[:4])) is None
    assert measured.against_dense(document(KERNELS)) == [pytest.approx(11 / 8)]
    assert measured.speeds(document(SYSTEMS)) == {"transformers generate": 5.0, "static": 10.0, "paged": 40.0}
    assert measured.shares(document(SYSTEMS)) == {"static": 0.2, "paged": 0.9}


def test_the_newest_on_a_gpu_counts(tmp_path: Path) -> None:
    assert measured.newest("section", tmp_path) is None
    for name, found in (
        ("a", document(LAYOUT, date="2026-01-01")),
        ("b", document(LAYOUT, date="2026-03-01")),
        ("c", document(LAYOUT, date="2026-04-01", device="CPU, x86_64")),
        ("d", document(KERNELS, date="2026-05-01")),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    found = measured.newest("section", tmp_path)
    assert found is not None
    assert measured.origin(found) == "NVIDIA X, 2026-03-01"


def test_claims_say_what_was_measured_or_how_it_would_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "newest", lambda key, folder=None: None)
    nothing = claims.kernel_cost()
    assert nothing.verdict == "to be measured"
    assert "lab ablate" in nothing.evidence
    assert claims.factors_multiply().evidence.endswith("paging buys batch size")
    there = {"section": document(LAYOUT), "kernel": document(KERNELS), "system": document(SYSTEMS)}
    monkeypatch.setattr(measured, "newest", lambda key, folder=None: there[key])
    assert claims.kernel_cost().verdict == "holds today"
    assert "+2.5 %" in claims.kernel_cost().evidence
    assert "5.00x together; the product would be 6.00x" in claims.factors_multiply().evidence
    assert "4.0x static, 8.0x transformers generate" in claims.over_tgi().evidence
    assert "10 % paged" in claims.contiguous_waste().evidence
