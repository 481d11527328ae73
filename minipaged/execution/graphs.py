"""Steps as CUDA graphs, whole: embedding, layers, LM head and, where draws are plain, the sampler in one launch.

A graph is captured once for each shape (graph_inputs.py) and replayed from then on, so everything that changes between steps lies in
buffers on the device. Sampled ids stay on the device, where the next step reads them, and are copied to the host behind the launch. Large
prompt chunks, and prompts whose log-probabilities are wanted, run as TorchRunner's steps, which is also the oracle, but through the fused
forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from minipaged.execution.eager import StepInputs, TorchRunner, attend_pages
from minipaged.execution.graph_inputs import Shape, fill, largest_shapes, shape_of, size_of, views
from minipaged.execution.kv_store import KVStore
from minipaged.execution.runner import Pending
from minipaged.execution.sampler import is_truncated
from minipaged.kernels.attention import paged_decode, paged_prefill
from minipaged.kernels.elementwise import embed_tokens, rms_norm
from minipaged.kernels.sampling import draw_tokens, truncation_threshold
from minipaged.model.fused import angle_table, fused_forward, fused_logits, rope_write
from minipaged.model.llama import Layer, Llama
from minipaged.model.loading.placement import to_device
from minipaged.scheduling.plan import StepPlan, StepTokens

# Columns of SamplingColumns; a step without truncation sends the first two.
CHANCES = ("temperature", "uniform", "top_k", "top_p", "min_p")


class Draws(Enum):
    """What a graph ends in."""

    GREEDY = "the most likely token of each row"
    WARM = "a token of each row, drawn at its temperature"
    TRUNCATED = "a token of each row, drawn at its temperature from what top-k, top-p and min-p leave"
    NONE = "logits: penalties, log-probabilities and groups are seen to outside"


@dataclass(slots=True)
class Stage:
    """Host buffers of one step, pinned so that copies run beside the computation."""

    inputs: Tensor  # int32, as on the device
    chances: Tensor  # float64 [CHANCES, rows]: of each draw the columns that CHANCES names
    drawn: Tensor  # int64 [rows]
    done: torch.cuda.Event


class GraphPending:
    """A replayed step: its tokens are on their way to the host."""

    __slots__ = ("_draws", "_stage")

    def __init__(self, stage: Stage, draws: int) -> None:
        self._stage = stage
        self._draws = draws

    def tokens(self) -> StepTokens:
        """Wait for the copy and read it."""
        self._stage.done.synchronize()
        return StepTokens(self._stage.drawn[: self._draws].numpy().astype(np.int32))


class GraphRunner(TorchRunner):
    """A TorchRunner that replays graphs wherever a step has a shape for one; CUDA only.

    max_model_len: longest sequence, in tokens: the width of the block tables that graphs are captured with. depth: the engine's, steps in
    flight beyond the one being committed.
    """

    def __init__(self, model: Llama, store: KVStore, max_num_seqs: int, max_model_len: int, *, depth: int = 1) -> None:
        super().__init__(model, store, max_num_seqs)
        if self.device.type != "cuda":
            raise ValueError(f"graphs need a CUDA device, not {self.device}")
        self._parking = max_num_seqs  # where padded rows draw into
        self._drawn = torch.zeros(max_num_seqs + 1, dtype=torch.int64, device=self.device)
        self._width = -(-max_model_len // store.block_size)
        largest = largest_shapes(max_num_seqs)
        self._rows = max(shape.rows for shape in largest)
        size = max(size_of(shape, self._width) for shape in largest)
        self._inputs = torch.zeros(size, dtype=torch.int32, device=self.device)
        self._chances = torch.zeros(len(CHANCES), self._rows, dtype=torch.float64, device=self.device)
        self._logits: Tensor | None = None
        self._angles = angle_table(model, max_model_len)
        self._graphs: dict[tuple[Shape, Draws], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._memory = torch.cuda.graph_pool_handle()
        self._capturing = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._too_large: set[tuple[Shape, Draws]] = set()  # no memory was left to capture these
        self._stages = [self._new_stage(size) for _ in range(depth + 2)]
        self._turn = 0

    def _new_stage(self, size: int) -> Stage:
        return Stage(
            torch.zeros(size, dtype=torch.int32, pin_memory=True),
            torch.zeros(len(CHANCES), self._rows, dtype=torch.float64, pin_memory=True),
            torch.zeros(self._rows, dtype=torch.int64, pin_memory=True),
            torch.cuda.Event(),  # type: ignore[no-untyped-call]
        )

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Pending:
        """Replay a graph where there is one for the step's shape; else as TorchRunner."""
        shape = shape_of(plan)
        if shape is None:
            return super().launch(plan)
        draws = draws_of(plan, shape)
        captured = self._graphs.get((shape, draws)) or self._capture(shape, draws)
        if captured is None:
            return super().launch(plan)
        self.store.swap_out(plan.swap_outs)
        self.store.swap_in(plan.swap_ins)
        self.store.copy(plan.copies)
        count = len(plan.draw_rows)
        stage = self._stages[self._turn]
        self._turn = (self._turn + 1) % len(self._stages)
        stage.done.synchronize()  # its last copy was made depth + 2 steps ago
        self._send(plan, stage, shape, draws)
        graph, result = captured
        graph.replay()
        if draws is Draws.NONE:
            stage.done.record()
            if shape.chunks or np.array_equal(plan.draw_rows, np.arange(len(plan.seq_ids))):
                return self._draw(plan, result[:count])
            return self._draw(plan, result[to_device(plan.draw_rows, self.device, torch.int64)])
        stage.drawn[:count].copy_(result[:count], non_blocking=True)
        stage.done.record()
        return GraphPending(stage, count)

    def _send(self, plan: StepPlan, stage: Stage, shape: Shape, draws: Draws) -> None:
        """Bring the step to the device: one copy for all integers, one more if the graph draws by temperature."""
        inputs = views(stage.inputs.numpy(), shape, self._width)
        used = fill(inputs, plan, self.store.block_size, self._parking)
        end = size_of(shape, self._width) - (shape.rows - used) * self._width
        self._inputs[:end].copy_(stage.inputs[:end], non_blocking=True)
        if plan.sampling is not None and draws in (Draws.WARM, Draws.TRUNCATED):
            count, chances = len(plan.draw_rows), stage.chances.numpy()
            sent = 2 if draws is Draws.WARM else len(CHANCES)
            for row, name in zip(chances[:sent], CHANCES, strict=False):
                row[:count] = getattr(plan.sampling, name)
            self._chances[:sent].copy_(stage.chances[:sent], non_blocking=True)

    def _forward(self, inputs: StepInputs) -> Tensor:
        """As TorchRunner's, fused: for the steps that are not replayed."""

        def attend(layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            caches = self.store.layers[layer.index]
            rope_write(layer, query, key, value, (inputs.positions, self._angles, *caches, inputs.slot_mapping))
            return attend_pages(query, *caches, inputs, self._scale)

        embedded = functional.embedding(inputs.token_ids, self.model.embedding)
        norm = self.model.norm
        return rms_norm(fused_forward(self.model, embedded, attend), norm.weight, norm.eps)

    def _step(self, shape: Shape, draws: Draws) -> Tensor:
        """What a graph does: one step of what lies in the inputs. Returns the drawn ids, [rows], or the logits, [rows, vocab]: of each
        decode in its row, or, where there are chunks, of each draw.
        """
        inputs = views(self._inputs, shape, self._width)
        token_ids, positions, slots, places = inputs.tokens.unbind(0)
        embedded = embed_tokens(self.model.embedding, token_ids, self._drawn, places)

        def attend(layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            caches = self.store.layers[layer.index]
            rope_write(layer, query, key, value, (positions, self._angles, *caches, slots))
            if not shape.chunks:
                return paged_decode(query, *caches, inputs.tables, inputs.lengths, self._scale)
            out = torch.empty_like(query, memory_format=torch.contiguous_format)
            # Rows that are no decodes get zeros; those are tokens of chunks, or padding, and the chunks' kernel comes after.
            paged_decode(
                query[: shape.rows], *caches, inputs.tables, inputs.lengths, self._scale, out=out[: shape.rows]
            )
            return paged_prefill(
                query,
                *caches,
                inputs.chunk_tables,
                inputs.chunk_lengths,
                inputs.chunk_starts,
                shape.tokens,
                self._scale,
                out=out,
            )

        hidden = fused_forward(self.model, embedded, attend)
        drawn_from, drawn_for = inputs.draws.unbind(0)
        logits = fused_logits(self.model, hidden.index_select(0, drawn_from) if shape.chunks else hidden)
        if draws is Draws.NONE:
            return self._all_logits()[: shape.rows].copy_(logits)
        drawn = self._draw_here(logits, draws)
        self._drawn.index_copy_(0, drawn_for.long(), drawn)
        return drawn

    def _draw_here(self, logits: Tensor, draws: Draws) -> Tensor:
        """A token of each row, as `sample` draws it."""
        if draws is Draws.GREEDY:
            return draw_tokens(logits)
        temperature, uniform, *truncation = self._chances[:, : len(logits)].unbind(0)
        least = truncation_threshold(logits, temperature, *truncation) if draws is Draws.TRUNCATED else None
        return draw_tokens(logits, temperature, uniform, least)

    def _all_logits(self) -> Tensor:
        """Where the graphs that end in logits leave them, float32 [rows, vocab]: one place for all, read before the next replay."""
        if self._logits is None:
            self._logits = torch.empty(
                self._rows, self.model.config.vocab_size, dtype=torch.float32, device=self.device
            )
        return self._logits

    def _capture(self, shape: Shape, draws: Draws) -> tuple[torch.cuda.CUDAGraph, Tensor] | None:
        """Capture the graph of a shape, over inputs of padding alone, so that warming it up writes nothing; None where the memory is
        short.
        """
        if (shape, draws) in self._too_large:
            return None
        inputs = views(self._inputs, shape, self._width)
        for part in (inputs.draws, inputs.lengths, inputs.chunk_lengths, inputs.chunk_starts):
            part.zero_()
        inputs.tokens.copy_(torch.tensor([[0], [0], [-1], [self._parking]], dtype=torch.int32, device=self.device))
        inputs.draws[1] = self._parking
        self._capturing.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(self._capturing):
                self._step(shape, draws)
            with torch.cuda.graph(graph, pool=self._memory, stream=self._capturing):
                result = self._step(shape, draws)
        except torch.OutOfMemoryError:
            self._too_large.add((shape, draws))
            return None
        finally:
            torch.cuda.current_stream().wait_stream(self._capturing)
        self._graphs[shape, draws] = graph, result
        return graph, result


def draws_of(plan: StepPlan, shape: Shape) -> Draws:
    """What the step's graph is to end in. It draws itself where nothing but tokens is asked for; among decodes alone, only if every row
    draws one token, for its own place.
    """
    if not shape.chunks and not (
        len(plan.draw_rows) == len(plan.seq_ids) and np.array_equal(plan.draw_slots, plan.slots)
    ):
        return Draws.NONE
    if plan.top_logprobs >= 0 or plan.penalty_tokens or plan.banned_tokens:
        return Draws.NONE
    if plan.sampling is None:
        return Draws.GREEDY
    return Draws.TRUNCATED if is_truncated(plan.sampling) else Draws.WARM
