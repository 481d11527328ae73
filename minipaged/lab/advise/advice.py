"""Which techniques help a given use, each with the number that says so.

There are no rules of thumb here: a technique is judged only by a figure that the calculators or the simulator compute
for this very use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from minipaged.baselines.systems import PAGED
from minipaged.config import ModelConfig, check_choice, check_int, check_real
from minipaged.errors import InputError
from minipaged.lab.advise.calculators import Deployment, Load, capacity
from minipaged.lab.formats import seconds
from minipaged.lab.simulation.hardware import COPY_SECONDS, GPU
from minipaged.lab.simulation.roofline import FEMTO, roofline
from minipaged.lab.simulation.servers import Server
from minipaged.lab.simulation.simulate import Result, simulate
from minipaged.lab.simulation.workloads import Lengths, Workload

AS_IT_STANDS = "as it stands"
WORTHWHILE = 1.05  # a gain below this is called none


@dataclass(frozen=True, slots=True)
class Use:
    """What the model is for. Lengths in tokens, latency in seconds between two tokens."""

    model: ModelConfig
    gpu: GPU
    tp: int
    prompt: int
    output: int
    users: int  # requests that wait or run at any time
    shared: int = 0  # leading prompt tokens that requests have in common
    samples: int = 1
    latency: float | None = None

    def __post_init__(self) -> None:
        for name in ("tp", "prompt", "output", "users", "samples"):
            check_int(name, getattr(self, name), 1)
        check_int("shared", self.shared, 0)
        if self.shared >= self.prompt:
            raise InputError(
                f"shared ({self.shared}) must be less than prompt ({self.prompt}): each request has tokens of its own"
            )
        if self.prompt + self.output > self.model.max_position:
            raise InputError(
                f"prompt ({self.prompt}) and output ({self.output}) exceed the context of {self.model.name} ({self.model.max_position})"
            )
        if self.latency is not None:
            check_real("latency", self.latency, 0.0, open_low=True)

    def deployment(self, **changes: object) -> Deployment:
        """As it stands, or with something changed."""
        return replace(Deployment(self.model, self.gpu, self.tp), **changes)  # type: ignore[arg-type]

    def load(self) -> Load:
        """Mean lengths."""
        return Load(self.prompt, self.output)


class Preset(NamedTuple):
    """A kind of use and its lengths in tokens."""

    prompt: int
    output: int
    shared: int
    source: str


PAPER = "PagedAttention paper"
PRESETS = {
    "chat": Preset(161, 338, 0, f"ShareGPT's means, {PAPER}, section 6.1"),
    "instructions": Preset(19, 58, 0, f"Alpaca's means, {PAPER}, section 6.1"),
    "long-chat": Preset(1024, 338, 0, f"histories cut to 1024, {PAPER}, section 6.5"),
    "translation": Preset(
        371, 40, 341, f"five examples before each sentence, {PAPER}, section 6.4; sentence lengths assumed"
    ),
    "documents": Preset(4000, 250, 0, "assumed: questions about a text of some pages"),
    "code": Preset(1500, 60, 0, "assumed: completion in an editor"),
    "agents": Preset(6000, 300, 4000, "assumed: tools and instructions before every turn"),
}


def preset(name: str) -> Preset:
    """The kind of use of that name. InputError lists them."""
    check_choice("use", name, PRESETS)
    return PRESETS[name]


@dataclass(frozen=True, slots=True)
class Advice:
    """A technique and whether it helps here."""

    technique: str
    helps: bool
    why: str

    @property
    def verdict(self) -> str:
        """In words."""
        if self.technique == AS_IT_STANDS:
            return "" if self.helps else "too slow"
        return "helps" if self.helps else "does not"


def as_it_stands(use: Use) -> Advice:
    """The time between tokens that the roofline allows, against the goal."""
    step, rows = _step_seconds(use), _rows(use, use.deployment())
    met = use.latency is None or step <= use.latency
    tokens = _throughput(use, use.deployment())
    return Advice(
        AS_IT_STANDS,
        met,
        f"{rows} of {_asked(use)} rows run, {seconds(step)} between tokens, {tokens:,.0f} tok/s at most{_goal(use, step)}",
    )


def paging(use: Use) -> Advice:
    """Batch on the same memory, paged against reserved to the limit and against reserved by an oracle."""
    runs = {system: _run(use, system) for system in ("orca-max", "orca-oracle", PAGED)}
    batch = {name: run.mean_batch for name, run in runs.items()}
    gain = runs[PAGED].tokens_per_second / runs["orca-oracle"].tokens_per_second
    return Advice(
        "paging",
        gain >= WORTHWHILE,
        f"simulated with {_count(use.users, 'request')}: {batch[PAGED]:.0f} run at once; {batch['orca-max']:.0f} if each reserved "
        f"the limit, {batch['orca-oracle']:.0f} even with lengths known beforehand; throughput over the latter {gain:.2f}x",
    )


def continuous_batching(use: Use) -> Advice:
    """Rows that join and leave at every step against batches that wait for their slowest row, both contiguous."""
    static, joined = (_run(use, system).tokens_per_second for system in ("static", "orca-max"))
    return Advice(
        "continuous batching",
        joined / static >= WORTHWHILE,
        f"simulated, both reserving the limit: static batches {static:,.0f} tok/s, joining at every step {joined:,.0f}: "
        f"{joined / static:.2f}x",
    )


def prefix_caching(use: Use) -> Advice:
    """Prompt work and memory that a shared prefix saves."""
    if not use.shared:
        return Advice("prefix caching", False, f"0 of {use.prompt} prompt tokens are shared: nothing hits")
    blocks = use.shared // 16
    full, cut = (use.deployment().prefill_seconds(n) for n in (use.prompt, use.prompt - blocks * 16))
    first = _rate(use, use.prompt, held=use.prompt)
    then = _rate(use, use.prompt - blocks * 16, held=use.prompt - blocks * 16)
    return Advice(
        "prefix caching",
        blocks > 0 and (then / first >= WORTHWHILE or full / cut >= WORTHWHILE),
        f"{16 * blocks} of {use.prompt} prompt tokens hit: first token {seconds(full)} -> {seconds(cut)}, "
        f"throughput bound {then / first:.2f}x",
    )


def sharing_samples(use: Use) -> Advice:
    """Blocks saved by forking samples."""
    own = -(-(use.prompt + use.output) // 16)
    if use.samples == 1:
        return Advice("copy-on-write sharing", False, f"1 sample a request: 0 of {own} blocks shared")
    shared = use.prompt // 16
    saving = (use.samples - 1) * shared / (use.samples * own)
    return Advice(
        "copy-on-write sharing",
        saving >= 1 - 1 / WORTHWHILE,
        f"{use.samples} samples share {shared} of {own} blocks each: {100 * saving:.0f} % of the blocks saved",
    )


def chunked_prefill(use: Use) -> Advice:
    """How long a whole prompt would hold up the others' next tokens."""
    step, prompt = _step_seconds(use), use.deployment().prefill_seconds(use.prompt)
    chunk = use.deployment().prefill_seconds(min(512, use.prompt))
    limit = use.latency or 2 * step
    if _asked(use) == 1:
        return Advice(
            "chunked prefill", False, f"1 row at a time: its prompt takes {seconds(prompt)} and holds up nobody"
        )
    return Advice(
        "chunked prefill",
        use.users > 1 and prompt > limit and chunk < prompt,
        f"a prompt of {use.prompt} takes {seconds(prompt)} in one pass, a decode step {seconds(step)}; "
        f"in chunks of 512 the others wait {seconds(chunk)} (limit {seconds(limit)})",
    )


