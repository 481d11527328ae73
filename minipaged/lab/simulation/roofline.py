"""How long a step must take: bytes over bandwidth or operations over peak, whichever is longer, part by part.

It needs a model's shape and a GPU's data sheet only. Times are whole femtoseconds, so that the time of k regular steps
is a closed form that equals, to the last digit, the sum of the k steps one by one (the simulator jumps by it).

A step has four parts that follow each other:
  matrix products   max(weights read once, 2 * weights * tokens); the output head only for the tokens drawn
  attention         max(K and V of every context read once, 4 * layers * heads * head_dim * query-key pairs)
  all-reduce        two a layer when the model is split over GPUs (Megatron-LM, section 3), each moving
                    2 * (tp - 1) / tp of the activations around the ring
  overhead          launches and the host's work, a constant
The first three are divided by `efficiency`, the fraction of the data sheet that real kernels reach.
Source: Williams et al., "Roofline", CACM 2009; Pope et al., "Efficiently scaling transformer inference", 2022,
section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

from minipaged.config import DTYPE_BYTES, ModelConfig, check_int, check_real
from minipaged.errors import InputError
from minipaged.lab.simulation.hardware import GPU

FEMTO = 10**15  # femtoseconds in a second
# One small all-reduce over NVLink within a server, in a CUDA graph: 6.6 us at 4 KB, 7.2 at 64 (two H200, execution/README.md).
ALL_REDUCE_LATENCY_S = 7e-6


def head_parameters(config: ModelConfig) -> int:
    """Weights of the output head."""
    return config.vocab_size * config.hidden_size


def layer_parameters(config: ModelConfig) -> int:
    """Weights that every token passes: all of them but the embedding table and the output head."""
    return config.num_parameters() - head_parameters(config) * (1 if config.tie_embeddings else 2)


@dataclass(frozen=True, slots=True)
class Roofline:
    """Step times of one model on `tp` GPUs, in whole femtoseconds. Build it with `roofline()`."""

    weight_fs: int  # read every weight once
    token_fs: int  # matrix products of one token, head excluded
    draw_fs: int  # output head for one token
    kv_fs: int  # read K and V of one context token
    pair_fs: int  # attention arithmetic of one query-key pair
    reduce_fs: int  # all-reduce, the part that does not depend on tokens
    reduce_token_fs: int
    overhead_fs: int
    copy_fs: int  # read and write K and V of one token on the device
    swap_fs: int  # move K and V of one token between device and host
    efficiency: float

    def step(self, tokens: int, draws: int, context: int, pairs: int) -> int:
        """Femtoseconds of a step that computes `tokens`, draws `draws`, reads `context` cached tokens, scores
        `pairs` query-key pairs.
        """
        linear = max(self.weight_fs, self.token_fs * tokens + self.draw_fs * draws)
        attention = max(self.kv_fs * context, self.pair_fs * pairs)
        return linear + attention + self.reduce_fs + self.reduce_token_fs * tokens + self.overhead_fs

    def decode_base(self, rows: int) -> int:
        """Femtoseconds of a decode step of `rows` tokens, attention left out."""
        linear = max(self.weight_fs, (self.token_fs + self.draw_fs) * rows)
        return linear + self.reduce_fs + self.reduce_token_fs * rows + self.overhead_fs

    def decode_slope(self) -> int:
        """Femtoseconds that each context token adds to a decode step."""
        return max(self.kv_fs, self.pair_fs)

    def decode_steps(self, steps: int, rows: int, context: int) -> int:
        """Femtoseconds of `steps` decode steps in a row; the first reads `context` tokens, each next one `rows`
        more. A closed form.
        """
        reads = steps * context + rows * (steps * (steps - 1) // 2)
        return steps * self.decode_base(rows) + self.decode_slope() * reads


def roofline(
    config: ModelConfig,
    gpu: GPU,
    *,
    tp: int = 1,
    dtype: str = "bfloat16",
    kv_dtype: str | None = None,
    weight_bits: float | None = None,
    efficiency: float = 1.0,
    overhead_seconds: float = 0.0,
) -> Roofline:
    """The roofline of `config` on `tp` of `gpu`.

    `weight_bits` below the dtype's models quantized weights: fewer bytes, the same arithmetic. KV heads are
    replicated when fewer than `tp`.
    Raises InputError for an unknown dtype or a number out of range.
    """
    check_int("tp", tp, 1, 1024)
    check_real("efficiency", efficiency, 0.0, 1.0, open_low=True)
    check_real("overhead_seconds", overhead_seconds, 0.0)
    for name in (dtype, kv_dtype or dtype):
        if name not in DTYPE_BYTES:
            raise InputError(f"unknown dtype {name!r}; known: {', '.join(DTYPE_BYTES)}")
    bits = (
        8 * DTYPE_BYTES[dtype]
        if weight_bits is None
        else check_real("weight_bits", weight_bits, 0.0, 32.0, open_low=True)
    )

    layers, head = layer_parameters(config), head_parameters(config)
    rate, flops = gpu.bandwidth_bytes * efficiency / FEMTO, gpu.peak_flops * efficiency / FEMTO
    kv_bytes = config.kv_bytes_per_token(kv_dtype or dtype)
    kv_share = kv_bytes / min(tp, config.num_kv_heads)
    reduces = 2 * config.num_layers if tp > 1 else 0
    activation_bytes = config.hidden_size * DTYPE_BYTES[dtype]
    ring = 2 * (tp - 1) / tp / (gpu.link_bytes * efficiency / FEMTO)
    return Roofline(
        weight_fs=round((layers + head) * bits / 8 / tp / rate),
        token_fs=round(2 * layers / tp / flops),
        draw_fs=round(2 * head / tp / flops),
        kv_fs=max(1, round(kv_share / rate)),
        pair_fs=round(4 * config.num_layers * config.num_heads * config.head_dim / tp / flops),
        reduce_fs=round(reduces * ALL_REDUCE_LATENCY_S * FEMTO),
        reduce_token_fs=round(reduces * activation_bytes * ring),
        overhead_fs=round(overhead_seconds * FEMTO),
        copy_fs=round(2 * kv_share / rate),
        swap_fs=round(kv_bytes / tp / (gpu.host_bytes * efficiency / FEMTO)),
        efficiency=efficiency,
    )
