"""truncation_threshold on the GPU for few rows in sixteen bits: each row cut into parts, whose programs share the search.

As in truncate_triton.py the number is searched among the numbers of the logits' dtype. There one program reads the whole row for each step
of the search; here a step is a launch of one program a part. Each sums its part at sixteen numbers, and the next launch's programs all join
the parts' sums, and so know which sixteenth to look at next: four steps for bfloat16's 65 thousand numbers, first for top-k, then for top-p
among what that kept. A row that does not ask, or is found, passes through: its programs end at once.

Bytes: the logits once from memory, then from the second cache, and 64 bytes a part and step. Bound by the latency of the launches.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803

import torch
import triton
import triton.language as tl

from minipaged.kernels.dependent_launch import dependent_launch, wait_for_previous
from minipaged.kernels.launch_table import next_power_of_two
from minipaged.kernels.sampling.draw_triton import COLDEST, base_2, load_logits
from minipaged.kernels.sampling.truncate_triton import GRAINS, LEAST_SHARE, number_at, place_of

PART, NUM_WARPS = 4096, 8
TRIED = 16  # numbers that a step tries
STEPS = {
    torch.bfloat16: 4,
    torch.float16: 5,
}  # for top-k, and for top-p: TRIED ** STEPS is at least all places from -inf to inf
MOST_ROWS = 8  # with more rows, a program a row keeps the GPU busy enough


@triton.jit
def _best_of(bests_ptr, row, num_parts, PARTS: tl.constexpr):
    """The largest logit of the row."""
    part = tl.arange(0, PARTS)
    return tl.max(tl.load(bests_ptr + row * num_parts + part, mask=part < num_parts, other=float("-inf")), 0)


@triton.jit
def _after(places_ptr, enough_ptr, sums_ptr, side, row, rows, num_parts, TRIED: tl.constexpr, PARTS: tl.constexpr):
    """(low, high, enough) once the sums of a step are there: there is `enough` at and above low, and there is not at high.

    side: which half of the buffers that step wrote. enough: below 0 it is a share, negated, of all that is at and above the first low.
    """
    low = tl.load(places_ptr + (side * rows + row) * 2)
    high = tl.load(places_ptr + (side * rows + row) * 2 + 1)
    enough = tl.load(enough_ptr + side * rows + row)
    if high - low > 1:
        part = tl.arange(0, PARTS)
        tried = tl.arange(0, TRIED)
        pointers = sums_ptr + ((side * rows + row) * num_parts + part)[:, None] * TRIED + tried[None, :]
        sums = tl.sum(tl.load(pointers, mask=(part < num_parts)[:, None], other=0.0), 0)
        if enough < 0.0:
            enough = tl.maximum(-enough * tl.sum(tl.where(tried == 0, sums, 0.0), 0), LEAST_SHARE)
        gap = (high - low + TRIED - 1) // TRIED
        low += tl.sum(((sums >= enough) & (tried > 0)).to(tl.int64), 0) * gap
        high = tl.minimum(low + gap, high)
    return low, high, enough


@triton.jit(do_not_specialize=["step"])
def _step_kernel(
    places_ptr,  # int64 [2, rows, 2]: low and high of the numbers tried by this step, and by the one before
    enough_ptr,  # float32 [2, rows]
    sums_ptr,  # float32 [2, rows, parts, TRIED]: counts or weights of the logits at and above each number tried
    bests_ptr,  # float32 [rows, parts]: the largest logit, written by the first step
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    vocab,
    stride,
    num_parts,
    step,  # 0 to STEPS - 1 search for top-k, the next STEPS for top-p
    STEPS: tl.constexpr,
    TRIED: tl.constexpr,
    GRAIN: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    part = tl.program_id(0)
    row = tl.program_id(1)
    rows = tl.num_programs(1)
    now = step % 2
    column = part * PART + tl.arange(0, PART)
    wait_for_previous(DEPENDENT)
    temperature = tl.load(temperature_ptr + row).to(tl.float32)
    top_k = tl.load(top_k_ptr + row).to(tl.int32)
    top_p = tl.load(top_p_ptr + row).to(tl.float32)
    row_ptr = logits_ptr + row.to(tl.int64) * stride
    warm = temperature >= COLDEST
    by_count = warm & (top_k > 0) & (top_k < vocab)
    by_share = warm & (top_p < 1.0)
    if warm & (step == 0):
        tl.store(bests_ptr + row * num_parts + part, tl.max(load_logits(row_ptr, column, vocab), 0))
    if (by_count & (step < STEPS)) | (by_share & (step >= STEPS)):
        low = place_of(tl.full([], float("-inf"), tl.float32), GRAIN)
        high = place_of(tl.full([], float("inf"), tl.float32), GRAIN) + 1
        enough = top_k.to(tl.float32)
        best = tl.full([], 0.0, tl.float32)
        if (step > 0) & (by_count | (step > STEPS)):
            low, high, enough = _after(places_ptr, enough_ptr, sums_ptr, 1 - now, row, rows, num_parts, TRIED, PARTS)
        if step >= STEPS:
            best = _best_of(bests_ptr, row, num_parts, PARTS)
        if step == STEPS:
            high = place_of(best, GRAIN) + 1
            enough = -tl.maximum(top_p, LEAST_SHARE)
        if part == 0:
            tl.store(places_ptr + (now * rows + row) * 2, low)
            tl.store(places_ptr + (now * rows + row) * 2 + 1, high)
            tl.store(enough_ptr + now * rows + row, enough)
        if high - low > 1:
            logits = load_logits(row_ptr, column, vocab)
            weight = tl.full([PART], 1.0, tl.float32)
            if step >= STEPS:
                weight = tl.exp2((logits - best) * base_2(temperature))
            gap = (high - low + TRIED - 1) // TRIED
            at = sums_ptr + ((now * rows + row) * num_parts + part) * TRIED
            for tried in tl.static_range(TRIED):
                number = number_at(tl.minimum(low + tried * gap, high), GRAIN)
                tl.store(at + tried, tl.sum(tl.where(logits >= number, weight, 0.0), 0))


@triton.jit
def _found_kernel(
    out_ptr,  # float32 [rows]
    places_ptr,
    enough_ptr,
    sums_ptr,
    bests_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    vocab,
    num_parts,
    STEPS: tl.constexpr,
    TRIED: tl.constexpr,
    GRAIN: tl.constexpr,
    PARTS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    row = tl.program_id(0)
    rows = tl.num_programs(0)
    wait_for_previous(DEPENDENT)
    temperature = tl.load(temperature_ptr + row).to(tl.float32)
    top_k = tl.load(top_k_ptr + row).to(tl.int32)
    top_p = tl.load(top_p_ptr + row).to(tl.float32)
    min_p = tl.load(min_p_ptr + row).to(tl.float32)
    threshold = float("-inf")
    if temperature >= COLDEST and (top_k > 0 or top_p < 1.0 or min_p > 0.0):
        best = _best_of(bests_ptr, row, num_parts, PARTS)
        low = place_of(tl.full([], float("-inf"), tl.float32), GRAIN)
        if (top_p < 1.0) | ((top_k > 0) & (top_k < vocab)):
            side = tl.where(top_p < 1.0, (2 * STEPS - 1) % 2, (STEPS - 1) % 2)  # of the last step that searched
            low, _, _ = _after(places_ptr, enough_ptr, sums_ptr, side, row, rows, num_parts, TRIED, PARTS)
        threshold = number_at(low, GRAIN)
        if min_p > 0.0:
            threshold = tl.minimum(tl.maximum(threshold, best + tl.log2(min_p) / base_2(temperature)), best)
    tl.store(out_ptr + row, threshold)


def takes_few_rows(logits: torch.Tensor) -> bool:
    """Whether these rows' search is shared: few of them, in sixteen bits."""
    return logits.shape[0] <= MOST_ROWS and logits.element_size() == 2


