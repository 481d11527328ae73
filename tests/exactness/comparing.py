"""Token for token against a reference, up to the first place where the reference's two best logits are closer than the margin."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minipaged.assembly import build_engine
from minipaged.config import CacheConfig, EngineConfig, SamplingParams
from minipaged.engine import Engine
from minipaged.model.loading.tokenizer import ByteTokenizer
from minipaged.model.loading.weights import load_model, open_checkpoint
from minipaged.model.loading.zoo import LoadedModel
from minipaged.scheduling.request import RequestOutput

MARGIN = 1e-3


@dataclass(frozen=True)
class Answer:
    """What the reference drew, and at which drawn token (if any) its two best logits first came closer than the margin."""

    tokens: list[int]
    sure: int  # the first `sure` tokens must be equal


def reference_answer(model: Any, prompt: list[int], max_tokens: int, eos: tuple[int, ...] = ()) -> Answer:
    """transformers' own greedy generate."""
    done = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        do_sample=False,
        max_new_tokens=max_tokens,
        eos_token_id=list(eos) or None,
        pad_token_id=0,
        repetition_penalty=1.0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = done.sequences[0, len(prompt) :].tolist()
    sure = len(tokens)
    for i, logits in enumerate(done.logits):
        best = logits[0].topk(2).values
        if float(best[0] - best[1]) < MARGIN:
            sure = i
            break
    return Answer(tokens, sure)


def engine_on(loaded: LoadedModel, *, blocks: int = 400, block_size: int = 16, **limits: Any) -> Engine:
    """A float32 CPU engine with a pool of its own."""
    cache = {k: limits.pop(k) for k in ("enable_prefix_caching", "num_host_blocks", "watermark") if k in limits}
    config = EngineConfig(max_model_len=loaded.config.max_position, **limits)
    pool = CacheConfig(num_blocks=blocks, block_size=block_size, **cache)
    return build_engine(loaded, pool, config, device=torch.device("cpu"), dtype="float32")


def load_tiny(folder: Path) -> LoadedModel:
    """A saved network without a tokenizer of its own."""
    checkpoint = open_checkpoint(folder)
    model = load_model(checkpoint, dtype=torch.float32, device=torch.device("cpu")).pack()
    return LoadedModel(checkpoint.config, model, ByteTokenizer(checkpoint.config.vocab_size))


def run(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> list[RequestOutput]:
    """All prompts in one batch, to the end."""
    outputs = [engine.ask(prompt, params) for prompt in prompts]
    while engine.has_work:
        engine.step()
    return outputs


def assert_equal(outputs: list[RequestOutput], answers: list[Answer]) -> int:
    """Every output equals its answer as far as the reference is sure; returns how many comparisons were cut short."""
    cut = 0
    for i, (output, answer) in enumerate(zip(outputs, answers, strict=True)):
        assert output.error is None, output.error
        drawn = output.outputs[0].token_ids
        assert drawn[: answer.sure] == answer.tokens[: answer.sure], f"prompt {i} differs from the reference"
        if answer.sure == len(answer.tokens):
            assert len(drawn) == len(answer.tokens)
        cut += answer.sure < len(answer.tokens)
    assert cut <= len(answers) // 2, f"{cut} of {len(answers)} comparisons were cut short"
    return cut


def assert_pool_is_empty(engine: Engine) -> None:
    """Nothing is held once all is done."""
    usage = engine.scheduler.manager.usage()
    assert usage.referenced == 0
    assert usage.free + usage.null == usage.total