def quantized_weights(use: Use) -> Advice:
    """4-bit weights: less to read, more room."""
    return _against("4-bit weights", use, use.deployment(weight_bits=4.5))


def quantized_kv(use: Use) -> Advice:
    """8-bit KV: twice the slots, half the reading."""
    return _against("8-bit KV", use, use.deployment(kv_dtype="int8"))


def tensor_parallel(use: Use) -> Advice:
    """Twice the GPUs: time a token, and throughput a GPU."""
    now, twice = use.deployment(), use.deployment(tp=2 * use.tp)
    try:
        rows = _rows(use, now)
    except InputError as error:
        return Advice(f"tensor parallel ({2 * use.tp})", True, f"needed: {error}")
    mean = use.prompt + use.output / 2
    before, after = now.decode_seconds(rows, mean), twice.decode_seconds(rows, mean)
    per_gpu = _throughput(use, twice) / _throughput(use, now) / 2
    meets = use.latency is not None and after <= use.latency < before
    return Advice(
        f"tensor parallel ({2 * use.tp})",
        meets or per_gpu >= WORTHWHILE,
        f"next token {seconds(before)} -> {seconds(after)} at {_count(rows, 'row')}; throughput bound a GPU {per_gpu:.2f}x"
        + _goal(use, after),
    )


