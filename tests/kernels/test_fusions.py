"""The fused operations around attention: twins against the separate operations, interpreted Triton kernels against the twins (L64)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minipaged.kernels.cache import rope_write_kv, write_kv
from minipaged.kernels.elementwise import embed_tokens, rms_norm, silu_mul
from tests.kernels.paged_cases import assert_close, examples

pytestmark = pytest.mark.usefixtures("unset_choice")

DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
EPS = 1e-5


def normal(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal, NaN included."""
    integers = {2: torch.int16, 4: torch.int32}[one.element_size()]
    return torch.equal(one.contiguous().view(integers), other.contiguous().view(integers))


@examples(30)
@given(st.integers(0, 9), st.integers(1, 200), DTYPES, st.integers(0, 9))
def test_rms_norm_twin_has_unit_mean_square_times_weight(tokens: int, size: int, dtype: torch.dtype, seed: int) -> None:
    x, weight = normal(seed, tokens, size, dtype=dtype), normal(seed + 1, size, dtype=dtype)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    assert_close(rms_norm(x, weight, EPS), expected)


def test_silu_mul_twin_is_silu_times_up() -> None:
    gate_up = normal(0, 5, 14, dtype=torch.float32)
    gate, up = gate_up.double().chunk(2, 1)
    assert_close(silu_mul(gate_up), gate / (1 + (-gate).exp()) * up)


