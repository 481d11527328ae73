"""Which tokens the next step computes, and what the drawn tokens mean.

Every sequence only ever moves from `computed` towards `total`; a prompt chunk and a decode are the same thing. Running sequences
come first, in order of rank; when the pool runs dry, the last of them leaves. Knows budgets and plans; who runs, and what memory they
hold, is in residents.py. Knows nothing of tensors or text. One thread owns it.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import numpy.typing as npt

from minipaged.config import EngineConfig, check_int
from minipaged.errors import InputError
from minipaged.memory.block_manager import BlockManager
from minipaged.scheduling import groups
from minipaged.scheduling.beam import BeamSearch
from minipaged.scheduling.door import check_request
from minipaged.scheduling.plan import IntArray, StepPlan, StepTokens
from minipaged.scheduling.planner import build_plan, draws_of
from minipaged.scheduling.policies import PreemptionCost
from minipaged.scheduling.records import Draft
from minipaged.scheduling.request import Request, RequestOutput, Sequence, Status
from minipaged.scheduling.residents import Residents


class Scheduler(Residents):
    """Continuous batching with chunked prefill, preemption, groups and beams over a block manager.

    config: the limits; manager: the block tables; block_size: as the manager's; cost: what a swap and a recompute take, for
    `preemption="auto"`.
    """

    def __init__(
        self, config: EngineConfig, manager: BlockManager, block_size: int, cost: PreemptionCost | None = None
    ) -> None:
        super().__init__(config, manager, block_size, cost)
        self._flights: deque[StepPlan] = deque()  # launched and not committed, oldest first
        self._touched: list[Request] = []  # ended outside a step's draws: reported by the next commit

    # ---- arrivals and departures

    def add(self, request: Request) -> None:
        """Queue a request. RequestError if it can never be served here; nothing is changed then."""
        self.check(request)
        request.arrival = self._arrivals
        self._arrivals += 1
        params = request.params
        if params.beam_width is not None:
            request.beams = BeamSearch(
                params.beam_width, params.max_tokens, request.stop_ids, params.length_penalty, params.early_stopping
            )
        if params.prompt_logprobs is not None:
            request.prompt_logprobs.append(None)  # nothing comes before the first token
        request.sequences.append(self.new_sequence(request, list(request.prompt_token_ids)))
        self.requests[request.request_id] = request
        self.waiting.push(request)
        self.log("submit", request.sequences[0], request.num_prompt)

    def check(self, request: Request) -> None:
        """Raise RequestError if the request can never be served by this engine, saying what would."""
        check_request(request, self.config, self.manager, self.block_size, self.requests)

    def abort(self, request_id: int) -> bool:
        """End a request wherever it is and give back all it holds; False if it has ended already or was never here."""
        check_int("request_id", request_id, 0)
        request = self.requests.get(request_id)
        if request is None:
            return False
        for sequence in request.alive:
            self.end(sequence, "abort")
        self._touched.append(request)
        return True

    def give_up(self) -> None:
        """A step was lost on its way: end every request with `error`, and forget the steps in flight and the prefix cache."""
        self._flights.clear()
        self._settled = self._launched
        for request in list(self.requests.values()):
            for sequence in request.alive:
                self.end(sequence, "error")
            self._touched.append(request)
        self.manager.reset_prefix_cache()

    def take_ended(self) -> list[RequestOutput]:
        """The requests that ended outside a step, each reported once."""
        ended, self._touched = self._touched, []
        return [request.output for request in ended]

    def finish(self, sequence: Sequence, reason: str) -> None:
        """End one sequence from outside (a stop string); does nothing if it has ended."""
        if not isinstance(sequence, Sequence):
            raise InputError(f"a sequence must be a Sequence, not {sequence!r}")
        if sequence.status is not Status.FINISHED:
            self.end(sequence, reason)

    @property
    def has_work(self) -> bool:
        """Whether any request has not ended, or an end is still to be reported."""
        return bool(self.requests or self._touched or self._flights)

    # ---- one step

    def schedule(self) -> StepPlan | None:
        """The next step, or None if nothing can be done before a step in flight is committed (or at all)."""
        self.manager.begin_step()
        draft = Draft(budget=self.config.max_num_batched_tokens)
        self._schedule_running(draft)
        if not draft.preempted:
            self._resume_and_admit(draft)
        if not draft.slots and not draft.swap_outs and not draft.swap_ins:
            return None
        slots = np.concatenate(draft.slots) if draft.slots else np.zeros(0, np.int64)
        takes = np.concatenate(draft.takes) if draft.takes else np.zeros(0, np.int64)
        return self._launch(draft, slots, takes)

    def _schedule_running(self, draft: Draft) -> None:
        batch = self.batch
        slots = self.order()
        if not len(slots):
            return
        computed, total = batch.computed[slots], batch.total[slots]
        need = total - computed
        need[(total >= batch.limit[slots]) | batch.busy[slots]] = 0  # only a step in flight is missing
        take = self._share_budget(draft.budget, slots, need)
        ends = computed + take
        short = (ends > batch.room[slots]).nonzero()[0]
        served = self._extend(draft, slots[short], ends[short]) if len(short) else 0
        for i in short[served:].tolist():
            if take[i]:
                self._make_room(draft, slots, take, ends, i)
        chosen = take.nonzero()[0]
        if len(chosen) < len(slots):
            slots, take = slots[chosen], take[chosen]
        if len(slots):
            draft.slots.append(slots)
            draft.takes.append(take)
            draft.budget -= int(take.sum())

    def _share_budget(
        self, budget: int, slots: npt.NDArray[np.int64], need: npt.NDArray[np.int32]
    ) -> npt.NDArray[np.int64]:
        """Tokens for each running slot: all it needs, first come first served."""
        if self._num_groups:
            return groups.share_budget(self.batch, self.running, budget, slots, need)
        if int(need.sum()) <= budget:
            return need.astype(np.int64)
        before = np.cumsum(need) - need
        take: npt.NDArray[np.int64] = np.clip(budget - before, 0, need)
        return take

    def _make_room(
        self,
        draft: Draft,
        slots: npt.NDArray[np.int64],
        take: npt.NDArray[np.int64],
        ends: npt.NDArray[np.int64],
        i: int,
    ) -> None:
        """Find room for slots[i] up to ends[i]; the last of the running make way until there is, or will be in the next step."""
        sequence = self.batch.sequences[int(slots[i])]
        if sequence is None:
            return
        while not self._extend(draft, slots[i : i + 1], ends[i : i + 1]):
            if draft.swap_outs:  # the blocks of whoever left are handed out from the next step on: nobody else need go
                take[np.isin(slots, [s.slot for s in sequence.request.alive])] = 0
                return
            victim = next((r for r in reversed(self.running) if not self.batch.busy[r.alive[0].slot]), None)
            if victim is None:
                take[i] = 0  # all wait for a step in flight
                return
            gone = [s.slot for s in victim.alive]
            take[np.isin(slots, gone)] = 0
            self._preempt(draft, victim)
            if victim is sequence.request:
                return

    def _launch(self, draft: Draft, slots: npt.NDArray[np.int64], takes: npt.NDArray[np.int64]) -> StepPlan:
        batch = self.batch
        draws = draws_of(batch, slots, takes)
        copies = tuple(pair for pairs in draft.copies.values() for pair in pairs) if draft.copies else ()
        plan = build_plan(
            self._launched, batch, slots, takes, draws, tuple(draft.swap_outs), tuple(draft.swap_ins), copies
        )
        self._launched += 1
        self.counters.copies += len(copies)
        self.counters.computed_tokens += plan.num_tokens
        batch.computed[slots] += takes
        owners = slots[draws.rows[draws.first]]
        batch.draw_pending(owners)
        batch.busy[owners] = draws.parting
        self._flights.append(plan)
        return plan

    # ---- what it drew

    def commit(self, plan: StepPlan, tokens: StepTokens) -> list[RequestOutput]:
        """Take in what a launched step drew, oldest first: append, publish full blocks, fork and prune, finish, free.

        Returns the outputs of every request that gained a token or ended. ValueError if `plan` is not the oldest in flight, or if these
        are no tokens of its draws; nothing is changed then.
        """
        if not self._flights or self._flights[0] is not plan:
            raise ValueError("commit takes the oldest plan in flight")
        ids = _drawn_ids(plan, tokens)
        self._flights.popleft()
        self._settled = plan.step + 1
        batch = self.batch
        slots, rows = plan.slots.astype(np.int64), plan.draw_rows.astype(np.int64)
        self._mark_full_blocks(plan, slots)
        if tokens.prompt_logprobs:
            groups.note_prompt_logprobs(self, plan, tokens.prompt_logprobs)
        slots, drawers = slots[rows], plan.seq_ids[rows]  # of the rows that drew: samples not born yet have no others
        outputs: list[RequestOutput]
        touched, self._touched = self._touched, []
        if not np.count_nonzero((batch.seq_id[slots] != drawers) | batch.watched[slots]):
            outputs = batch.outputs[slots].tolist()
            self._append_plain(slots, ids)
            self.counters.generated_tokens += len(ids)
        else:
            draws = [self.sequences.get(seq_id) for seq_id in drawers.tolist()]
            seen = groups.commit_draws(self, draws, ids, tokens)
            outputs = [request.output for request in seen]
            touched = [r for r in touched if r not in seen]
        if touched:
            outputs.extend(request.output for request in touched)
        return outputs

    def _append_plain(self, slots: npt.NDArray[np.int64], ids: npt.NDArray[np.int32]) -> None:
        """One token for each of the sequences in these slots, none of which asks for more than the token."""
        batch = self.batch
        for tokens, token in zip(batch.tokens[slots].tolist(), ids.tolist(), strict=True):
            tokens.append(token)
        known = batch.known[slots] + 1
        batch.known[slots] = known
        batch.busy[slots] = False
        newest = known == batch.total[slots]
        batch.last[slots[newest]] = ids[newest]
        at_limit = known >= batch.limit[slots]
        stopped = (ids == batch.stop[slots]) & (known >= batch.stop_from[slots])
        ended = (at_limit | stopped).nonzero()[0]
        for slot, by_token in zip(slots[ended].tolist(), stopped[ended].tolist(), strict=True):
            sequence = batch.sequences[slot]
            if sequence is not None:
                self.end(sequence, "stop" if by_token else "length")

    def _mark_full_blocks(self, plan: StepPlan, slots: npt.NDArray[np.int64]) -> None:
        """Report to the manager the tokens whose blocks this step has filled."""
        batch, mark = self.batch, self.manager.mark_computed
        ends = plan.starts + plan.lengths
        starts = batch.marked[slots]
        filled = ends // self.block_size > starts // self.block_size
        filled &= batch.seq_id[slots] == plan.seq_ids
        rows = filled.nonzero()[0]
        if not len(rows):
            return
        slots, starts, ends = slots[rows], starts[rows], ends[rows]
        seated = zip(batch.seq_id[slots].tolist(), batch.tokens[slots].tolist(), strict=True)
        for (seq_id, tokens), start, end in zip(seated, starts.tolist(), ends.tolist(), strict=True):
            mark(seq_id, tokens[start:end])
        batch.marked[slots] = ends


def _drawn_ids(plan: StepPlan, tokens: StepTokens) -> IntArray:
    """The drawn token ids, [draws]. InputError unless there is a whole number for each draw of the plan."""
    if not isinstance(tokens, StepTokens):
        raise InputError(f"what a step drew must be StepTokens, not {tokens!r}")
    ids = np.asarray(tokens.token_ids)
    if ids.shape != plan.draw_rows.shape or (ids.size and ids.dtype.kind not in "iu"):
        raise InputError(
            f"the step drew {len(plan.draw_rows)} tokens: token_ids must be as many whole numbers, not {ids!r}"
        )
    return ids.astype(np.int32, copy=False)
