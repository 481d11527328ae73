"""Sums that need no simulation: what a model's cache takes, what fits, how fast it can be, and how many GPUs a load
needs.

The bounds are rooflines of data sheets: nothing real is faster.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from minipaged.config import DTYPE_BYTES, ModelConfig, check_int, check_real
from minipaged.errors import InputError
from minipaged.lab.simulation.hardware import GPU, find_gpu
from minipaged.lab.simulation.roofline import FEMTO, Roofline, roofline
from minipaged.lab.simulation.servers import pool_slots, weight_bytes
from minipaged.model.loading.hf_config import read_config
from minipaged.model.loading.shapes import shape


def find_model(name: str) -> ModelConfig:
    """A shape by name, or by the path of a config.json or of the folder that holds one."""
    path = Path(name)
    if path.name == "config.json" and path.is_file():
        return read_config(path.parent)
    return read_config(path) if path.is_dir() else shape(name)


@dataclass(frozen=True, slots=True)
class Deployment:
    """One copy of a model on tp * pp GPUs. Raises InputError for numbers that cannot be."""

    model: ModelConfig
    gpu: GPU
    tp: int = 1
    pp: int = 1
    dtype: str = "bfloat16"
    kv_dtype: str = "bfloat16"
    weight_bits: float = 16
    utilization: float = 0.95
    efficiency: float = 1.0

    def __post_init__(self) -> None:
        check_int("tp", self.tp, 1, 1024)
        check_int("pp", self.pp, 1, self.model.num_layers)
        for dtype in (self.dtype, self.kv_dtype):
            if dtype not in DTYPE_BYTES:
                raise InputError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPE_BYTES)}")
        check_real("weight_bits", self.weight_bits, 1.0, 32.0)
        check_real("utilization", self.utilization, 0.0, 1.0, open_low=True)
        check_real("efficiency", self.efficiency, 0.0, 1.0, open_low=True)

    @property
    def kv_bytes(self) -> int:
        """KV bytes of one token over all layers."""
        return self.model.kv_bytes_per_token(self.kv_dtype)

    @property
    def weights(self) -> int:
        """Bytes of all weights."""
        return weight_bytes(self.model, self.dtype, self.weight_bits)

    @property
    def gpus(self) -> int:
        """GPUs of one copy."""
        return self.tp * self.pp

    def slots(self) -> int:
        """Tokens whose KV fits beside the weights."""
        return pool_slots(
            self.model,
            self.gpu,
            tp=self.tp,
            pp=self.pp,
            dtype=self.dtype,
            kv_dtype=self.kv_dtype,
            weight_bits=self.weight_bits,
            utilization=self.utilization,
        )

    def stage(self) -> Roofline:
        """Step times of one pipeline stage; head and embeddings are counted with every stage's share of the layers."""
        layers = -(-self.model.num_layers // self.pp)
        return roofline(
            replace(self.model, num_layers=layers),
            self.gpu,
            tp=self.tp,
            dtype=self.dtype,
            kv_dtype=self.kv_dtype,
            weight_bits=self.weight_bits,
            efficiency=self.efficiency,
        )

    def decode_seconds(self, rows: int, context: float) -> float:
        """Seconds between two tokens of one sequence when `rows` sequences of `context` tokens decode together. With
        pp stages the rows run as pp micro-batches, one in each stage, and a token passes them all.
        """
        micro = max(1, math.ceil(rows / self.pp))
        clock = self.stage()
        return self.pp * clock.decode_steps(1, micro, round(micro * context)) / FEMTO

    def prefill_seconds(self, tokens: int) -> float:
        """Seconds until a lone prompt of `tokens` has its first token."""
        return self.pp * self.stage().step(tokens, 1, tokens, tokens * (tokens + 1) // 2) / FEMTO


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of a deployment: mean lengths in tokens, requests a second."""

    prompt: int
    output: int
    rate: float | None = None

    def __post_init__(self) -> None:
        check_int("prompt", self.prompt, 1)
        check_int("output", self.output, 1)
        if self.rate is not None:
            check_real("rate", self.rate, 0.0, open_low=True)


@dataclass(frozen=True, slots=True)
class Capacity:
    """What one copy can do. Rates are upper bounds."""

    slots: int
    full_sequences: int  # that fit when each holds its whole prompt and answer
    mean_sequences: int  # that fit on average when requests are at all ages: prompt + half the answer + half a block
    rows: int  # that run: the above, or what the caller allowed
    seconds_per_token: float  # between two tokens of a sequence
    first_token_seconds: float  # of a lone prompt
    tokens_per_second: float  # answers of all rows together, prompts paid for
    requests_per_second: float
    bound_by: str  # memory, arithmetic


def capacity(deployment: Deployment, load: Load, *, block_size: int = 16, max_rows: int | None = None) -> Capacity:
    """What fits and how fast it can go. Raises InputError where not even one request fits."""
    slots = deployment.slots()
    whole = -(-(load.prompt + load.output) // block_size) * block_size
    if whole > slots:
        raise InputError(f"a request of {load.prompt + load.output} tokens does not fit the pool of {slots} tokens")
    mean = load.prompt + load.output / 2
    mean_rows = int(slots / (mean + block_size / 2))
    rows = max(1, min(mean_rows, max_rows or mean_rows))
    clock = deployment.stage()
    per_token = deployment.decode_seconds(rows, mean)
    micro = max(1, math.ceil(rows / deployment.pp))
    # Each answer costs its share of `output` decode steps and one prefill; prompts run beside decodes, so they add
    # arithmetic only.
    prefill = (clock.token_fs * load.prompt + clock.pair_fs * load.prompt * (load.prompt + 1) // 2) / FEMTO
    round_trip = load.output * per_token / deployment.pp + micro * prefill
    requests = micro / round_trip
    arithmetic = (clock.token_fs + clock.draw_fs) * micro > clock.weight_fs
    return Capacity(
        slots=slots,
        full_sequences=slots // whole,
        mean_sequences=mean_rows,
        rows=rows,
        seconds_per_token=per_token,
        first_token_seconds=deployment.prefill_seconds(load.prompt),
        tokens_per_second=requests * load.output,
        requests_per_second=requests,
        bound_by="arithmetic" if arithmetic else "memory bandwidth",
    )


def rows_within(deployment: Deployment, load: Load, goal: float) -> int:
    """The most rows that decode together with at most `goal` seconds between two tokens. InputError where one is too slow."""
    check_real("latency", goal, 0.0, open_low=True)
    mean = load.prompt + load.output / 2
    alone = deployment.decode_seconds(1, mean)
    if alone > goal:
        raise InputError(
            f"even one row takes {1e3 * alone:.3g} ms between two tokens, {1e3 * goal:g} are wanted: more GPUs a layer (tp), fewer "
            "bits a weight or a faster GPU shorten it"
        )
    low, high = 1, 2
    while deployment.decode_seconds(high, mean) <= goal and high < 1 << 20:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if deployment.decode_seconds(middle, mean) <= goal else (low, middle)
    return low


@dataclass(frozen=True, slots=True)
class Fleet:
    """Copies for a load, and what they cost if a price was given."""

    copies: int
    gpus: int
    dollars_per_hour: float | None
    dollars_per_million_tokens: float | None  # of answers


def fleet(deployment: Deployment, load: Load, fits: Capacity, *, price: float | None = None) -> Fleet:
    """How many copies serve `load.rate`. `price`: dollars an hour for one GPU; the project knows none."""
    if load.rate is None:
        raise InputError("a rate is needed to count GPUs: requests a second")
    if price is not None:
        check_real("price", price, 0.0)
    copies = math.ceil(load.rate / fits.requests_per_second)
    gpus = copies * deployment.gpus
    hourly = None if price is None else gpus * price
    per_million = None if hourly is None else hourly / (load.rate * load.output * 3600) * 1e6
    return Fleet(copies, gpus, hourly, per_million)


def smallest_tp(model: ModelConfig, gpu_name: str, *, weight_bits: float = 16) -> int:
    """The smallest power of two of GPUs that holds the weights and one context of 2048 tokens."""
    gpu = find_gpu(gpu_name)
    for tp in (1, 2, 4, 8, 16, 32, 64):
        try:
            if pool_slots(model, gpu, tp=tp, weight_bits=weight_bits) >= min(2048, model.max_position):
                return tp
        except InputError:
            continue
    raise InputError(f"{model.name} does not fit on 64 x {gpu.name}")
