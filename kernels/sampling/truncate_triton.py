"""truncation_threshold on the GPU: one program a row, which searches the number instead of sorting. Few rows: truncate_parts_triton.py.

How many logits are at least x, and what they weigh, only falls as x grows. So the least logit kept is found by halving, twice in one
reading of the row, which after the first comes from the cache: three numbers are tried at once. The numbers of the logits' own dtype are
searched, in their order: 8 readings for bfloat16's 65 thousand, 16 for float32's. A row without truncation is not read at all.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803

import torch
import triton
import triton.language as tl

from minipaged.kernels.dependent_launch import dependent_launch, wait_for_previous
from minipaged.kernels.launch_table import next_power_of_two
from minipaged.kernels.sampling.draw_triton import COLDEST, base_2, load_logits

MOST_LOGITS, NUM_WARPS = 16384, 16  # read at a time
# Of the likeliest token's weight, which is 1: a top_p that float32 takes for 0 asks for something all the same, and it is there.
LEAST_SHARE = tl.constexpr(1e-30)
# How far apart the bits of neighbours lie once they are float32.
GRAINS = {torch.bfloat16: 1 << 16, torch.float16: 1 << 13, torch.float32: 1}


@triton.jit
def place_of(x, GRAIN: tl.constexpr):
    """Where a float32 stands among the numbers of its dtype, counted from 0.0: int64."""
    bits = x.to(tl.int32, bitcast=True)
    size = (bits & 0x7FFFFFFF).to(tl.int64) // GRAIN
    return tl.where(bits < 0, -size, size)


@triton.jit
def number_at(place, GRAIN: tl.constexpr):
    """The float32 at a place."""
    size = (tl.abs(place) * GRAIN).to(tl.int32).to(tl.float32, bitcast=True)
    return tl.where(place < 0, -size, size)


@triton.jit
def _search(
    row_ptr, vocab, low, high, enough, best, base, COUNTED: tl.constexpr, GRAIN: tl.constexpr, BLOCK: tl.constexpr
):
    """The highest place at and above which there is `enough`: there is at `low`, there is not at `high`. Logits are COUNTED, or weigh
    2^((logit - best) * base).
    """
    while high - low > 1:
        step = (high - low + 3) // 4
        first = number_at(low + step, GRAIN)
        second = number_at(tl.minimum(low + 2 * step, high), GRAIN)
        third = number_at(tl.minimum(low + 3 * step, high), GRAIN)
        from_first = tl.zeros([BLOCK], tl.float32)
        from_second = tl.zeros([BLOCK], tl.float32)
        from_third = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocab, BLOCK):
            logits = load_logits(row_ptr, start + tl.arange(0, BLOCK), vocab)
            weight = 1.0 if COUNTED else tl.exp2((logits - best) * base)
            from_first += tl.where(logits >= first, weight, 0.0)
            from_second += tl.where(logits >= second, weight, 0.0)
            from_third += tl.where(logits >= third, weight, 0.0)
        quarters = (tl.sum(from_first, 0) >= enough).to(tl.int64)
        quarters += (tl.sum(from_second, 0) >= enough).to(tl.int64)
        quarters += (tl.sum(from_third, 0) >= enough).to(tl.int64)
        low += quarters * step
        high = tl.minimum(low + step, high)
    return low


@triton.jit
def _threshold_kernel(
    out_ptr,  # float32 [rows]
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    vocab,
    stride,
    GRAIN: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    row = tl.program_id(0)
    wait_for_previous(DEPENDENT)
    temperature = tl.load(temperature_ptr + row).to(tl.float32)
    top_k = tl.load(top_k_ptr + row).to(tl.int32)
    top_p = tl.load(top_p_ptr + row).to(tl.float32)
    min_p = tl.load(min_p_ptr + row).to(tl.float32)
    threshold = float("-inf")
    if temperature >= COLDEST and (top_k > 0 or top_p < 1.0 or min_p > 0.0):
        row_ptr = logits_ptr + row.to(tl.int64) * stride
        bests = tl.full([BLOCK], float("-inf"), tl.float32)
        for start in range(0, vocab, BLOCK):
            bests = tl.maximum(bests, load_logits(row_ptr, start + tl.arange(0, BLOCK), vocab))
        best = tl.max(bests, 0)
        base = base_2(temperature)
        low = place_of(tl.full([], float("-inf"), tl.float32), GRAIN)
        high = place_of(best, GRAIN) + 1
        if top_k > 0 and top_k < vocab:
            low = _search(row_ptr, vocab, low, high, top_k.to(tl.float32), best, base, True, GRAIN, BLOCK)
        if top_p < 1.0:
            kept = tl.zeros([BLOCK], tl.float32)
            for start in range(0, vocab, BLOCK):
                logits = load_logits(row_ptr, start + tl.arange(0, BLOCK), vocab)
                weight = tl.exp2((logits - best) * base)
                kept += tl.where(logits >= number_at(low, GRAIN), weight, 0.0)
            enough = tl.maximum(top_p * tl.sum(kept, 0), LEAST_SHARE)
            low = _search(row_ptr, vocab, low, high, enough, best, base, False, GRAIN, BLOCK)
        threshold = number_at(low, GRAIN)
        if min_p > 0.0:
            threshold = tl.minimum(tl.maximum(threshold, best + tl.log2(min_p) / base), best)
    tl.store(out_ptr + row, threshold)


def truncation_threshold_triton(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """See truncation_threshold."""
    rows, vocab = logits.shape
    out = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows == 0:
        return out
    _threshold_kernel[(rows,)](
        out,
        logits,
        temperature,
        top_k,
        top_p,
        min_p,
        vocab,
        logits.stride(0),
        GRAIN=GRAINS[logits.dtype],
        BLOCK=min(MOST_LOGITS, next_power_of_two(vocab)),
        num_warps=NUM_WARPS,
        **dependent_launch(logits.device),
    )
    return out
