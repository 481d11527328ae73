"""A StepPlan, and the StepTokens that it drew, as bytes and back, for ranks in other processes: a JSON head, then the arrays one after
another. No pickle.
"""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np

from minipaged.scheduling.plan import (
    LogitAdjustments,
    Pairs,
    PromptLogprobs,
    PromptQuery,
    SamplingColumns,
    StepPlan,
    StepTokens,
)

ARRAYS = ("seq_ids", "slots", "starts", "lengths", "token_ids", "tables", "draw_rows", "draw_slots")
COLUMNS = ("token_ids", "logprobs", "ranks", "top_ids", "top_logprobs")
_LENGTH = struct.Struct("<I")


def pack_plan(plan: StepPlan) -> bytes:
    """All of a plan."""
    left_out = [] if plan.num_left_out is None else [plan.num_left_out]
    arrays = [getattr(plan, name) for name in ARRAYS] + left_out + list(plan.sampling or ())
    head = {
        "step": plan.step,
        "pairs": (plan.swap_outs, plan.swap_ins, plan.copies),
        "left_out": bool(left_out),
        "top": plan.top_logprobs,
        "queries": plan.prompt_queries,
        "adjustments": [each if each is None or each.mask is None else _as_text(each) for each in plan.adjustments],
    }
    return _join(head, arrays)


def unpack_plan(body: bytes) -> StepPlan:
    """The plan that was packed."""
    head, arrays = _take_apart(body)
    named = dict(zip(ARRAYS, arrays, strict=False))
    left_out, sampling = None, arrays[len(ARRAYS) :]
    if head["left_out"]:
        left_out, *sampling = sampling
    swap_outs, swap_ins, copies = (_pairs(pairs) for pairs in head["pairs"])
    return StepPlan(
        step=head["step"],
        swap_outs=swap_outs,
        swap_ins=swap_ins,
        copies=copies,
        **named,
        sampling=SamplingColumns(*sampling) if sampling else None,
        top_logprobs=head["top"],
        prompt_queries=tuple(PromptQuery(row, tuple(targets), top) for row, targets, top in head["queries"]),
        adjustments=tuple(None if each is None else _adjustments(each) for each in head["adjustments"]),
        num_left_out=left_out,
    )


def pack_tokens(step: int, tokens: StepTokens) -> bytes:
    """What a step drew."""
    present = [name for name in COLUMNS if getattr(tokens, name) is not None]
    prompts = tokens.prompt_logprobs
    arrays = [getattr(tokens, name) for name in present]
    for entry in (prompts or {}).values():
        arrays += entry[1:]
    rows = None if prompts is None else [(row, entry.start) for row, entry in prompts.items()]
    return _join({"step": step, "present": present, "prompts": rows}, arrays)


def unpack_tokens(body: bytes) -> tuple[int, StepTokens]:
    """The step's number, and what it drew."""
    head, arrays = _take_apart(body)
    columns = {name: arrays.pop(0) for name in head["present"]}
    prompts = None
    if head["prompts"] is not None:
        prompts = {row: PromptLogprobs(start, *(arrays.pop(0) for _ in range(4))) for row, start in head["prompts"]}
    return head["step"], StepTokens(**columns, prompt_logprobs=prompts)


def _join(head: dict[str, Any], arrays: list[Any]) -> bytes:
    head["arrays"] = [(array.dtype.str, array.shape) for array in arrays]
    text = json.dumps(head, separators=(",", ":")).encode()
    return b"".join((_LENGTH.pack(len(text)), text, *(np.ascontiguousarray(array).tobytes() for array in arrays)))


def _take_apart(body: bytes) -> tuple[dict[str, Any], list[Any]]:
    whole = bytearray(body)  # so that the arrays can be written, as torch wants them
    (size,) = _LENGTH.unpack_from(whole)
    offset = _LENGTH.size + size
    head = json.loads(whole[_LENGTH.size : offset])
    arrays = []
    for dtype, shape in head["arrays"]:
        arrays.append(np.frombuffer(whole, dtype, int(np.prod(shape)), offset).reshape(shape))
        offset += arrays[-1].nbytes
    return head, arrays


def _pairs(pairs: list[list[int]]) -> Pairs:
    return tuple((first, second) for first, second in pairs)


def _as_text(adjustments: LogitAdjustments) -> tuple[Any, ...]:
    """The mask, its last field, as hexadecimal digits: JSON has no bytes."""
    return (*adjustments[:-1], (adjustments.mask or b"").hex())


def _adjustments(told: list[Any]) -> LogitAdjustments:
    allowed, banned, bias, seen, repetition, drawn, presence, frequency, mask = told
    return LogitAdjustments(
        None if allowed is None else tuple(allowed),
        tuple(banned),
        tuple((token, value) for token, value in bias),
        tuple(seen),
        repetition,
        tuple((token, count) for token, count in drawn),
        presence,
        frequency,
        None if mask is None else bytes.fromhex(mask),
    )
