"""Heavy hitters' kernels: the torch form against a plain loop, and the Triton kernels against it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minipaged.config import SamplingParams
from minipaged.execution.paged_kv import PagedKV
from minipaged.execution.step_inputs import StepInputs
from minipaged.kernels.attention import heavy_hitters
from minipaged.kernels.attention.heavy_hitters import Budget, Marks, dropped, keep_heaviest, keep_heaviest_torch
from minipaged.kernels.cache.quantize import quantize
from minipaged.memory.retention import Retention
from tests.exactness.retained import engine_of, kept_by_engine, run_watched, tiny_model
from tests.exactness.test_heavy_hitters import assert_as_simulated
from tests.kernels.paged_cases import examples

GREEDY = SamplingParams(max_tokens=16, ignore_eos=True)


def rows_of(
    lengths: list[int], budget: Budget, heads: tuple[int, int], page: int, kept_as: torch.dtype | None, seed: int = 0
) -> dict[str, Any]:
    """Rows of one query over shuffled pages; each slot in use has a score and a position of its own, every other one is NaN."""
    torch.manual_seed(seed)
    num_heads, kv_heads = heads
    width = max(1, *(-(-n // page) for n in lengths))
    blocks = torch.randperm(width * len(lengths)) + 1
    tables = blocks.view(len(lengths), width).int()
    num_blocks, head_dim = width * len(lengths) + 1, 16
    key, value = (torch.randn(num_blocks, page, kv_heads, head_dim) for _ in range(2))
    scores = torch.full((num_blocks, kv_heads, page), float("nan"))
    positions = torch.randint(0, 10**6, scores.shape, dtype=torch.int32)
    newest = torch.tensor([n + 7 for n in lengths], dtype=torch.int32)
    unused = torch.ones(num_blocks, page, dtype=torch.bool)
    for row, length in enumerate(lengths):
        for head in range(kv_heads):
            order = torch.randperm(length + 6)[: max(0, length - 1)].int()
            for at in range(length):
                block = int(tables[row, at // page])
                unused[block, at % page] = False
                if at < length - 1:
                    scores[block, head, at % page] = torch.randint(0, 4, ()) + torch.rand(())
                    positions[block, head, at % page] = order[at]
    key[unused], value[unused] = float("nan"), float("nan")
    scales = None
    if kept_as is not None:
        (key, key_scale), (value, value_scale) = (quantize(x.nan_to_num(0), kept_as) for x in (key, value))
        scales = tuple(x.transpose(1, 2).contiguous() for x in (key_scale, value_scale))
    return {
        "query": torch.randn(len(lengths), num_heads, head_dim),
        "key_cache": key,
        "value_cache": value,
        "marks": Marks(scores, positions),
        "block_tables": tables,
        "context_lens": torch.tensor(lengths, dtype=torch.int32),
        "positions": newest,
        "budget": budget,
        "softmax_scale": 0.3,
        "scales": scales,
    }


def copied(case: dict[str, Any]) -> dict[str, Any]:
    """The same, in tensors of its own."""
    own = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in case.items()}
    own["marks"] = Marks(*(x.clone() for x in case["marks"]))
    own["scales"] = None if case["scales"] is None else tuple(x.clone() for x in case["scales"])
    return own


@pytest.mark.usefixtures("interpreted")
@examples(8)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    heavy=st.integers(1, 20),
    recent=st.integers(1, 20),
    heads=st.sampled_from([(2, 2), (6, 2), (4, 1)]),
    page=st.sampled_from([4, 16]),
    kept_as=st.sampled_from([None, torch.int8, torch.float8_e4m3fn]),
    seed=st.integers(0, 99),
)
def test_L63_L64_L72_the_triton_kernels_are_the_twin(
    lengths: list[int],
    heavy: int,
    recent: int,
    heads: tuple[int, int],
    page: int,
    kept_as: torch.dtype | None,
    seed: int,
) -> None:
    from minipaged.kernels.attention.heavy_hitters_triton import keep_heaviest_triton

    budget = Budget(heavy, recent)
    lengths = [min(n, heavy + recent) for n in lengths]
    case = rows_of(lengths, budget, heads, page, kept_as, seed)
    twin = copied(case)
    keep_heaviest_triton(**case)
    keep_heaviest_torch(drawn_from=None, **twin)
    for name in ("key_cache", "value_cache"):
        assert torch.equal(case[name].float().nan_to_num(99), twin[name].float().nan_to_num(99)), name
    assert torch.equal(case["marks"].positions, twin["marks"].positions)
    torch.testing.assert_close(case["marks"].scores, twin["marks"].scores, equal_nan=True, rtol=1e-5, atol=1e-5)
    for kept, expected in zip(case["scales"] or (), twin["scales"] or (), strict=True):
        assert torch.equal(kept, expected)


def test_L72_the_oldest_of_equals_goes_and_the_newest_stay() -> None:
    scores = torch.tensor([[[1.0, 0.5, 0.5, 0.5, 9.0, 0.1, 0.0, float("nan")]]])
    positions = torch.tensor([[[30, 12, 11, 13, 1, 31, 32, 99]]], dtype=torch.int32)
    for heavy, recent, gone in (
        (4, 3, [2]),
        (3, 3, [1, 2]),
        (2, 3, [1, 2, 3]),
        (3, 1, [2, 1, 5, 6]),
        (1, 4, [1, 2, 3]),
    ):
        found = dropped(scores, positions, torch.tensor([7]), Budget(heavy, recent))
        assert found[0, 0].nonzero().flatten().tolist() == sorted(gone), (heavy, recent)


def test_L38_chunks_add_up_to_the_whole_prompt() -> None:
    """Scores of a prompt read in pieces are those of the prompt read at once, and nothing goes before its end."""
    length, budget = 23, Budget(6, 5)
    case = rows_of([length], budget, (4, 2), 4, None)
    queries = torch.randn(length, 4, 16)
    kept = []
    for cuts in ([0, length], [0, 3, 4, 17, length]):
        own = copied(case)
        own["marks"].scores.fill_(float("nan"))
        for start, end in pairwise(cuts):
            own["context_lens"] = torch.tensor([end], dtype=torch.int32)
            own["query"], own["positions"] = queries[start:end], torch.arange(start, end, dtype=torch.int32)
            starts = torch.tensor([0, end - start], dtype=torch.int32)
            keep_heaviest(query_starts=starts, drawn_from=torch.tensor([end == length]), **own)
        slots = heavy_hitters.slots_of(own["block_tables"], budget.most, own["marks"].scores.shape)
        kept.append([mark.view(-1)[slots] for mark in own["marks"]])
    torch.testing.assert_close(*(scores for scores, _ in kept))
    assert torch.equal(*(positions for _, positions in kept))
    assert all(int(positions.max()) == length - 1 for _, positions in kept)


def test_marks_that_do_not_fit_are_refused() -> None:
    case = rows_of([9], Budget(4, 4), (2, 2), 4, None)
    plain = {"query_starts": None, "drawn_from": None}
    with pytest.raises(ValueError, match=r"scores are torch\.float64"):
        keep_heaviest(**{**case, **plain, "marks": Marks(case["marks"].scores.double(), case["marks"].positions)})
    with pytest.raises(ValueError, match="both must be at least 1"):
        keep_heaviest(**{**case, **plain, "budget": Budget(0, 4)})
    with pytest.raises(ValueError, match="drawn_from has shape"):
        keep_heaviest(**{**case, **plain, "drawn_from": torch.tensor([True, True])})


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
def test_L72_decodes_by_the_triton_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps as a graph has them, in which every row draws and none has more than one token too many."""
    retention, by_kernel = Retention(heavy=5, recent=3), []
    real = PagedKV._keep_heaviest

    def as_in_a_graph(self: PagedKV, layer: int, query: Any, inputs: StepInputs) -> None:
        fits = not len(inputs.chunk_lengths) and int(inputs.decode_lengths.max()) <= retention.budget
        monkeypatch.setattr(heavy_hitters, "use_triton", lambda tensor: fits)
        by_kernel.append(fits)
        real(self, layer, query, inputs._replace(drawn_from=None) if fits else inputs)

    monkeypatch.setattr(PagedKV, "_keep_heaviest", as_in_a_graph)
    engine, runner = engine_of(tiny_model(), retention, block_size=4, num_blocks=30)
    with kept_by_engine(runner):
        run_watched(engine, [([i % 50 for i in range(12)], replace(GREEDY, max_tokens=8)), ([3], GREEDY)], retention)
    assert sum(by_kernel) > 20
    assert assert_as_simulated(runner, retention).evicted > 30