def truncation_threshold_by_parts(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """See truncation_threshold; logits in sixteen bits."""
    (rows, vocab), device = logits.shape, logits.device
    out = torch.empty(rows, dtype=torch.float32, device=device)
    if rows == 0:
        return out
    num_parts = triton.cdiv(vocab, PART)
    bests = torch.empty(rows, num_parts, dtype=torch.float32, device=device)
    places = torch.empty(2, rows, 2, dtype=torch.int64, device=device)
    enough = torch.empty(2, rows, dtype=torch.float32, device=device)
    sums = torch.empty(2, rows, num_parts, TRIED, dtype=torch.float32, device=device)
    dependent = dependent_launch(device)
    search = {
        "STEPS": STEPS[logits.dtype],
        "TRIED": TRIED,
        "GRAIN": GRAINS[logits.dtype],
        "PARTS": next_power_of_two(num_parts),
    }
    for step in range(2 * search["STEPS"]):
        _step_kernel[(num_parts, rows)](
            places,
            enough,
            sums,
            bests,
            logits,
            temperature,
            top_k,
            top_p,
            vocab,
            logits.stride(0),
            num_parts,
            step,
            PART=PART,
            num_warps=NUM_WARPS,
            **search,
            **dependent,
        )
    _found_kernel[(rows,)](
        out,
        places,
        enough,
        sums,
        bests,
        temperature,
        top_k,
        top_p,
        min_p,
        vocab,
        num_parts,
        num_warps=4,
        **search,
        **dependent,
    )
    return out
