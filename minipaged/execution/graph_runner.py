"""Decode steps as CUDA graphs, whole: embedding, layers, LM head and, where draws are plain, the sampler in one launch.

A graph is captured once for each number of rows (rounded up to a bucket) and replayed from then on, so everything that changes between
steps lies in buffers on the device: token ids, positions, slots, block tables, lengths. Padded rows have length 0, slot -1 and a drawing
place of their own. Sampled ids stay on the device, where the next step reads them, and are copied to the host behind the launch. Steps that
compute prompts too run as TorchRunner's, which is also the oracle, but through the fused forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

import kernels
from minipaged.execution.kv_store import KVStore
from minipaged.execution.runner import Pending
from minipaged.execution.torch_runner import StepInputs, TorchRunner, attend_pages
from minipaged.model.fused import angle_table, fused_forward, fused_logits, rope_write
from minipaged.model.llama import Layer, Llama
from minipaged.scheduling.plan import SamplingColumns, StepPlan, StepTokens

NUM_STAGES = 4  # steps whose host buffers may be in use at once: more than any flight's depth needs
COLUMNS = 5  # token id, position, slot, length, drawing place; then the block tables


def bucket_of(rows: int) -> int:
    """Rows that a graph for `rows` sequences has: 1, 2, 4, 8, then multiples of 8 to 64, of 16 to 256, of 32 beyond."""
    for step, limit in ((8, 64), (16, 256), (32, 1 << 30)):
        if rows <= limit:
            return 1 << (rows - 1).bit_length() if rows <= 8 else -(-rows // step) * step
    raise ValueError(f"no bucket holds {rows} rows")


class Draws(Enum):
    """What a graph ends in."""

    GREEDY = "the most likely token of each row"
    WARM = "a token of each row, drawn at its temperature"
    NONE = "logits: truncation, penalties, log-probabilities and groups are seen to outside"


@dataclass(slots=True)
class Stage:
    """Host buffers of one step, pinned so that copies run beside the computation."""

    inputs: Tensor  # int32 [(COLUMNS + table width) * rows], as on the device
    chances: Tensor  # float64 [2, bucket]: temperature and uniform number of each row
    drawn: Tensor  # int64 [rows]
    done: torch.cuda.Event


class GraphPending:
    """A replayed step: its tokens are on their way to the host."""

    __slots__ = ("_rows", "_stage")

    def __init__(self, stage: Stage, rows: int) -> None:
        self._stage = stage
        self._rows = rows

    def tokens(self) -> StepTokens:
        """Wait for the copy and read it."""
        self._stage.done.synchronize()
        return StepTokens(self._stage.drawn[: self._rows].numpy().astype(np.int32))


class GraphRunner(TorchRunner):
    """A TorchRunner that replays graphs wherever each row of a step computes one token; CUDA only.

    max_model_len: longest sequence, in tokens: the width of the block tables that graphs are captured with.
    """

    def __init__(self, model: Llama, store: KVStore, max_num_seqs: int, max_model_len: int) -> None:
        super().__init__(model, store, max_num_seqs)
        if self.device.type != "cuda":
            raise ValueError(f"graphs need a CUDA device, not {self.device}")
        rows, device = bucket_of(max_num_seqs), self.device
        self._parking = max_num_seqs  # where padded rows draw into
        self._drawn = torch.zeros(max_num_seqs + 1, dtype=torch.int64, device=device)
        self._width = -(-max_model_len // store.block_size)
        self._inputs = torch.zeros((COLUMNS + self._width) * rows, dtype=torch.int32, device=device)
        self._chances = torch.zeros(2, rows, dtype=torch.float64, device=device)
        self._logits: Tensor | None = None
        self._angles = angle_table(model, max_model_len)
        self._graphs: dict[tuple[int, Draws], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._memory = torch.cuda.graph_pool_handle()
        self._stages = [self._new_stage(rows) for _ in range(NUM_STAGES)]
        self._turn = 0

    def _new_stage(self, rows: int) -> Stage:
        return Stage(
            torch.zeros((COLUMNS + self._width) * rows, dtype=torch.int32, pin_memory=True),
            torch.zeros(2, rows, dtype=torch.float64, pin_memory=True),
            torch.zeros(rows, dtype=torch.int64, pin_memory=True),
            torch.cuda.Event(),  # type: ignore[no-untyped-call]
        )

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Pending:
        """Replay a graph where the step is all decoding; else as TorchRunner."""
        rows = len(plan.seq_ids)
        if not rows or plan.num_tokens != rows or plan.prompt_queries:
            return super().launch(plan)
        self.store.swap_out(plan.swap_outs)
        self.store.swap_in(plan.swap_ins)
        self.store.copy(plan.copies)
        bucket, draws = bucket_of(rows), draws_of(plan)
        stage = self._stages[self._turn]
        self._turn = (self._turn + 1) % NUM_STAGES
        stage.done.synchronize()  # its last copy was made long ago
        self._fill(plan, stage, bucket, draws)
        graph, result = self._graphs.get((bucket, draws)) or self._capture(bucket, draws)
        graph.replay()
        if draws is Draws.NONE:
            stage.done.record()
            if np.array_equal(plan.draw_rows, np.arange(rows)):
                return self._draw(plan, result[:rows])
            return self._draw(plan, result[torch.from_numpy(plan.draw_rows.astype(np.int64)).to(self.device)])
        stage.drawn[:rows].copy_(result[:rows], non_blocking=True)
        stage.done.record()
        return GraphPending(stage, rows)

    def _views(self, inputs: Tensor, bucket: int) -> tuple[Tensor, Tensor]:
        """(columns [COLUMNS, bucket], block tables [bucket, width]) of a buffer of inputs, the host's or the device's."""
        end = COLUMNS * bucket
        return inputs[:end].view(COLUMNS, bucket), inputs[end : end + bucket * self._width].view(bucket, self._width)

    def _fill(self, plan: StepPlan, stage: Stage, bucket: int, draws: Draws) -> None:
        """Bring the step's rows to the device: one copy for all integers, one more if the graph draws by temperature.

        Table entries past a row's length are whatever stood there: they are never read.
        """
        rows, width = plan.tables.shape
        size = self.store.block_size
        columns, tables = (view.numpy() for view in self._views(stage.inputs, bucket))
        columns[:, rows:] = np.array([0, 0, -1, 0, self._parking], np.int32)[:, None]
        columns[0, :rows] = plan.token_ids
        columns[1, :rows] = plan.starts
        blocks = plan.tables[np.arange(rows), plan.starts // size]
        columns[2, :rows] = blocks * size + plan.starts % size
        columns[3, :rows] = plan.starts + 1
        columns[4, :rows] = plan.slots
        tables[:rows, :width] = plan.tables
        end = COLUMNS * bucket + rows * self._width
        self._inputs[:end].copy_(stage.inputs[:end], non_blocking=True)
        if plan.sampling is not None and draws is Draws.WARM:
            chances = stage.chances.numpy()
            chances[0, :rows], chances[1, :rows] = plan.sampling.temperature, plan.sampling.uniform
            self._chances[:, :rows].copy_(stage.chances[:, :rows], non_blocking=True)

    def _forward(self, inputs: StepInputs) -> Tensor:
        """As TorchRunner's, fused: for the steps that are not replayed."""

        def attend(layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            caches = self.store.layers[layer.index]
            rope_write(layer, query, key, value, (inputs.positions, self._angles, *caches, inputs.slot_mapping))
            return attend_pages(query, *caches, inputs, self._scale)

        embedded = functional.embedding(inputs.token_ids, self.model.embedding)
        norm = self.model.norm
        return kernels.rms_norm(fused_forward(self.model, embedded, attend), norm.weight, norm.eps)

    def _step(self, bucket: int, draws: Draws) -> Tensor:
        """What a graph does: one decode step of the first `bucket` rows of the buffers. Returns the drawn ids, [bucket], or the
        logits, [bucket, vocab].
        """
        columns, tables = self._views(self._inputs, bucket)
        token_ids, positions, slots, lengths, places = columns.unbind(0)
        embedded = kernels.embed_tokens(self.model.embedding, token_ids, self._drawn, places)

        def attend(layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            caches = self.store.layers[layer.index]
            rope_write(layer, query, key, value, (positions, self._angles, *caches, slots))
            return kernels.paged_decode(query, *caches, tables, lengths, self._scale)

        logits = fused_logits(self.model, fused_forward(self.model, embedded, attend))
        if draws is Draws.NONE:
            return self._all_logits()[:bucket].copy_(logits)
        temperature, uniform = self._chances[:, :bucket].unbind(0)
        warm = draws is Draws.WARM
        drawn = kernels.draw_tokens(logits, temperature, uniform) if warm else kernels.draw_tokens(logits)
        self._drawn.index_copy_(0, places.long(), drawn)
        return drawn

    def _all_logits(self) -> Tensor:
        """Where the graphs that end in logits leave them, float32 [rows, vocab]: one place for all, read before the next replay."""
        if self._logits is None:
            rows = bucket_of(self._parking)
            self._logits = torch.empty(rows, self.model.config.vocab_size, dtype=torch.float32, device=self.device)
        return self._logits

    def _capture(self, bucket: int, draws: Draws) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Capture the graph of a bucket. Warming up runs the step, which must not be seen: what it draws is put back."""
        kept = self._drawn.clone()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step(bucket, draws)
            self._drawn.copy_(kept)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            result = self._step(bucket, draws)
        self._graphs[bucket, draws] = graph, result
        return graph, result


def draws_of(plan: StepPlan) -> Draws:
    """What the graph of a step of decodes is to end in. It draws itself where every row draws one token, for its own slot, greedily or by
    temperature alone.
    """
    each_for_itself = len(plan.draw_rows) == len(plan.seq_ids) and np.array_equal(plan.draw_slots, plan.slots)
    more_asked = plan.top_logprobs >= 0 or plan.penalty_tokens or plan.banned_tokens
    if not each_for_itself or more_asked or (plan.sampling is not None and is_truncated(plan.sampling)):
        return Draws.NONE
    return Draws.GREEDY if plan.sampling is None else Draws.WARM


def is_truncated(columns: SamplingColumns) -> bool:
    """Whether any draw asks for top-k, top-p or min-p."""
    return bool(((columns.top_k > 0) | (columns.top_p < 1.0) | (columns.min_p > 0.0)).any())