def swap_or_recompute(use: Use) -> Advice:
    """The cheaper way back for a preempted request at half its answer."""
    tokens = use.prompt + use.output // 2
    clock = roofline(use.model, use.gpu, tp=use.tp)
    again = clock.step(tokens, 1, tokens, tokens * (tokens + 1) // 2) / FEMTO
    copies = 2 * -(-tokens // 16) * use.model.num_layers * 2
    swap = 2 * tokens * clock.swap_fs / FEMTO + copies * COPY_SECONDS
    outcome = _run(use, PAGED).outcome
    share = outcome.preemptions / len(outcome.finish)
    return Advice(
        "swap to host",
        outcome.preemptions > 0 and swap * WORTHWHILE < again,
        f"{share:.2f} preemptions a request (simulated); bringing back {tokens} tokens: swap out and in {seconds(swap)}, "
        f"recompute {seconds(again)}",
    )


def bigger_batch(use: Use) -> Advice:
    """Whether more requests at once would still raise throughput, or arithmetic is the limit already."""
    now, rows = use.deployment(), _rows(use, use.deployment())
    mean = use.prompt + use.output / 2
    gain = 2 * now.decode_seconds(rows, mean) / now.decode_seconds(2 * rows, mean)
    waiting = _asked(use) - rows
    state = f"{waiting} of {_asked(use)} rows wait" if waiting else f"{_count(rows, 'row')} asked for, all run already"
    return Advice(
        "memory for more rows",
        gain >= WORTHWHILE and waiting > 0,
        f"{state}; twice as many at once would decode {gain:.2f}x the tokens a second",
    )


TECHNIQUES: tuple[Callable[[Use], Advice], ...] = (
    as_it_stands,
    continuous_batching,
    paging,
    prefix_caching,
    sharing_samples,
    chunked_prefill,
    bigger_batch,
    quantized_weights,
    quantized_kv,
    tensor_parallel,
    swap_or_recompute,
)


def advise(use: Use) -> list[Advice]:
    """Every technique judged for this use. Raises InputError where not even one request fits."""
    capacity(use.deployment(), use.load())
    return [technique(use) for technique in TECHNIQUES]


def _goal(use: Use, step: float) -> str:
    """Whether a time between tokens meets the goal, if there is one."""
    if use.latency is None:
        return ""
    return f"; the goal of {seconds(use.latency)} is {'met' if step <= use.latency else 'missed'}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s'[: number != 1]}"


def _asked(use: Use) -> int:
    """Rows that the users would run if memory allowed."""
    return use.users * use.samples


@lru_cache(maxsize=16)
def _run(use: Use, system: str) -> Result:
    """That system on this use's traffic."""
    return simulate(system, _traffic(use), _server(use), max_rows=_asked(use))


def _rows(use: Use, deployment: Deployment) -> int:
    return min(_asked(use), capacity(deployment, use.load()).mean_sequences)


def _step_seconds(use: Use) -> float:
    deployment = use.deployment()
    return deployment.decode_seconds(_rows(use, deployment), use.prompt + use.output / 2)


def _throughput(use: Use, deployment: Deployment) -> float:
    return capacity(deployment, use.load(), max_rows=_asked(use)).tokens_per_second


def _rate(use: Use, computed: int, *, held: int) -> float:
    """Requests a second when prompts of `computed` tokens are run and `held` tokens are held beside the answer."""
    deployment = use.deployment()
    rows = min(use.users, int(deployment.slots() / (held + use.output / 2 + 8)))
    step = deployment.decode_seconds(rows, use.prompt + use.output / 2)
    clock = deployment.stage()
    prefill = (clock.token_fs * computed + clock.pair_fs * computed * use.prompt) / FEMTO
    return rows / (use.output * step + rows * prefill)


def _against(name: str, use: Use, other: Deployment) -> Advice:
    """Throughput and time a token, changed against as it stands."""
    now = use.deployment()
    before, after = _throughput(use, now), _throughput(use, other)
    rows, mean = _rows(use, now), use.prompt + use.output / 2
    slow, fast = now.decode_seconds(rows, mean), other.decode_seconds(rows, mean)
    return Advice(
        name,
        max(after / before, slow / fast) >= WORTHWHILE,
        f"pool {now.slots():,} -> {other.slots():,} tokens; throughput bound {after / before:.2f}x; "
        f"next token {seconds(slow)} -> {seconds(fast)} at {_count(rows, 'row')}{_goal(use, fast)}",
    )


def _server(use: Use) -> Server:
    clock = roofline(use.model, use.gpu, tp=use.tp)
    limit = min(use.model.max_position, max(2048, 2 * (use.prompt + use.output)))
    return Server(use.model, use.gpu, use.tp, use.deployment().slots(), limit, clock)


def _traffic(use: Use) -> Workload:
    """Log-normal lengths around the means (sigma 0.8), all waiting from the start."""
    count = max(300, min(2000, 4 * use.users))
    columns = [
        Lengths(mean, 0.8, 1, 3 * mean + 8).draw(np.random.default_rng([7, i]), count)
        if mean > 1
        else np.ones(count, np.int64)
        for i, mean in enumerate((use.prompt, use.output))
    ]
    limit = min(use.model.max_position, max(2048, 2 * (use.prompt + use.output)))
    prompts = np.minimum(columns[0], limit - 1)
    outputs = np.minimum(columns[1], limit - prompts)
    return Workload("use", np.zeros(count), prompts, outputs, int(outputs.max()), use.samples)