def angles(max_pos: int, head_dim: int) -> Tensor:
    """[max_pos, head_dim]: cosines, then sines."""
    frequency = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    angle = torch.arange(max_pos)[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class RopeCase:
    """Views of one merged projection, caches of NaN, and slots of which every third is -1."""

    def __init__(
        self, tokens: int, heads: int, kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype
    ) -> None:
        merged = normal(1, tokens, (heads + 2 * kv_heads), head_dim, dtype=dtype)
        self.query, self.key, self.value = merged.split([heads, kv_heads, kv_heads], dim=1)
        self.positions = torch.randint(0, 100, (tokens,), generator=torch.Generator().manual_seed(2))
        num_blocks = tokens // block_size + 2
        self.slots = torch.randperm(num_blocks * block_size, generator=torch.Generator().manual_seed(3))[:tokens]
        self.slots[::3] = -1
        self.key_cache, self.value_cache = torch.full((2, num_blocks, block_size, kv_heads, head_dim), math.nan).to(
            dtype
        )
        self.cos_sin = angles(100, head_dim)

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        caches = (self.key_cache, self.value_cache)
        return (self.query, self.key, self.value, self.positions, self.cos_sin, *caches, self.slots)


def rope_cases() -> st.SearchStrategy[RopeCase]:
    return st.builds(
        RopeCase,
        tokens=st.integers(0, 7),
        heads=st.integers(1, 10),
        kv_heads=st.integers(1, 5),
        head_dim=st.sampled_from([2, 32, 64, 80, 128, 256]),
        block_size=st.sampled_from([1, 4, 16]),
        dtype=DTYPES,
    )


@examples(30)
@given(rope_cases())
def test_rope_write_twin_is_a_turn_in_the_plane_and_a_write(case: RopeCase) -> None:
    query, key = case.query.clone(), case.key.clone()
    expected_keys, expected_values = case.key_cache.clone(), case.value_cache.clone()
    rope_write_kv(*case.arguments())
    assert torch.equal(case.key, key)
    cos, sin = case.cos_sin[case.positions].double()[:, None].chunk(2, -1)
    turn = torch.complex(cos, sin)

    def turned(x: Tensor) -> Tensor:
        pair = torch.complex(*x.double().chunk(2, -1)) * turn
        return torch.cat([pair.real, pair.imag], -1)

    assert_close(case.query, turned(query))
    rotated = turned(key).to(key.dtype)
    write_kv(rotated, case.value, expected_keys, expected_values, case.slots)
    assert torch.equal(case.key_cache.isnan(), expected_keys.isnan())
    assert_close(case.key_cache.nan_to_num(), expected_keys.nan_to_num())
    assert same_bits(case.value_cache, expected_values)


@pytest.mark.usefixtures("interpreted")
@examples(40)
@given(st.integers(0, 4), st.integers(1, 5), st.integers(1, 700), DTYPES, st.booleans())
def test_L64_rms_norm_equals_twin(tokens: int, heads: int, size: int, dtype: torch.dtype, per_head: bool) -> None:
    from minipaged.kernels.elementwise.norm import rms_norm_torch
    from minipaged.kernels.elementwise.norm_triton import rms_norm_triton

    wider = normal(0, tokens, heads + 2, size, dtype=dtype)
    x, weight = wider[:, 1:-1] if per_head else wider[:, 0], normal(1, size, dtype=dtype)
    out = rms_norm_triton(x, weight, EPS)
    assert out.is_contiguous()
    assert_close(out, rms_norm_torch(x, weight, EPS))


@pytest.mark.usefixtures("interpreted")
@examples(25)
@given(st.integers(0, 4), st.integers(1, 1500), DTYPES)
def test_L64_silu_mul_equals_twin(tokens: int, inner: int, dtype: torch.dtype) -> None:
    from minipaged.kernels.elementwise.activation import silu_mul_torch
    from minipaged.kernels.elementwise.activation_triton import silu_mul_triton

    gate_up = 10 * normal(0, tokens, 2 * inner, dtype=dtype)
    out, expected = silu_mul_triton(gate_up), silu_mul_torch(gate_up)
    assert out.shape == (tokens, inner)
    assert_close(out, expected)


@pytest.mark.usefixtures("interpreted")
@examples(15)
@given(st.integers(0, 5), st.integers(1, 1500), DTYPES)
def test_L64_embed_tokens_equals_twin(tokens: int, size: int, dtype: torch.dtype) -> None:
    from minipaged.kernels.elementwise.embed import embed_tokens_torch
    from minipaged.kernels.elementwise.embed_triton import embed_tokens_triton

    table, newest = normal(0, 9, size, dtype=dtype), torch.tensor([3, 8, 1])
    token_ids = torch.tensor([4, -1, 0, -1, 8], dtype=torch.int32)[:tokens]
    batch_indices = torch.tensor([0, 1, 0, 2, 2], dtype=torch.int32)[:tokens]
    expected = table[torch.tensor([4, 8, 0, 1, 8])[:tokens]]
    assert torch.equal(embed_tokens_torch(table, token_ids, newest, batch_indices), expected)
    assert torch.equal(embed_tokens_triton(table, token_ids, newest, batch_indices), expected)


def test_rope_write_norms_each_head_first() -> None:
    case = RopeCase(7, 4, 2, 32, 4, torch.bfloat16)
    query_norm, key_norm = normal(4, 2, 32, dtype=torch.bfloat16)
    expected = [x.clone() for x in case.arguments()]
    rope_write_kv(rms_norm(expected[0], query_norm, EPS), rms_norm(expected[1], key_norm, EPS), *expected[2:])
    rope_write_kv(*case.arguments(), query_norm=query_norm, key_norm=key_norm, eps=EPS)
    assert same_bits(case.key_cache, expected[5])
    with pytest.raises(ValueError, match="query_norm and key_norm go together"):
        rope_write_kv(*case.arguments(), query_norm=query_norm)


@pytest.mark.usefixtures("interpreted")
@examples(40)
@given(rope_cases(), st.booleans(), st.booleans(), st.booleans())
def test_L64_rope_write_equals_twin(case: RopeCase, half_angles: bool, with_norm: bool, one_row: bool) -> None:
    from minipaged.kernels.cache.rope_write import rope_write_kv_torch
    from minipaged.kernels.cache.rope_write_triton import rope_write_kv_triton

    if half_angles:
        case.cos_sin = case.cos_sin.to(case.query.dtype)
    if one_row:  # of a layer without rope: the same row for every position
        case.cos_sin = case.cos_sin[:1].expand_as(case.cos_sin)
    norm: dict[str, Any] = {}
    if with_norm:
        weights = normal(4, 2, case.query.shape[2], dtype=case.query.dtype)
        norm = {"query_norm": weights[0], "key_norm": weights[1], "eps": EPS}
    expected = [x.clone() for x in case.arguments()]
    rope_write_kv_torch(*expected, **norm)
    rope_write_kv_triton(*case.arguments(), **norm)
    assert_close(case.query, expected[0])
    assert torch.equal(case.key_cache.isnan(), expected[5].isnan())
    assert_close(case.key_cache.nan_to_num(), expected[5].nan_to_num())
    assert same_bits(case.value_cache, expected[6])


def test_arguments_that_do_not_fit_are_named() -> None:
    x, weight = torch.zeros(3, 8), torch.ones(8)
    with pytest.raises(ValueError, match=r"x has shape \[3, 8\] and weight \[7\]"):
        rms_norm(x, weight[:7], EPS)
    with pytest.raises(ValueError, match=r"weight torch\.float16"):
        rms_norm(x, weight.half(), EPS)
    with pytest.raises(ValueError, match="eps is -1"):
        rms_norm(x, weight, -1)
    with pytest.raises(ValueError, match=r"gate_up has shape \[3, 7\]"):
        silu_mul(torch.zeros(3, 7))
    with pytest.raises(ValueError, match=r"batch_indices has shape \[2\]; it must be \[3\]"):
        embed_tokens(x, torch.zeros(3, dtype=torch.int32), torch.zeros(1, dtype=torch.int64), torch.zeros(2).int())
    case = RopeCase(5, 2, 1, 32, 4, torch.float32)
    arguments = case.arguments()
    with pytest.raises(ValueError, match=r"query has shape \[4, 2, 32\]"):
        rope_write_kv(case.query[:4], *arguments[1:])
    with pytest.raises(ValueError, match=r"positions is torch\.int16"):
        rope_write_kv(*arguments[:3], case.positions.short(), *arguments[4:])
    with pytest.raises(ValueError, match=r"it must be \[max_pos, 32\]"):
        rope_write_kv(*arguments[:4], case.cos_sin[:, :16], *arguments[5:])
