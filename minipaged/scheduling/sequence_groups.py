"""How a request with several sequences goes on: its share of the budget, and what the tokens it drew decide.

Nothing is changed here. `decide` says which sequences go on with which tokens, which are forked and which end; commit.py carries it out.

The sequences of one request draw in lockstep: while some of them still catch up (after a recompute), each holds back its last token until
all of them can draw in one step.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from minipaged.scheduling.beam import BeamSearch, Candidate
from minipaged.scheduling.plan import IntArray, PromptLogprobs, StepTokens
from minipaged.scheduling.request import Request, Sequence, TokenLogprobs

# ---- the budget


def lockstep(need: IntArray, budget: int) -> IntArray:
    """Tokens for each sequence of one request out of `budget`: all that they need, or as much as leaves none ahead of the others."""
    want = np.maximum(need - 1, 0) if len(need) > 1 and int(need.sum()) > budget else need
    return in_turn(want, budget)


def in_turn(want: IntArray, budget: int) -> IntArray:
    """As much of `want` as the budget has, first come first served."""
    before = np.cumsum(want) - want
    take: IntArray = np.clip(budget - before, 0, want).astype(np.int32)
    return take


def share_of(request: Request, budget: int, need: IntArray) -> IntArray:
    """Tokens for each sequence of the request that is in the batch, out of `budget`."""
    to_fork = request.to_fork
    if not to_fork:
        return lockstep(need, budget)
    # Each goes on to where the next one is forked from it; nobody draws before all are there.
    present = [s for s in request.sequences if s.slot >= 0]
    want = need.copy()
    for i, sequence in enumerate(present):
        forks = [s.forks_at for s in to_fork if s.forks_from is sequence]
        stop = min([*forks, len(sequence.token_ids) - 1])
        want[i] = min(want[i], stop - sequence.num_computed)
    return in_turn(want, budget)


def share_budget(running: list[Request], budget: int, need: IntArray) -> IntArray:
    """Tokens for each running slot, request by request in serving order."""
    take = np.zeros(len(need), np.int32)
    at = 0
    for request in running:
        width = sum(s.slot >= 0 for s in request.sequences)
        if budget > 0:
            take[at : at + width] = share_of(request, budget, need[at : at + width])
            budget -= int(take[at : at + width].sum())
        at += width
    return take


def of_later_steps(running: list[Request], ready: npt.NDArray[np.bool_], steps: int) -> npt.NDArray[np.bool_]:
    """Which running slots to leave to the steps that follow, where `steps` of them share the sequences: the first requests that are ready,
    up to an even share of all sequences, go now. ready: [slots], in serving order.
    """
    share = -(-len(ready) // steps)
    later = np.zeros(len(ready), bool)
    at = taken = 0
    for request in running:
        width = sum(s.slot >= 0 for s in request.sequences)
        later[at : at + width] = taken >= share  # a request's sequences go together
        taken += int(np.count_nonzero(ready[at : at + width]))
        at += width
    return later


# ---- after a recompute


def plan_forks(request: Request) -> None:
    """Let a request that was sent away come back as one sequence: say of each other one from which it is forked again, and where.

    That is the earlier one that it agrees with longest. Each computes its own last token at least, since it draws what follows.
    """
    alive, start = request.alive, request.num_prompt
    for i, sequence in enumerate(alive):
        agrees = [_agreement(other, sequence, start) for other in alive[:i]]
        sequence.forks_from = alive[agrees.index(max(agrees))] if agrees else None
        sequence.forks_at = max(agrees, default=0)


def _agreement(one: Sequence, other: Sequence, start: int) -> int:
    """How many leading tokens are the same and not the last of either; the first `start` are known to be."""
    most = min(len(one.token_ids), len(other.token_ids)) - 1
    return next((i for i in range(start, most) if one.token_ids[i] != other.token_ids[i]), most)


# ---- what was drawn


class Branch(NamedTuple):
    """A sequence and the token that follows it. logprobs: None where none are kept."""

    parent: Sequence
    token: int
    logprobs: TokenLogprobs | None


class Decision(NamedTuple):
    """What the draws of one request mean. Carried out in this order."""

    ended: tuple[tuple[Branch, float, str], ...] = ()  # hypotheses of a beam search that end: (branch, score, reason)
    dropped: tuple[int, ...] = ()  # hypotheses that better ones push out, by their number
    losers: tuple[Sequence, ...] = ()  # beams that no branch continues
    branches: tuple[Branch, ...] = ()  # the first of a parent continues it, each further one is forked from it
    scores: tuple[float, ...] = ()  # of a beam search: each branch's cumulative log-probability


def decide(request: Request, draws: list[tuple[int, Sequence]], tokens: StepTokens) -> Decision:
    """What becomes of a request whose sequences drew tokens. draws: (number of the draw, the sequence that it continues).

    Where n samples begin, the prompt's one row has drawn n tokens: the same sequence stands in n draws.
    """
    if request.beams is not None:
        return _decide_beams(request, request.beams, draws, tokens)
    return Decision(branches=tuple(Branch(s, int(tokens.token_ids[d]), _logprobs_of(s, d, tokens)) for d, s in draws))


def _logprobs_of(sequence: Sequence, draw: int, tokens: StepTokens) -> TokenLogprobs | None:
    """The log-probabilities that a draw brought, if its request keeps them."""
    params = sequence.request.params
    if tokens.logprobs is None or tokens.ranks is None or (params.logprobs is None and params.best_of is None):
        return None
    drawn, logprob = int(tokens.token_ids[draw]), sequence.request.logprob
    found = {drawn: logprob(drawn, tokens.logprobs[draw], tokens.ranks[draw])}
    if params.logprobs and tokens.top_ids is not None and tokens.top_logprobs is not None:
        for rank in range(params.logprobs):
            top = int(tokens.top_ids[draw, rank])
            if top not in found:
                found[top] = logprob(top, tokens.top_logprobs[draw, rank], rank + 1)
    return found


def _decide_beams(
    request: Request, search: BeamSearch, draws: list[tuple[int, Sequence]], tokens: StepTokens
) -> Decision:
    """One step of a beam search: winners go on or are forked, losers end, ended hypotheses keep their tokens and need no blocks."""
    if tokens.top_ids is None or tokens.top_logprobs is None:
        raise ValueError("a beam search needs the best tokens and their log-probabilities")
    beams = [beam for _, beam in draws]
    rows = [draw for draw, _ in draws]
    top_ids, top_logprobs = tokens.top_ids[rows], tokens.top_logprobs[rows]
    step = search.advance(
        [beam.cumulative_logprob for beam in beams],
        top_ids[:, : search.num_candidates],
        top_logprobs[:, : search.num_candidates],
        beams[0].num_output,
    )

    def branch(candidate: Candidate) -> Branch:
        ids, values = top_ids[candidate.parent], top_logprobs[candidate.parent]
        rank = int(np.flatnonzero(ids == candidate.token)[0])
        found = {candidate.token: request.logprob(candidate.token, values[rank], rank + 1)}
        for other in range(request.params.logprobs or 0):
            found.setdefault(int(ids[other]), request.logprob(int(ids[other]), values[other], other + 1))
        return Branch(beams[candidate.parent], candidate.token, found)

    def reason(candidate: Candidate) -> str:
        return "stop" if candidate.token in search.stop_ids else "length"

    ended = tuple((branch(candidate), candidate.score, reason(candidate)) for _, candidate in step.ended)
    survivors = () if step.done else step.survivors
    kept = {candidate.parent for candidate in survivors}
    return Decision(
        ended=ended,
        dropped=step.dropped,
        losers=tuple(beam for i, beam in enumerate(beams) if i not in kept),
        branches=tuple(map(branch, survivors)),
        scores=tuple(candidate.score for candidate in survivors),
    )


def prompt_entries(request: Request, found: PromptLogprobs) -> list[TokenLogprobs]:
    """The log-probabilities of prompt positions that a step computed, of those that are not noted yet."""
    prompt, entries = request.prompt_token_ids, []
    first = len(request.prompt_logprobs)
    for position in range(first, min(len(prompt), found.start + len(found.chosen) + 1)):
        i = position - found.start - 1  # entry i is about the token after position start + i
        entry = {prompt[position]: request.logprob(prompt[position], found.chosen[i], int(found.ranks[i]))}
        for rank in range(request.params.prompt_logprobs or 0):
            top = int(found.top_ids[i, rank])
            entry.setdefault(top, request.logprob(top, found.top_values[i, rank], rank + 1))
        entries.append(entry)
    return entries
