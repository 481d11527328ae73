"""Which running sequences are in plain decoding, and how much of each was told.

By slot, so that a step of them is a handful of array operations.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from minipaged.scheduling.plan import StepPlan
from minipaged.scheduling.request import Request, Sequence
from minipaged.scheduling.scheduler import Scheduler
from minipaged.text.detokenizer import TextCodec
from minipaged.text.growing import TextStream
from minipaged.trace.rows import PlainColumns

Told = tuple[int, int]  # tokens, characters of text


class PlainDecodes:
    """The sequences that only grow: seated, no more samples of their request to be born, no scores, no stop strings, all they have drawn
    is text.

    A sequence is learned when it was told in full, and forgotten before anything else than growth is told of it. Events name every
    other change (its end, a preemption), so whoever forgets what the events name can trust the rest.
    """

    def __init__(self, scheduler: Scheduler, codec: TextCodec | None) -> None:
        self._scheduler = scheduler
        self._reads = codec is not None
        self._pieces = _Pieces(codec)
        n = len(scheduler.batch.seq_id)
        self._seq_id = np.full(n, -1, np.int64)
        self._request, self._parent, self._cached, self._prompt = (np.zeros(n, np.int64) for _ in range(4))
        self._tokens, self._characters = np.zeros(n, np.int64), np.zeros(n, np.int64)  # told
        self._slots: dict[int, int] = {}  # of the sequences known here
        self._known: dict[Request, int] = {}  # how many of a request's are known
        self.requests: set[Request] = set()  # those of which all that live are known

    def clear(self) -> None:
        """Forget them all."""
        self._seq_id[:] = -1
        self._slots.clear()
        self._known.clear()
        self.requests.clear()

    def forget(self, sequence: Sequence) -> Told | None:
        """What was told of it, if it is known here; it is not any more."""
        slot = self._slots.pop(sequence.seq_id, None)
        if slot is None:
            return None
        request = sequence.request
        self.requests.discard(request)
        self._known[request] -= 1
        if not self._known[request]:
            del self._known[request]
        self._seq_id[slot] = -1
        return int(self._tokens[slot]), int(self._characters[slot])

    def learn(self, sequence: Sequence, told: Told) -> bool:
        """Know it from now on, if all that it can do is grow. It must have just been told, up to `told`."""
        slot, request, state = sequence.slot, sequence.request, sequence.text_state
        if (
            slot < 0
            or not _grows_plainly(request)
            or (state is not None if not self._reads else not isinstance(state, TextStream) or not state.whole)
        ):
            return False
        self._seq_id[slot] = sequence.seq_id
        self._request[slot], self._parent[slot] = request.request_id, sequence.parent
        self._cached[slot], self._prompt[slot] = sequence.num_cached, request.num_prompt
        self._tokens[slot], self._characters[slot] = told
        self._slots[sequence.seq_id] = slot
        known = self._known[request] = self._known.get(request, 0) + 1
        if known == (1 if request.params.num_sequences == 1 else len(request.alive)):
            self.requests.add(request)
        return True

    def is_known(self, slots: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
        """Whether the sequence seated in each slot is known here."""
        seated = self._scheduler.batch.seq_id[slots]
        known: npt.NDArray[np.bool_] = (seated >= 0) & (seated == self._seq_id[slots])
        return known

    def take(self, plan: StepPlan | None) -> tuple[PlainColumns, list[Sequence]]:
        """What the plan computes or the last commit made grow, as told from now on; and those that must be told one by one."""
        batch = self._scheduler.batch
        moved = batch.num_tokens > self._tokens
        if plan is not None:
            moved[plan.slots] = True
        slots = np.flatnonzero(moved & (self._seq_id >= 0) & (self._seq_id == batch.seq_id))
        new = batch.num_tokens[slots] - self._tokens[slots]
        odd = new > 1  # several commits in one step, as a pause makes
        grown = np.flatnonzero(new == 1)
        sequences = batch.sequences
        tokens: list[int] = [sequences[slot].token_ids[-1] for slot in slots[grown].tolist()]
        pieces = list(map(self._pieces.__getitem__, tokens))
        if None in pieces:  # a part of a character: the text stream must hold it back
            odd[grown[[piece is None for piece in pieces]]] = True
            tokens = [token for token, piece in zip(tokens, pieces, strict=True) if piece is not None]
        found = [piece for piece in pieces if piece is not None]
        others: list[Sequence] = []
        if odd.any():
            others = [s for s in (sequences[slot] for slot in slots[odd].tolist()) if s is not None]
            slots, new = slots[~odd], new[~odd]
        at = slots[new == 1]
        self._tokens[at] += 1
        self._characters[at] += np.fromiter((length for _, length in found), np.int64, len(found))
        columns = PlainColumns(
            self._seq_id[slots],
            self._request[slots],
            self._parent[slots],
            batch.num_computed[slots].astype(np.int64),
            self._cached[slots],
            self._prompt[slots],
            new.astype(np.int64),
            tokens,
            [text for text, _ in found],
        )
        return columns, others


def _grows_plainly(request: Request) -> bool:
    """Whether its sequences change by a token at a time and nothing else, from now on to their ends."""
    params = request.params
    if params.stop or params.logprobs is not None or params.best_of is not None or params.beam_width is not None:
        return False
    return request.forked or params.num_sequences == 1


class _Pieces(dict[int, tuple[bytes, int] | None]):
    """Token -> its bytes and how many characters they are; None where they are not whole characters. Filled as tokens are met."""

    def __init__(self, codec: TextCodec | None) -> None:
        super().__init__()
        self._codec = codec

    def __missing__(self, token: int) -> tuple[bytes, int] | None:
        data = self._codec.token_bytes(token) if self._codec is not None else b""
        try:
            piece = (data, len(data) if data.isascii() else len(data.decode()))
        except UnicodeDecodeError:
            piece = None
        self[token] = piece
        return piece
