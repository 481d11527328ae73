"""What differs when a request has several sequences: one share of the budget, samples that part, beams that fork and end.

The sequences of one request draw in lockstep: while some of them still catch up (after a recompute), each holds back its last token until
all of them can draw in one step.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from minipaged.scheduling.batch import Batch
from minipaged.scheduling.plan import PromptLogprobs, StepPlan, StepTokens
from minipaged.scheduling.request import Logprob, Request, Sequence, TokenLogprobs

if TYPE_CHECKING:
    from minipaged.scheduling.scheduler import Scheduler

Counts = npt.NDArray[np.int64]


def lockstep(need: npt.NDArray[np.int32] | Counts, budget: int) -> Counts:
    """Tokens for each sequence of one request out of `budget`: all that they need, or as much as leaves none ahead of the others."""
    want = need.astype(np.int64)
    if len(want) > 1 and int(want.sum()) > budget:
        want = np.maximum(want - 1, 0)
    before = np.cumsum(want) - want
    take: Counts = np.clip(budget - before, 0, want)
    return take


def share_budget(
    batch: Batch, running: list[Request], budget: int, slots: Counts, need: npt.NDArray[np.int32]
) -> Counts:
    """Tokens for each running slot, request by request in serving order."""
    take = np.zeros(len(slots), np.int64)
    at = 0
    for request in running:
        width = sum(s.slot >= 0 for s in request.sequences)
        if budget > 0:
            take[at : at + width] = lockstep(need[at : at + width], budget)
            budget -= int(take[at : at + width].sum())
        at += width
    return take


def commit_draws(
    scheduler: Scheduler, draws: list[Sequence | None], ids: npt.NDArray[np.int32], tokens: StepTokens
) -> list[Request]:
    """Take in a step's draws where some of them need a closer look. Returns the requests that changed, each once.

    draws: whose each one is; None where the sequence has ended meanwhile, and its extra token is dropped.
    """
    alive = [(i, sequence) for i, sequence in enumerate(draws) if sequence is not None]
    seen: list[Request] = []
    for request, members in groupby(alive, key=lambda draw: draw[1].request):
        lines = list(members)
        start = lines[0][0]
        seen.append(request)
        if request.beams is not None:
            _commit_beams(scheduler, request, [beam for _, beam in lines], start, tokens)
        elif not request.forked and request.params.num_sequences > 1:
            _part(scheduler, request, lines[0][1], start, ids, tokens)
        else:
            for i, line in lines:
                append(scheduler, line, int(ids[i]), _logprobs_at(line, i, int(ids[i]), tokens))
    return seen


def append(scheduler: Scheduler, sequence: Sequence, token: int, logprobs: TokenLogprobs | None) -> None:
    """One more token for a sequence that has not ended, wherever it is."""
    scheduler.counters.generated_tokens += 1
    _extend(scheduler, sequence, token, logprobs)
    params = sequence.request.params
    if token in sequence.request.stop_ids and sequence.num_output > params.min_tokens:
        scheduler.end(sequence, "stop")
    elif sequence.num_output >= params.max_tokens:
        scheduler.end(sequence, "length")


def _extend(scheduler: Scheduler, sequence: Sequence, token: int, logprobs: TokenLogprobs | None) -> None:
    batch, slot = scheduler.batch, sequence.slot
    sequence.token_ids.append(token)
    if logprobs is not None:
        sequence.cumulative_logprob += logprobs[token].logprob
        if sequence.request.params.logprobs is not None:
            sequence.logprobs.append(logprobs)
    if slot < 0:
        return
    batch.known[slot] += 1
    batch.busy[slot] = False
    if batch.known[slot] == batch.total[slot]:
        batch.last[slot] = token


def _logprobs_at(sequence: Sequence, i: int, token: int, tokens: StepTokens) -> TokenLogprobs | None:
    """The log-probabilities that draw i brought, if its request tracks them."""
    params = sequence.request.params
    if tokens.logprobs is None or tokens.ranks is None or (params.logprobs is None and params.best_of is None):
        return None
    found = {token: Logprob(float(tokens.logprobs[i]), int(tokens.ranks[i]))}
    if params.logprobs and tokens.top_ids is not None and tokens.top_logprobs is not None:
        for rank in range(params.logprobs):
            found.setdefault(int(tokens.top_ids[i, rank]), Logprob(float(tokens.top_logprobs[i, rank]), rank + 1))
    return found


def _part(
    scheduler: Scheduler,
    request: Request,
    parent: Sequence,
    start: int,
    ids: npt.NDArray[np.int32],
    tokens: StepTokens,
) -> None:
    """The prompt is computed and n first tokens are drawn: n - 1 children share the prompt's blocks with the parent."""
    request.forked = True
    slots, request.slots = request.slots, []
    lines = [parent] + [scheduler.fork(parent, slot, index) for index, slot in enumerate(slots, 1)]
    scheduler.batch.draw_pending(np.array(slots, np.int64))
    for i, line in enumerate(lines, start):
        append(scheduler, line, int(ids[i]), _logprobs_at(line, i, int(ids[i]), tokens))


