"""A step while it is put together (StepBuilder), and the StepPlan that it becomes: array operations over the batch's columns."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from minipaged.scheduling.batch import MOST, Batch
from minipaged.scheduling.plan import IntArray, LogitAdjustments, PromptQuery, SamplingColumns, StepPlan
from minipaged.scheduling.request import Request, Sequence

Index = npt.NDArray[np.int64]
_NO_ROWS, _NO_TAKES = np.zeros(0, np.int64), np.zeros(0, np.int32)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # of SplitMix64


class Draws(NamedTuple):
    """The tokens to sample in a step."""

    rows: Index  # [draws] row whose logits are read
    slots: Index  # [draws] the slot each token belongs to
    samples: Index  # [draws] which of the request's samples
    drawing: Index  # [drawing rows] the slots of the rows that draw, each once
    awaits_result: npt.NDArray[np.bool_]  # [drawing rows] whether what is drawn decides how the sequence goes on


@dataclass
class StepBuilder:
    """What the step is to do, as far as it is known. budget: tokens that may still be scheduled."""

    budget: int
    num_tokens: int = 0  # tokens that are scheduled
    slots: list[Index] = field(default_factory=list)
    takes: list[IntArray] = field(default_factory=list)  # tokens to compute of each slot
    copies: dict[int, tuple[tuple[int, int], ...]] = field(default_factory=dict)  # by sequence
    swap_outs: list[tuple[int, int]] = field(default_factory=list)
    swap_ins: list[tuple[int, int]] = field(default_factory=list)
    preempted: bool = False
    room_for: Request | None = None  # the running request that others made way for last

    def add(self, slots: Index, takes: IntArray) -> None:
        """Schedule `takes[i]` tokens of slots[i]; slots with nothing to take are left out."""
        if np.count_nonzero(takes) < len(takes):
            chosen = takes.nonzero()[0]
            slots, takes = slots[chosen], takes[chosen]
        if len(slots):
            self.slots.append(slots)
            self.takes.append(takes)
            num_tokens = int(takes.sum())
            self.num_tokens += num_tokens
            self.budget -= num_tokens

    def add_copies(self, seq_id: int, copies: tuple[tuple[int, int], ...]) -> None:
        """Block copies that this sequence's writes need."""
        self.copies[seq_id] = self.copies.get(seq_id, ()) + copies

    def build(self, number: int, batch: Batch) -> StepPlan | None:
        """The plan, or None for a step that does nothing. The batch's columns count it as launched; the engine launches it next."""
        if not (self.slots or self.swap_outs or self.swap_ins):
            return None
        slots = np.concatenate(self.slots) if self.slots else _NO_ROWS
        takes = np.concatenate(self.takes) if self.takes else _NO_TAKES
        starts = batch.num_computed[slots]
        ends = starts + takes
        slow = bool(np.count_nonzero(batch.needs_slow_path[slots]))
        # Those draw that reach their last token.
        draws = _draws_of(batch, slots, (ends == batch.num_with_pending[slots]).nonzero()[0], slow)
        owners = slots[draws.rows]
        greedy = np.count_nonzero(batch.only_greedy[owners]) == len(owners)
        only_decodes = self.num_tokens == len(slots) == len(draws.drawing)
        plan = StepPlan(
            step=number,
            swap_outs=tuple(self.swap_outs),
            swap_ins=tuple(self.swap_ins),
            copies=tuple(pair for pairs in self.copies.values() for pair in pairs) if self.copies else (),
            seq_ids=batch.seq_id[slots],
            slots=slots.astype(np.int32),
            starts=starts,
            lengths=takes,
            token_ids=batch.last_token[slots] if only_decodes else _token_ids(batch, slots, takes),
            tables=batch.table_rows(slots),
            draw_rows=draws.rows.astype(np.int32),
            draw_slots=draws.slots.astype(np.int32),
            sampling=None if greedy else _sampling(batch, owners, draws.samples),
            top_logprobs=_top_logprobs(batch, owners) if slow else -1,
            prompt_queries=_prompt_queries(batch, slots, takes) if slow else (),
            adjustments=() if greedy else _adjustments(batch, owners),
            num_left_out=batch.num_left_out[slots] if batch.any_left_out else None,
        )
        batch.num_computed[slots] = ends
        if batch.keeps_heaviest:
            batch.keep_heaviest(draws.drawing)
        batch.draw_pending(draws.drawing)
        batch.awaiting_result[draws.drawing] = draws.awaits_result
        return plan


def _draws_of(batch: Batch, slots: Index, rows: Index, slow: bool) -> Draws:
    """One draw for each of `rows`; n of them where n samples are forked from it. slow: some slot needs the slow path."""
    owners = slots[rows]
    if not slow:
        return Draws(rows, owners, batch.sample_index[owners], owners, batch.reads_answer[owners])
    awaits_result = np.zeros(len(rows), np.bool_)
    all_rows: list[int] = []
    targets: list[int] = []
    samples: list[int] = []
    for i, (row, slot) in enumerate(zip(rows.tolist(), owners.tolist(), strict=True)):
        sequence = batch.sequences[slot]
        if sequence is None:
            raise RuntimeError(f"slot {slot} is scheduled but empty")
        request = sequence.request
        children = request.reserved_slots if request.beams is None and not request.forked else []
        all_rows.extend([row] * (1 + len(children)))
        targets.extend([slot, *children])
        samples.extend([sequence.index, *range(1, 1 + len(children))])
        awaits_result[i] = bool(children) or request.beams is not None or bool(batch.reads_answer[slot])
    as_index = [np.array(column, np.int64) for column in (all_rows, targets, samples)]
    return Draws(as_index[0], as_index[1], as_index[2], owners, awaits_result)


