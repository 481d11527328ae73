"""Commit: what a launched step drew becomes tokens, forks and ends.

Most steps draw one token for each of many sequences that ask for nothing else: those are a handful of array operations. Where a sequence
has ended meanwhile, or its request wants log-probabilities, stop strings or beams, or its samples are still to be forked, the step's draws
are taken one by one. `_why_ended` says whether an answer ends: by a stop token, a stop string (of which text/detokenizer.py knows) or its
length; RunningSet.end then gives its blocks back.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Protocol

import numpy as np

from minipaged.errors import InputError
from minipaged.scheduling.plan import IntArray, PromptLogprobs, StepPlan, StepTokens
from minipaged.scheduling.request import Request, RequestOutput, Sequence
from minipaged.scheduling.sequence_groups import Branch, Decision, decide, prompt_entries

if TYPE_CHECKING:
    from minipaged.scheduling.running_set import RunningSet, Slots


class TextStops(Protocol):
    """Whoever reads the text of sequences and knows where a stop string ends it: in the engine, minipaged/text/detokenizer.py Detokenizer,
    whose TextStream._find_stop also cuts the text there.
    """

    def stopped(self, sequence: Sequence) -> bool:
        """Whether a stop string of its request stands in the sequence's text."""
        ...


def drawn_ids(plan: StepPlan, tokens: StepTokens) -> IntArray:
    """The drawn token ids, [draws]. InputError unless there is a whole number for each draw of the plan."""
    if not isinstance(tokens, StepTokens):
        raise InputError(f"what a step drew must be StepTokens, not {tokens!r}")
    ids = np.asarray(tokens.token_ids)
    if ids.shape != plan.draw_rows.shape or (ids.size and ids.dtype.kind not in "iu"):
        raise InputError(
            f"the step drew {len(plan.draw_rows)} tokens: token_ids must be as many whole numbers, not {ids!r}"
        )
    return ids.astype(np.int32, copy=False)


def commit_draws(
    running_set: RunningSet, plan: StepPlan, ids: IntArray, tokens: StepTokens, text_stops: TextStops | None
) -> list[RequestOutput]:
    """Append what the step drew and end what is complete. Returns the outputs of the requests that changed, each once."""
    batch = running_set.batch
    slots, drawers = plan.draw_slots.astype(np.int64), plan.seq_ids[plan.draw_rows]
    if not np.count_nonzero((batch.seq_id[slots] != drawers) | batch.needs_slow_path[slots] | (ids < 0)):
        outputs: list[RequestOutput] = batch.outputs[slots].tolist()
        if running_set.num_groups:  # asked before the last group's samples may end
            outputs = list(dict.fromkeys(outputs))
        _append_to_all(running_set, slots, ids)
        return outputs
    # A sequence that has ended meanwhile is not found any more: its extra token is dropped.
    found = [(draw, running_set.sequences.get(seq_id)) for draw, seq_id in enumerate(drawers.tolist())]
    alive = [(draw, sequence) for draw, sequence in found if sequence is not None]
    changed: list[Request] = []
    for request, drawn in groupby(alive, key=lambda draw: draw[1].request):
        draws = list(drawn)
        changed.append(request)
        if any(ids[draw] < 0 for draw, _ in draws):
            _fail(running_set, request)
            continue
        running_set.counters.generated_tokens += len(draws)
        _carry_out(running_set, request, decide(request, draws, tokens), text_stops)
        if request.forked and not request.to_fork:
            batch.settle(request)
    return [request.output for request in changed]


def _fail(running_set: RunningSet, request: Request) -> None:
    """Nothing could be drawn for a request: it ends and says why, as others do not."""
    for sequence in request.alive:
        running_set.end(sequence, "error")
    request.error = "no token can be drawn: the logits are not numbers (NaN), or every token is forbidden"


