"""Compiles an engine's kernels before they are needed: in parallel, while the weights are loaded, into Triton's cache on disk.

Which variants these are, a one-layer copy of the network tells that has shapes but no weights (kernels/variants.py): it runs the steps
that the engine may be asked for. A process of its own does that, for it must hold neither the GPU nor this process's locks; it forks as
many workers as there are processors, and each takes the next variant from a common queue. A file in Triton's cache says that a list was
compiled whole, so the next start with the same settings and the same kernels starts no process.

Run as `python -m minipaged.execution.compile_ahead < DEPLOYMENT`; prints a JSON line for each variant.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from minipaged.config import DTYPE_BYTES, CacheConfig, EngineConfig, ModelConfig, Progress
from minipaged.execution.graphs import Draws, GraphRunner, every_shape
from minipaged.execution.largest_step import largest_step
from minipaged.execution.paged_kv import PagedKV
from minipaged.execution.sampler import sample
from minipaged.execution.step_inputs import inputs_of
from minipaged.kernels.launch_table import Gpu
from minipaged.model.llama import Llama
from minipaged.scheduling.plan import SamplingColumns, StepPlan

if TYPE_CHECKING:
    from minipaged.kernels.variants import Variant

MOST_WORKERS = 16
WORKER_BYTES = 1 << 30  # of memory that a worker may come to hold


@dataclass(frozen=True, slots=True)
class Deployment:
    """What decides which variants an engine needs. wide: whether a layer's keys may be 2^31 numbers or more, so that offsets are wider."""

    model: ModelConfig
    engine: EngineConfig
    cache: CacheConfig
    wide: bool
    dtype: str
    gpu: Gpu

    def to_json(self) -> str:
        """For the process that compiles, and for the name of what it has compiled."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Deployment:
        """The reverse."""
        told = json.loads(text)
        model, engine, cache, gpu = (told.pop(name) for name in ("model", "engine", "cache", "gpu"))
        shape: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in model.items()
        }
        return Deployment(
            ModelConfig(**shape), EngineConfig(**engine), CacheConfig(**cache), gpu=Gpu(tuple(gpu[0]), *gpu[1:]), **told
        )


def deployment_of(
    model: ModelConfig, engine: EngineConfig, cache: CacheConfig, dtype: str, gpu: Gpu, memory: int | None = None
) -> Deployment:
    """memory: bytes for the weights and a pool beside them, where cache.num_blocks is not known yet."""
    num_blocks = cache.num_blocks
    if memory is not None:
        left = memory - model.num_parameters() * DTYPE_BYTES[dtype]
        num_blocks = left // (model.kv_bytes_per_token(cache.kv_dtype(dtype)) * cache.block_size)
    wide = num_blocks * cache.block_size * model.num_kv_heads * model.head_dim >= 2**31
    # One layer launches what all of them do. Angles are data, and so is a tokenizer's end.
    one = replace(model, name="", num_layers=1, unrotated_layers=(), rope_scaling=None, eos_token_ids=())
    limits = EngineConfig(engine.max_num_seqs, engine.max_num_batched_tokens, engine.max_model_len)
    kept = CacheConfig(block_size=cache.block_size, kv_cache_dtype=cache.kv_cache_dtype)
    return Deployment(one, limits, kept, wide, dtype, gpu)


# ---- which variants


@torch.inference_mode()
def variants_of(deployed: Deployment) -> list[Variant]:
    """The variants that the engine may launch. Those that take longest to compile come first: they have the most parameters.

    Only the layers and the draws are run: for some other operations on shapes torch would import its compiler, which takes seconds.
    """
    from minipaged.kernels.variants import recording

    with recording(deployed.gpu) as variants:
        runner = runner_on_shapes(deployed)
        alone, mixed = every_shape(deployed.engine.max_num_seqs)
        for draws in Draws:
            for shape in (alone[0], alone[-1]):
                runner.step(shape, draws)
        for plan in (*_plans(deployed), largest_step(deployed.engine)):
            hidden = runner._forward(inputs_of(plan, deployed.cache.block_size, runner.device))
            runner.model.head(hidden[: len(plan.draw_rows)])
        for shape in alone + mixed:
            runner.step(shape, Draws.GREEDY)
        logits = torch.empty(
            1, deployed.model.vocab_size, device=runner.device
        )  # adjusted ones, and those of launched steps
        for top_p, temperature in ((1.0, 0.0), (1.0, 1.0), (0.9, 1.0)):
            sample(logits, _drawn(top_p, temperature))
        runner.kv.copy(((1, 1),))
    return sorted(variants, key=lambda variant: -len(variant.function.params))


def runner_on_shapes(deployed: Deployment) -> GraphRunner:
    """A runner of the network's first layer, without contents."""
    shapes, dtype = torch.device("meta"), getattr(torch, deployed.dtype)
    model = Llama(deployed.model, dtype=dtype, device=shapes)
    kv = PagedKV(
        deployed.model,
        2**31 if deployed.wide else 2,
        deployed.cache.block_size,
        dtype=dtype,
        kept_as=deployed.cache.kv_dtype(deployed.dtype),
        device=shapes,
    )
    return GraphRunner(model, kv, deployed.engine.max_num_seqs, deployed.engine.max_model_len)


