"""transformers beside the systems, on the same requests: `generate` over static batches, and its continuous batching.

Runs as a process of its own, so that its memory is its own and its failure ends nothing else:
`python -m minipaged.lab.measure.transformers_peer generate random:llama-7b requests.json result.json`. The
weights are random and the lengths forced, so what is said does not matter.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minipaged.errors import InputError
from minipaged.lab.measure.device_run import DeviceResult, percentiles
from minipaged.lab.simulation.workloads import TimedRequest

PEERS = ("generate", "continuous")
START_SECONDS = 240  # until the weights are drawn and the graphs captured; a peer that needs longer is given up
MAX_NEW = 1024  # what a client allows, as for the systems


def run_peer(
    peer: str, model: str, requests: Sequence[TimedRequest], *, device: str, pool: int | None, seconds: float | None
) -> DeviceResult:
    """Run one of PEERS in a process of its own. A peer that is absent or fails is a result without tokens that says why."""
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder, "requests.json"), Path(folder, "result.json")
        settings = {"device": device, "pool": pool, "seconds": seconds, "requests": list(requests)}
        asked.write_text(json.dumps(settings), encoding="utf-8")
        command = [
            sys.executable,
            "-m",
            "minipaged.lab.measure.transformers_peer",
            peer,
            model,
            str(asked),
            str(answered),
        ]
        patience = None if seconds is None else START_SECONDS + 4 * seconds
        try:
            ended = subprocess.run(command, capture_output=True, text=True, timeout=patience, check=False)
            why = (ended.stderr.strip().splitlines() or [f"ended with {ended.returncode}"])[-1]
        except subprocess.TimeoutExpired:
            why = f"gave no result within {patience:.0f} s"
        if answered.exists():
            found: dict[str, Any] = json.loads(answered.read_text(encoding="utf-8"))
            found["first_token"], found["per_token"] = tuple(found["first_token"]), tuple(found["per_token"])
            return DeviceResult(**found)
    nothing = (math.nan, math.nan)
    return DeviceResult(
        f"transformers {peer}", pool or 0, len(requests), 0, 0, 0, 0.0, 0.0, 0.0, nothing, nothing, math.nan, 0, math.nan,
        note=f"skipped: {why[:300]}",
    )  # fmt: skip


def _network(name: str, device: str) -> Any:
    """The shape as transformers' own network with random weights, bfloat16 on a GPU and float32 elsewhere."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from minipaged.model.loading.hub_shape import hub_config
    from minipaged.model.loading.placement import choose_device, choose_dtype
    from minipaged.model.loading.shapes import shape

    if not name.startswith("random:"):
        raise InputError(f"transformers is run on random:SHAPE only, not {name}")
    words, place = hub_config(shape(name)), choose_device(device)
    with torch.device(place):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(words.pop("model_type"), **words), dtype=choose_dtype("auto", place)
        )
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model.eval()


def static_batches(requests: Sequence[TimedRequest], pool: int, most: int = 256) -> list[list[int]]:
    """Requests in order of arrival, as many to a batch as its slab fits the pool: rows x (longest prompt + MAX_NEW)."""
    batches: list[list[int]] = [[]]
    longest = 0
    for i, (prompt, _) in enumerate(requests):
        longest = max(longest, len(prompt))
        rows = len(batches[-1]) + 1
        if batches[-1] and (rows > most or rows * (longest + MAX_NEW) > pool):
            batches.append([])
            longest = len(prompt)
        batches[-1].append(i)
    return batches


