"""A model on GPUs: how many KV slots it has and how long its steps take. The paper's three servers are here."""

from __future__ import annotations

from dataclasses import dataclass

from minipaged.config import DTYPE_BYTES, ModelConfig, check_int, check_real
from minipaged.errors import InputError
from minipaged.lab.simulation.hardware import GPU, find_gpu
from minipaged.lab.simulation.roofline import Roofline, roofline
from minipaged.model.loading.shapes import shape

# The share of the data sheet that a served step reaches, one constant a GPU. For the A100 it is fitted to one point
# of the paper: on average 132.44 requests run when vLLM serves OPT-13B with Alpaca at 30 requests a second (Fig.
# 13b). It is low because it carries all of a 2023 engine's overhead. Elsewhere nothing was fitted: the roofline itself.
EFFICIENCY = {"a100-40": 0.293, "a100-80": 0.293}
# The other way to spend that one constant: the data sheet's rates, and so many seconds of the host in every step.
FIXED_STEP_SECONDS = 0.0557


@dataclass(frozen=True, slots=True)
class Server:
    """`tp` GPUs that serve one model. `pool` is the KV slots (tokens) of the whole server."""

    model: ModelConfig
    gpu: GPU
    tp: int
    pool: int
    max_len: int
    clock: Roofline

    def describe(self) -> str:
        """A line for titles."""
        gpus = self.gpu.name if self.tp == 1 else f"{self.tp} x {self.gpu.name}"
        return f"{self.model.name} on {gpus}, {self.pool:,} slots"


def weight_bytes(config: ModelConfig, dtype: str = "bfloat16", weight_bits: float | None = None) -> int:
    """Bytes of all weights."""
    bits = 8 * DTYPE_BYTES[dtype] if weight_bits is None else weight_bits
    return round(config.num_parameters() * bits / 8)


def pool_slots(
    config: ModelConfig,
    gpu: GPU,
    *,
    tp: int = 1,
    pp: int = 1,
    dtype: str = "bfloat16",
    kv_dtype: str | None = None,
    weight_bits: float | None = None,
    utilization: float = 0.95,
) -> int:
    """KV slots that are left beside the weights: (GPUs * memory * utilization - weights) / KV bytes of a token.

    Where there are fewer KV heads than tensor-parallel ranks, heads are replicated and each rank pays for one.
    Raises InputError if the weights alone do not fit.
    """
    check_int("tp", tp, 1, 1024)
    check_int("pp", pp, 1, config.num_layers)
    check_real("utilization", utilization, 0.0, 1.0, open_low=True)
    room = tp * pp * gpu.memory_bytes * utilization - weight_bytes(config, dtype, weight_bits)
    copies = max(1, tp / config.num_kv_heads)
    slots = int(room // (config.kv_bytes_per_token(kv_dtype or dtype) * copies))
    if slots < 1:
        weights = weight_bytes(config, dtype, weight_bits)
        each = gpu.memory_bytes * utilization
        raise InputError(
            f"the weights of {config.name} take {weights / 2**30:,.1f} GiB; {tp * pp} x {gpu.name} offer {tp * pp * each / 2**30:,.1f}: "
            f"take at least {int(weights // each) + 1} of them (tp, pp), or fewer bits a weight"
        )
    return slots


def make_server(
    model: str,
    gpu: str,
    *,
    tp: int = 1,
    slots: int | None = None,
    max_len: int | None = None,
    dtype: str = "bfloat16",
    efficiency: float | None = None,
    overhead_seconds: float = 0.0,
) -> Server:
    """A server by name. `slots` overrides the computed pool. Raises InputError for unknown names and for a pool that
    cannot be.
    """
    config, device = shape(model), find_gpu(gpu)
    pool = check_int("slots", slots, 1) if slots is not None else pool_slots(config, device, tp=tp, dtype=dtype)
    share = EFFICIENCY.get(device.name, 1.0) if efficiency is None else efficiency
    clock = roofline(config, device, tp=tp, dtype=dtype, efficiency=share, overhead_seconds=overhead_seconds)
    limit = min(2048, config.max_position) if max_len is None else check_int("max_len", max_len, 2)
    return Server(config, device, tp, pool, limit, clock)


def paper_server(model: str, *, fixed_cost: bool = False) -> Server:
    """The servers of the PagedAttention paper (Table 1): KV memory 12, 21 and 264 GB, that is 15.7 K, 9.7 K and 60.1
    K slots. `fixed_cost`: what a step loses is FIXED_STEP_SECONDS, not a share of the data sheet.
    """
    table = {
        "opt-13b": ("a100-40", 1, 15_728),
        "llama-13b": ("a100-40", 1, 15_728),
        "opt-66b": ("a100-40", 4, 9_700),
        "opt-175b": ("a100-80", 8, 60_100),
    }
    if model not in table:
        raise InputError(f"the paper served {', '.join(table)}, not {model!r}")
    gpu, tp, slots = table[model]
    if fixed_cost:
        return make_server(model, gpu, tp=tp, slots=slots, efficiency=1.0, overhead_seconds=FIXED_STEP_SECONDS)
    return make_server(model, gpu, tp=tp, slots=slots)
