"""What one step does, as integers and arrays only, so that a plan can travel to another process or rank; and who runs it.

Rows are the sequences of this step. Row r computes positions [starts[r], starts[r] + lengths[r]) of sequence seq_ids[r]; its tokens lie in
token_ids, row after row. Draws are the tokens to sample: draw d reads the logits after the last token of row draw_rows[d].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]
LongArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
Pairs = tuple[tuple[int, int], ...]

# A token id that the host does not know yet: the one that this row's slot drew in the newest launched step.
IN_FLIGHT = -1


class SamplingColumns(NamedTuple):
    """How each draw samples, one entry a draw. None in a plan means: every draw is greedy, with nothing else asked."""

    temperature: FloatArray  # 0: greedy
    top_p: FloatArray
    top_k: IntArray  # 0: all
    min_p: FloatArray
    uniform: npt.NDArray[np.float64]  # one number in [0, 1) from the stream (seed, sample index, position)


class LogitAdjustments(NamedTuple):
    """What is done to the logits of one draw before it samples, in this order."""

    allowed: tuple[int, ...] | None = None  # nothing else can be drawn
    banned: tuple[int, ...] = ()  # cannot be drawn: stop tokens before min_tokens, the last tokens of bad words
    bias: tuple[tuple[int, float], ...] = ()  # (token, what is added)
    seen: tuple[
        int, ...
    ] = ()  # what the prompt and the answer have: divided by `repetition` if positive, else multiplied
    repetition: float = 1.0
    drawn: tuple[
        tuple[int, int], ...
    ] = ()  # (token, how often the answer has it): less `presence`, and `frequency` each time
    presence: float = 0.0
    frequency: float = 0.0
    # Where a grammar says what may come: bit t % 8 of byte t // 8 is set if token t may. Beside `allowed`: both must let a token pass.
    mask: bytes | None = None


class PromptQuery(NamedTuple):
    """Wanted: the log-probabilities of `targets`, the prompt tokens that follow the first positions of a row."""

    row: int
    targets: tuple[int, ...]
    top: int  # how many of the best tokens besides


@dataclass(frozen=True, slots=True, eq=False)
class StepPlan:
    """One step. Executed in this order: swap_outs, swap_ins, copies, KV writes and attention, draws."""

    step: int
    swap_outs: Pairs  # (device block, host block)
    swap_ins: Pairs  # (host block, device block)
    copies: Pairs  # (source, destination)
    seq_ids: LongArray  # [rows]
    slots: IntArray  # [rows] a small number that stays with the sequence while it runs: its place in persistent buffers
    starts: IntArray  # [rows] first position computed: num_computed before the step
    lengths: IntArray  # [rows] tokens computed, at least 1
    token_ids: IntArray  # [sum(lengths)]; IN_FLIGHT where the host does not know the token
    tables: IntArray  # [rows, width] physical blocks, released entries left out, 0 past the end
    draw_rows: IntArray  # [draws]
    draw_slots: IntArray  # [draws] the slot that the drawn token belongs to (differs from the row's when samples fork)
    sampling: SamplingColumns | None
    top_logprobs: int = -1  # -1: none; 0: the drawn token's; k: the k best too (beams: 2 * width)
    prompt_queries: tuple[PromptQuery, ...] = ()  # rows whose prompt log-probabilities are wanted
    adjustments: tuple[LogitAdjustments | None, ...] = ()  # one a draw; () if none has any
    num_left_out: IntArray | None = (
        None  # [rows] tokens before each first one that its table leaves out; None: nowhere any
    )

    @property
    def num_tokens(self) -> int:
        """Tokens computed in this step."""
        return len(self.token_ids)


class PromptLogprobs(NamedTuple):
    """The answer to a PromptQuery: entry i is about the token after position start + i."""

    start: int
    chosen: FloatArray  # [n] log-probability of the token that follows
    ranks: IntArray  # [n] 1 is the most likely
    top_ids: IntArray  # [n, k]
    top_values: FloatArray  # [n, k]


@dataclass(frozen=True, slots=True, eq=False)
class StepTokens:
    """What a launched step drew, on the host."""

    token_ids: IntArray  # [draws]; -1 where nothing could be drawn: the logits are NaN, or all of them -inf
    logprobs: FloatArray | None = None  # [draws] log-softmax of the raw logits at the drawn token
    ranks: IntArray | None = None  # [draws]
    top_ids: IntArray | None = None  # [draws, k], most likely first
    top_logprobs: FloatArray | None = None  # [draws, k]
    prompt_logprobs: dict[int, PromptLogprobs] | None = None  # by row


# ---- who runs it: execution/eager.py, execution/graphs.py, the simulated runner


class Pending(Protocol):
    """A launched step."""

    def tokens(self) -> StepTokens:
        """Wait for the step and return what it drew."""
        ...


class Runner(Protocol):
    """Runs plans in the order they are launched: swap-outs, swap-ins, copies, then KV writes and attention layer by layer, then draws.

    A layer writes the keys and values of all tokens of the step before any of them attends.

    This is also where work can be spread over devices: a runner may send a plan to other processes instead of running it. A
    tensor-parallel runner sends every plan to all ranks, each of which has its heads of the KV pool under the same block ids, and reads
    one rank's tokens. A pipeline-parallel runner sends it to the first stage and reads the last one's tokens; the engine then keeps as
    many steps in flight as there are stages.
    """

    def num_blocks(self) -> int:
        """Blocks in the device pool, the null block included; the same on all ranks."""
        ...

    def launch(self, plan: StepPlan) -> Pending:
        """Start a step; returns before it is done where the device allows."""
        ...
