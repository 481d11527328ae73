"""Drawing tokens: the twin against the distribution's definition, the interpreted Triton kernels against the twin (L64)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minipaged.kernels.checks import COLDEST
from minipaged.kernels.sampling import draw_tokens
from minipaged.kernels.sampling.draw import draw_tokens_torch
from tests.kernels.paged_cases import examples

pytestmark = pytest.mark.usefixtures("unset_choice")

DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
NEAR = 1e-5  # a threshold this close to a boundary may fall on either side of it


def drawn_logits(rows: int, vocab: int, dtype: torch.dtype, seed: int, banned: float = 0.3) -> Tensor:
    """[rows, vocab], a share of it -inf, never a whole row."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, vocab + 1, generator=generator)
    logits[torch.rand(rows, vocab + 1, generator=generator) < banned] = float("-inf")
    logits[:, vocab // 2] = 1.0
    return logits.to(dtype)[:, :vocab]


def assert_drawn(tokens: Tensor, logits: Tensor, temperature: Tensor, uniform: Tensor) -> None:
    """Each token's stretch of the cumulative distribution holds its uniform number; cold rows take the first best."""
    scaled = logits.double() / temperature.where(temperature >= COLDEST, 1.0)[:, None]
    ends = scaled.softmax(-1).cumsum(-1)
    for row, token in enumerate(tokens.tolist()):
        if temperature[row] < COLDEST:
            assert token == int((logits[row] == logits[row].max()).nonzero()[0])
            continue
        begin = float(ends[row, token - 1]) if token else 0.0
        assert begin - NEAR <= uniform[row] <= float(ends[row, token]) + NEAR
        assert logits[row, token] > float("-inf")


@examples(40)
@given(st.integers(0, 5), st.integers(1, 300), DTYPES, st.integers(0, 99))
def test_twin_draws_by_the_cumulative_distribution(rows: int, vocab: int, dtype: torch.dtype, seed: int) -> None:
    logits = drawn_logits(rows, vocab, dtype, seed)
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(rows, generator=generator, dtype=torch.float64)
    temperature = torch.tensor([0.0, 0.7, 1.0, 3.0, 0.05])[:rows]
    assert_drawn(draw_tokens(logits, temperature, uniform), logits, temperature, uniform)
    assert torch.equal(draw_tokens(logits), logits.argmax(-1))


@pytest.mark.usefixtures("interpreted")
@examples(12)
@given(st.integers(0, 3), st.sampled_from([1, 700, 4096, 9000, 70_000]), DTYPES, st.integers(0, 99), st.booleans())
def test_L64_draw_equals_twin(rows: int, vocab: int, dtype: torch.dtype, seed: int, edges: bool) -> None:
    from minipaged.kernels.sampling.draw_triton import draw_tokens_triton

    logits = drawn_logits(rows, vocab, dtype, seed, banned=0.99 if edges else 0.3)
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(rows, generator=generator, dtype=torch.float64)
    if edges:
        uniform = torch.tensor([0.0, 1 - 2**-53, 0.5], dtype=torch.float64)[:rows]
    temperature = torch.tensor([1.0, 0.6, 0.0])[:rows]
    assert_drawn(draw_tokens_triton(logits, temperature, uniform), logits, temperature, uniform)
    assert torch.equal(draw_tokens_triton(logits), draw_tokens_torch(logits))


@pytest.mark.usefixtures("interpreted")
def test_the_bound_of_cold_draws_is_one_number() -> None:
    """1e-5 as float32 holds it, in a float64 column, is warm for both: they compare as float32."""
    from minipaged.kernels.sampling.draw_triton import draw_tokens_triton

    logits, uniform = torch.zeros(1, 8), torch.full((1,), 0.9, dtype=torch.float64)
    bound = torch.tensor([COLDEST], dtype=torch.float32).double()
    assert [draw(logits, bound, uniform).item() for draw in (draw_tokens_torch, draw_tokens_triton)] == [7, 7]


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("temperature", [1e-4, 1e-5, 1e-6, 1e-38, 1e-45, 0.0])
def test_the_coldest_draws_are_the_most_likely_tokens(temperature: float) -> None:
    from minipaged.kernels.sampling.draw_triton import draw_tokens_triton

    logits = drawn_logits(2, 5000, torch.float32, 1)
    logits[0, 1234] = logits[1, 4999] = 40.0
    cold, uniform = torch.full((2,), temperature), torch.tensor([0.3, 1 - 2**-53], dtype=torch.float64)
    for draw in (draw_tokens_torch, draw_tokens_triton):
        assert draw(logits, cold, uniform).tolist() == [1234, 4999]


def test_arguments_that_do_not_fit_are_named() -> None:
    logits, uniform = torch.zeros(3, 8), torch.zeros(3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"logits is torch\.float32 \[8\]"):
        draw_tokens(logits[0])
    with pytest.raises(ValueError, match="temperature and uniform go together"):
        draw_tokens(logits, uniform)
    with pytest.raises(ValueError, match=r"uniform is torch\.float32 \[3\]"):
        draw_tokens(logits, uniform, uniform.float())
    with pytest.raises(ValueError, match=r"temperature is torch\.float64 \[2\]"):
        draw_tokens(logits, uniform[:2], uniform)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("vocab", [300, 5000, 70_000])
def test_L64_nothing_is_drawn_from_logits_that_are_no_numbers(vocab: int) -> None:
    """-1 for a row of NaN, of -inf alone, and with an infinite one; its neighbours draw as ever."""
    from minipaged.kernels.sampling.draw_triton import draw_tokens_triton

    logits = drawn_logits(5, vocab, torch.float32, 3)
    logits[1], logits[2], logits[3, vocab // 3] = float("nan"), float("-inf"), float("inf")
    uniform = torch.full((5,), 0.5, dtype=torch.float64)
    for draw in (draw_tokens_torch, draw_tokens_triton):
        for asked in ((), (torch.full((5,), 0.8), uniform), (torch.zeros(5), uniform)):
            drawn = draw(logits, *asked)
            assert drawn[1:4].tolist() == [-1, -1, -1]
            assert drawn[[0, 4]].tolist() == draw(logits[[0, 4]], *(column[:2] for column in asked)).tolist()
            assert (drawn[[0, 4]] >= 0).all()
