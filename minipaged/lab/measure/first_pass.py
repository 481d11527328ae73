"""What an engine waits for when it meets things for the first time, step by step.

Run as `python -m minipaged.lab.measure.first_pass MODEL WORKLOADS`. Loads the model, gives a first answer, then makes a first and two more
passes over each workload. Steps are the same in every pass, so what a step took beyond its like in the last pass is a stall; kernels that
were compiled or loaded and graphs that were captured in it say why. With `--profile WORKLOAD`, also where the GPU's time goes in a pass.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from minipaged.api import LLM
from minipaged.config import SamplingParams
from minipaged.engine import Engine
from minipaged.lab.measure.contender_minipaged import answer_with, make_llm
from minipaged.lab.measure.engine import Asked, Job, requests_of

STALL_SECONDS = 0.03  # beyond the same step of the last pass
SHOWN = 12


@dataclass
class Step:
    """One step: seconds of it, and what was made in it for the first time, with its seconds."""

    seconds: float = 0.0
    made: list[tuple[str, float]] = field(default_factory=list)

    @property
    def why(self) -> str:
        """What was made in the step, in words."""
        return ", ".join(f"{what} {1e3 * seconds:.0f} ms" for what, seconds in self.made if seconds > 0.002)


class Watch:
    """Notes steps, compiled kernels and captured graphs of one process."""

    def __init__(self) -> None:
        self.steps: list[Step] = [Step()]

    def timed(self, owner: Any, name: str, what: Callable[[Any, tuple[Any, ...]], str]) -> None:
        """Note each call of a method as something that was made."""
        method = getattr(owner, name)

        def wrapped(this: Any, *arguments: Any, **words: Any) -> Any:
            started = time.perf_counter()
            try:
                return method(this, *arguments, **words)
            finally:
                self.steps[-1].made.append((what(this, arguments), time.perf_counter() - started))

        setattr(owner, name, wrapped)

    def begin(self) -> None:
        """Watch this process: Triton's compiler (which also loads what was compiled before), and graphs."""
        from triton.compiler.compiler import CompiledKernel
        from triton.runtime.jit import JITFunction

        from minipaged.execution.graphs import GraphRunner

        self.timed(JITFunction, "_do_compile", lambda kernel, _: f"{kernel.fn.__name__} compiled or found")
        self.timed(CompiledKernel, "_init_handles", lambda kernel, _: f"{kernel.name} loaded")
        self.timed(GraphRunner, "_captured", lambda _, asked: f"graph of {tuple(asked[0])} {asked[1].name}")

    @contextmanager
    def steps_of(self, engine: Engine) -> Iterator[list[Step]]:
        """The steps that the engine takes meanwhile."""
        found: list[Step] = []
        inner = engine._step

        def step() -> Any:
            self.steps.append(Step())
            started = time.perf_counter()
            try:
                return inner()
            finally:
                self.steps[-1].seconds = time.perf_counter() - started
                found.append(self.steps[-1])

        engine._step = step  # type: ignore[method-assign]
        try:
            yield found
        finally:
            del engine._step


def passes(watch: Watch, llm: LLM, asked: Asked, count: int) -> list[tuple[float, list[Step]]]:
    """Seconds and steps of each pass."""
    found = []
    for _ in range(count):
        llm.reset_prefix_cache()
        with watch.steps_of(llm.engine) as steps:
            started = time.perf_counter()
            answer_with(llm, asked)
            found.append((time.perf_counter() - started, steps))
    return found


def stalls(first: list[Step], last: list[Step]) -> list[tuple[float, int, str]]:
    """(seconds lost, number of the step, why), the longest first."""
    lost = [
        (one.seconds - other.seconds, number, one.why)
        for number, (one, other) in enumerate(zip(first, last, strict=False))
    ]
    return sorted((each for each in lost if each[0] > STALL_SECONDS), reverse=True)


def profile(llm: LLM, asked: Asked) -> None:
    """Print where the GPU's time goes in a pass, summed by kernel."""
    import torch

    llm.reset_prefix_cache()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        started = time.perf_counter()
        answer_with(llm, asked)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    sums: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    for event in found.key_averages():
        spent, calls = sums[event.key[:90]]
        sums[event.key[:90]] = spent + event.self_device_time_total / 1e3, calls + event.count
    busy = sum(spent for spent, _ in sums.values())
    print(f"profile: {seconds:.3f} s, the GPU busy {busy / 1e3:.3f} s")
    for name, (spent, calls) in sorted(sums.items(), key=lambda item: -item[1][0])[:25]:
        print(f"  {spent:9.1f} ms {calls:7} x {1e3 * spent / max(1, calls):8.1f} us  {name}")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("workloads", help="names, with commas between them")
    parser.add_argument("--profile", default="", help="a workload whose kernels are summed")
    parser.add_argument("--passes", type=int, default=3, help="over each workload")
    parser.add_argument(
        "--context", type=int, default=0, help="tokens of a sequence at most, if not what the workloads need"
    )
    parser.add_argument("--step-tokens", type=int, default=8192, help="tokens of a step at most")
    parser.add_argument("--fewer", default="", help="then the last workload again with fewer tokens a step: 4096,2048")
    chosen = parser.parse_args()
    job = Job(chosen.model, tuple(filter(None, chosen.workloads.split(","))))
    watch, started, said = Watch(), time.perf_counter(), ""

    def progress(what: str, done: int, total: int) -> None:
        nonlocal said
        if what != said:
            print(f"  {time.perf_counter() - started:6.2f} s: {what} ({total})", flush=True)
            said = what

    watch.begin()
    llm = make_llm(
        chosen.model,
        max_model_len=chosen.context or job.context,
        enable_prefix_caching=job.prefix_caching,
        max_num_batched_tokens=chosen.step_tokens,
        progress=progress,
    )
    print(f"  {time.perf_counter() - started:6.2f} s: ready; {len(llm._parts.compiled)} variants compiled ahead, "
          f"{sum(each.seconds for each in llm._parts.compiled):.1f} s of processors")  # fmt: skip
    print(f"  made while loading: {watch.steps[0].why}")
    llm.generate([{"prompt_token_ids": list(range(5, 40))}], SamplingParams(max_tokens=1))
    print(f"  {time.perf_counter() - started:6.2f} s: first answer", flush=True)
    for name in job.workloads:
        found = passes(watch, llm, requests_of(name), chosen.passes)
        first, first_steps = found[0]
        last_steps = found[-1][1]
        print(f"{name}: first {first:.3f} s, then {', '.join(f'{seconds:.3f}' for seconds, _ in found[1:])} s; "
              f"{len(last_steps)} steps", flush=True)  # fmt: skip
        for lost, number, why in stalls(first_steps, last_steps)[:SHOWN]:
            print(f"  step {number}: {1e3 * lost:.0f} ms lost: {why or '?'}")
    for tokens in map(int, filter(None, chosen.fewer.split(","))):
        running = llm.engine.scheduler.running_set
        running.config = replace(running.config, max_num_batched_tokens=tokens)
        found = passes(watch, llm, requests_of(job.workloads[-1]), 2)
        print(
            f"{job.workloads[-1]}, {tokens} tokens a step: {', '.join(f'{seconds:.3f}' for seconds, _ in found)} s",
            flush=True,
        )
    if chosen.profile:
        profile(llm, requests_of(chosen.profile))


if __name__ == "__main__":
    main()