def _token_ids(batch: Batch, slots: Index, takes: IntArray) -> IntArray:
    parts: list[npt.ArrayLike] = []
    for slot, take in zip(slots.tolist(), takes.tolist(), strict=True):
        start = int(batch.num_computed[slot])
        sequence = batch.sequences[slot]
        if start + take > batch.num_tokens[slot] or sequence is None:
            parts.append(batch.last_token[slot : slot + 1])  # drawn by a step in flight
        else:
            parts.append(sequence.token_ids[start : start + take])
    return np.concatenate([np.asarray(part, np.int32) for part in parts]) if parts else np.zeros(0, np.int32)


def _sampling(batch: Batch, owners: Index, samples: Index) -> SamplingColumns:
    return SamplingColumns(
        temperature=batch.temperature[owners],
        top_p=batch.top_p[owners],
        top_k=batch.top_k[owners],
        min_p=batch.min_p[owners],
        uniform=uniform(batch.seed[owners], samples, batch.num_with_pending[owners].astype(np.int64)),
    )


def _top_logprobs(batch: Batch, owners: Index) -> int:
    most = -1
    for slot in owners[batch.needs_slow_path[owners]].tolist():
        sequence = batch.sequences[slot]
        if sequence is None:
            continue
        request = sequence.request
        if request.beams is not None:
            most = max(most, request.beams.num_candidates, request.params.logprobs or 0)
        elif request.params.logprobs is not None:
            most = max(most, request.params.logprobs)
        elif request.params.best_of is not None:
            most = max(most, 0)
    return most


def _prompt_queries(batch: Batch, slots: Index, takes: IntArray) -> tuple[PromptQuery, ...]:
    queries = []
    for row in np.flatnonzero(batch.needs_slow_path[slots]).tolist():
        slot = int(slots[row])
        sequence = batch.sequences[slot]
        if sequence is None or sequence.request.params.prompt_logprobs is None:
            continue
        request, start = sequence.request, int(batch.num_computed[slot])
        targets = request.prompt_token_ids[start + 1 : start + int(takes[row]) + 1]
        if targets and len(request.prompt_logprobs) < request.num_prompt:
            queries.append(PromptQuery(row, targets, sequence.request.params.prompt_logprobs))
    return tuple(queries)


def _adjustments(batch: Batch, owners: Index) -> tuple[LogitAdjustments | None, ...]:
    early = batch.num_with_pending[owners] + 1 < batch.stop_from[owners]
    asked = batch.adjusts_logits[owners] | early
    if not asked.any():
        return ()
    found: list[LogitAdjustments | None] = []
    for slot, wanted, is_early in zip(owners.tolist(), asked.tolist(), early.tolist(), strict=True):
        sequence = batch.sequences[slot]
        found.append(_adjustments_of(sequence, is_early) if wanted and sequence is not None else None)
    return tuple(found)


def _adjustments_of(sequence: Sequence, early: bool) -> LogitAdjustments:
    """What is done to the logits of a sequence's next draw. early: it may not stop yet. The tokens it has drawn are all known where they
    matter: it waits for them then (Batch.reads_answer).
    """
    request, params = sequence.request, sequence.request.params
    penalized = params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
    banned = set(request.stop_ids) if early else set()
    for word in request.bad_words:
        start = len(sequence.token_ids) - (len(word) - 1)
        if start >= request.num_prompt and tuple(sequence.token_ids[start:]) == word[:-1]:
            banned.add(word[-1])
    return LogitAdjustments(
        allowed=params.allowed_token_ids,
        banned=tuple(sorted(banned)),
        bias=tuple(params.logit_bias),  # type: ignore[arg-type]  # pairs, once they are checked
        seen=tuple(dict.fromkeys(sequence.token_ids)) if params.repetition_penalty != 1.0 else (),
        repetition=min(max(params.repetition_penalty, 1 / MOST), MOST),
        drawn=tuple(Counter(sequence.output_token_ids).items()) if penalized else (),
        presence=params.presence_penalty,
        frequency=params.frequency_penalty,
        mask=request.mask_of(sequence) if request.mask_of is not None else None,
    )


# ---- random numbers


def uniform(
    seed: npt.NDArray[np.int64], index: npt.NDArray[np.int64], position: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """One number in [0, 1) for each (seed, sample index, position), and nothing else: a rerun is equal whatever the schedule was.

    All arrays [draws].
    """
    with np.errstate(over="ignore"):
        x = _mix(seed.astype(np.uint64) + _GOLDEN)
        x = _mix(x + _GOLDEN * (index.astype(np.uint64) + np.uint64(1)))
        x = _mix(x + _GOLDEN * (position.astype(np.uint64) + np.uint64(1)))
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele, Lea and Flood, 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
