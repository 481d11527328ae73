"""What a request must be to be served here: each refusal says why, and what would do."""

from __future__ import annotations

from collections.abc import Container
from typing import TYPE_CHECKING, Any

from minipaged.config import LOGIT_CHANGES, EngineConfig, SamplingParams
from minipaged.errors import RequestError
from minipaged.memory.retention import KEEP_ALL, Retention
from minipaged.memory.types import Admission
from minipaged.scheduling.request import Request

if TYPE_CHECKING:
    from minipaged.memory.block_manager import BlockManager


def check_request(
    request: Request, config: EngineConfig, manager: BlockManager, block_size: int, taken: Container[int]
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
    if request.num_prompt >= config.max_model_len:
        raise RequestError(
            f"the prompt has {request.num_prompt} tokens; this engine's context holds {config.max_model_len}, "
            f"at least one of them for the answer"
        )
    if longest > config.max_model_len:
        raise RequestError(
            f"prompt ({request.num_prompt}) + max_tokens ({params.max_tokens}) = {longest} tokens exceed the context of "
            f"{config.max_model_len}: max_tokens may be at most {config.max_model_len - request.num_prompt}"
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
        blocks = retention.most_blocks_of_request(request.num_prompt, params.max_tokens, width, block_size, chunk)
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
            f"the request may need {blocks} blocks ({width} x {longest} tokens{kept}, {block_size} a block); "
            f"the pool has {usable}: shorten it, lower {lower}, or raise num_blocks"
        )
