"""Beam search as decisions only: which candidates go on, which have ended, and when to stop. No memory, no tensors.

The rules are those of transformers (its _beam_search): of the best (1 + stop tokens, at least 2) * width continuations, the ended
ones among the first `width` compete for the finished list, and the best `width` that have not ended go on.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

WORST = np.float32(-1.0e9)


class Candidate(NamedTuple):
    """A beam's possible next token."""

    parent: int  # index of the beam it continues
    token: int
    score: float  # cumulative log-probability, this token included


class BeamStep(NamedTuple):
    """What one step decided."""

    survivors: tuple[Candidate, ...]  # at most width, best first
    ended: tuple[tuple[float, Candidate], ...]  # (length-normalized score, candidate) that enter the finished list
    dropped: tuple[int, ...]  # finished hypotheses, by the number that `ended` gave them, pushed out of the list
    done: bool


class BeamSearch:
    """The state of one request's beam search.

    width: beams; max_tokens: most tokens drawn; stop_ids: tokens that end a beam; length_penalty: exponent of the length in the score;
    early_stopping: stop as soon as `width` hypotheses have ended.
    """

    def __init__(
        self, width: int, max_tokens: int, stop_ids: frozenset[int], length_penalty: float, early_stopping: bool
    ) -> None:
        self.width = width
        self.max_tokens = max_tokens
        self.stop_ids = stop_ids
        self.length_penalty = length_penalty
        self.early_stopping = early_stopping
        self._finished: list[tuple[float, int]] = []  # (score, number), best first, at most width
        self._count = 0
        self._improvable = True

    @property
    def num_candidates(self) -> int:
        """Continuations wanted of each beam: enough that the best of all beams are among them."""
        return max(2, 1 + len(self.stop_ids)) * self.width

    def advance(
        self,
        scores: list[float],
        top_ids: npt.NDArray[np.int32],
        top_logprobs: npt.NDArray[np.float32],
        num_output: int,
    ) -> BeamStep:
        """Decide one step.

        scores: cumulative log-probability of each beam; top_ids, top_logprobs: [beams, num_candidates or more]; num_output: tokens drawn
        so far, this step not counted. The k-th candidate that ever ended is number k, counted from 0.
        """
        totals = np.asarray(scores, np.float32)[:, None] + top_logprobs.astype(np.float32)
        order = np.argsort(-totals, axis=None, kind="stable")[: self.num_candidates]
        beams, columns = np.unravel_index(order, totals.shape)
        candidates = [
            Candidate(int(b), int(top_ids[b, c]), float(totals[b, c])) for b, c in zip(beams, columns, strict=True)
        ]
        length = num_output + 1
        at_limit = length >= self.max_tokens
        ends = [at_limit or c.token in self.stop_ids for c in candidates]
        survivors = [c for c, end in zip(candidates, ends, strict=True) if not end][: self.width]
        ended: list[tuple[float, Candidate]] = []
        full = self.early_stopping and len(self._finished) >= self.width
        if self._improvable and not full:
            for candidate, end in zip(candidates[: self.width], ends, strict=False):
                if end:
                    score = float(np.float32(candidate.score) / np.float32(length**self.length_penalty))
                    ended.append((score, candidate))
        dropped = self._merge(ended)
        done = self._is_done(survivors, length) or at_limit
        return BeamStep(tuple(survivors), tuple(ended), dropped, done)

    def _merge(self, ended: list[tuple[float, Candidate]]) -> tuple[int, ...]:
        """Enter the ended candidates and keep the best `width`."""
        for score, _ in ended:
            self._finished.append((score, self._count))
            self._count += 1
        self._finished.sort(key=lambda entry: (-entry[0], entry[1]))
        dropped = tuple(number for _, number in self._finished[self.width :])
        del self._finished[self.width :]
        return dropped

    def _is_done(self, survivors: list[Candidate], length: int) -> bool:
        if not survivors:
            return True
        full = len(self._finished) >= self.width
        worst = np.float32(self._finished[-1][0]) if full else WORST
        best_possible = np.float32(survivors[0].score) / np.float32(length**self.length_penalty)
        self._improvable = self._improvable and bool(best_possible > worst)
        return not self._improvable or (self.early_stopping and full)
