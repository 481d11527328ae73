"""Packed weights: what is packed comes back, and the Triton kernels equal their twins (L64), interpreted here and compiled on a GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minipaged.kernels.launch_table import PackedLaunch
from minipaged.kernels.linear.packed import (
    packed_gated_linear,
    packed_gated_linear_torch,
    packed_linear,
    packed_linear_torch,
)
from minipaged.kernels.linear.packed_matrix import PackedMatrix, codes_of, dequantize, pack
from tests.kernels.paged_cases import assert_close, examples

pytestmark = pytest.mark.usefixtures("unset_choice")

EPS = 1e-5


class PackedCase:
    """A packed matrix whose products are of about unit size, what it was made of, and what may stand around a product."""

    def __init__(
        self,
        rows: int,
        outputs: int,
        groups: int,
        group: int,
        bits: int,
        zero_points: bool,
        scale_dtype: torch.dtype = torch.float16,
        dtype: torch.dtype = torch.float32,
        bias: bool = False,
        residual: bool = False,
        device: str = "cpu",
    ) -> None:
        generator = torch.Generator().manual_seed(rows + 7 * outputs + 11 * groups + group + bits)
        inputs, top = groups * group, 2**bits
        self.codes = torch.randint(0, top, (2 * outputs, inputs), generator=generator, dtype=torch.uint8)
        scale = (torch.rand(2 * outputs, groups, generator=generator) + 0.5) / (top / 4 * inputs**0.5)
        zero = torch.randint(top // 4, 3 * top // 4, scale.shape, generator=generator).float()
        self.scales = torch.stack((scale, zero if zero_points else -zero * scale.half().float()), -1).to(scale_dtype)
        self.codes, self.scales = self.codes.to(device), self.scales.to(device)
        self.weight = pack(self.codes, self.scales, bits, has_zero_points=zero_points)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype).to(device)

        self.x = normal(rows, inputs + 8)[:, :inputs]
        self.norm = normal(inputs)
        self.bias = normal(2 * outputs) if bias else None
        self.residual = normal(rows, 2 * outputs) if residual else None

    def dense(self) -> Tensor:
        """W by the definition, in float64."""
        scale, offset = self.scales.double().repeat_interleave(self.weight.group, 1).unbind(-1)
        if self.weight.has_zero_points:
            return scale * (self.codes.double() - offset)
        return scale * self.codes.double() + offset


def cases(rows: st.SearchStrategy[int], dtypes: tuple[torch.dtype, ...]) -> st.SearchStrategy[PackedCase]:
    return st.builds(
        PackedCase,
        rows=rows,
        outputs=st.integers(1, 40),
        groups=st.integers(1, 9),
        group=st.sampled_from([16, 32, 48, 64, 128]),
        bits=st.sampled_from([4, 8]),
        zero_points=st.booleans(),
        scale_dtype=st.sampled_from([torch.float16, torch.float32]),
        dtype=st.sampled_from(dtypes),
        bias=st.booleans(),
        residual=st.booleans(),
    )


@examples(40)
@given(cases(st.integers(0, 4), (torch.float32,)))
def test_what_is_packed_comes_back(case: PackedCase) -> None:
    assert torch.equal(codes_of(case.weight), case.codes)
    torch.testing.assert_close(dequantize(case.weight, torch.float32).double(), case.dense(), rtol=1e-6, atol=1e-7)


@examples(30)
@given(cases(st.integers(0, 4), (torch.float32, torch.bfloat16)))
def test_twin_is_the_product_with_its_surroundings(case: PackedCase) -> None:
    x = case.x.double()
    x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * case.norm.double()
    exact = x @ case.dense().T
    exact = exact if case.bias is None else exact + case.bias.double()
    gate, up = exact.chunk(2, 1)
    gated = packed_gated_linear(case.x, case.weight, case.bias, norm=case.norm, eps=EPS)
    assert_close(gated, gate * torch.sigmoid(gate) * up)
    exact = exact if case.residual is None else exact + case.residual.double()
    assert_close(packed_linear(case.x, case.weight, case.bias, norm=case.norm, eps=EPS, residual=case.residual), exact)


def launches() -> st.SearchStrategy[PackedLaunch]:
    return st.builds(
        PackedLaunch,
        rows=st.sampled_from([16, 32]),
        columns=st.sampled_from([16, 64]),
        split=st.sampled_from([1, 4]),
        num_warps=st.just(4),
        num_stages=st.just(2),
    )


@pytest.mark.usefixtures("interpreted")
@examples(15)
@given(cases(st.sampled_from([1, 2, 5, 16, 64]), (torch.float32, torch.float16, torch.bfloat16)), launches())
def test_L64_packed_rows_equal_twin(case: PackedCase, launch: PackedLaunch) -> None:
    from minipaged.kernels.linear.packed_triton import packed_rows_triton, packed_tile_triton

    kept = case.residual
    for multiply in (packed_rows_triton, packed_tile_triton):
        residual, case.residual = (None if kept is None else kept.clone() for _ in range(2))
        expected = packed_linear_torch(case.x, case.weight, case.bias, residual=residual)
        found = multiply(case.x, case.weight, case.bias, residual=case.residual, launch=launch)
        assert_close(found, expected)
        assert kept is None or found is case.residual
    gated = packed_gated_linear_torch(case.x, case.weight, case.bias)
    assert_close(packed_rows_triton(case.x, case.weight, case.bias, gated=True, launch=launch), gated)


@pytest.mark.usefixtures("interpreted")
@examples(8)
@given(cases(st.just(1), (torch.float32,)))
def test_L64_dequantized_on_the_device_equals_twin(case: PackedCase) -> None:
    from minipaged.kernels.linear.packed_triton import dequantize_triton

    for dtype in (torch.float32, torch.float16):
        assert torch.equal(dequantize_triton(case.weight, dtype), dequantize(case.weight, dtype))


def test_arguments_that_do_not_fit_are_named() -> None:
    case = PackedCase(2, 3, 2, 32, 4, True)
    with pytest.raises(ValueError, match=r"x has shape \[2, 60\] and the weight \[6, 64\]"):
        packed_linear(case.x[:, :60], case.weight)
    with pytest.raises(ValueError, match=r"x is torch\.float64"):
        packed_linear(case.x.double(), case.weight)
    with pytest.raises(ValueError, match=r"groups a multiple of 16"):
        pack(case.codes, torch.ones(6, 8, 2), 4, has_zero_points=True)
    odd = PackedMatrix(case.weight.words[:5], case.weight.scales[:5], 64, 32, True)
    with pytest.raises(ValueError, match="outputs even"):
        packed_gated_linear(case.x, odd)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(
    ("groups", "group", "bits", "zero_points", "dtype"),
    [
        (32, 128, 4, True, torch.bfloat16),
        (9, 64, 4, True, torch.bfloat16),
        (18, 32, 4, False, torch.float16),
        (12, 16, 8, True, torch.bfloat16),
        (36, 32, 8, False, torch.float16),
        (1, 576, 4, True, torch.float32),
    ],
)
def test_packed_products_on_a_gpu(groups: int, group: int, bits: int, zero_points: bool, dtype: torch.dtype) -> None:
    """Every number of rows that has a kernel or a launch of its own, beside the dense product in float64."""
    from minipaged.kernels.linear.packed_triton import dequantize_triton

    for rows in (1, 5, 16, 40, 100, 200):
        case = PackedCase(
            rows, 150, groups, group, bits, zero_points, dtype=dtype, bias=True, residual=True, device="cuda"
        )
        assert torch.equal(dequantize_triton(case.weight, dtype), dequantize(case.weight, dtype))
        weight, x = case.dense(), case.x.double()
        gate, up = (x @ weight.T + case.bias.double()).chunk(2, 1)
        assert_close(packed_gated_linear(case.x, case.weight, case.bias), gate * torch.sigmoid(gate) * up)
        normed = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * case.norm.double()
        found = packed_linear(case.x, case.weight, case.bias, norm=case.norm, eps=EPS)
        assert_close(found, normed @ weight.T + case.bias.double())
        exact = x @ weight.T + case.residual.double()
        assert_close(packed_linear(case.x, case.weight, residual=case.residual), exact)
