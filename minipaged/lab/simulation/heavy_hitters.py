"""Which tokens heavy hitters (H2O, Zhang et al., 2023) keep: one KV head's set, token by token, over a dense matrix of attention scores.

It knows no blocks and no slots. An engine's kept sets must be these.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class KeptSets(NamedTuple):
    """What each query of a text sees. T tokens."""

    seen: npt.NDArray[np.bool_]  # [queries, keys]
    kept: npt.NDArray[np.bool_]  # [queries, keys] what is left of it when the query has been computed
    probabilities: npt.NDArray[np.float64]  # [group, queries, keys]
    # [queries] how much more was given to the least of what stays than to the most of what goes; infinite where nothing goes
    margins: npt.NDArray[np.float64]


def kept_sets(scores: npt.ArrayLike, num_prompt: int, heavy: int, recent: int) -> KeptSets:
    """scores: [group, queries, keys], of the query heads that share a KV head, scaled; keys behind their query are not read.

    The first num_prompt queries see all before them. When the last of these is computed, and each one after it, heavy + recent - 1
    tokens stay: the last recent - 1 and, of the others, those that all queries so far have given the most attention; at equal sums the
    oldest goes.
    """
    logits = np.asarray(scores, np.float64)
    group, size, _ = logits.shape
    most = heavy + recent - 1
    live, given = np.zeros(size, bool), np.zeros(size)
    seen, kept = np.zeros((size, size), bool), np.zeros((size, size), bool)
    probabilities, margins = np.zeros((group, size, size)), np.full(size, np.inf)
    for query in range(size):
        live[query] = True
        seen[query] = live
        weights = np.exp(logits[:, query, live] - logits[:, query, live].max(axis=-1, keepdims=True))
        probabilities[:, query, live] = weights / weights.sum(axis=-1, keepdims=True)
        given += probabilities[:, query].sum(axis=0)
        if query >= num_prompt - 1 and live.sum() > most:
            chosen = np.flatnonzero(live)  # by age
            old = chosen[chosen <= query - (recent - 1)]
            by_score = old[np.argsort(given[old], kind="stable")]
            count = len(chosen) - most
            live[by_score[:count]] = False
            if count < len(by_score):
                margins[query] = given[by_score[count]] - given[by_score[count - 1]]
        kept[query] = live
    return KeptSets(seen, kept, probabilities, margins)
