"""How fast a model larger than its device can write: bytes over the links that carry them, operations over the peak, whichever is longest.

A step reads every weight. Those that are not on the device come over the host link, those on disk through the disk first; meanwhile the
device computes what it has. A larger batch shares one such reading, so throughput grows with it until something else is the limit: the
device's memory, which keys and values fill, or what these cost to read. All of this overlaps perfectly here, and every rate is a data
sheet's or assumed below, none fitted. Real links and kernels stay behind their data sheets; only where the disk is the limit, whose rate
is assumed, may a real machine be faster.

Source: Sheng et al., "FlexGen", 2023; the published figures are those of its repository (benchmark/batch_size_table.md): a T4, 208 GB of
memory, 1.5 TB of SSD, prompts of 512 tokens and answers of 32; tokens written over the time of prefill and decode together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from minipaged.config import DTYPE_BYTES, ModelConfig, check_int, check_real
from minipaged.errors import InputError
from minipaged.lab.simulation.hardware import GPU, find_gpu
from minipaged.lab.simulation.roofline import FEMTO, roofline
from minipaged.model.loading.shapes import shape

DTYPE = "float16"
DEVICE_SHARE = 0.9  # of the device's memory, for weights, keys and values
# Assumed of the machine of the published figures, as its paper describes the disk; the memory is that of a two-socket server of its time.
DISK_READ, DISK_WRITE, HOST_MEMORY = 2e9, 1e9, 50e9  # bytes per second


@dataclass(frozen=True, slots=True)
class Policy:
    """Shares of the weights in host memory and on disk (the rest is on the device), and where keys and values are."""

    host: float
    disk: float = 0.0
    kv: str = "device"  # device; host, where the host attends; disk, from where the host reads them


@dataclass(frozen=True, slots=True)
class Throughput:
    """Of a batch: tokens written a second over prefill and decode, seconds of a middle decode step, and what takes the longest in it."""

    batch: int
    tokens_per_second: float
    step_seconds: float
    limit: str
    streamed_bytes: float  # in each step, over the host link


@dataclass(frozen=True, slots=True)
class Published:
    """A figure of FlexGen's table, and the placement that it was measured with as far as it is known."""

    system: str
    model: str
    batch: int
    tokens_per_second: float
    policy: Policy


PUBLISHED = (
    Published("Accelerate", "opt-6.7b", 2, 25.12, Policy(0.0)),
    Published("FlexGen", "opt-6.7b", 2, 25.26, Policy(0.0)),
    Published("DeepSpeed ZeRO", "opt-6.7b", 16, 9.28, Policy(1.0)),
    Published("Accelerate", "opt-30b", 8, 0.62, Policy(1.0)),
    Published("DeepSpeed ZeRO", "opt-30b", 4, 0.60, Policy(1.0)),
    Published("FlexGen", "opt-30b", 144, 7.32, Policy(0.8, kv="host")),
    Published("Accelerate", "opt-175b", 2, 0.01, Policy(0.0, 1.0)),
    Published("DeepSpeed ZeRO", "opt-175b", 1, 0.01, Policy(0.0, 1.0)),
    Published("FlexGen", "opt-175b", 256, 0.69, Policy(0.5, 0.5, kv="disk")),
)


def throughput(config: ModelConfig, gpu: GPU, policy: Policy, batch: int, prompt: int, output: int) -> Throughput:
    """Of `batch` prompts of `prompt` tokens, each answered with `output` tokens, all at once. InputError for numbers out of range."""
    check_int("batch", batch, 1)
    check_int("prompt", prompt, 1)
    check_int("output", output, 1)
    prefill = max(_seconds(config, gpu, policy, batch, prompt, 0).values())
    decode = [max(_seconds(config, gpu, policy, batch, 1, prompt + i).values()) for i in range(1, output)]
    middle = _seconds(config, gpu, policy, batch, 1, prompt + output // 2)
    limit = max(middle, key=lambda name: middle[name])
    streamed = (policy.host + policy.disk) * _weight_bytes(config)
    return Throughput(batch, batch * output / (prefill + sum(decode)), middle[limit], limit, streamed)


def _weight_bytes(config: ModelConfig) -> float:
    return float(config.num_parameters() * DTYPE_BYTES[DTYPE])


def _seconds(config: ModelConfig, gpu: GPU, policy: Policy, batch: int, tokens: int, context: int) -> dict[str, float]:
    """Of a step that computes `tokens` of each sequence behind `context` others: what each part of the machine takes by itself."""
    weights, kv = _weight_bytes(config), config.kv_bytes_per_token(DTYPE) * batch
    new, old = kv * tokens, kv * context
    pairs = batch * (tokens * context + tokens * (tokens + 1) // 2)
    clock = roofline(config, gpu, dtype=DTYPE)
    on_device = context * batch if policy.kv == "device" else 0
    away = policy.kv != "device"
    return {
        # One token's attention is the host's where keys and values are: else a prompt's would be scored there too.
        "device": clock.step(batch * tokens, batch, on_device, pairs if tokens > 1 or not away else 0) / FEMTO,
        "host link": ((policy.host + policy.disk) * weights + (new if away else 0.0)) / gpu.host_bytes,
        "host memory": old / HOST_MEMORY if away else 0.0,
        "disk": policy.disk * weights / DISK_READ
        + ((old / DISK_READ + new / DISK_WRITE) if policy.kv == "disk" else 0.0),
    }


def against_batch(
    config: ModelConfig, gpu: GPU, batches: tuple[int, ...], prompt: int, output: int, link_bytes: float | None = None
) -> list[Throughput | None]:
    """As this engine does it: keys and values on the device, weights there as far as there is room beside them, the rest streamed from host
    memory. None for a batch whose keys and values leave no room for two layers. link_bytes: of the host link per second, in place of
    the data sheet's."""
    if link_bytes is not None:
        gpu = replace(gpu, host_bytes=check_real("link", link_bytes, 0.0, open_low=True))
    weights, found = _weight_bytes(config), list[Throughput | None]()
    for batch in batches:
        held = check_int("batch", batch, 1) * (prompt + output) * config.kv_bytes_per_token(DTYPE)
        room = DEVICE_SHARE * gpu.memory_bytes - held
        buffers = 2 * weights / config.num_layers
        if room >= weights:
            found.append(throughput(config, gpu, Policy(0.0), batch, prompt, output))
        elif room < buffers:
            found.append(None)
        else:
            found.append(throughput(config, gpu, Policy(1 - (room - buffers) / weights), batch, prompt, output))
    return found


def against_published() -> list[tuple[Published, Throughput]]:
    """FlexGen's table, and what the sums give for each of its rows."""
    gpu = find_gpu("t4")
    return [(row, throughput(shape(row.model), gpu, row.policy, row.batch, 512, 32)) for row in PUBLISHED]


def parse_batches(text: str) -> tuple[int, ...]:
    """Batch sizes with commas between them. InputError for anything else."""
    try:
        batches = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"batches must be whole numbers with commas between them, as 1,8,64, not {text!r}") from None
    for batch in batches:
        check_int("batches", batch, 1)
    return batches
