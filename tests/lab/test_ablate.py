"""What `lab ablate` times is right before it is fast: the ways of writing attention agree, and a small run measures every section."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch

from minipaged.errors import InputError
from minipaged.lab.measure import ablate as module
from minipaged.lab.measure.ablate import ablate, sizes_for
from minipaged.lab.measure.attention_variants import (
    DECODES,
    Cells,
    paged,
    split_torch,
    torch_dense,
    written_out_prefill,
)
from minipaged.lab.measure.rows import SECTIONS
from minipaged.lab.measure.step_bench import SlotPool, decode_step, prefill_step, time_of
from minipaged.lab.report.bench_report import ablation_tables
from minipaged.lab.report.device_report import ablation_dicts, ablation_page, load_note, plot_of, print_ablation
from minipaged.model.llama import Llama
from minipaged.model.loading.shapes import shape

CPU = torch.device("cpu")


def cells_of(rows: int, heads: int, kv_heads: int, context: int, size: int) -> tuple[torch.Tensor, Cells]:
    """The same keys and values twice: in shuffled blocks and dense."""
    torch.manual_seed(0)
    width = -(-context // size)
    keys, values = torch.randn(2, rows * width + 1, size, kv_heads, 16)
    tables = torch.randperm(rows * width).view(rows, width) + 1
    dense = [
        x[tables].view(rows, width * size, kv_heads, 16)[:, :context].transpose(1, 2).contiguous()
        for x in (keys, values)
    ]
    lengths = torch.full((rows,), context, dtype=torch.int32)
    return torch.randn(rows, heads, 16), Cells(keys, values, tables.to(torch.int32), lengths, dense[0], dense[1])


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("context", [1, 37, 512])
def test_all_ways_of_writing_attention_agree(heads: int, kv_heads: int, context: int) -> None:
    query, cells = cells_of(3, heads, kv_heads, context, 16)
    expected = paged(query, cells, 0.25)
    for name, attend in {**DECODES, "torch": torch_dense}.items():
        torch.testing.assert_close(attend(query, cells, 0.25), expected, msg=name)
    for parts in (1, 2, 3, 4):
        torch.testing.assert_close(split_torch(query, cells, 0.25, parts), expected)


def test_splitting_cuts_rows_into_parts_of_enough_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    query, cells = cells_of(2, 4, 2, 512, 16)
    seen: list[int] = []
    real = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    class Spy:
        def _scaled_dot_product_flash_attention_for_cpu(
            self, q: torch.Tensor, k: torch.Tensor, *rest: object, **named: object
        ) -> object:
            seen.append(k.shape[2])
            return real(q, k, *rest, **named)

    monkeypatch.setattr(torch.ops, "aten", Spy())
    split_torch(query, cells, 0.25, 4)
    split_torch(query, cells, 0.25, 16)
    assert seen == [128, 128]


def test_prefill_written_out_agrees_with_torchs() -> None:
    query, key, value = torch.randn(9, 6, 16), torch.randn(9, 2, 16), torch.randn(9, 2, 16)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), is_causal=True, enable_gqa=True, scale=0.3
    ).transpose(0, 1)
    torch.testing.assert_close(written_out_prefill(query, key, value, 0.3), expected)


def test_steps_compute_what_the_engine_would() -> None:
    """A step over shuffled blocks draws what the plain network draws for the same tokens: here after a prefill of the same prompt."""
    model = Llama.random(shape("toy"), 0, torch.float32, CPU, 0.1)
    pool = SlotPool(model.config, 2, 512, torch.float32, CPU)
    torch.manual_seed(1)
    one_pass = prefill_step(model, pool, 40, fused=True)
    torch.manual_seed(1)
    written = prefill_step(model, pool, 40, fused=False)
    assert one_pass().tolist() == written().tolist()
    drawn = {}
    for size in (1, 16, 64):
        for path in (False, True):
            torch.manual_seed(2)
            step = decode_step(model, pool, 3, 50, paged, block_size=size, shuffled=True, fused=path)
            drawn[size, path] = step().tolist()
        assert drawn[size, True] == drawn[size, False]
    assert time_of(lambda: None, CPU) >= 0


def test_a_small_run_measures_every_section(monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(sizes_for(CPU, 120.0), rows=2, context=64, lone=64, prompt=32)
    small = replace(small, requests=small.requests[:12])
    monkeypatch.setattr(module, "sizes_for", lambda device, seconds: small)
    stages: list[str] = []
    found = ablate("toy", device="cpu", seconds=120.0, progress=lambda what, done, total: stages.append(what))
    assert {m.section for m in found.measures} == set(SECTIONS)
    assert [m.section for m in found.measures] == sorted((m.section for m in found.measures), key=list(SECTIONS).index)
    assert all(m.ratio > 0 for m in found.measures)
    assert all(m.seconds > 0 for m in found.measures if not math.isnan(m.seconds))
    assert set(stages) == {"loading", *SECTIONS}
    preempted = [m.note for m in found.of("preemption")]
    assert all(not note.startswith("0 ") for note in preempted), preempted
    product, both = found.of("together")[-1], found.of("together")[-2]
    assert product.note == f"measured together: {both.ratio:.2f}x"

    print_ablation(found)
    rows = ablation_dicts(found)
    kept = json.loads(json.dumps({"device": "here", "date": "2026-01-01", "rows": rows}))
    ElementTree.fromstring(plot_of(kept))
    tables = "\n".join(ablation_tables(kept["rows"]))
    assert all(f"| {m.name} |" in tables for m in found.measures)
    assert "<svg" in ablation_page(found).text()


def test_an_ablation_stopped_after_a_few_steps_gives_no_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Systems that the time limit stopped at once have neither speed nor factor, and the tables and the plot say so."""
    small = replace(sizes_for(CPU, 1e-9), rows=2, context=64, lone=64, prompt=32)
    monkeypatch.setattr(module, "sizes_for", lambda device, seconds: small)
    heard: list[float] = []
    found = ablate("toy", device="cpu", seconds=1e-9, progress=lambda what, done, total: heard.append(done / total))
    assert heard == sorted(heard)
    assert heard[-1] <= 1
    for measure in (*found.of("batching"), *found.of("preemption")):
        assert math.isnan(measure.ratio)
        assert math.isnan(measure.tokens_per_second)
        assert "too few" in measure.note
    print_ablation(found)
    rows = json.loads(json.dumps(ablation_dicts(found)))
    assert "| one at a time |" in "\n".join(ablation_tables(rows))
    ElementTree.fromstring(plot_of({"device": "here", "date": "2026-01-01", "rows": rows}))


def test_results_without_a_plot_are_refused() -> None:
    with pytest.raises(InputError, match="no plot"):
        plot_of({"device": "here", "date": "today", "rows": [{"kernel": "copy"}]})


def test_a_busy_machine_is_said_to_be_one() -> None:
    assert "measure again" in load_note(9.0, 2, "cpu")
    assert load_note(2.5, 2, "cpu") == ""
    assert load_note(90.0, 2, "cuda") == ""
