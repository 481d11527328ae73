"""Runs plans on a real model with torch: batch tensors, KV writes and attention over pages, sampling. The plain path, and the oracle of all
faster ones. Knows tensors; knows nothing of requests.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from minipaged.execution import sampler
from minipaged.execution.kv_store import KVStore
from minipaged.execution.runner import Pending
from minipaged.kernels.attention import paged_decode, paged_prefill
from minipaged.kernels.cache import write_kv
from minipaged.kernels.sampling import draw_tokens
from minipaged.model.llama import Llama
from minipaged.model.loading.placement import to_device
from minipaged.scheduling.plan import IN_FLIGHT, PromptLogprobs, StepPlan, StepTokens

PROMPT_ROWS = 256  # prompt tokens whose log-probabilities are computed at a time


class StepInputs:
    """A plan's rows as tensors on the device."""

    def __init__(self, plan: StepPlan, block_size: int, device: torch.device) -> None:
        starts, lengths = plan.starts.astype(np.int64), plan.lengths.astype(np.int64)
        ends = np.cumsum(lengths)
        row_of = np.repeat(np.arange(len(lengths)), lengths)
        positions = np.arange(plan.num_tokens) - np.repeat(ends - lengths - starts, lengths)
        blocks = plan.tables[row_of, positions // block_size].astype(np.int64)

        def tensor(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
            return to_device(array, device, dtype)

        self.token_ids = tensor(plan.token_ids, torch.int64)
        self.positions = tensor(positions, torch.int64)
        self.slot_mapping = tensor(blocks * block_size + positions % block_size, torch.int64)
        self.tables = tensor(plan.tables, torch.int32)
        self.context_lens = tensor(starts + lengths, torch.int32)
        self.query_starts = tensor(np.concatenate([[0], ends]), torch.int32)
        self.longest = int(lengths.max(initial=0))
        ones, longer = np.flatnonzero(lengths == 1), np.flatnonzero(lengths > 1)
        self.mixed = bool(len(ones) and len(longer))  # decodes and prompt chunks in one step: each has its kernel
        if self.mixed:
            context = starts + lengths
            self.decode_tables, self.decode_lens = (
                tensor(plan.tables[ones], torch.int32),
                tensor(context[ones], torch.int32),
            )
            self.prompt_tables = tensor(plan.tables[longer], torch.int32)
            self.prompt_lens = tensor(context[longer], torch.int32)
            self.prompt_starts = tensor(np.concatenate([[0], np.cumsum(lengths[longer])]), torch.int32)
            # Mostly the decodes come first, being older: then both are stretches of the step, and nothing need be gathered.
            self.decode_tokens: slice | torch.Tensor = slice(0, len(ones))
            self.prompt_tokens: slice | torch.Tensor = slice(len(ones), plan.num_tokens)
            if ones[-1] >= len(ones):
                self.decode_tokens = tensor(ends[ones] - 1, torch.int64)
                self.prompt_tokens = tensor(np.flatnonzero(lengths[row_of] > 1), torch.int64)
        self.last_rows = tensor(ends[plan.draw_rows] - 1, torch.int64)


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

    model: the network, on the device; store: the KV tensors; max_num_seqs: slots of the scheduler.
    """

    def __init__(self, model: Llama, store: KVStore, max_num_seqs: int) -> None:
        self.model = model
        self.store = store
        self.device = store.device
        self._scale = model.config.head_dim**-0.5
        self._drawn = torch.zeros(max_num_seqs, dtype=torch.int64, device=self.device)  # newest token of each slot

    def num_blocks(self) -> int:
        """Blocks in the device pool, the null block included."""
        return self.store.num_blocks

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Pending:
        """Run the step: swap-outs, swap-ins, copies, then KV writes, attention and draws."""
        self.store.swap_out(plan.swap_outs)
        self.store.swap_in(plan.swap_ins)
        self.store.copy(plan.copies)
        if not plan.num_tokens:
            return TorchPending(torch.zeros(0, dtype=torch.int64))
        inputs = StepInputs(plan, self.store.block_size, self.device)
        if (plan.token_ids == IN_FLIGHT).any():
            self._fill_in_flight(plan, inputs)
        hidden = self._forward(inputs)
        pending = self._draw(plan, self.model.logits(hidden[inputs.last_rows]))
        if plan.prompt_queries:
            pending.prompt_logprobs = self._prompt_logprobs(plan, hidden)
        return pending

    def _forward(self, inputs: StepInputs) -> torch.Tensor:
        """Hidden states after the last norm, [tokens, hidden_size]; writes the step's keys and values on the way."""

        def attend(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            write_kv(key, value, *self.store.layers[layer], inputs.slot_mapping)
            return attend_pages(query, *self.store.layers[layer], inputs, self._scale)

        hidden: torch.Tensor = self.model(inputs.token_ids, inputs.positions, attend)
        return hidden

    def _fill_in_flight(self, plan: StepPlan, inputs: StepInputs) -> None:
        """Tokens that the host does not know are the newest of their row's slot."""
        unknown = np.flatnonzero(plan.token_ids == IN_FLIGHT)
        rows = np.repeat(plan.slots, plan.lengths)[unknown].astype(np.int64)
        inputs.token_ids[to_device(unknown, self.device)] = self._drawn[to_device(rows, self.device)]

    def _draw(self, plan: StepPlan, logits: torch.Tensor) -> TorchPending:
        """One token for each draw. logits: float32 [draws, vocab]."""
        raw = logits
        if plan.sampling is None:
            drawn = draw_tokens(logits)
        else:
            if plan.penalty_tokens or plan.banned_tokens:
                logits = logits.clone()
            if plan.penalty_tokens:
                penalties = to_device(plan.sampling.repetition_penalty, self.device)
                sampler.penalize(logits, plan.penalty_tokens, penalties)
            sampler.ban(logits, plan.banned_tokens)
            drawn = sampler.sample(logits, plan.sampling)
        self._drawn[to_device(plan.draw_slots, self.device, torch.int64)] = drawn
        if plan.top_logprobs < 0:
            return TorchPending(drawn)
        logprobs = raw.log_softmax(dim=-1)
        chosen = logprobs.gather(1, drawn[:, None])
        best, tokens = logprobs.topk(min(plan.top_logprobs, logprobs.shape[-1]), dim=-1)
        ranks = (logprobs > chosen).sum(dim=-1) + 1
        return TorchPending(drawn, logprobs=chosen.squeeze(1), ranks=ranks, top_ids=tokens, top_logprobs=best)

    def _prompt_logprobs(self, plan: StepPlan, hidden: torch.Tensor) -> dict[int, PromptLogprobs]:
        """What the model thought of every prompt token that this step's rows were followed by."""
        found: dict[int, PromptLogprobs] = {}
        ends = np.cumsum(plan.lengths)
        for row, targets, top in plan.prompt_queries:
            first = int(ends[row] - plan.lengths[row])
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


def attend_pages(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, inputs: StepInputs, scale: float
) -> torch.Tensor:
    """Attention of a step's tokens over the block tables, the step's own keys and values written already.

    query: [tokens, heads, head_dim]; keys, values: one layer's cache. Decodes and prompt chunks of a mixed step have a kernel each.
    """
    tables, lens = inputs.tables, inputs.context_lens
    if inputs.longest == 1:
        return paged_decode(query, keys, values, tables, lens, scale)
    if not inputs.mixed:
        return paged_prefill(query, keys, values, tables, lens, inputs.query_starts, inputs.longest, scale)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    decodes, prompts = inputs.decode_tokens, inputs.prompt_tokens
    tables, lens = inputs.decode_tables, inputs.decode_lens
    if isinstance(decodes, slice):
        paged_decode(query[decodes], keys, values, tables, lens, scale, out=out[decodes])
    else:
        out[decodes] = paged_decode(query[decodes], keys, values, tables, lens, scale)
    tables, lens, starts = inputs.prompt_tables, inputs.prompt_lens, inputs.prompt_starts
    if isinstance(prompts, slice):
        paged_prefill(query[prompts], keys, values, tables, lens, starts, inputs.longest, scale, out=out[prompts])
    else:
        out[prompts] = paged_prefill(query[prompts], keys, values, tables, lens, starts, inputs.longest, scale)
    return out
