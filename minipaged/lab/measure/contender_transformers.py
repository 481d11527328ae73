"""transformers as a contender: `generate` on one padded batch for batch:N, its continuous batching for the other workloads.

It is slow at these sizes, so a workload is cut to its first 64 requests and timed once after its first pass; the row says how many ran.
Each pass has a cache of its own, so that no prefix is known from the pass before.
"""

from __future__ import annotations

from typing import Any

from minipaged.lab.measure.engine import Asked, ContenderMissingError, Job, Runs
from minipaged.lab.simulation.workloads import TimedRequest
from minipaged.model.loading.hub_shape import hub_config
from minipaged.model.loading.placement import choose_device, choose_dtype
from minipaged.model.loading.shapes import shape

MOST_REQUESTS = 64
WAIT_SECONDS = 120.0  # for one more answer, before it counts as stuck


def load(name: str, job: Job) -> Runs:
    """transformers on the job's shape. ContenderMissingError if it is not installed."""
    try:
        import transformers
    except (ImportError, OSError) as error:
        raise ContenderMissingError(f"transformers cannot be imported: {error}") from None
    import torch

    device = choose_device(job.device)
    words = hub_config(shape(job.model))
    config = transformers.AutoConfig.for_model(words.pop("model_type"), **words)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=choose_dtype("auto", device))
    model.eval()
    generation = model.generation_config
    generation.eos_token_id, generation.pad_token_id, generation.use_cache = None, 0, True

    def answer(workload: str, asked: Asked) -> int:
        generation.do_sample, generation.temperature = asked.temperature > 0, asked.temperature or None
        generation.top_p = asked.top_p if asked.temperature > 0 else None
        with torch.no_grad():  # not inference mode: in 5.17 the thread of its continuous batching is outside of it
            run = _batch if workload.startswith("batch:") else _continuous
            return run(model, asked.requests)

    return Runs(answer, most_requests=MOST_REQUESTS, repeats=1)


def _batch(model: Any, asked: list[TimedRequest]) -> int:
    """One call of generate: all prompts and answers of batch:N are of one length."""
    import torch

    (count,) = {n for _, n in asked}
    prompts = torch.tensor([prompt for prompt, _ in asked], device=model.device)
    out = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=count, min_new_tokens=count)
    return int(out.shape[0] * (out.shape[1] - prompts.shape[1]))


def _continuous(model: Any, asked: list[TimedRequest]) -> int:
    """Its continuous batching, one request each, as its own `generate_batch` does but with lengths of their own."""
    tokens = 0
    with model.continuous_batching_context_manager(generation_config=model.generation_config) as manager:
        for prompt, count in asked:
            manager.add_request(prompt, max_new_tokens=count, eos_token_id=-1)
        for _ in asked:
            result = None
            while result is None or not result.is_finished():
                result = manager.get_result(timeout=WAIT_SECONDS)
                if result is None:
                    raise RuntimeError(f"continuous batching gave no answer for {WAIT_SECONDS:g} s")
            if result.error is not None:
                raise RuntimeError(f"continuous batching failed: {result.error}")
            tokens += len(result.generated_tokens)
    return tokens
