"""The registry of compiled variants: how many each kernel has, and that no step needs one that is not in it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
ENGINES = [  # shape, context, tokens a step
    ("llama-3-8b", 4096, 8192),
    ("llama-3-8b", 8192, 2048),
    ("llama-7b", 2048, 8192),
    ("llama-3.2-1b", 8192, 2048),
    ("qwen2.5-1.5b", 32768, 2048),
    ("qwen3-0.6b", 2048, 8192),
    ("smollm2-135m", 8192, 2048),
]
# Variants of each kernel in one engine, at most. Each costs a second or more of a processor at the first start: one more needs a reason.
BUDGET = {
    "_decode_kernel": 8,  # rows whole, or cut: room for 1, 32 or 256 rows; few long rows are launched plainly; behind common pages
    "shared_kernel": 3,  # common pages in 4, 8 or 16 parts
    "reduce_kernel": 4,  # no common pages; 4, 8 or 16 parts of them
    "_prefill_kernel": 2,  # short and long contexts
    "_hopper_prefill_kernel": 2,  # short and long contexts
    "_one_row_kernel": 5,  # qkv, output, gate and up, down, head
    "_few_rows_kernel": 2,  # output, down
    "_parts_kernel": 6,  # greedy, drawn, truncated; from a graph's logits, from adjusted ones
    "_token_kernel": 6,
    "_threshold_kernel": 2,
    "_step_kernel": 1,  # the search for few rows, in a graph alone
    "_found_kernel": 1,
    "_rope_write_kernel": 1,
    "_norm_kernel": 1,
    "_silu_mul_kernel": 1,
    "_embed_kernel": 1,
    "_copy_kernel": 1,
}
TOTAL = 45
NOT_COUNTED = {
    "_write_kernel",  # rope_write_kv does its work where graphs run
    "_dequantize_kernel",  # caches of codes
    "_packed_one_row_kernel",  # packed weights: compiled when they are first used
    "_packed_rows_kernel",
    "_packed_tile_kernel",
    "_raw_scores_kernel",  # heavy hitters: the same
    "_keep_kernel",
}


def in_a_process(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Triton here interprets; there it does not."""
    pytest.importorskip("triton")
    kept = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "MINIPAGED_KERNELS")}
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=kept | environment, capture_output=True, text=True, timeout=280
    )


@pytest.fixture(scope="module")
def told() -> list[dict[str, Any]]:
    done = in_a_process("-m", "tests.kernels.count_variants", json.dumps(ENGINES))
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_keeps_its_budget(told: list[dict[str, Any]]) -> None:
    for engine in told:
        over = {kernel: n for kernel, n in engine["variants"].items() if n > BUDGET[kernel]}
        assert not over, engine["name"]
        assert sum(engine["variants"].values()) <= TOTAL, engine["name"]
    most = {kernel: max(engine["variants"].get(kernel, 0) for engine in told) for kernel in BUDGET}
    assert most == BUDGET, "a budget that nobody uses up is too large"


def test_no_step_needs_a_variant_that_is_not_known_ahead(told: list[dict[str, Any]]) -> None:
    assert {engine["name"]: engine["surprises"] for engine in told} == {engine["name"]: [] for engine in told}


def test_every_kernel_is_in_the_registry() -> None:
    launched = {
        name
        for path in (ROOT / "kernels").rglob("*.py")
        for name in re.findall(r"^    (\w+_kernel)\[", path.read_text(), re.MULTILINE)
        + re.findall(r"^        (\w+_kernel)\[", path.read_text(), re.MULTILINE)
    }
    assert launched == set(BUDGET) | NOT_COUNTED


COMPILE = """
import sys
from minipaged.config import CacheConfig, EngineConfig
from minipaged.execution.compile_ahead import CompileAhead, deployment_of
from minipaged.kernels.launch_table import H100
from minipaged.model.loading.shapes import shape

deployed = deployment_of(shape("toy"), EngineConfig(max_num_seqs=2, max_model_len=64), CacheConfig(), "float16", H100)
heard = []
done = CompileAhead(deployed).wait(lambda *words: heard.append(words))
assert len(done) > 15 and not any(each.trouble for each in done), done
assert heard[-1] == ("compiling kernels", len(done), len(done))
assert CompileAhead(deployed).wait() == [], "the next start finds all of it"
"""


@pytest.mark.slow
def test_they_are_compiled_without_a_gpu_and_once(tmp_path: Path) -> None:
    done = in_a_process("-W", "error", "-c", COMPILE, TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list(tmp_path.rglob("*.cubin"))) > 15
    assert len(list(tmp_path.glob("minipaged-*"))) == 1
