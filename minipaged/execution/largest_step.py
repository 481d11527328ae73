"""The largest step that an engine may be asked for, and what it takes beside the weights and the KV pool: measured, not estimated.

A pool that takes nearly all of a GPU's memory must leave room for a step's activations, logits and draws. So before the pool is made, one
such step runs over a pool of two blocks, and the allocator tells its peak.
"""

from __future__ import annotations

import numpy as np
import torch

from minipaged.config import EngineConfig
from minipaged.execution.eager import TorchRunner
from minipaged.scheduling.plan import SamplingColumns, StepPlan


def largest_step(config: EngineConfig) -> StepPlan:
    """As many tokens and draws as a step may have, every draw truncated and its log-probability wanted; all in the null block."""
    rows = min(config.max_num_seqs, config.max_num_batched_tokens)
    tokens = min(config.max_num_batched_tokens, rows * config.max_model_len)
    lengths = np.full(rows, tokens // rows, np.int32)
    lengths[: tokens % rows] += 1
    every = np.arange(rows, dtype=np.int32)
    sampling = SamplingColumns(
        temperature=np.ones(rows, np.float32),
        top_p=np.full(rows, 0.9, np.float32),
        top_k=np.zeros(rows, np.int32),
        min_p=np.zeros(rows, np.float32),
        uniform=np.full(rows, 0.5),
    )
    return StepPlan(
        step=0,
        swap_outs=(),
        swap_ins=(),
        copies=(),
        seq_ids=every.astype(np.int64),
        slots=every,
        starts=np.zeros(rows, np.int32),
        lengths=lengths,
        token_ids=np.zeros(tokens, np.int32),
        tables=np.zeros((rows, int(lengths.max())), np.int32),  # a block holds at least one token
        draw_rows=every,
        draw_slots=every,
        sampling=sampling,
        top_logprobs=1,
    )


def peak_bytes(runner: TorchRunner, config: EngineConfig) -> int:
    """Bytes that the largest step takes at its peak, on a CUDA device. The runner's pool may have two blocks."""
    torch.cuda.synchronize(runner.device)
    torch.cuda.reset_peak_memory_stats(runner.device)
    before = torch.cuda.memory_allocated(runner.device)
    runner.launch(largest_step(config)).tokens()
    return torch.cuda.max_memory_allocated(runner.device) - before
