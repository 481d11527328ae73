"""What a model computes under a retention policy, as its definition says it: token by token, over no pages at all.

An engine is watched while it runs: the hidden state of every position of every step must be the definition's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from minipaged.config import EngineConfig, ModelConfig, SamplingParams
from minipaged.engine import Engine
from minipaged.execution.eager import TorchRunner
from minipaged.execution.paged_kv import PagedKV
from minipaged.execution.step_inputs import StepInputs, token_order
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


class WatchedRunner(TorchRunner):
    """Keeps the hidden states of every row that it computes, with the sequence that it belongs to."""

    scheduler: Scheduler

    def __init__(self, model: Llama, kv: PagedKV, max_num_seqs: int) -> None:
        super().__init__(model, kv, max_num_seqs)
        self.seen: list[tuple[Sequence, int, Tensor]] = []
        self.widest = 0  # entries of the longest table

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
