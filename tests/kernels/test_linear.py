"""Products of few rows and what is fused around them: twins against float64, interpreted Triton kernels against the twins (L64)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minipaged.kernels.launch_table import LinearLaunch
from minipaged.kernels.linear import gated_linear, linear
from minipaged.kernels.linear.matmul import gated_linear_torch, linear_torch
from tests.kernels.paged_cases import assert_close, examples

pytestmark = pytest.mark.usefixtures("unset_choice")

DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
EPS = 1e-5


class LinearCase:
    """x, a weight whose products are of about unit size, and what may stand around them."""

    def __init__(
        self, rows: int, inputs: int, outputs: int, dtype: torch.dtype, norm: bool, bias: bool, residual: bool
    ) -> None:
        generator = torch.Generator().manual_seed(rows + 7 * inputs + 11 * outputs)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        self.x = normal(rows, inputs + 3)[:, :inputs].to(dtype)
        self.weight = (normal(2 * outputs, inputs) / inputs**0.5).to(dtype)
        self.norm = normal(inputs).to(dtype) if norm else None
        self.bias = normal(2 * outputs).to(dtype) if bias else None
        self.residual = normal(rows, 2 * outputs).to(dtype) if residual else None

    def exact(self) -> Tensor:
        """The product in float64, residual included."""
        x = self.x.double()
        if self.norm is not None:
            x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * self.norm.double()
        product = x @ self.weight.double().T
        product = product if self.bias is None else product + self.bias.double()
        return product if self.residual is None else product + self.residual.double()


def cases(rows: st.SearchStrategy[int] = st.integers(0, 20)) -> st.SearchStrategy[LinearCase]:  # noqa: B008
    return st.builds(
        LinearCase,
        rows=rows,
        inputs=st.integers(1, 200),
        outputs=st.integers(1, 70),
        dtype=DTYPES,
        norm=st.booleans(),
        bias=st.booleans(),
        residual=st.booleans(),
    )


def launches(rows: tuple[int, ...]) -> st.SearchStrategy[LinearLaunch]:
    return st.builds(
        LinearLaunch,
        rows=st.sampled_from(rows),
        columns=st.sampled_from([16, 64]),
        depth=st.sampled_from([32, 128]),
        num_warps=st.just(4),
        num_stages=st.just(2),
    )


@examples(40)
@given(cases())
def test_twin_is_the_product_with_its_surroundings(case: LinearCase) -> None:
    exact = case.exact()
    found = linear(case.x, case.weight, case.bias, norm=case.norm, eps=EPS, residual=case.residual)
    assert_close(found, exact)
    if case.residual is not None:
        assert found is case.residual


@examples(40)
@given(cases())
def test_gated_twin_is_silu_of_one_half_times_the_other(case: LinearCase) -> None:
    case.residual = None
    gate, up = case.exact().chunk(2, 1)
    found = gated_linear(case.x, case.weight, case.bias, norm=case.norm, eps=EPS)
    assert_close(found, gate * torch.sigmoid(gate) * up)


@pytest.mark.usefixtures("interpreted")
@examples(25)
@given(cases(), launches((16, 32)))
def test_L64_few_rows_equal_twin(case: LinearCase, launch: LinearLaunch) -> None:
    from minipaged.kernels.linear.matmul_triton import few_rows_triton

    residual = None if case.residual is None else case.residual.clone()
    expected = linear_torch(case.x, case.weight, case.bias, residual=residual)
    assert_close(few_rows_triton(case.x, case.weight, case.bias, residual=case.residual, launch=launch), expected)


@pytest.mark.usefixtures("interpreted")
@examples(30)
@given(cases(rows=st.just(1)), launches((1,)), st.booleans())
def test_L64_one_row_equals_twin(case: LinearCase, launch: LinearLaunch, gated: bool) -> None:
    from minipaged.kernels.linear.matmul_triton import one_row_triton

    if gated:
        case.residual = None
        expected = gated_linear_torch(case.x, case.weight, case.bias, norm=case.norm, eps=EPS)
    else:
        residual = None if case.residual is None else case.residual.clone()
        expected = linear_torch(case.x, case.weight, case.bias, norm=case.norm, eps=EPS, residual=residual)
    found = one_row_triton(
        case.x, case.weight, case.bias, norm=case.norm, eps=EPS, residual=case.residual, gated=gated, launch=launch
    )
    assert_close(found, expected)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("gated", [False, True])
def test_large_activations_do_not_overflow_before_the_norm_divides_them(gated: bool) -> None:
    from minipaged.kernels.linear.matmul_triton import one_row_triton

    case = LinearCase(1, 128, 20, torch.float16, True, False, False)
    case.x[0, 5] = 9000.0
    norm = torch.full((128,), 8.0, dtype=torch.float16)
    expected = (gated_linear_torch if gated else linear_torch)(case.x, case.weight, norm=norm, eps=EPS)
    found = one_row_triton(case.x, case.weight, norm=norm, eps=EPS, gated=gated)
    assert expected.isfinite().all()
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_arguments_that_do_not_fit_are_named() -> None:
    x, weight = torch.zeros(3, 8), torch.zeros(6, 8)
    with pytest.raises(ValueError, match=r"x has shape \[3, 8\] and weight \[6, 7\]"):
        linear(x, weight[:, :7])
    with pytest.raises(ValueError, match="outputs even"):
        gated_linear(x, weight[:5])
    with pytest.raises(ValueError, match=r"weight is torch\.float16"):
        linear(x, weight.half())
    with pytest.raises(ValueError, match=r"bias is torch\.float32 \[5\]; it must be torch\.float32 \[6\]"):
        linear(x, weight, torch.zeros(5))
    with pytest.raises(ValueError, match=r"norm is torch\.float32 \[6\]"):
        linear(x, weight, norm=torch.zeros(6))
    with pytest.raises(ValueError, match=r"residual is torch\.float32 \[3, 8\]"):
        linear(x, weight, residual=torch.zeros(3, 8))
