"""Top-k, top-p and min-p as one number a row: the twin against the definition, the interpreted Triton kernel too (L64)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minipaged.kernels.sampling import draw_tokens, truncation_threshold
from minipaged.kernels.sampling.truncate import truncation_threshold_torch
from tests.kernels.paged_cases import examples
from tests.kernels.test_draw import DTYPES, assert_drawn, drawn_logits

pytestmark = pytest.mark.usefixtures("unset_choice")

NEAR = 1e-5  # sums of float32 and of float64: a share this close to top_p may fall on either side of it
ROWS = 4
Asked = dict[str, Tensor]


@st.composite
def truncations(draw: st.DrawFn, vocab: int) -> Asked:
    """temperature, top_k, top_p, min_p of ROWS rows."""
    each = {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.5]),
        "top_k": st.just(0) | st.integers(1, vocab + 3),
        "top_p": st.just(1.0) | st.floats(0.01, 0.999),
        "min_p": st.just(0.0) | st.floats(0.001, 1.0),
    }
    return {name: torch.tensor(draw(st.lists(kind, min_size=ROWS, max_size=ROWS))) for name, kind in each.items()}


def assert_cut(threshold: Tensor, logits: Tensor, asked: Asked) -> None:
    """The tokens that stay are those of the definition, one rule after another; ties stay together."""
    for row, one in enumerate(logits.double()):
        temperature, top_k, top_p, min_p = (
            float(asked[name][row]) for name in ("temperature", "top_k", "top_p", "min_p")
        )
        stays = one >= float(threshold[row])
        if temperature == 0 or (top_k == 0 and top_p >= 1 and min_p == 0):
            assert stays.all()
            continue
        assert stays[one.argmax()]
        likelihood = (one / temperature).softmax(-1)
        by_k = one >= one.sort(descending=True).values[min(int(top_k) or len(one), len(one)) - 1]
        floor = likelihood >= likelihood.max() * min_p * (1 + NEAR)
        sure = likelihood >= likelihood.max() * min_p * (1 - NEAR)
        assert not (stays & ~by_k).any()
        assert not (stays & ~sure).any()
        if top_p >= 1:
            assert torch.equal(stays | ~floor, by_k | ~floor)
            continue
        shares = likelihood * by_k / likelihood[by_k].sum()
        above = torch.stack([shares[one > value].sum() for value in one])  # the share of all likelier tokens
        assert not (stays & (above > top_p + NEAR)).any()
        assert stays[by_k & floor & (above < top_p - NEAR)].all()


def asked_of(**asked: Any) -> Asked:
    """One row."""
    given_all = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **asked}
    return {name: torch.tensor([value]) for name, value in given_all.items()}


@examples(60)
@given(st.data(), st.sampled_from([1, 2, 30, 300]), DTYPES, st.integers(0, 99))
def test_twin_keeps_what_the_definition_keeps(data: st.DataObject, vocab: int, dtype: torch.dtype, seed: int) -> None:
    logits, asked = drawn_logits(ROWS, vocab, dtype, seed), data.draw(truncations(vocab))
    assert_cut(truncation_threshold(logits, **asked), logits, asked)


@pytest.mark.usefixtures("interpreted")
@examples(10)
@given(st.data(), st.sampled_from([1, 2, 300, 9000]), DTYPES, st.integers(0, 99))
def test_L64_least_kept_logit_keeps_what_the_definition_keeps(
    data: st.DataObject, vocab: int, dtype: torch.dtype, seed: int
) -> None:
    from minipaged.kernels.sampling.truncate_triton import truncation_threshold_triton

    logits, asked = drawn_logits(ROWS, vocab, dtype, seed), data.draw(truncations(vocab))
    threshold = truncation_threshold_triton(logits, **asked)
    assert_cut(threshold, logits, asked)
    only_k = asked | {"top_p": torch.ones(ROWS), "min_p": torch.zeros(ROWS)}
    kept, twins = (
        logits >= cut(logits, **only_k)[:, None] for cut in (truncation_threshold_triton, truncation_threshold_torch)
    )
    assert torch.equal(kept, twins)


@pytest.mark.usefixtures("interpreted")
@examples(10)
@given(
    st.data(), st.sampled_from([1, 2, 300, 9000]), st.sampled_from([torch.float16, torch.bfloat16]), st.integers(0, 99)
)
def test_L64_a_search_that_parts_share_finds_what_one_program_finds(
    data: st.DataObject, vocab: int, dtype: torch.dtype, seed: int
) -> None:
    """9,000 logits are three parts; whole numbers as logits tie across them."""
    from minipaged.kernels.sampling.truncate_parts_triton import truncation_threshold_by_parts

    logits, asked = drawn_logits(ROWS, vocab, dtype, seed), data.draw(truncations(vocab))
    if data.draw(st.booleans()):
        logits = logits.round()
    assert_cut(truncation_threshold_by_parts(logits, **asked), logits, asked)
    only_k = asked | {"top_p": torch.ones(ROWS), "min_p": torch.zeros(ROWS)}
    kept, twins = (
        logits >= cut(logits, **only_k)[:, None] for cut in (truncation_threshold_by_parts, truncation_threshold_torch)
    )
    assert torch.equal(kept, twins)


@pytest.mark.parametrize("kernel", ["torch", "triton"])
def test_ties_stay_together(kernel: str, request: pytest.FixtureRequest) -> None:
    if kernel == "triton":
        request.getfixturevalue("interpreted")
        from minipaged.kernels.sampling.truncate_triton import truncation_threshold_triton as find_threshold
    else:
        find_threshold = truncation_threshold_torch
    logits = torch.tensor([[-1.0, 0.0, -0.0, 2.0, 0.0, -3.0]])
    assert find_threshold(logits, **asked_of(top_k=2)) == 0.0
    assert find_threshold(logits, **asked_of(top_k=5)) == -1.0
    assert find_threshold(logits, **asked_of(top_p=0.8)) == 0.0
    assert find_threshold(logits, **asked_of(top_p=0.1)) == 2.0
    assert find_threshold(logits, **asked_of(min_p=1.0)) == 2.0


@pytest.mark.parametrize("top_p", [1e-8, 1e-50, 0.0])
@pytest.mark.parametrize("top_k", [0, 3])
@pytest.mark.usefixtures("interpreted")
def test_the_likeliest_token_stays_however_small_top_p_is(top_k: int, top_p: float) -> None:
    """1e-50 is a request's good right, and 0 in float32."""
    from minipaged.kernels.sampling.truncate_parts_triton import truncation_threshold_by_parts
    from minipaged.kernels.sampling.truncate_triton import truncation_threshold_triton

    logits, asked = torch.tensor([[1.0, 3.0, 2.0, -1.0]]), asked_of(top_k=top_k, top_p=top_p)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert truncation_threshold_triton(logits.to(dtype), **asked) == 3.0
        if dtype.itemsize == 2:
            assert truncation_threshold_by_parts(logits.to(dtype), **asked) == 3.0
        assert truncation_threshold_torch(logits.to(dtype), **asked) == 3.0


