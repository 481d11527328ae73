"""The running sequences as columns, so that a step of plain decoding is a handful of array operations.

A sequence keeps its slot (its row in these columns, and in a runner's persistent buffers) from admission to its end, preemption or swap.
What num_published, num_computed, num_tokens, num_with_pending and num_reserved mean, and who may touch which tokens between them:
minipaged/README.md, "Who owns which tokens, and when".
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from minipaged.memory.retention import KEEP_ALL, Retention
from minipaged.scheduling.plan import IN_FLIGHT, IntArray
from minipaged.scheduling.request import Request, Sequence

NO_TOKEN = -2  # in `stop`: nothing but the length ends this sequence
COLDEST = 1e-5  # below this temperature a draw is greedy: logits over it would leave what float32 can hold
MOST = 1e30  # what a temperature or a penalty beyond counts as: all tokens are alike long before, and float32 ends soon after


def _is_looked_at(request: Request) -> bool:
    """Whether each token of each sequence is looked at by itself: several stop tokens, stop strings, log-probabilities, beams."""
    params = request.params
    logged = params.logprobs is not None or params.prompt_logprobs is not None or params.best_of is not None
    return len(request.stop_ids) > 1 or bool(params.stop) or logged or params.beam_width is not None


class Batch:
    """Columns of the running sequences, by slot. results_come_late: no draw may follow one whose token the host does not know.

    retention, block_size: which tokens the tables leave out, and how many an entry stands for.
    """

    def __init__(
        self,
        num_slots: int,
        *,
        results_come_late: bool = False,
        retention: Retention = KEEP_ALL,
        block_size: int = 1,
    ) -> None:
        n = num_slots
        self._retention = retention
        self._block_size = block_size
        self.results_come_late = results_come_late
        self.sequences: list[Sequence | None] = [None] * n
        self.token_ids = np.full(n, None, object)  # each sequence's own list
        self.outputs = np.full(n, None, object)  # the RequestOutput that each belongs to
        self.seq_id = np.full(n, -1, np.int64)
        self.num_tokens = np.zeros(n, np.int32)
        self.num_with_pending = np.zeros(n, np.int32)
        self.num_computed = np.zeros(n, np.int32)
        self.num_published = np.zeros(n, np.int32)
        self.num_reserved = np.zeros(n, np.int32)
        self.max_length = np.zeros(n, np.int32)  # the length at which it ends
        self.stop_token = np.full(n, NO_TOKEN, np.int32)  # its only one
        self.stop_from = np.zeros(n, np.int32)  # the length from which stop tokens count (min_tokens)
        # A step in flight decides how its group goes on: it is not scheduled before that is known.
        self.awaiting_result = np.zeros(n, bool)
        # What it draws is looked at one by one: see _is_looked_at; and while samples are still to be forked.
        self.needs_slow_path = np.zeros(n, bool)
        # The one at num_with_pending - 1; IN_FLIGHT if the host does not know it.
        self.last_token = np.zeros(n, np.int32)
        self.temperature = np.zeros(n, np.float32)
        self.top_p = np.ones(n, np.float32)
        self.top_k = np.zeros(n, np.int32)
        self.min_p = np.zeros(n, np.float32)
        self.adjusts_logits = np.zeros(n, bool)  # penalties, biases, forbidden tokens
        self.reads_answer = np.zeros(n, bool)  # its next draw depends on the tokens that were drawn
        self.seed = np.zeros(n, np.int64)
        self.sample_index = np.zeros(n, np.int64)
        self.only_greedy = np.ones(n, bool)  # greedy, with nothing else asked
        # The blocks that each holds, 0 past each end. Released entries are left out, so a row is no longer than what the sequence holds.
        self.tables = np.zeros((n, 16), np.int32)
        self.table_len = np.zeros(n, np.int32)
        # Tokens that have gone: those of released entries, or all but heavy hitters.
        self.num_left_out = np.zeros(n, np.int32)
        self.any_left_out = False  # whether there ever were any
        self._free = list(range(n - 1, -1, -1))

    @property
    def keeps_heaviest(self) -> bool:
        """Whether heavy hitters stay, and other tokens go one by one."""
        return self._retention.heavy > 0

    @property
    def num_free(self) -> int:
        """Slots that nobody holds or has reserved."""
        return len(self._free)

    def take_slots(self, count: int) -> list[int]:
        """Take `count` free slots."""
        return [self._free.pop() for _ in range(count)]

    def return_slots(self, slots: Iterable[int]) -> None:
        """Give back slots that were taken and never filled."""
        self._free.extend(slots)

    def put(self, sequence: Sequence, slot: int, num_reserved: int, seed: int) -> None:
        """Give a sequence a slot that was taken for it; its block table is set apart."""
        request: Request = sequence.request
        params = request.params
        sequence.enter(self, slot)
        self.sequences[slot] = sequence
        self.token_ids[slot], self.outputs[slot] = sequence.token_ids, request.output
        self.seq_id[slot] = sequence.seq_id
        self.num_tokens[slot] = self.num_with_pending[slot] = len(sequence.token_ids)
        self.num_reserved[slot] = num_reserved
        self.max_length[slot] = request.num_prompt + params.max_tokens
        stop_ids = request.stop_ids
        self.stop_token[slot] = next(iter(stop_ids)) if len(stop_ids) == 1 else NO_TOKEN
        self.stop_from[slot] = request.num_prompt + params.min_tokens + 1
        self.needs_slow_path[slot] = params.num_sequences > 1 or _is_looked_at(request)
        self.last_token[slot] = sequence.token_ids[-1]
        self.top_p[slot] = params.top_p
        self.top_k[slot] = min(params.top_k, 2**31 - 1)
        self.min_p[slot] = params.min_p
        penalized = params.repetition_penalty != 1.0 or bool(params.presence_penalty or params.frequency_penalty)
        words = request.bad_words
        limited = params.allowed_token_ids is not None or bool(params.logit_bias or words or request.mask_of)
        self.adjusts_logits[slot] = penalized or limited
        depends = request.mask_of is not None or any(len(word) > 1 for word in words)
        self.reads_answer[slot] = self.results_come_late or penalized or depends
        self.seed[slot] = seed
        self.sample_index[slot] = sequence.index
        self.set_sampling(sequence)
        self.awaiting_result[slot] = False
        self.table_len[slot] = self.num_left_out[slot] = 0
        if self._retention.heavy:
            self._leave_out(slot, int(self._retention.left_out(sequence.num_computed, request.num_prompt)))

    def set_sampling(self, sequence: Sequence) -> None:
        """Take over the temperature of a running sequence's request, which may change while it runs."""
        params, slot = sequence.request.params, sequence.slot
        self.temperature[slot] = min(params.temperature, MOST) if params.temperature >= COLDEST else 0.0
        self.only_greedy[slot] = (
            params.greedy
            and not self.adjusts_logits[slot]
            and params.min_tokens == 0
            and params.logprobs is None
            and params.num_sequences == 1
            and params.beam_width is None
        )

    def settle(self, request: Request) -> None:
        """The samples of a request are all there: from now on each goes on like a request of its own."""
        for sequence in request.sequences:
            if sequence.slot >= 0:
                self.needs_slow_path[sequence.slot] = _is_looked_at(request)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out; its slot is free again."""
        slot = sequence.slot
        sequence.leave()
        self.sequences[slot] = self.token_ids[slot] = self.outputs[slot] = None
        self.seq_id[slot] = -1
        self._free.append(slot)

    def set_table(self, slot: int, table: tuple[int, ...]) -> None:
        """The slot's block table is this one, of which released entries (0) are left out."""
        blocks = tuple(filter(None, table))
        if len(blocks) < len(table):
            self._leave_out(slot, (len(table) - len(blocks)) * self._block_size - int(self.num_left_out[slot]))
        self.tables[slot, len(blocks) :] = 0
        self.table_len[slot] = 0
        self.extend_table(slot, blocks)

    def release_entries(self, slot: int, start: int, count: int) -> None:
        """The `count` blocks from the start-th on were released: those behind them move up."""
        end, length, row = start + count, int(self.table_len[slot]), self.tables[slot]
        row[start : length - count] = row[end:length].copy()
        row[length - count : length] = 0
        self.table_len[slot] = length - count
        self._leave_out(slot, count * self._block_size)

    def keep_heaviest(self, slots: npt.NDArray[np.int64]) -> None:
        """The sequences in these slots, each once, draw in a step that was launched: what is beyond the heavy hitters' budget goes then.

        Places in the table that were computed, reserved and published are later positions now.
        """
        gone = self.num_computed[slots] - (self._retention.budget - 1) - self.num_left_out[slots]
        gone = np.maximum(gone, 0)
        if gone.any():
            for column in (self.num_left_out, self.num_reserved, self.num_published):
                column[slots] += gone
            self.any_left_out = True

    def _leave_out(self, slot: int, count: int) -> None:
        if count:
            self.num_left_out[slot] += count
            self.any_left_out = True

    def extend_table(self, slot: int, blocks: tuple[int, ...]) -> None:
        """Blocks follow at the end of the slot's table."""
        start = int(self.table_len[slot])
        end = start + len(blocks)
        self._widen(end)
        self.tables[slot, start:end] = blocks
        self.table_len[slot] = end

    def extend_tables(self, slots: npt.NDArray[np.int64], blocks: list[int]) -> None:
        """One block follows at the end of the table of each of these slots, which differ."""
        ends = self.table_len[slots]
        self._widen(int(ends.max(initial=0)) + 1)
        self.tables[slots, ends] = blocks
        self.table_len[slots] = ends + 1

    def _widen(self, width: int) -> None:
        """Let tables of `width` blocks fit."""
        have = self.tables.shape[1]
        if width > have:
            self.tables = np.pad(self.tables, ((0, 0), (0, max(width, 2 * have) - have)))

    def table_rows(self, slots: npt.NDArray[np.int64] | IntArray) -> IntArray:
        """A copy of the slots' block tables, [rows, widest], 0 past each end."""
        rows: IntArray = self.tables.take(slots, axis=0)
        return rows[:, : int(self.table_len[slots].max(initial=0))]

    def draw_pending(self, slots: npt.NDArray[np.int64] | IntArray) -> None:
        """A step that draws one token for each of these slots was launched."""
        self.num_with_pending[slots] += 1
        self.last_token[slots] = IN_FLIGHT
