"""Lists the variants of kernels that engines need on an H100, as JSON. Run by test_variants.py: Triton must not interpret here."""

from __future__ import annotations

import json
import random
import sys
from collections import Counter

import torch

from minipaged.config import CacheConfig, EngineConfig
from minipaged.execution.compile_ahead import Deployment, deployment_of, plan_of, runner_on_shapes, variants_of
from minipaged.execution.eager import TorchRunner
from minipaged.execution.graphs import Draws, every_shape
from minipaged.kernels.launch_table import H100
from minipaged.kernels.variants import key_of, recording
from minipaged.model.loading.shapes import shape

STEPS = 60  # drawn at random for each engine


@torch.inference_mode()
def surprises(deployed: Deployment, rng: random.Random) -> list[str]:
    """Kernels that steps of all sorts launch and that variants_of has not named."""
    known = {key_of(each.function, each.arguments, each.options) for each in variants_of(deployed)}
    limits = deployed.engine
    with recording(deployed.gpu) as found:
        runner = runner_on_shapes(deployed)
        for _ in range(STEPS):
            context = rng.randint(2, limits.max_model_len)
            rows = rng.randint(0, limits.max_num_seqs - 1)
            left = max(2, limits.max_num_batched_tokens - rows)
            chunks = [max(2, left // n) for n in [rng.randint(1, 9)] for _ in range(n)]
            lengths = [1] * rows + [min(chunk, context) for chunk in chunks][: limits.max_num_seqs - rows]
            TorchRunner.launch(runner, plan_of(lengths, context, deployed.cache.block_size))
        alone, mixed = every_shape(limits.max_num_seqs)
        for captured in rng.sample(alone + mixed, 20):
            runner.step(captured, rng.choice(list(Draws)))
    return [each.name for each in found if key_of(each.function, each.arguments, each.options) not in known]


def main() -> None:
    rng = random.Random(0)
    for name, context, tokens in json.loads(sys.argv[1]):
        limits = EngineConfig(max_model_len=context, max_num_batched_tokens=tokens)
        deployed = deployment_of(shape(name), limits, CacheConfig(), "bfloat16", H100, 70 << 30)
        assert Deployment.from_json(deployed.to_json()) == deployed
        found = variants_of(deployed)
        assert all(each.options.get("launch_pdl", False) == each.options.get("DEPENDENT", False) for each in found)
        line = {"name": name, "variants": Counter(each.name for each in found), "surprises": surprises(deployed, rng)}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
