"""What a request must be to be served here: each refusal says why, and what would do."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minipaged.config import LOGIT_CHANGES, EngineConfig, SamplingParams
from minipaged.errors import RequestError
from minipaged.memory.retention import KEEP_ALL, Retention
from minipaged.memory.types import Admission
from minipaged.scheduling.request import Request

if TYPE_CHECKING:
    from minipaged.memory.block_manager import BlockManager


@dataclass(frozen=True, slots=True)
class Room:
    """How long a sequence can become: `context` tokens, in a pool of `num_blocks` blocks of `block_size` slots (block 0 is nobody's).

    num_blocks: None where blocks are given back as a sequence grows, so that the pool sets no limit of this form.
    """

    context: int
    block_size: int
    num_blocks: int | None

    def most_tokens(self, num_prompt: int, width: int = 1) -> int:
        """How many tokens an answer to such a prompt can have, where `width` sequences share the prompt's full blocks; below 1: none."""
        if self.num_blocks is None:
            return self.context - num_prompt
        shared = num_prompt // self.block_size
        in_pool = (shared + max(0, self.num_blocks - 1 - shared) // width) * self.block_size
        return min(self.context, in_pool) - num_prompt


def check_request(
    request: Request, config: EngineConfig, manager: BlockManager, room: Room, taken: Container[int]
) -> None:
    """RequestError if the request can never be served. taken: request ids that are in use. Nothing is changed."""
    if not isinstance(request, Request):
        raise RequestError(f"a request must be a Request, not {request!r}")
    request.check()
    params = request.params
    if params.beam_width is not None:
        plain = SamplingParams()
        for name in ("stop", "min_tokens", *LOGIT_CHANGES):
            if getattr(params, name) != getattr(plain, name):
                raise RequestError(
                    f"{name} must keep its default with beam_width: beams are chosen by their scores alone"
                )
    width, longest = params.num_sequences, request.num_prompt + params.max_tokens
    if request.request_id in taken:
        raise RequestError(f"request id {request.request_id} is in use")
    if request.num_prompt >= room.context:
        raise RequestError(
            f"the prompt has {request.num_prompt} tokens; this engine's context holds {room.context}, "
            f"at least one of them for the answer"
        )
    if longest > room.context:
        raise RequestError(
            f"prompt ({request.num_prompt}) + max_tokens ({params.max_tokens}) = {longest} tokens exceed the context of "
            f"{room.context}: max_tokens may be at most {room.context - request.num_prompt}"
        )
    retention: Retention = getattr(manager, "retention", KEEP_ALL)
    if params.beam_width is not None and not retention.shares:
        raise RequestError(
            f"beam_width does not go with retention {retention}: each beam would copy its whole cache in every step; "
            "ask for samples (n), or leave retention out"
        )
    for name in ("max_num_seqs", "max_num_batched_tokens"):
        if width > getattr(config, name):
            raise RequestError(f"{width} sequences at once exceed {name} ({getattr(config, name)})")
    chunk = config.max_num_batched_tokens
    in_chunks: dict[str, Any] = {} if retention.window is None else {"chunk": chunk}
    if manager.can_admit(request.num_prompt, params.max_tokens, num_sequences=width, **in_chunks) is Admission.NEVER:
        blocks = retention.most_blocks_of_request(request.num_prompt, params.max_tokens, width, room.block_size, chunk)
        usable = manager.usage().total - 1
        kept, lower = "", "n"
        if retention.heavy:
            kept, lower = (
                f", of which {retention} is kept once the prompt of {request.num_prompt} is computed",
                "n or the budget",
            )
        elif retention.window is not None:
            kept = f", of which {retention} is kept, and {chunk} more are computed in a step"
            lower = "n, the window or max_num_batched_tokens"
        raise RequestError(
            f"the request may need {blocks} blocks ({width} x {longest} tokens{kept}, {room.block_size} a block); "
            f"the pool has {usable}: shorten it, lower {lower}, or raise num_blocks"
        )
