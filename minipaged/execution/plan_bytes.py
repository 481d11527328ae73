"""A StepPlan, and the StepTokens that it drew, as bytes and back, for ranks in other processes: a JSON head, then the arrays one after
another. No pickle.
"""

from __future__ import annotations

import json
import struct
from dataclasses import fields
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

ARRAYS = tuple(field.name for field in fields(StepPlan) if "Array" in str(field.type))  # of a plan; one may be None
COLUMNS = ("token_ids", "logprobs", "ranks", "top_ids", "top_logprobs")
_LENGTH = struct.Struct("<I")


def pack_plan(plan: StepPlan) -> bytes:
    """All of a plan."""
    present = [name for name in ARRAYS if getattr(plan, name) is not None]
    masks = [each.mask for each in plan.adjustments if each is not None and each.mask is not None]
    arrays = [getattr(plan, name) for name in present] + list(plan.sampling or ())
    arrays += [np.frombuffer(mask, np.uint8) for mask in masks]
    head = {
        "step": plan.step,
        "present": present,
        "pairs": (plan.swap_outs, plan.swap_ins, plan.copies),
        "sampling": plan.sampling is not None,
        "top": plan.top_logprobs,
        "queries": plan.prompt_queries,
        # True for a mask, which is one of the arrays
        "adjustments": [each and each._replace(mask=None if each.mask is None else True) for each in plan.adjustments],  # type: ignore[arg-type]
    }
    return _join(head, arrays)


def unpack_plan(body: bytes) -> StepPlan:
    """The plan that was packed."""
    head, arrays = _take_apart(body)
    named = {name: arrays.pop(0) for name in head["present"]}
    sampling = [arrays.pop(0) for _ in SamplingColumns._fields] if head["sampling"] else None
    swap_outs, swap_ins, copies = (_pairs(pairs) for pairs in head["pairs"])
    return StepPlan(
        step=head["step"],
        swap_outs=swap_outs,
        swap_ins=swap_ins,
        copies=copies,
        **named,
        sampling=SamplingColumns(*sampling) if sampling is not None else None,
        top_logprobs=head["top"],
        prompt_queries=tuple(PromptQuery(row, tuple(targets), top) for row, targets, top in head["queries"]),
        adjustments=tuple(each and _adjustments(each, arrays) for each in head["adjustments"]),
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


def _adjustments(told: list[Any], masks: list[Any]) -> LogitAdjustments:
    found = LogitAdjustments(*map(_tuples, told))
    return found if found.mask is None else found._replace(mask=masks.pop(0).tobytes())


def _tuples(told: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    return tuple(map(_tuples, told)) if isinstance(told, list) else told