def _generate(name: str, settings: dict[str, Any]) -> DeviceResult:
    """`generate`, batch after batch, each stopped when its slowest row has its length."""
    import torch
    from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

    model, requests, limit = _network(name, settings["device"]), settings["requests"], settings["seconds"]
    device = model.device
    pool = settings["pool"] or _free_slots(model)
    count = len(requests)
    lengths = [n for _, n in requests]
    first, finish, written = [math.nan] * count, [math.nan] * count, [0] * count
    rows_seconds, steps_taken, steps_needed = 0.0, 0, 0
    promised = 0  # tokens of the batches that were begun

    class Clock(StoppingCriteria):  # type: ignore[misc]
        """Notes when each step ended; stops at the time limit."""

        def __init__(self, members: list[int], longest: int, measured: bool) -> None:
            self.members, self.longest, self.measured = members, longest, measured
            self.steps, self.before = 0, time.perf_counter()

        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            nonlocal rows_seconds
            input_ids[:, -1].tolist()  # waits for the step
            now = time.perf_counter()
            self.steps += 1
            alive = [i for i in self.members if lengths[i] >= self.steps]
            if self.measured:
                rows_seconds += (now - self.before) * len(alive)
                for i in alive:
                    written[i] = self.steps
                    if self.steps == 1:
                        first[i] = now - start
                    if self.steps == lengths[i]:
                        finish[i] = now - start
            self.before = now
            over = self.measured and limit is not None and now - start > limit
            return torch.full((len(self.members),), self.steps >= self.longest or over, device=device)

    def run(members: list[int], longest: int, measured: bool) -> int:
        width = max(len(requests[i][0]) for i in members)
        ids = torch.zeros(len(members), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(members):
            prompt = requests[i][0]
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        clock = Clock(members, longest, measured)
        chosen = GenerationConfig(max_new_tokens=longest, do_sample=False, pad_token_id=0)
        model.generate(
            ids.to(device), attention_mask=mask.to(device), generation_config=chosen,
            stopping_criteria=StoppingCriteriaList([clock]),
        )  # fmt: skip
        return clock.steps

    batches = static_batches(requests, pool)
    with torch.inference_mode():
        start = time.perf_counter()
        run(batches[0][:2], 2, False)
        start = time.perf_counter()
        for members in batches:
            longest = max(lengths[i] for i in members)
            steps_needed += longest
            promised += sum(lengths[i] for i in members)
            steps_taken += run(members, longest, True)
            if limit is not None and time.perf_counter() - start > limit:
                break
    took = time.perf_counter() - start
    note = ""
    if steps_taken < steps_needed:
        whole = promised / (took * steps_needed / steps_taken)
        note = (
            f"stopped after {took:.0f} s, at step {steps_taken} of {steps_needed}, while most rows still ran; at this pace "
            f"whole batches give {whole:,.0f} tok/s"
        )
    return _result("generate", pool, requests, first, finish, written, took, rows_seconds, note)


def _continuous(name: str, settings: dict[str, Any]) -> DeviceResult:
    """Continuous batching through its manager, so that each request has its own length."""
    import torch
    from transformers.generation import ContinuousBatchingConfig, GenerationConfig

    model, requests, limit = _network(name, settings["device"]), settings["requests"], settings["seconds"]
    pool = settings["pool"]
    given: dict[str, Any] = {}
    if pool is not None:
        given["num_blocks"] = max(2, pool // 256)
        given["page_size" if hasattr(ContinuousBatchingConfig(), "page_size") else "block_size"] = 256
    count = len(requests)
    chosen = GenerationConfig(max_new_tokens=MAX_NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    manager = model.init_continuous_batching(
        generation_config=chosen, continuous_batching_config=ContinuousBatchingConfig(**given)
    )
    times: list[list[float]] = [[] for _ in requests]
    finish = [math.nan] * count
    # no_grad: its own thread may not be in inference mode (5.17 is not), and may not write what was made in it
    with torch.no_grad():
        if hasattr(manager, "warmup"):
            manager.warmup()
        manager.start()
        start = time.perf_counter()
        for i, (prompt, length) in enumerate(requests):
            manager.add_request(prompt, request_id=str(i), max_new_tokens=length, streaming=True)
        done = 0
        while done < count and (limit is None or time.perf_counter() - start <= limit):
            output = manager.get_result(timeout=0.2)
            if output is None:
                if not manager.is_running():
                    raise RuntimeError("the continuous batching thread ended")
                continue
            if output.error:
                raise RuntimeError(output.error)
            now, index = time.perf_counter() - start, int(output.request_id)
            times[index] += [now] * (len(output.generated_tokens) - len(times[index]))
            if len(times[index]) >= requests[index][1] and math.isnan(finish[index]):
                finish[index] = now
                done += 1
    took = time.perf_counter() - start
    written = [len(t) for t in times]
    first = [t[0] if t else math.nan for t in times]
    rows_seconds = sum((took if math.isnan(f) else f) - t[0] for t, f in zip(times, finish, strict=True) if t)
    note = "" if done == count else f"stopped after {took:.0f} s"
    return _result("continuous", pool or 0, requests, first, finish, written, took, rows_seconds, note)


def _free_slots(model: Any) -> int:
    """Slots that nine tenths of the memory left hold; 4,096 without a GPU."""
    import torch

    if model.device.type != "cuda":
        return 4096
    config = model.config
    a_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    return int(0.9 * torch.cuda.mem_get_info()[0] / a_token)


def _result(
    peer: str,
    pool: int,
    requests: Sequence[TimedRequest],
    first: list[float],
    finish: list[float],
    written: list[int],
    took: float,
    rows_seconds: float,
    note: str,
) -> DeviceResult:
    count = len(requests)
    gaps = [
        ((took if math.isnan(end) else end) - begin) / (n - 1)
        for begin, end, n in zip(first, finish, written, strict=True)
        if n > 1 and not math.isnan(begin)
    ]
    ended = [end / length for end, (_, length) in zip(finish, requests, strict=True) if not math.isnan(end)]
    return DeviceResult(
        system=f"transformers {peer}",
        pool=pool,
        requests=count,
        finished=len(ended),
        refused=0,
        tokens=sum(written),
        seconds=took,
        mean_rows=rows_seconds / took,
        token_share=math.nan,
        first_token=percentiles(first, served=count),
        per_token=percentiles(gaps, served=len(gaps)),
        normalized_latency=sum(ended) / len(ended) if ended else math.nan,
        preemptions=0,
        same_answers=math.nan,
        note=note,
    )


def main() -> None:
    """peer, model, file of settings, file for the result."""
    peer, name, asked, answered = sys.argv[1:]
    settings = json.loads(Path(asked).read_text(encoding="utf-8"))
    result = (_generate if peer == "generate" else _continuous)(name, settings)
    from dataclasses import asdict

    Path(answered).write_text(json.dumps(asdict(result)), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)  # the library's thread may still run, and nothing it does counts any more


if __name__ == "__main__":
    main()
