"""The trace's vocabulary: what changed in one step, as plain values that screen, recorder, tests, lessons and lab all read.

Knows nothing of engines, files or screens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from minipaged.memory.types import PoolBreakdown, Run

SCHEMA_MAJOR, SCHEMA_MINOR = 1, 0

# Bits of BlockPatch.flags
FLAG_CACHED, FLAG_PINNED, FLAG_COPIED, FLAG_NULL = 1, 2, 4, 8  # COPIED: a copy wrote this block in this very step
TIER_DEVICE, TIER_HOST = 0, 1


class Event(NamedTuple):
    """One thing that happened. Events stand in causal order.

    kind: a block event's (alloc free fork copy cache_hit publish evict swap_out swap_in release) or one of
    admit append preempt prune finish refuse abort knob. `cause` is the id of the event that led to it, -1 if none.
    """

    id: int
    kind: str
    cause: int
    sequence: int
    block: int
    other: int
    amount: int


@dataclass(frozen=True, slots=True, eq=False)
class BlockPatch:
    """Blocks whose state changed, as columns of equal length."""

    ids: npt.NDArray[np.int32]
    owner: npt.NDArray[np.int32]  # sequence that holds it (the earliest of several); -1: nobody
    refs: npt.NDArray[np.int32]
    fill: npt.NDArray[np.int32]  # slots whose KV is written
    flags: npt.NDArray[np.uint8]
    tier: npt.NDArray[np.uint8]
    group: npt.NDArray[np.int32]  # 0 today (layer groups, later)


class TablePatch(NamedTuple):
    """From entry `start` on, the sequence's block table now reads `ids` (what stood there before is gone)."""

    sequence: int
    group: int
    start: int
    ids: tuple[int, ...]
    tier: int = TIER_DEVICE


class SequencePatch(NamedTuple):
    """A sequence's new state. token_ids and text are what was added since its last patch; the rest replaces."""

    sequence: int
    request: int
    parent: int  # -1: none
    status: str  # waiting running swapped finished aborted refused
    num_computed: int
    num_cached: int
    num_prompt: int
    token_ids: tuple[int, ...]  # tokens added (the prompt at first)
    text: bytes  # UTF-8 added; the prompt's text at first
    score: float  # cumulative log-probability, nan if not tracked
    finish_reason: str  # "" while it lives


class Queues(NamedTuple):
    """Sequence ids by queue, in the order they are visited."""

    running: tuple[int, ...] = ()
    waiting: tuple[int, ...] = ()
    swapped: tuple[int, ...] = ()


class Stats(NamedTuple):
    """Counters and gauges after the step. Counts are since the start; *_blocks are now."""

    num_tokens: int = 0  # computed in this step
    num_drawn: int = 0  # sampled in this step
    total_blocks: int = 0  # null block included
    free_blocks: int = 0  # cached ones included
    cached_blocks: int = 0
    host_total: int = 0
    host_free: int = 0
    block_size: int = 0
    token_slots: int = 0  # device slots that hold a live token's KV, each physical slot once
    tail_slots: int = 0  # slots of referenced blocks that hold none (internal waste)
    shared_saved_blocks: int = 0  # table entries less distinct blocks: what sharing saves now
    copies: int = 0
    hit_tokens: int = 0
    queried_tokens: int = 0
    preemptions: int = 0
    swaps: int = 0
    generated_tokens: int = 0
    elapsed_ns: int = 0  # wall time of the step
    rank: int = 0
    stage: int = 0
    num_waiting: int = 0  # sequences not started; Queues names the first of them


@dataclass(frozen=True, slots=True, eq=False)
class StepDelta:
    """All that one step changed. `events` and `sequences` are tuples, or columns that read as tuples (rows.py)."""

    step: int
    t_ns: int
    events: Sequence[Event]
    blocks: BlockPatch
    tables: tuple[TablePatch, ...]
    sequences: Sequence[SequencePatch]
    queues: Queues
    stats: Stats


@dataclass(frozen=True, slots=True)
class ShadowDelta:
    """What another system would hold after this step, on the same traffic: accounting, not speed."""

    step: int
    system: str
    runs: tuple[Run, ...]
    stats: PoolBreakdown