def _plans(deployed: Deployment) -> Iterator[StepPlan]:
    """Steps that are launched kernel by kernel: chunks of every kind of length after contexts of every kind, with and without decodes."""
    longest, most, at_once = (
        deployed.engine.max_model_len, deployed.engine.max_num_batched_tokens, deployed.engine.max_num_seqs,
    )  # fmt: skip
    contexts = sorted({min(longest, n) for n in (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, longest)})
    decodes = sorted({min(n, at_once) for n in (1, 2, 32, 33, 64, 128, 256, at_once)})
    for context in contexts:
        chunk = min(context, most)
        for rows in {1, min(most // chunk, at_once), min(4, most // chunk, at_once)}:
            yield plan_of([chunk] * rows, context, deployed.cache.block_size)
        for count in decodes:
            if count + 2 <= most and count < at_once:
                yield plan_of([1] * count + [max(2, min(chunk, most - count))], context, deployed.cache.block_size)


def _drawn(top_p: float, temperature: float) -> SamplingColumns:
    one = np.ones(1, np.float32)
    return SamplingColumns(
        np.float32(temperature) * one, np.float32(top_p) * one, np.zeros(1, np.int32), 0 * one, np.zeros(1)
    )


def plan_of(lengths: list[int], context: int, block_size: int) -> StepPlan:
    """Rows of these lengths that end at `context`, all in the null block."""
    rows = len(lengths)
    every, computed = np.arange(rows, dtype=np.int32), np.array(lengths, np.int32)
    return StepPlan(
        step=0,
        swap_outs=(),
        swap_ins=(),
        copies=(),
        seq_ids=every.astype(np.int64),
        slots=every,
        starts=np.maximum(context - computed, 0),
        lengths=computed,
        token_ids=np.zeros(sum(lengths), np.int32),
        tables=np.zeros((rows, -(-context // block_size)), np.int32),
        draw_rows=every,
        draw_slots=every,
        sampling=None,
    )


# ---- the process that compiles


class _Target:
    """As much of Triton's driver as compiling asks for: no GPU is touched."""

    def __init__(self, capability: tuple[int, int]) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def main() -> None:
    """Compile what standard input asks for."""
    from triton.runtime import driver

    deployed = Deployment.from_json(sys.stdin.read())
    variants = variants_of(deployed)
    _tell({"variants": len(variants)})
    driver.set_active(_Target(deployed.gpu.capability))
    reading, writing = os.pipe()
    for index in range(len(variants)):  # numbers of 4 bytes: a pipe holds thousands of them
        os.write(writing, struct.pack("i", index))
    os.close(writing)
    children = []
    jobs: list[Callable[[], None]] = [partial(_work, variants, reading)] * min(workers(), len(variants))
    for job in (_make_utilities, *jobs):
        child = os.fork()
        if child == 0:
            job()
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


def workers() -> int:
    """How many processes may compile at a time: one a processor, as far as there is memory for them."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return max(1, min(MOST_WORKERS, processors, memory // WORKER_BYTES))


def _work(variants: list[Variant], queue: int) -> None:
    """Take numbers from the queue until it is empty. A variant that fails is left to the engine, which will say why."""
    while number := os.read(queue, 4):
        variant = variants[struct.unpack("i", number)[0]]
        started = time.perf_counter()
        trouble = ""
        try:
            _make_launcher(variant.compile())
        except Exception as error:
            trouble = f"{type(error).__name__}: {error}"
        _tell({"kernel": variant.name, "seconds": round(time.perf_counter() - started, 3), "trouble": trouble})


def _make_launcher(compiled: Any) -> None:
    """Triton to 3.6 has a C compiler make a launcher for every signature; it comes into the same cache."""
    from triton.backends.nvidia import driver

    if hasattr(driver, "make_launcher"):
        with contextlib.suppress(AssertionError):  # no CUDA library here
            driver.CudaLauncher(compiled.src, compiled.metadata)


def _make_utilities() -> None:
    """The part of Triton's driver that a C compiler makes, once a machine."""
    from triton.backends.nvidia import driver

    with contextlib.suppress(Exception):  # no CUDA library here: the variants are for another machine
        driver.CudaUtils()


def _tell(words: dict[str, Any]) -> None:
    """One line, in one write: workers share the output."""
    os.write(sys.stdout.fileno(), (json.dumps(words) + "\n").encode())


# ---- the engine's side


class Compiled(NamedTuple):
    """A variant that a worker has compiled, or found in the cache."""

    kernel: str
    seconds: float
    trouble: str


class CompileAhead:
    """The compiling of one engine's kernels, from its start on. `wait` for it before the first kernel is launched."""

    def __init__(self, deployed: Deployment) -> None:
        self.deployed = deployed
        self.done: list[Compiled] = []
        self.total = 0
        self._mark = mark_of(deployed)
        self._process: subprocess.Popen[bytes] | None = None
        if not self._mark.exists():
            command = [sys.executable, "-m", "minipaged.execution.compile_ahead"]
            # Into a file: nobody reads a pipe of errors before the end, and whoever fills one waits for ever.
            self._said = tempfile.TemporaryFile()  # noqa: SIM115
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, start_new_session=True
            )
            assert self._process.stdin is not None
            self._process.stdin.write(deployed.to_json().encode())
            self._process.stdin.close()

    def wait(self, progress: Progress | None = None) -> list[Compiled]:
        """Wait until all is compiled; nothing to wait for where it was before. Returns what was compiled now."""
        if self._process is None:
            return self.done
        assert self._process.stdout is not None
        for line in self._process.stdout:
            words = json.loads(line)
            if "variants" in words:
                self.total = words["variants"]
            else:
                self.done.append(Compiled(**words))
            if progress is not None:
                progress("compiling kernels", len(self.done), self.total)
        self._end()
        return self.done

    def _end(self) -> None:
        assert self._process is not None
        code = self._process.wait()
        self._said.seek(0)
        said = self._said.read().decode(errors="replace").strip().splitlines()
        self._said.close()
        failed = [f"{each.kernel}: {each.trouble}" for each in self.done if each.trouble]
        if code == 0 and len(self.done) == self.total and not failed:
            self._mark.parent.mkdir(parents=True, exist_ok=True)
            self._mark.touch()
        else:
            why = (failed or said or [f"the process ended with {code}"])[-1]
            warnings.warn(f"kernels are compiled when they are first used, not ahead: {why}", stacklevel=3)
        self._process = None

    def stop(self) -> None:
        """Give up: the engine is not built."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._said.close()
            self._process = None


def mark_of(deployed: Deployment) -> Path:
    """The file in Triton's cache that says that these variants are in it, of this Triton and these sources."""
    import triton

    digest = hashlib.sha256(
        f"{deployed.to_json()} {triton.__version__} {os.environ.get('MINIPAGED_DEPENDENT_LAUNCH')}".encode()
    )
    root = Path(sys.modules["minipaged.kernels"].__file__ or "").parent
    for path in sorted((*root.rglob("*.py"), *Path(__file__).parent.glob("*.py"))):
        digest.update(path.read_bytes())
    return Path(triton.knobs.cache.dir) / f"minipaged-{digest.hexdigest()[:24]}"


if __name__ == "__main__":
    main()