def _append_to_all(running_set: RunningSet, slots: Slots, ids: IntArray) -> None:
    """One token for each of the sequences in these slots, none of which asks for more than the token."""
    batch = running_set.batch
    for token_ids, token in zip(batch.token_ids[slots].tolist(), ids.tolist(), strict=True):
        token_ids.append(token)
    running_set.counters.generated_tokens += len(ids)
    num_tokens = batch.num_tokens[slots] + 1
    batch.num_tokens[slots] = num_tokens
    batch.awaiting_result[slots] = False
    newest = num_tokens == batch.num_with_pending[slots]
    batch.last_token[slots[newest]] = ids[newest]
    at_limit = num_tokens >= batch.max_length[slots]
    stopped = (ids == batch.stop_token[slots]) & (num_tokens >= batch.stop_from[slots])
    ended = (at_limit | stopped).nonzero()[0]
    for slot, by_token in zip(slots[ended].tolist(), stopped[ended].tolist(), strict=True):
        sequence = batch.sequences[slot]
        if sequence is not None:
            running_set.end(sequence, "stop" if by_token else "length")


def _carry_out(running_set: RunningSet, request: Request, decision: Decision, text_stops: TextStops | None) -> None:
    """Do to one request's sequences what its draws decided."""
    # 1) Hypotheses of a beam search that end keep their tokens and need no blocks.
    for branch, score, reason in decision.ended:
        _end_hypothesis(running_set, request, branch, score, reason)
    for number in decision.dropped:
        request.hypotheses[number].finish_reason = "pruned"
        request.sequences.remove(request.hypotheses[number])
    # 2) Winners are forked before losers are freed: what both hold stays. A fork takes over a loser's slot.
    for loser in decision.losers:
        running_set.hand_over_slot(loser)
    lines: list[Sequence] = []
    for number, branch in enumerate(decision.branches):
        line = branch.parent
        if line in lines:
            request.forked = True
            line = running_set.fork(line, number if request.beams is None else line.index)
            running_set.batch.draw_pending(np.array([line.slot], np.int64))
        lines.append(line)
    request.forked |= request.beams is not None
    # 3) Each line has one more token.
    for line, branch in zip(lines, decision.branches, strict=True):
        _append(running_set, line, branch)
    for line, score in zip(lines, decision.scores, strict=False):
        line.cumulative_logprob = score
    for loser in decision.losers:
        running_set.end(loser, "pruned")
        request.sequences.remove(loser)
    # 4) Those that are complete end. (A beam search has said itself what ends.)
    if request.beams is None:
        for line in lines:
            reason = _why_ended(line, text_stops)
            if reason:
                running_set.end(line, reason)


def _end_hypothesis(running_set: RunningSet, request: Request, branch: Branch, score: float, reason: str) -> None:
    parent = branch.parent
    ended = running_set.new_sequence(request, [*parent.token_ids, branch.token], parent=parent.seq_id)
    ended.cumulative_logprob = score
    if request.params.logprobs is not None and branch.logprobs is not None:
        ended.logprobs = [*parent.logprobs, branch.logprobs]
    request.hypotheses.append(ended)
    request.sequences.append(ended)
    running_set.end(ended, reason)


def _append(running_set: RunningSet, sequence: Sequence, branch: Branch) -> None:
    """One more token for a sequence that has not ended, wherever it is."""
    batch, slot = running_set.batch, sequence.slot
    sequence.token_ids.append(branch.token)
    if branch.logprobs is not None:
        sequence.cumulative_logprob += branch.logprobs[branch.token].logprob
        if sequence.request.params.logprobs is not None:
            sequence.logprobs.append(branch.logprobs)
    if slot >= 0:
        batch.num_tokens[slot] += 1
        batch.awaiting_result[slot] = False
        if batch.num_tokens[slot] == batch.num_with_pending[slot]:
            batch.last_token[slot] = branch.token


def _why_ended(sequence: Sequence, text_stops: TextStops | None) -> str:
    """The reason why a sequence is complete with its newest token; "" while it goes on."""
    request, params = sequence.request, sequence.request.params
    if sequence.token_ids[-1] in request.stop_ids and sequence.num_output > params.min_tokens:
        return "stop"
    if params.stop and text_stops is not None and text_stops.stopped(sequence):
        return "stop"
    return "length" if sequence.num_output >= params.max_tokens else ""


def note_prompt_logprobs(running_set: RunningSet, plan: StepPlan, found: dict[int, PromptLogprobs]) -> None:
    """Take in the log-probabilities of the prompt positions that a step computed, also for one that was sent away meanwhile."""
    for row, values in found.items():
        sequence = running_set.sequences.get(int(plan.seq_ids[row]))
        if sequence is not None:
            request = sequence.request
            request.prompt_logprobs.extend(prompt_entries(request, values))
