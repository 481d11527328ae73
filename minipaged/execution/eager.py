"""Runs plans on a real model, operation by operation: inputs (step_inputs.py), KV writes and attention over pages (paged_kv.py alone),
draws (sampler.py).

CPUs run this. On a GPU it is the reference that the graphs (graphs.py) must agree with, and what they fall back to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from minipaged.execution import sampler
from minipaged.execution.paged_kv import PagedKV
from minipaged.execution.step_inputs import StepInputs, inputs_of, to_device, token_order
from minipaged.kernels.sampling import draw_tokens
from minipaged.model.llama import Llama
from minipaged.scheduling.plan import Pending, PromptLogprobs, StepPlan, StepTokens

if TYPE_CHECKING:
    from minipaged.execution.collectives import Pipe

PROMPT_ROWS = 256  # prompt tokens whose log-probabilities are computed at a time


class TorchPending:
    """A launched step whose tokens are on their way to the host: they do not wait for the step that is launched after it."""

    def __init__(self, drawn: torch.Tensor, **columns: torch.Tensor) -> None:
        """drawn: [draws]; columns: StepTokens' log-probabilities, ranks and best tokens, where they are wanted."""
        self.prompt_logprobs: dict[int, PromptLogprobs] | None = None
        self._columns = {name: _towards_host(column) for name, column in {"token_ids": drawn, **columns}.items()}
        self._arrived: torch.cuda.Event | None = None
        if drawn.is_cuda:
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def tokens(self) -> StepTokens:
        """Wait for the step and read what it drew."""
        if self._arrived is not None:
            self._arrived.synchronize()
        columns: dict[str, Any] = {
            name: column.numpy().astype(np.float32 if column.is_floating_point() else np.int32)
            for name, column in self._columns.items()
        }
        return StepTokens(**columns, prompt_logprobs=self.prompt_logprobs)


