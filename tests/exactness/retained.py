"""What a model computes under a retention policy, as its definition says it: token by token, over no pages at all.

An engine is watched while it runs: the hidden state of every position of every step must be the definition's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from minipaged.config import EngineConfig, ModelConfig, SamplingParams
from minipaged.engine import Engine
from minipaged.execution.eager import TorchRunner
from minipaged.execution.paged_kv import PagedKV
from minipaged.execution.step_inputs import StepInputs, token_order
from minipaged.lab.simulation.heavy_hitters import KeptSets, kept_sets
from minipaged.memory.block_manager import BlockManager
from minipaged.memory.retention import Retention
from minipaged.model.llama import Layer, Llama, rope_angles, rotate
from minipaged.scheduling.plan import Pending, StepPlan
from minipaged.scheduling.request import RequestOutput, Sequence
from minipaged.scheduling.scheduler import Scheduler

TINY = ModelConfig("tiny", 67, 32, 48, 3, 4, 2, 8, 4096)


def tiny_model(config: ModelConfig = TINY, seed: int = 0) -> Llama:
    """Weights so large that a mistake anywhere is seen in the hidden states."""
    return Llama.random(config, seed, torch.float32, "cpu", std=0.4)


def by_definition(model: Llama, token_ids: list[int], retention: Retention) -> Tensor:
    """Hidden states after the last norm, [T, hidden_size].

    Each query sees the first `sinks` tokens and the last `window` ones. With sinks, keys and query are rotated by their places among those
    (StreamingLLM, section 3.2: "positions within the cache"); without, by their positions in the text.
    """
    config, size = model.config, len(token_ids)

    def attention(layer: Layer, heads: Tensor) -> Tensor:
        query, key, value = layer.split(heads)
        if layer.query_norm is not None and layer.key_norm is not None:
            query, key = layer.query_norm(query), layer.key_norm(key)
        windows = [w for w in (retention.window, config.window_of(layer.index)) if w is not None]
        window, group = min(windows, default=size), layer.num_heads // layer.num_kv_heads
        key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
        at = torch.arange(size)
        kept = (at <= at[:, None]) & ((at > at[:, None] - window) | (at < retention.sinks))  # [queries, keys]
        places = kept.cumsum(dim=1) - 1 if retention.sinks else at.expand(size, size)  # of each key, for each query
        keys = key.expand(size, *key.shape)  # [queries, keys, heads, head_dim]
        if layer.rotates:
            cos, sin = rope_angles(model.frequencies, at, model.dtype)
            keys = rotate(keys, cos[places], sin[places])
            query = rotate(query, cos[places.diagonal()], sin[places.diagonal()])
        scores = torch.einsum("ihd,ijhd->hij", query, keys) * config.head_dim**-0.5
        return torch.einsum("hij,jhd->ihd", scores.masked_fill(~kept, -torch.inf).softmax(dim=-1), value)

    with torch.inference_mode():
        embedded = functional.embedding(torch.tensor(token_ids), model.embedding)
        hidden: Tensor = model.norm(model.run_layers(embedded, attention))
    return hidden


def heaviest_by_definition(
    model: Llama, token_ids: list[int], retention: Retention, num_prompt: int
) -> tuple[Tensor, list[list[KeptSets]]]:
    """As by_definition, for heavy hitters, with the sets of each layer and KV head: what one KV head keeps, the lab's simulation says."""
    config, found = model.config, list[list[KeptSets]]()

    def attention(layer: Layer, heads: Tensor) -> Tensor:
        query, key, value = layer.split(heads)
        if layer.query_norm is not None and layer.key_norm is not None:
            query, key = layer.query_norm(query), layer.key_norm(key)
        if layer.rotates:
            angles = rope_angles(model.frequencies, torch.arange(len(token_ids)), model.dtype)
            query, key = rotate(query, *angles), rotate(key, *angles)
        group, out = layer.num_heads // layer.num_kv_heads, torch.empty_like(query)
        found.append([])
        for head in range(layer.num_kv_heads):
            of_head = slice(head * group, (head + 1) * group)
            scores = torch.einsum("ihd,jd->hij", query[:, of_head], key[:, head]) * config.head_dim**-0.5
            sets = kept_sets(scores.numpy(), num_prompt, retention.heavy, retention.recent)
            found[-1].append(sets)
            weights = torch.from_numpy(sets.probabilities).to(value.dtype)
            out[:, of_head] = torch.einsum("hij,jd->ihd", weights, value[:, head])
        return out

    with torch.inference_mode():
        embedded = functional.embedding(torch.tensor(token_ids), model.embedding)
        hidden: Tensor = model.norm(model.run_layers(embedded, attention))
    return hidden, found


