"""This project's engine as a contender: LLM with the job's context and prefix cache, and as many sequences as the peers may run."""

from __future__ import annotations

from typing import Any

from minipaged.api import LLM
from minipaged.config import SamplingParams
from minipaged.lab.measure.engine import CONTEXTS, Asked, Job, Runs

STEP_TOKENS = 8192
PLAIN: dict[str, Any] = {"graphs": False, "overlap": 0}  # the oracle of the fast path


def make_llm(model: str, **settings: Any) -> LLM:
    """The engine as the benchmarks run it. Token ids out: nobody reads the text, so none is made, as the peers make none."""
    chosen = {
        "max_model_len": CONTEXTS[0],
        "enable_prefix_caching": False,
        "max_num_seqs": 256,
        "max_num_batched_tokens": STEP_TOKENS,
    }
    return LLM(model, **{**chosen, **settings})


def load(name: str, job: Job) -> Runs:
    """The fast path, or the plain one for minipaged-plain."""
    llm = make_llm(
        job.model,
        max_num_seqs=job.max_num_seqs,
        max_model_len=job.context,
        enable_prefix_caching=job.prefix_caching,
        device=job.device,
        weights=job.weights,
        kv_cache_dtype=job.kv_cache_dtype,
        tensor_parallel=job.tensor_parallel,
        pipeline_parallel=job.pipeline_parallel,
        **(PLAIN if name == "minipaged-plain" else {}),
    )

    return Runs(lambda workload, asked: answer_with(llm, asked), forget=llm.reset_prefix_cache)


def answer_with(llm: LLM, asked: Asked) -> int:
    """Generate all that is asked for; returns the output tokens."""
    params = [
        SamplingParams(temperature=asked.temperature, top_p=asked.top_p, max_tokens=n, ignore_eos=True)
        for _, n in asked.requests
    ]
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt, _ in asked.requests], params)
    return sum(output.request.sequences[0].num_output for output in outputs)
