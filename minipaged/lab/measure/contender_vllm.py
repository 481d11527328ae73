"""vLLM as a contender: weights of its own drawing in the same shape, FlashAttention, CUDA graphs, no tokenizer."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from minipaged.lab.measure.engine import Asked, ContenderMissingError, Job, Runs
from minipaged.model.loading.hub_shape import hub_config
from minipaged.model.loading.shapes import shape

MEMORY_SHARE = 0.9  # of the GPU's, weights included


def load(name: str, job: Job) -> Runs:
    """vLLM on the job's shape. ContenderMissingError if it is not installed."""
    try:
        from vllm import LLM, SamplingParams
    except (ImportError, OSError) as error:
        raise ContenderMissingError(f"vllm cannot be imported: {error}") from None
    folder = tempfile.mkdtemp(prefix="minipaged-vllm-")
    Path(folder, "config.json").write_text(json.dumps(hub_config(shape(job.model))))
    llm = LLM(
        model=folder,
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        seed=0,
        max_model_len=job.context,
        max_num_seqs=job.max_num_seqs,
        gpu_memory_utilization=MEMORY_SHARE,
        enable_prefix_caching=job.prefix_caching,
        tensor_parallel_size=job.tensor_parallel,
        pipeline_parallel_size=job.pipeline_parallel,
        attention_config={"backend": "FLASH_ATTN"},
    )

    def answer(workload: str, asked: Asked) -> int:
        drawn = {"temperature": asked.temperature, "top_p": asked.top_p}
        params = [SamplingParams(**drawn, max_tokens=n, ignore_eos=True, detokenize=False) for _, n in asked.requests]
        prompts = [{"prompt_token_ids": prompt} for prompt, _ in asked.requests]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return Runs(answer, forget=llm.reset_prefix_cache)