class WatchedRunner(TorchRunner):
    """Keeps the hidden states of every row that it computes, with the sequence that it belongs to."""

    scheduler: Scheduler

    def __init__(self, model: Llama, kv: PagedKV, max_num_seqs: int) -> None:
        super().__init__(model, kv, max_num_seqs)
        self.seen: list[tuple[Sequence, int, Tensor]] = []
        self.widest = 0  # entries of the longest table
        # Of heavy hitters, while `kept_by_engine` watches: sequence -> position -> layer -> KV head -> positions that stay behind it.
        self.kept: dict[int, dict[int, list[list[list[int]]]]] = {}

    def launch(self, plan: StepPlan) -> Pending:
        self._plan = plan
        self.widest = max(self.widest, plan.tables.shape[1])
        return super().launch(plan)

    def _forward(self, inputs: StepInputs) -> Tensor:
        plan, hidden = self._plan, super()._forward(inputs)
        _, firsts = token_order(plan)
        for row, seq_id in enumerate(plan.seq_ids.tolist()):
            states = hidden[int(firsts[row]) : int(firsts[row] + plan.lengths[row])].clone()
            sequence = self.scheduler.sequences.get(seq_id)
            if sequence is not None:  # one that has ended while this step was in flight draws what nobody reads
                self.seen.append((sequence, int(plan.starts[row]), states))
        return hidden


@contextmanager
def kept_by_engine(runner: WatchedRunner) -> Iterator[None]:
    """Meanwhile, what each row keeps is read from the cache after every step."""
    launch, kv = runner.launch, runner.kv

    def watched(plan: StepPlan) -> Pending:
        pending, draws = launch(plan), set(plan.draw_rows.tolist())
        for row, seq_id in enumerate(plan.seq_ids.tolist()):
            sequence = runner.scheduler.sequences.get(seq_id)
            if sequence is None:
                continue
            left_out = 0 if plan.num_left_out is None else int(plan.num_left_out[row])
            end = int(plan.starts[row] + plan.lengths[row])
            held = min(end - left_out, kv.retention.budget - 1) if row in draws else end - left_out
            slots = np.arange(held)
            blocks = torch.from_numpy(plan.tables[row, slots // kv.block_size].astype(np.int64))
            at = torch.from_numpy(slots % kv.block_size)
            runner.kept.setdefault(id(sequence), {})[end - 1] = [
                [sorted(marks.positions[blocks, head, at].tolist()) for head in range(marks.positions.shape[1])]
                for marks in kv.marks
            ]
        return pending

    runner.launch = watched  # type: ignore[method-assign]
    yield
    runner.launch = launch  # type: ignore[method-assign]


def engine_of(
    model: Llama,
    retention: Retention,
    *,
    block_size: int = 4,
    num_blocks: int = 200,
    num_host_blocks: int = 0,
    prefix_caching: bool = True,
    kept_as: str | None = None,
    **limits: Any,
) -> tuple[Engine, WatchedRunner]:
    """An engine over the model, and its runner."""
    config = EngineConfig(**{"max_model_len": 10_000, "max_num_seqs": 8, **limits})
    kv = PagedKV(
        *(model.config, num_blocks, block_size),
        num_host_blocks=num_host_blocks,
        dtype=model.dtype,
        kept_as=kept_as,
        retention=retention,
    )
    for tensor in kv.tensors.values():
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))  # what nobody has written is never read
    runner = WatchedRunner(model, kv, config.max_num_seqs)
    manager = BlockManager(
        num_blocks,
        block_size,
        num_host_blocks=num_host_blocks,
        prefix_caching=prefix_caching,
        watermark=0.0,
        retention=retention,
    )
    runner.scheduler = Scheduler(config, manager, block_size)
    return Engine(runner.scheduler, runner, vocab_size=model.config.vocab_size), runner


def run_watched(
    engine: Engine, asked: list[tuple[list[int], SamplingParams]], retention: Retention
) -> list[RequestOutput]:
    """Run to the end. After every step no sequence holds an entry that the policy would release (where every step is committed at once)."""
    scheduler = engine.scheduler
    outputs = [engine.ask(prompt, params) for prompt, params in asked]
    while engine.has_work:
        engine.step()
        for sequence in scheduler.sequences.values():
            if sequence.slot >= 0 and not sequence.request.to_fork and not scheduler.config.depth:
                table = scheduler.manager.table(sequence.seq_id)
                published = int(scheduler.batch.num_published[sequence.slot]) // scheduler.block_size
                spare = retention.spare(sequence.num_computed, scheduler.block_size)
                assert not any(table[spare.start : min(spare.stop, published)])
                assert all(table[: spare.start])
                assert all(table[spare.stop :])
    for output in outputs:
        assert output.error is None, output.error
    usage = scheduler.manager.usage()
    assert usage.referenced == 0
    return outputs


def assert_as_defined(runner: WatchedRunner, model: Llama, retention: Retention, most: float = 1e-3) -> None:
    """Every hidden state that was computed is the definition's."""
    sequences = {id(sequence): sequence for sequence, _, _ in runner.seen}
    expected = {key: by_definition(model, s.token_ids, retention) for key, s in sequences.items()}
    for sequence, start, states in runner.seen:
        wanted = expected[id(sequence)][start : start + len(states)]
        far = (states - wanted).abs().max().item()
        assert far < most, f"sequence {sequence.seq_id}, positions from {start}: {far:g} from the definition"
