"""A StepPlan as bytes and back, for ranks in other processes: a JSON head, then the arrays one after another. No pickle."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np

from minipaged.scheduling.plan import LogitAdjustments, Pairs, PromptQuery, SamplingColumns, StepPlan

ARRAYS = ("seq_ids", "slots", "starts", "lengths", "token_ids", "tables", "draw_rows", "draw_slots")
_LENGTH = struct.Struct("<I")


def pack_plan(plan: StepPlan) -> bytes:
    """All of a plan."""
    arrays = [getattr(plan, name) for name in ARRAYS] + list(plan.sampling or ())
    head = {
        "step": plan.step,
        "pairs": (plan.swap_outs, plan.swap_ins, plan.copies),
        "arrays": [(array.dtype.str, array.shape) for array in arrays],
        "top": plan.top_logprobs,
        "queries": plan.prompt_queries,
        "adjustments": plan.adjustments,
    }
    text = json.dumps(head, separators=(",", ":")).encode()
    return b"".join((_LENGTH.pack(len(text)), text, *(np.ascontiguousarray(array).tobytes() for array in arrays)))


def unpack_plan(body: bytes) -> StepPlan:
    """The plan that was packed."""
    whole = bytearray(body)  # so that the arrays can be written, as torch wants them
    (size,) = _LENGTH.unpack_from(whole)
    offset = _LENGTH.size + size
    head = json.loads(whole[_LENGTH.size : offset])
    arrays = []
    for dtype, shape in head["arrays"]:
        count = int(np.prod(shape))
        arrays.append(np.frombuffer(whole, dtype, count, offset).reshape(shape))
        offset += arrays[-1].nbytes
    named = dict(zip(ARRAYS, arrays, strict=False))
    sampling = arrays[len(ARRAYS) :]
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
    )


def _pairs(pairs: list[list[int]]) -> Pairs:
    return tuple((first, second) for first, second in pairs)


def _adjustments(told: list[Any]) -> LogitAdjustments:
    allowed, banned, bias, seen, repetition, drawn, presence, frequency = told
    return LogitAdjustments(
        None if allowed is None else tuple(allowed),
        tuple(banned),
        tuple((token, value) for token, value in bias),
        tuple(seen),
        repetition,
        tuple((token, count) for token, count in drawn),
        presence,
        frequency,
    )
