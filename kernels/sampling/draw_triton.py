"""draw_tokens on the GPU in two kernels: the first reads all logits once, by parts of the vocabulary; the second finds the part and,
inside it, the token.

A part leaves its largest logit and where that is, and the sum of its weights relative to it. From these a row's second program knows in
which part the threshold falls, and looks at that part alone again. Softmax, cumulative sum and search over the whole vocabulary would
move a dozen times as much.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from minipaged.kernels.checks import COLDEST as LEAST_WARMTH
from minipaged.kernels.dependent_launch import dependent_launch, wait_for_previous
from minipaged.kernels.launch_table import next_power_of_two

NUM_WARPS = 4  # of the first kernel
SMALL_VOCABULARY = 1 << 16
COLDEST = tl.constexpr(LEAST_WARMTH)


@triton.jit
def load_logits(row_ptr, column, vocab):
    """float32; -inf past the vocabulary."""
    return tl.load(row_ptr + column, mask=column < vocab, other=float("-inf")).to(tl.float32)


@triton.jit
def base_2(temperature):
    """What a difference of logits is multiplied by to be an exponent of 2: log2(e) / temperature."""
    return 1.4426950408889634 / temperature


@triton.jit
def _parts_kernel(
    best_ptr,  # float32 [rows, parts]: the largest logit
    place_ptr,  # int32 [rows, parts]: where it is; not written for a row that is drawn
    weight_ptr,  # float32 [rows, parts]: sum of exp((logit - largest) / temperature); not written for a greedy row
    logits_ptr,
    threshold_ptr,
    temperature_ptr,
    vocab,
    stride,
    num_parts,
    PART: tl.constexpr,
    PARTS_A_PROGRAM: tl.constexpr,
    WARM: tl.constexpr,
    TRUNCATED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    part = tl.program_id(0) * PARTS_A_PROGRAM + tl.arange(0, PARTS_A_PROGRAM)
    row = tl.program_id(1)
    column = part[:, None] * PART + tl.arange(0, PART)[None, :]
    wait_for_previous(DEPENDENT)
    temperature = 0.0
    if WARM:
        temperature = tl.load(temperature_ptr + row).to(tl.float32)
    logits = load_logits(logits_ptr + row.to(tl.int64) * stride, column, vocab)
    if TRUNCATED:
        logits = tl.where(logits >= tl.load(threshold_ptr + row), logits, float("-inf"))
    best = tl.max(logits, 1)
    at = row * num_parts + part
    tl.store(best_ptr + at, best, mask=part < num_parts)
    if temperature >= COLDEST:
        shift = tl.where(best == float("-inf"), 0.0, best)  # a part of banned tokens alone
        weight = tl.sum(tl.exp2((logits - shift[:, None]) * base_2(temperature)), 1)
        tl.store(weight_ptr + at, weight, mask=part < num_parts)
    else:
        place = tl.min(tl.where(logits == best[:, None], column, vocab - 1), 1)
        tl.store(place_ptr + at, place, mask=part < num_parts)


@triton.jit
def _token_kernel(
    out_ptr,  # int64 [rows]
    best_ptr,
    place_ptr,
    weight_ptr,
    logits_ptr,
    threshold_ptr,
    temperature_ptr,
    uniform_ptr,
    vocab,
    stride,
    num_parts,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    WARM: tl.constexpr,
    TRUNCATED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    row = tl.program_id(0)
    part = tl.arange(0, PARTS)
    at = row * num_parts + part
    there = part < num_parts
    wait_for_previous(DEPENDENT)
    best = tl.load(best_ptr + at, mask=there, other=float("-inf"))
    place = tl.load(place_ptr + at, mask=there, other=vocab)
    temperature = 0.0
    if WARM:  # all loads at once: a row waits for memory twice, here and for the part's logits
        temperature = tl.load(temperature_ptr + row).to(tl.float32)
        uniform = tl.load(uniform_ptr + row).to(tl.float64)
        weight = tl.load(weight_ptr + at, mask=there, other=0.0)
    top = tl.max(best, 0)
    token = tl.min(tl.where(best == top, place, vocab - 1), 0)
    drawable = (top > float("-inf")) & (top < float("inf"))  # neither where it is NaN
    if WARM:  # noqa: SIM102 - the inside is compiled only if so
        if temperature >= COLDEST:
            share = weight.to(tl.float64) * tl.exp2((best - top) * base_2(temperature)).to(tl.float64)
            ends = tl.cumsum(share, 0)
            threshold = uniform * tl.sum(share, 0)
            last = tl.max(tl.where(share > 0.0, part, 0), 0)
            chosen = tl.minimum(tl.sum((ends <= threshold).to(tl.int32), 0), last)
            within = threshold - tl.sum(tl.where(part < chosen, share, 0.0), 0)
            column = chosen * PART + tl.arange(0, PART)
            logits = load_logits(logits_ptr + row.to(tl.int64) * stride, column, vocab)
            if TRUNCATED:
                logits = tl.where(logits >= tl.load(threshold_ptr + row), logits, float("-inf"))
            each = tl.exp2((logits - top) * base_2(temperature)).to(tl.float64)
            position = tl.sum((tl.cumsum(each, 0) <= within).to(tl.int32), 0)
            # Sums of float32 and of float64 differ in their last digits: never past the last token that has any weight.
            last_column = tl.max(tl.where(each > 0.0, column, 0), 0)
            token = tl.minimum(chosen * PART + position, last_column)
    tl.store(out_ptr + row, tl.where(drawable, token, -1).to(tl.int64))


class Parts(NamedTuple):
    """How a vocabulary is cut. size: logits of a part; a_program: parts that a program of the first kernel reads; warps: of the second."""

    size: int
    a_program: int
    warps: int


def parts_of(vocab: int) -> Parts:
    """The best of what was measured on an H100 (kernels/README.md). Parts of 256 are a warp's own, and few enough for one warp to join."""
    return Parts(256, 8, 1) if vocab <= SMALL_VOCABULARY else Parts(2048, 1, 4)


def draw_tokens_triton(
    logits: torch.Tensor,
    temperature: torch.Tensor | None = None,
    uniform: torch.Tensor | None = None,
    threshold: torch.Tensor | None = None,
) -> torch.Tensor:
    """See draw_tokens."""
    rows, vocab = logits.shape
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows == 0:
        return out
    parts = parts_of(vocab)
    num_parts = triton.cdiv(vocab, parts.size)
    best, weight = torch.empty(2, rows, num_parts, dtype=torch.float32, device=logits.device)
    place = torch.empty(rows, num_parts, dtype=torch.int32, device=logits.device)
    absent = best  # a pointer that is not read
    logits_of = (
        logits,
        absent if threshold is None else threshold,
        absent if temperature is None else temperature,
    )
    kinds = {"WARM": temperature is not None, "TRUNCATED": threshold is not None, **dependent_launch(logits.device)}
    _parts_kernel[(triton.cdiv(num_parts, parts.a_program), rows)](
        best,
        place,
        weight,
        *logits_of,
        vocab,
        logits.stride(0),
        num_parts,
        PART=parts.size,
        PARTS_A_PROGRAM=parts.a_program,
        num_warps=NUM_WARPS,
        **kinds,
    )
    _token_kernel[(rows,)](
        out,
        best,
        place,
        weight,
        *logits_of,
        absent if uniform is None else uniform,
        vocab,
        logits.stride(0),
        num_parts,
        PARTS=next_power_of_two(num_parts),
        PART=parts.size,
        num_warps=parts.warps,
        **kinds,
    )
    return out
