"""Steps as CUDA graphs, whole: embedding, layers, LM head and, where draws are plain, the sampler in one launch.

Everything that changes between steps lies in buffers on the device, one layout for each shape (step_inputs.py). So a shape's first step
runs over these buffers kernel by kernel, and its second one is captured while it is launched, and replayed from then on: nothing waits for
a graph. Sampled ids stay on the device, where the next step reads them, and are copied to the host behind the launch. Large prompt chunks,
and prompts whose log-probabilities are wanted, are launched kernel by kernel, as TorchRunner does.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import Enum
from itertools import product

import numpy as np
import torch
from torch import Tensor

from minipaged.config import Progress
from minipaged.execution.eager import TorchRunner
from minipaged.execution.paged_kv import PagedKV
from minipaged.execution.sampler import is_truncated
from minipaged.execution.shared_prefixes import shared_groups, tile_room
from minipaged.execution.step_inputs import Shape, StepInputs, fill, size_of, to_device, views
from minipaged.kernels.elementwise import embed_tokens, rms_norm
from minipaged.kernels.sampling import draw_tokens, truncation_threshold
from minipaged.model.llama import Layer, Llama, angle_rows, angle_table
from minipaged.scheduling.plan import Pending, StepPlan, StepTokens

# Columns of SamplingColumns; a step without truncation sends the first two.
SAMPLING_INPUTS = ("temperature", "uniform", "top_k", "top_p", "min_p")

MOST_TOKENS = 1024  # of a step with prompt chunks that is replayed: the GPU is busy with more for longer than the host with launching it
# Steps with chunks have coarser buckets than decodes alone, since there are more shapes.
TOKEN_BUCKETS = (64, 128, 192, 256, 384, 512, 768, 1024)
ROW_BUCKETS = (16, 64, 256, 512, 1024)
CHUNK_BUCKETS = (4, 32)


def bucket_of(rows: int) -> int:
    """Rows that a graph for `rows` decodes has: 1, 2, 4, 8, then multiples of 8 to 64, of 16 to 256, of 32 beyond."""
    for step, limit in ((8, 64), (16, 256), (32, 1 << 30)):
        if rows <= limit:
            return 1 << (rows - 1).bit_length() if rows <= 8 else -(-rows // step) * step
    raise ValueError(f"no bucket holds {rows} rows")


def shape_of(plan: StepPlan, *, shared: bool = False) -> Shape | None:
    """The shape whose graph can run this plan; None if it is to be launched kernel by kernel. shared: decodes alone have common blocks."""
    rows, tokens = len(plan.seq_ids), plan.num_tokens
    if not rows or plan.prompt_queries:
        return None
    if tokens == rows:
        return _decodes_alone(rows, shared=shared)
    decodes = int((plan.lengths == 1).sum())
    needed = max(decodes, len(plan.draw_rows), 1)
    if tokens > MOST_TOKENS or rows - decodes > CHUNK_BUCKETS[-1] or needed > MOST_TOKENS:
        return None
    return _mixed(_bucket(TOKEN_BUCKETS, tokens), _bucket(ROW_BUCKETS, needed), _bucket(CHUNK_BUCKETS, rows - decodes))


def _decodes_alone(rows: int, *, shared: bool) -> Shape:
    return Shape(bucket_of(rows), bucket_of(rows), 0, 0, tile_room(bucket_of(rows)) if shared else 0)


def _mixed(tokens: int, rows: int, chunks: int) -> Shape:
    """rows: room for as many decodes, and for as many draws."""
    return Shape(max(tokens, rows), rows, chunks, rows)


def _bucket(buckets: tuple[int, ...], needed: int) -> int:
    return next(n for n in buckets if n >= needed)


def largest_shapes(max_num_seqs: int) -> tuple[Shape, Shape]:
    """The shapes that need most room in an engine of so many sequences: of decodes alone, and with chunks."""
    mixed = _mixed(MOST_TOKENS, _bucket(ROW_BUCKETS, min(max_num_seqs, MOST_TOKENS)), CHUNK_BUCKETS[-1])
    return _decodes_alone(max_num_seqs, shared=True), mixed


def every_shape(max_num_seqs: int) -> tuple[list[Shape], list[Shape]]:
    """The shapes that a step may have in an engine of so many sequences: of decodes alone, those without common blocks first, and with
    chunks.
    """
    alone = [
        _decodes_alone(rows, shared=shared)
        for shared in (False, True)
        for rows in sorted({bucket_of(n) for n in range(1 + shared, max_num_seqs + 1)})
    ]
    rows = [n for n in ROW_BUCKETS if n <= _bucket(ROW_BUCKETS, min(max_num_seqs, MOST_TOKENS))]
    return alone, [_mixed(*sizes) for sizes in product(TOKEN_BUCKETS, rows, CHUNK_BUCKETS)]


class Draws(Enum):
    """What a graph ends in."""

    GREEDY = "the most likely token of each row"
    WARM = "a token of each row, drawn at its temperature"
    TRUNCATED = "a token of each row, drawn at its temperature from what top-k, top-p and min-p leave"
    NONE = "logits: adjustments, log-probabilities and groups are seen to outside"


@dataclass(slots=True)
class HostBuffers:
    """What the host sends and receives in one step, pinned so that copies run beside the computation."""

    inputs: Tensor  # int32, as on the device
    sampling: Tensor  # float64 [SAMPLING_INPUTS, rows]: of each draw the columns that SAMPLING_INPUTS names
    drawn: Tensor  # int64 [rows]
    done: torch.cuda.Event


class GraphPending:
    """A replayed step: its tokens are on their way to the host."""

    __slots__ = ("_buffers", "_draws")

    def __init__(self, buffers: HostBuffers, draws: int) -> None:
        self._buffers = buffers
        self._draws = draws

    def tokens(self) -> StepTokens:
        """Wait for the copy and read it."""
        self._buffers.done.synchronize()
        return StepTokens(self._buffers.drawn[: self._draws].numpy().astype(np.int32))


class GraphRunner(TorchRunner):
    """A TorchRunner that replays graphs wherever a step has a shape for one. On a GPU; on the device "meta" it launches what it would
    launch there (compile_ahead.py) and replays nothing.

    max_model_len: longest sequence, in tokens; table_width: entries of the block tables that graphs are captured with, None for as many as
    such a sequence has. depth: the engine's, steps in flight beyond the one being committed.
    """

    def __init__(
        self,
        model: Llama,
        kv: PagedKV,
        max_num_seqs: int,
        max_model_len: int,
        *,
        table_width: int | None = None,
        depth: int = 1,
    ) -> None:
        super().__init__(model, kv, max_num_seqs)
        if self.device.type not in ("cuda", "meta"):
            raise ValueError(f"graphs need a CUDA device, not {self.device}")
        self._most_decodes = max_num_seqs
        self._dummy_slot = max_num_seqs  # the batch index that padding draws for
        self._newest = torch.zeros(max_num_seqs + 1, dtype=torch.int64, device=self.device)
        self._width = table_width or -(-max_model_len // kv.block_size)
        largest = largest_shapes(max_num_seqs)
        self._rows = max(shape.decodes for shape in largest)
        size = max(size_of(shape, self._width) for shape in largest)
        self._inputs = torch.zeros(size, dtype=torch.int32, device=self.device)
        self._sampling = torch.zeros(len(SAMPLING_INPUTS), self._rows, dtype=torch.float64, device=self.device)
        self._logits: Tensor | None = None
        self._hidden_in: Tensor | None = None
        # Of all positions of the context; a stream behind sinks is longer, so its steps make their own.
        self._angles = angle_table(model.frequencies, 1 if kv.retention.sinks else max_model_len)
        self._graphs: dict[tuple[Shape, Draws], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._met: set[tuple[Shape, Draws]] = set()  # shapes that have run once, kernel by kernel
        self._too_large: set[tuple[Shape, Draws]] = set()  # no memory was left to capture these
        if self.device.type == "meta":
            return
        self._memory = torch.cuda.graph_pool_handle()
        self._capturing = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._host_buffers = [self._new_buffers(size) for _ in range(depth + 2)]
        self._turn = 0

    def _new_buffers(self, size: int) -> HostBuffers:
        return HostBuffers(
            torch.zeros(size, dtype=torch.int32, pin_memory=True),
            torch.zeros(len(SAMPLING_INPUTS), self._rows, dtype=torch.float64, pin_memory=True),
            torch.zeros(self._rows, dtype=torch.int64, pin_memory=True),
            torch.cuda.Event(),  # type: ignore[no-untyped-call]
        )

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Pending:
        """Replay a graph where there is one for the step's shape; else as TorchRunner."""
        # Rows with a window may have left what they share behind.
        groups = shared_groups(plan, self.kv.block_size) if self.kv.retention.keeps_all else []
        shape = shape_of(plan, shared=bool(groups))
        if self.kv.marks and not self._lets_go_of_one_each(plan):
            return super().launch(plan)
        # A recomputed group may hold more than its policy's width until it has forked again.
        if shape is None or plan.tables.shape[1] > self._width:
            return super().launch(plan)
        draws = draws_of(plan, shape)
        # A stage may end before the head, and ranks put their logits together outside of the graph.
        if not self.model.draws or (self.model.split is not None and draws is Draws.TRUNCATED):
            draws = Draws.NONE
        captured = self._graphs.get((shape, draws))
        if captured is None and (shape, draws) in self._met:
            captured = self._capture(shape, draws)
        self._move_blocks(plan)
        count = len(plan.draw_rows)
        buffers = self._host_buffers[self._turn]
        self._turn = (self._turn + 1) % len(self._host_buffers)
        buffers.done.synchronize()  # its last copy was made depth + 2 steps ago
        self._send(plan, buffers, shape, draws, groups)
        received = self._received(plan.num_tokens)
        if received is not None:
            self._entering[: plan.num_tokens].copy_(received)
        if captured is None:
            self._met.add((shape, draws))
            result = self.step(shape, draws)
        else:
            graph, result = captured
            graph.replay()
        if not self.model.draws:
            buffers.done.record()
            return self._give_on(result[: plan.num_tokens])
        if draws is Draws.NONE:
            buffers.done.record()
            if shape.chunks or np.array_equal(plan.draw_rows, np.arange(len(plan.seq_ids))):
                return self._draw(plan, result[:count])
            return self._draw(plan, result[to_device(plan.draw_rows, self.device, torch.int64)])
        buffers.drawn[:count].copy_(result[:count], non_blocking=True)
        buffers.done.record()
        return GraphPending(buffers, count)

    def _lets_go_of_one_each(self, plan: StepPlan) -> bool:
        """With heavy hitters: whether all rows are decodes that draw, and none sees more than the budget, as the end of a prompt may."""
        places = plan.starts if plan.num_left_out is None else plan.starts - plan.num_left_out
        every = plan.num_tokens == len(plan.seq_ids) == len(np.unique(plan.draw_rows))
        return every and int(places.max(initial=0)) < self.kv.retention.budget

    def _send(
        self, plan: StepPlan, buffers: HostBuffers, shape: Shape, draws: Draws, groups: list[tuple[list[int], int]]
    ) -> None:
        """Bring the step to the device: one copy for all integers, one more if the graph draws by temperature."""
        inputs = views(buffers.inputs.numpy(), shape, self._width)
        used = fill(inputs, plan, self.kv.block_size, self._dummy_slot, groups)
        end = size_of(shape, self._width) - (shape.decodes - used) * self._width
        self._inputs[:end].copy_(buffers.inputs[:end], non_blocking=True)
        if plan.sampling is not None and draws in (Draws.WARM, Draws.TRUNCATED):
            count, sampling = len(plan.draw_rows), buffers.sampling.numpy()
            sent = 2 if draws is Draws.WARM else len(SAMPLING_INPUTS)
            for row, name in zip(sampling[:sent], SAMPLING_INPUTS, strict=False):
                row[:count] = getattr(plan.sampling, name)
            self._sampling[:sent].copy_(buffers.sampling[:sent], non_blocking=True)

    def _forward(self, inputs: StepInputs) -> Tensor:
        """As TorchRunner's, for the steps that are not replayed."""
        hidden, norm = self._hidden(inputs, self._received(len(inputs.token_ids))), self.model.norm
        return rms_norm(hidden, norm.weight, norm.eps) if self.model.draws else hidden

    def _hidden(self, inputs: StepInputs, received: Tensor | None) -> Tensor:
        """Hidden states before the last norm, [tokens, hidden_size]; keys and values are written on the way, rotated while they are.

        received: of the stage before, in place of embeddings.
        """
        angles = self._angles
        if self.kv.retention.sinks:  # a row for each token of the step, behind that of position 0
            inputs, positions = self.kv.with_sinks(inputs, self.model.frequencies), inputs.positions
            angles = angle_rows(self.model.frequencies, torch.cat((torch.zeros_like(positions[:1]), positions)))
            inputs = inputs._replace(positions=torch.arange(1, len(angles), dtype=torch.int32, device=self.device))

        def attention(layer: Layer, heads: Tensor) -> Tensor:
            query = self.kv.rope_write(layer, heads, inputs, angles)
            return self.kv.attend(layer.index, query, inputs)

        embedding, split = self.model.embedding, self.model.split
        if received is not None:
            embedded = received
        elif split is None:
            embedded = embed_tokens(embedding, inputs.token_ids, self._newest, inputs.batch_indices)
        else:
            newest = self._newest.index_select(0, inputs.batch_indices).clamp(min=0)
            embedded = split.embed(embedding, torch.where(inputs.token_ids >= 0, inputs.token_ids, newest))
        return self.model.run_layers(embedded, attention)

    def step(self, shape: Shape, draws: Draws) -> Tensor:
        """What a graph holds: one step of what lies in the inputs. Returns the drawn ids, [rows], or the logits, [rows, vocab]: of each
        decode in its row, or, where there are chunks, of each draw.
        """
        inputs = views(self._inputs, shape, self._width)
        enters = self.pipe is not None and self.pipe.before is not None
        hidden = self._hidden(inputs, self._entering[: shape.tokens].clone() if enters else None)
        if not self.model.draws:
            return hidden
        drawn_for = inputs.batch_indices
        if shape.draws:
            hidden, drawn_for = hidden.index_select(0, inputs.draw_tokens), inputs.draw_indices
        logits = self.model.head(hidden, norm=self.model.norm)
        if draws is Draws.NONE:
            return self._all_logits()[: len(logits)].copy_(logits)
        drawn = self._draw_here(logits, draws)
        if not drawn.is_meta:
            self._newest.index_copy_(0, drawn_for.long(), drawn)
        return drawn

    def _draw_here(self, logits: Tensor, draws: Draws) -> Tensor:
        """A token of each row, as `sample` draws it."""
        split = self.model.split
        if draws is Draws.GREEDY:
            return draw_tokens(logits) if split is None else split.most_likely(logits)
        temperature, uniform, *truncation = self._sampling[:, : len(logits)].unbind(0)
        if split is not None:
            return split.draw(logits, temperature, uniform)
        threshold = truncation_threshold(logits, temperature, *truncation) if draws is Draws.TRUNCATED else None
        return draw_tokens(logits, temperature, uniform, threshold)

    def _all_logits(self) -> Tensor:
        """Where the graphs that end in logits leave them, float32 [rows, vocab]: one place for all, read before the next replay."""
        if self._logits is None:
            self._logits = torch.empty(
                self._rows, self.model.config.vocab_size, dtype=torch.float32, device=self.device
            )
        return self._logits

    @property
    def _entering(self) -> Tensor:
        """Where hidden states of the stage before are put for the graphs, [most tokens, hidden_size]."""
        if self._hidden_in is None:
            most = max(MOST_TOKENS, self._rows)
            size, dtype = self.model.config.hidden_size, self.model.dtype
            self._hidden_in = torch.zeros(most, size, dtype=dtype, device=self.device)
        return self._hidden_in

    def _capture(self, shape: Shape, draws: Draws) -> tuple[torch.cuda.CUDAGraph, Tensor] | None:
        """Capture the graph of a shape that has run once, so that all its kernels are there; None where the memory is short. Ranks that
        share the model must capture alike, so there a shortage is an error.

        Nothing runs meanwhile, and what lies in the inputs does not matter. torch.cuda.graph would collect garbage and give torch's free
        memory back first, which the next large step would ask for again.
        """
        if (shape, draws) in self._too_large:
            return None
        try:
            captured = self._captured(shape, draws)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()  # what torch holds without using it is not there for graphs
            try:
                captured = self._captured(shape, draws)
            except torch.OutOfMemoryError:
                if self.model.split is not None:
                    raise
                self._too_large.add((shape, draws))
                return None
        self._graphs[shape, draws] = captured
        return captured

    def _captured(self, shape: Shape, draws: Draws) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        self._capturing.wait_stream(current)
        # NCCL has threads of its own, which may ask the device something meanwhile.
        mode = "global" if self.model.split is None else "thread_local"
        with torch.cuda.stream(self._capturing):
            graph.capture_begin(pool=self._memory, capture_error_mode=mode)
            try:
                result = self.step(shape, draws)
            finally:
                graph.capture_end()
        current.wait_stream(self._capturing)
        return graph, result

    @torch.inference_mode()
    def capture_ahead(self, seconds: float, progress: Progress | None = None) -> int:
        """Capture graphs of decodes alone before they are asked for, for so long: from one row up, the most likely draws first. Returns how
        many.
        """
        alone, _ = every_shape(self._most_decodes)
        wanted = [
            (shape, draws)
            for draws in (Draws.GREEDY, Draws.TRUNCATED, Draws.WARM)
            for shape in alone
            if not shape.tiles
        ]
        end = time.perf_counter() + seconds
        for done, (shape, draws) in enumerate(wanted):
            if time.perf_counter() > end:
                return done
            if progress is not None:
                progress("capturing graphs", done, len(wanted))
            if (shape, draws) not in self._graphs:
                self._run_padding(shape, draws)
                self._capture(shape, draws)
        return len(wanted)

    def _run_padding(self, shape: Shape, draws: Draws) -> None:
        """Run a shape over inputs of padding alone, which writes nothing that anybody reads, on the stream that captures."""
        inputs = views(self._inputs, shape, self._width)
        self._inputs.zero_()
        inputs.slot_mapping.fill_(-1)
        inputs.batch_indices.fill_(self._dummy_slot)
        inputs.draw_indices.fill_(self._dummy_slot)
        self._capturing.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._capturing):
            self.step(shape, draws)
        torch.cuda.current_stream().wait_stream(self._capturing)
        self._met.add((shape, draws))


def draws_of(plan: StepPlan, shape: Shape) -> Draws:
    """What the step's graph is to end in. It draws itself where nothing but tokens is asked for; among decodes alone, only if every row
    draws one token, its own next one.
    """
    if not shape.chunks and not (
        len(plan.draw_rows) == len(plan.seq_ids) and np.array_equal(plan.draw_slots, plan.slots)
    ):
        return Draws.NONE
    if plan.top_logprobs >= 0 or plan.adjustments:
        return Draws.NONE
    if plan.sampling is None:
        return Draws.GREEDY
    return Draws.TRUNCATED if is_truncated(plan.sampling) else Draws.WARM