def _commit_beams(
    scheduler: Scheduler, request: Request, beams: list[Sequence], start: int, tokens: StepTokens
) -> None:
    """One step of a beam search: winners fork, then losers go, ended hypotheses keep their tokens and need no blocks."""
    search = request.beams
    if search is None or tokens.top_ids is None or tokens.top_logprobs is None:
        raise ValueError("a beam search needs the best tokens and their log-probabilities")
    scheduler.counters.generated_tokens += len(beams)
    rows = slice(start, start + len(beams))
    top_ids, top_logprobs = tokens.top_ids[rows], tokens.top_logprobs[rows]
    decided = search.advance(
        [b.cumulative_logprob for b in beams],
        top_ids[:, : search.num_candidates],
        top_logprobs[:, : search.num_candidates],
        beams[0].num_output,
    )

    def logprobs(parent: int, token: int) -> TokenLogprobs:
        rank = int(np.flatnonzero(top_ids[parent] == token)[0])
        found = {token: Logprob(float(top_logprobs[parent, rank]), rank + 1)}
        for other in range(request.params.logprobs or 0):
            found.setdefault(int(top_ids[parent, other]), Logprob(float(top_logprobs[parent, other]), other + 1))
        return found

    for _, candidate in decided.ended:
        parent = beams[candidate.parent]
        ended = scheduler.new_sequence(request, [*parent.token_ids, candidate.token], parent=parent.seq_id)
        ended.cumulative_logprob = candidate.score
        if request.params.logprobs is not None:
            ended.logprobs = [*parent.logprobs, logprobs(candidate.parent, candidate.token)]
        request.hypotheses.append(ended)
        request.sequences.append(ended)
        scheduler.end(ended, "stop" if candidate.token in search.stop_ids else "length")
    for number in decided.dropped:
        request.hypotheses[number].finish_reason = "pruned"
        request.sequences.remove(request.hypotheses[number])
    if decided.done:
        for beam in beams:
            scheduler.end(beam, "pruned")
            request.sequences.remove(beam)
        return
    request.forked = True
    kept = {candidate.parent for candidate in decided.survivors}
    losers = [beam for i, beam in enumerate(beams) if i not in kept]
    for loser in losers:
        scheduler.unseat(loser)
        request.slots.extend(scheduler.batch.reserve(1))
    continued: set[int] = set()
    lines: list[tuple[Sequence, int, TokenLogprobs, float]] = []
    for candidate in decided.survivors:
        line = beams[candidate.parent]
        if candidate.parent in continued:
            line = scheduler.fork(line, request.slots.pop(0), line.index)
            scheduler.batch.draw_pending(np.array([line.slot], np.int64))
        continued.add(candidate.parent)
        lines.append((line, candidate.token, logprobs(candidate.parent, candidate.token), candidate.score))
    for line, token, found, score in lines:
        _extend(scheduler, line, token, found)
        line.cumulative_logprob = score
    for loser in losers:
        scheduler.end(loser, "pruned")
        request.sequences.remove(loser)


def note_prompt_logprobs(scheduler: Scheduler, plan: StepPlan, found: dict[int, PromptLogprobs]) -> None:
    """Take in the log-probabilities of the prompt positions that a step computed."""
    batch = scheduler.batch
    for row, values in found.items():
        sequence = batch.sequences[int(plan.slots[row])]
        if sequence is None or sequence.seq_id != plan.seq_ids[row]:
            continue
        request = sequence.request
        noted, prompt = request.prompt_logprobs, request.prompt_token_ids
        for i in range(len(values.chosen)):
            position = values.start + i + 1  # the prompt token that these values are about
            if position != len(noted) or position >= len(prompt):
                continue
            entry = {prompt[position]: Logprob(float(values.chosen[i]), int(values.ranks[i]))}
            for rank in range(request.params.prompt_logprobs or 0):
                entry.setdefault(int(values.top_ids[i, rank]), Logprob(float(values.top_values[i, rank]), rank + 1))
            noted.append(entry)