def test_a_draw_takes_nothing_below() -> None:
    logits = torch.randn(300, 40, generator=torch.Generator().manual_seed(0))
    warm, uniform = torch.full((300,), 5.0), torch.linspace(0, 1, 301, dtype=torch.float64)[:300]
    threshold = logits.sort(descending=True).values[:, 3].contiguous()
    drawn = draw_tokens(logits, warm, uniform, threshold)
    assert (logits.gather(1, drawn[:, None])[:, 0] >= threshold).all()
    assert len({int((row > row[token]).sum()) for row, token in zip(logits, drawn, strict=True)}) == 4


@pytest.mark.usefixtures("interpreted")
@examples(8)
@given(DTYPES, st.integers(0, 99))
def test_L64_truncated_draw_equals_twin(dtype: torch.dtype, seed: int) -> None:
    from minipaged.kernels.sampling.draw_triton import draw_tokens_triton

    logits = drawn_logits(3, 3000, dtype, seed)
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(3, generator=generator, dtype=torch.float64)
    threshold = logits.float().sort(descending=True).values[torch.arange(3), torch.tensor([0, 7, 2000])]
    temperature = torch.tensor([1.0, 0.6, 0.0])
    drawn = draw_tokens_triton(logits, temperature, uniform, threshold)
    kept = logits.float().masked_fill(logits < threshold[:, None], float("-inf"))
    assert_drawn(drawn, kept, temperature, uniform)


def test_arguments_that_do_not_fit_are_named() -> None:
    logits = torch.zeros(1, 8)
    with pytest.raises(ValueError, match=r"logits is torch\.int64"):
        truncation_threshold(logits.long(), **asked_of())
    with pytest.raises(ValueError, match=r"top_p is torch\.float32 \[2\] on cpu; it must be \[1\], contiguous"):
        truncation_threshold(logits, **asked_of() | {"top_p": torch.ones(2)})
    with pytest.raises(ValueError, match=r"threshold is torch\.float64 \[1\]"):
        draw_tokens(logits, torch.ones(1), torch.zeros(1).double(), torch.zeros(1).double())
    with pytest.raises(
        ValueError, match=r"uniform is torch\.float64 \[2\] on cpu; it must be torch\.float64 \[2\], contiguous"
    ):
        draw_tokens(torch.zeros(2, 8), torch.ones(2), torch.zeros(4).double()[::2])