def _towards_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the host that is complete once the stream is past this point; the tensor itself on a CPU."""
    if not tensor.is_cuda:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


class TorchRunner:
    """Executes plans on one device.

    model: the network, on the device; kv: its keys and values; max_num_seqs: batch indices of the scheduler (StepPlan.slots).
    """

    def __init__(self, model: Llama, kv: PagedKV, max_num_seqs: int) -> None:
        self.model = model
        self.kv = kv
        self.device = kv.device
        self.pipe: Pipe | None = None  # the model is one stage of several
        # The token that each batch index drew last: the next step may be launched before the host has read it.
        self._newest = torch.zeros(max_num_seqs, dtype=torch.int64, device=self.device)

    def num_blocks(self) -> int:
        """Blocks in the device pool, the null block included."""
        return self.kv.num_blocks

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Pending:
        """Run the step: swap-outs, swap-ins, copies, then KV writes, attention and draws."""
        # Before any write: the holder of a copied block may write on in it in this very step.
        self._move_blocks(plan)
        if not len(plan.token_ids):
            return TorchPending(torch.zeros(0, dtype=torch.int64))
        inputs = inputs_of(plan, self.kv.block_size, self.device, heavy_hitters=bool(self.kv.marks))
        hidden = self._forward(inputs)
        if not self.model.draws:
            return self._give_on(hidden)
        pending = self._draw(plan, self.model.own_logits(hidden.index_select(0, inputs.draw_tokens)))
        if plan.prompt_queries:
            pending.prompt_logprobs = self._prompt_logprobs(plan, hidden)
        return pending

    def _move_blocks(self, plan: StepPlan) -> None:
        """What comes before the step's writes, in this order."""
        if not (plan.swap_outs or plan.swap_ins or plan.copies):
            return
        self.kv.swap_out(plan.swap_outs)
        self.kv.swap_in(plan.swap_ins)
        self.kv.copy(plan.copies)

    def _forward(self, inputs: StepInputs) -> torch.Tensor:
        """Hidden states after the last norm, [tokens, hidden_size]; writes the step's keys and values on the way."""

        def attention(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            # Of all tokens of the step, before any of them attends: a sequence may read a block that another one fills in this step.
            self.kv.write(layer, key, value, inputs)
            return self.kv.attend(layer, query, inputs)

        positions = inputs.positions
        if self.kv.retention.sinks:
            inputs = self.kv.with_sinks(inputs, self.model.frequencies)
            positions = positions.double()  # a stream behind sinks has no end, and float32 angles become coarse
        # Tokens that the host does not know are the newest of their batch index.
        newest = self._newest.index_select(0, inputs.batch_indices)
        token_ids = torch.where(inputs.token_ids >= 0, inputs.token_ids, newest)
        received = None if self.pipe is None else self._received(len(token_ids))
        hidden: torch.Tensor = self.model(token_ids, positions, attention, received)
        return hidden

    def _received(self, num_tokens: int) -> torch.Tensor | None:
        """Hidden states of the stage before; None where the model begins here."""
        return None if self.pipe is None or self.pipe.before is None else self.pipe.receive(num_tokens)

    def _give_on(self, hidden: torch.Tensor) -> TorchPending:
        """Hidden states for the next stage, where the tokens are drawn."""
        if self.pipe is not None:
            self.pipe.send(hidden)
        return TorchPending(torch.zeros(0, dtype=torch.int64))

    def _draw(self, plan: StepPlan, logits: torch.Tensor) -> TorchPending:
        """One token for each draw. logits: float32 [draws, vocab], of the tokens whose rows this rank has."""
        split = self.model.split
        if split is not None and needs_all_logits(plan):
            logits, split = split.whole(logits), None
        raw = logits
        if plan.sampling is None:
            drawn = draw_tokens(logits) if split is None else split.most_likely(logits)
        elif split is not None:
            columns = (plan.sampling.temperature, plan.sampling.uniform)
            drawn = split.draw(logits, *(to_device(column, self.device) for column in columns))
        else:
            if plan.adjustments:
                logits = sampler.adjust(logits.clone(), plan.adjustments)
            drawn = sampler.sample(logits, plan.sampling)
        known = drawn.clamp(min=0)  # -1: nothing could be drawn
        self._newest[to_device(plan.draw_slots, self.device, torch.int64)] = known
        if plan.top_logprobs < 0:
            return TorchPending(drawn)
        logprobs = raw.log_softmax(dim=-1)
        chosen = logprobs.gather(1, known[:, None])
        best, tokens = logprobs.topk(min(plan.top_logprobs, logprobs.shape[-1]), dim=-1)
        ranks = (logprobs > chosen).sum(dim=-1) + 1
        return TorchPending(drawn, logprobs=chosen.squeeze(1), ranks=ranks, top_ids=tokens, top_logprobs=best)

    def _prompt_logprobs(self, plan: StepPlan, hidden: torch.Tensor) -> dict[int, PromptLogprobs]:
        """What the model thought of every prompt token that this step's rows were followed by."""
        found: dict[int, PromptLogprobs] = {}
        _, starts = token_order(plan)
        for row, targets, top in plan.prompt_queries:
            first = int(starts[row])
            parts = [
                self._logprobs_of(hidden[first + at : first + at + PROMPT_ROWS], targets[at : at + PROMPT_ROWS], top)
                for at in range(0, max(1, len(targets)), PROMPT_ROWS)
            ]
            columns = (np.concatenate(column) for column in zip(*parts, strict=True))
            found[row] = PromptLogprobs(int(plan.starts[row]), *columns)
        return found

    def _logprobs_of(
        self, hidden: torch.Tensor, targets: tuple[int, ...], top: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The columns of PromptLogprobs for a few rows: all of a long prompt's logits at once would not fit beside a full pool."""
        logprobs = self.model.logits(hidden[: len(targets)]).log_softmax(dim=-1)
        chosen = logprobs.gather(1, torch.tensor(targets, dtype=torch.int64, device=self.device)[:, None])
        values, ids = logprobs.topk(top, dim=-1)
        ranks = (logprobs > chosen).sum(dim=-1) + 1
        return (
            chosen.squeeze(1).cpu().numpy(),
            ranks.cpu().numpy().astype(np.int32),
            ids.cpu().numpy().astype(np.int32),
            values.cpu().numpy(),
        )


def needs_all_logits(plan: StepPlan) -> bool:
    """Whether ranks with a part of the vocabulary each must put their logits together for this step's draws."""
    truncated = plan.sampling is not None and sampler.is_truncated(plan.sampling)
    return truncated or plan.top_logprobs >= 0 or bool(plan.adjustments)
