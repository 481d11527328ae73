"""draw_tokens on the GPU in two kernels: the first reads all logits once, by parts of the vocabulary; the second finds the part and,
inside it, the token.

A part leaves its largest logit and where that is, and the sum of its weights relative to it. From these a row's second program knows in
which part the threshold falls, and looks at that part alone again. Softmax, cumulative sum and search over the whole vocabulary would
move a dozen times as much.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803

import torch
import triton
import triton.language as tl

from kernels.dependent_launch import dependent_launch, wait_for_previous
from kernels.draw import COLDEST as LEAST_WARMTH
from kernels.launch_table import next_power_of_two

PART = 2048  # logits a program
COLDEST = tl.constexpr(LEAST_WARMTH)


@triton.jit
def _load_logits(logits_ptr, row, column, vocab, stride):
    """float32; -inf past the vocabulary."""
    logits = tl.load(logits_ptr + row.to(tl.int64) * stride + column, mask=column < vocab, other=float("-inf"))
    return logits.to(tl.float32)


@triton.jit
def _base_2(temperature):
    """What a difference of logits is multiplied by to be an exponent of 2: log2(e) / temperature."""
    return 1.4426950408889634 / temperature


@triton.jit
def _parts_kernel(
    best_ptr,  # float32 [rows, parts]: the largest logit
    place_ptr,  # int32 [rows, parts]: where it is; not written for a row that is drawn
    weight_ptr,  # float32 [rows, parts]: sum of exp((logit - largest) / temperature); not written for a greedy row
    logits_ptr,
    temperature_ptr,
    vocab,
    stride,
    PART: tl.constexpr,
    WARM: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    part = tl.program_id(0)
    row = tl.program_id(1)
    column = part * PART + tl.arange(0, PART)
    wait_for_previous(DEPENDENT)
    temperature = 0.0
    if WARM:
        temperature = tl.load(temperature_ptr + row).to(tl.float32)
    logits = _load_logits(logits_ptr, row, column, vocab, stride)
    best = tl.max(logits, 0)
    at = row * tl.num_programs(0) + part
    tl.store(best_ptr + at, best)
    if temperature >= COLDEST:
        shift = tl.where(best == float("-inf"), 0.0, best)  # a part of banned tokens alone
        tl.store(weight_ptr + at, tl.sum(tl.exp2((logits - shift) * _base_2(temperature)), 0))
    else:
        tl.store(place_ptr + at, tl.min(tl.where(logits == best, column, vocab - 1), 0))


@triton.jit
def _token_kernel(
    out_ptr,  # int64 [rows]
    best_ptr,
    place_ptr,
    weight_ptr,
    logits_ptr,
    temperature_ptr,
    uniform_ptr,
    vocab,
    stride,
    num_parts,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    WARM: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    row = tl.program_id(0)
    part = tl.arange(0, PARTS)
    wait_for_previous(DEPENDENT)
    at = row * num_parts + part
    best = tl.load(best_ptr + at, mask=part < num_parts, other=float("-inf"))
    top = tl.max(best, 0)
    place = tl.load(place_ptr + at, mask=part < num_parts, other=vocab)
    token = tl.min(tl.where(best == top, place, vocab - 1), 0)
    if WARM:
        temperature = tl.load(temperature_ptr + row).to(tl.float32)
        if temperature >= COLDEST:
            weight = tl.load(weight_ptr + at, mask=part < num_parts, other=0.0)
            weight = weight.to(tl.float64) * tl.exp2((best - top) * _base_2(temperature)).to(tl.float64)
            ends = tl.cumsum(weight, 0)
            threshold = tl.load(uniform_ptr + row).to(tl.float64) * tl.sum(weight, 0)
            last = tl.max(tl.where(weight > 0.0, part, 0), 0)
            chosen = tl.minimum(tl.sum((ends <= threshold).to(tl.int32), 0), last)
            within = threshold - tl.sum(tl.where(part < chosen, weight, 0.0), 0)
            column = chosen * PART + tl.arange(0, PART)
            logits = _load_logits(logits_ptr, row, column, vocab, stride)
            each = tl.exp2((logits - top) * _base_2(temperature)).to(tl.float64)
            position = tl.sum((tl.cumsum(each, 0) <= within).to(tl.int32), 0)
            # Sums of float32 and of float64 differ in their last digits: never past the last token that has any weight.
            last_column = tl.max(tl.where(each > 0.0, column, 0), 0)
            token = tl.minimum(chosen * PART + position, last_column)
    tl.store(out_ptr + row, token.to(tl.int64))


def draw_tokens_triton(
    logits: torch.Tensor, temperature: torch.Tensor | None = None, uniform: torch.Tensor | None = None
) -> torch.Tensor:
    """See kernels.draw_tokens."""
    rows, vocab = logits.shape
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows == 0:
        return out
    num_parts = triton.cdiv(vocab, PART)
    best, weight = torch.empty(2, rows, num_parts, dtype=torch.float32, device=logits.device)
    place = torch.empty(rows, num_parts, dtype=torch.int32, device=logits.device)
    warm = temperature is not None
    options = dependent_launch(logits.device)
    _parts_kernel[(num_parts, rows)](
        best,
        place,
        weight,
        logits,
        temperature if warm else best,
        vocab,
        logits.stride(0),
        PART=PART,
        WARM=warm,
        num_warps=4,
        **options,
    )
    _token_kernel[(rows,)](
        out,
        best,
        place,
        weight,
        logits,
        temperature if warm else best,
        uniform if warm else best,
        vocab,
        logits.stride(0),
        num_parts,
        PARTS=next_power_of_two(num_parts),
        PART=PART,
        WARM=warm,
        num_warps=4,
        **options,
    )
    return out
