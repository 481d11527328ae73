"""The GPUs that a roofline can be drawn for: published memory, bandwidth, peak rate and links.

Every figure is the manufacturer's own (dense rates,
no sparsity): NVIDIA's data sheets of T4, V100 SXM2, A10, A100 (40 GB and 80 GB SXM), L4, L40S, H100 SXM5, H200 SXM
and B200 (DGX B200, per GPU), the Ampere GA102 and Ada AD102 whitepapers for GeForce RTX 3090 and 4090 (FP16 tensor
rate with FP32 accumulate), and AMD's for MI300X.
Boards sold as "40 GB" or "80 GB" hold that many GiB, less what the driver keeps.
"""

from __future__ import annotations

from dataclasses import dataclass

from minipaged.config import check_real
from minipaged.errors import InputError

GIB = 1024**3
COPY_SECONDS = 5e-6  # assumed: to start one copy between host and device; K and V of each layer of each block are a copy of their own


@dataclass(frozen=True, slots=True)
class GPU:
    """One accelerator. Rates are per second; links count one direction."""

    name: str
    memory_bytes: int
    bandwidth_bytes: float  # device memory, bytes per second
    peak_flops: float  # 16-bit matrix products with 32-bit sums, per second
    link_bytes: float  # to the other GPUs of the server, bytes per second in one direction
    host_bytes: float  # to host memory, bytes per second in one direction

    def __post_init__(self) -> None:
        for name in ("memory_bytes", "bandwidth_bytes", "peak_flops", "link_bytes", "host_bytes"):
            check_real(f"{name} of GPU {self.name}", getattr(self, name), 0.0, open_low=True)


def _gpu(name: str, memory_gib: int, gb_per_s: float, tflops: float, link_gb_per_s: float, host_gb_per_s: float) -> GPU:
    return GPU(name, memory_gib * GIB, gb_per_s * 1e9, tflops * 1e12, link_gb_per_s * 1e9, host_gb_per_s * 1e9)


GPUS: dict[str, GPU] = {
    gpu.name: gpu
    for gpu in (
        #     name      GiB  GB/s  TFLOP/s link host
        _gpu("t4", 16, 320, 65, 16, 16),
        _gpu("v100", 32, 900, 125, 150, 16),
        _gpu("a10", 24, 600, 125, 32, 32),
        _gpu("a100-40", 40, 1555, 312, 300, 32),
        _gpu("a100-80", 80, 2039, 312, 300, 32),
        _gpu("3090", 24, 936, 71, 32, 32),
        _gpu("4090", 24, 1008, 165.2, 32, 32),
        _gpu("l4", 24, 300, 121, 32, 32),
        _gpu("l40s", 48, 864, 362, 32, 32),
        _gpu("h100", 80, 3350, 989, 450, 64),
        _gpu("h200", 140, 4800, 989, 450, 64),
        _gpu("b200", 180, 8000, 2250, 900, 64),
        _gpu("mi300x", 192, 5300, 1307, 448, 64),
    )
}


def find_gpu(name: str) -> GPU:
    """The GPU of that name. Raises InputError that lists the known ones."""
    gpu = GPUS.get(name.strip().lower())
    if gpu is None:
        raise InputError(f"unknown GPU {name!r}; known: {', '.join(GPUS)}")
    return gpu
