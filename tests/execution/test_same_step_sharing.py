"""Sequences of one step may share what the step itself computes: every layer writes all keys and values before anyone attends.

A writer computes a prompt, in one go or in chunks; readers have its blocks in their tables and start behind them, in the very step that
writes them. The answers and what lies in the cache must be as if everyone had come one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minipaged.execution.eager import TorchRunner
from minipaged.execution.paged_kv import PagedKV
from minipaged.execution.step_inputs import StepInputs, inputs_of
from minipaged.model.llama import Layer, angle_table
from minipaged.model.loading import zoo
from tests.execution.plans import plan_of

TOY = zoo.load("toy", device="cpu", dtype="float32")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Row:
    """Tokens [start, start + len(tokens)) of a sequence with this table."""

    start: int
    tokens: list[int]
    table: list[int]


def run_step(runner: TorchRunner, rows: list[Row]) -> tuple[np.ndarray, np.ndarray]:
    """The most likely tokens after each row, and their log-probabilities."""
    plan = plan_of(
        [(row.start, len(row.tokens)) for row in rows],
        block_size=runner.kv.block_size,
        tables=[row.table for row in rows],
        token_ids=[token for row in rows for token in row.tokens],
    )
    drawn = runner.launch(replace(plan, top_logprobs=5)).tokens()
    assert drawn.top_ids is not None
    assert drawn.top_logprobs is not None
    return drawn.top_ids, drawn.top_logprobs


def new_runner(block_size: int, blocks: int) -> TorchRunner:
    """A pool full of NaN: whoever reads a slot before it is written shows it."""
    kv = PagedKV(TOY.config, blocks, block_size)
    for tensor in kv.tensors.values():
        tensor.fill_(float("nan"))
    return TorchRunner(TOY.model, kv, max_num_seqs=80)


@st.composite
def scenes(draw: st.DrawFn) -> tuple[int, list[Row], list[Row]]:
    """(block size, what was computed before, the step's rows: each shares only with those before it)."""
    block_size = draw(st.integers(1, 5))
    prompt = draw(st.lists(st.integers(97, 122), min_size=2 * block_size, max_size=30))
    done = draw(st.integers(0, len(prompt) - 1))  # tokens of earlier chunks
    end = draw(st.integers(done + 1, len(prompt)))
    free = iter(range(1, 200))
    table = [next(free) for _ in range(-(-end // block_size))]
    before = [Row(0, prompt[:done], table)] if done else []
    rows = [Row(done, prompt[done:end], table)]
    written = [(prompt[:end], table)]
    for _ in range(draw(st.integers(1, 4))):
        tokens, blocks = draw(st.sampled_from(written))  # of the writer, or of a reader that writes on
        shared = draw(st.integers(0, len(tokens) // block_size))
        own = draw(st.lists(st.integers(97, 122), min_size=1, max_size=9))
        start = shared * block_size
        mine = blocks[:shared] + [next(free) for _ in range(-(-len(own) // block_size))]
        rows.append(Row(start, own, mine))
        written.append((tokens[:start] + own, mine))
    return block_size, before, rows


@settings(deadline=None)
@given(scenes(), st.randoms(use_true_random=False))
def test_one_step_is_as_one_after_the_other(scene: tuple[int, list[Row], list[Row]], random: object) -> None:
    block_size, before, rows = scene
    apart, together = new_runner(block_size, 200), new_runner(block_size, 200)
    for runner in (apart, together):
        for row in before:
            run_step(runner, [row])
    expected = [run_step(apart, [row]) for row in rows]
    order = list(range(len(rows)))
    random.shuffle(order)  # type: ignore[attr-defined]
    ids, values = run_step(together, [rows[i] for i in order])
    for at, i in enumerate(order):
        np.testing.assert_allclose(values[at], expected[i][1][0], rtol=1e-3, atol=1e-3)
        assert ids[at, 0] == expected[i][0][0, 0] or values[at, 0] - values[at, 1] < 1e-3
    for name, tensor in apart.kv.tensors.items():
        torch.testing.assert_close(together.kv.tensors[name], tensor, rtol=1e-3, atol=1e-3, equal_nan=True)


ROWS = [Row(0, [97, 98, 99, 100, 101, 102, 103, 104], [1, 2]), Row(8, [105], [1, 2, 3]), Row(4, [110, 111], [1, 4])]


def test_rotating_on_the_way_to_the_cache_writes_before_anyone_attends_too() -> None:
    """As graphs do it."""
    angles = angle_table(TOY.model.frequencies, 32)

    def hidden(kv: PagedKV, rows: list[Row]) -> tuple[torch.Tensor, StepInputs]:
        plan = plan_of(
            [(row.start, len(row.tokens)) for row in rows],
            tables=[row.table for row in rows],
            token_ids=[token for row in rows for token in row.tokens],
        )
        inputs = inputs_of(plan, 4, CPU)

        def attention(layer: Layer, heads: torch.Tensor) -> torch.Tensor:
            return kv.attend(layer.index, kv.rope_write(layer, heads, inputs, angles), inputs)

        embedded = TOY.model.embedding[inputs.token_ids.long()]
        return TOY.model.run_layers(embedded, attention).index_select(0, inputs.draw_tokens), inputs

    with torch.inference_mode():
        apart, together = new_runner(4, 5).kv, new_runner(4, 5).kv
        expected = torch.cat([hidden(apart, [row])[0] for row in ROWS])
        found, _ = hidden(together, ROWS)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


class AttendsFirst(PagedKV):
    """Reads its pages before the step has written them, as a kernel might that does not wait."""

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor, inputs: StepInputs) -> None:
        self.late = (layer, key, value, inputs)

    def attend(self, layer: int, query: torch.Tensor, inputs: StepInputs) -> torch.Tensor:
        out = super().attend(layer, query, inputs)
        super().write(*self.late)
        return out


def test_reading_early_is_found() -> None:
    early = AttendsFirst(TOY.config, 5, 4)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(
            run_step(TorchRunner(TOY.model, early, 80), ROWS)[1],
            run_step(new_runner(4, 5), ROWS)[1],
            rtol=1e-3,
            atol=1e-3,
        )
