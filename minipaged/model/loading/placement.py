"""Chooses device and dtype from the words a user gives, and checks that there is enough memory."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from minipaged.config import DTYPES
from minipaged.errors import InputError


def choose_device(device: str | torch.device) -> torch.device:
    """`auto` is the first GPU, or the CPU. InputError for a name that is none, or a device this machine lacks."""
    if isinstance(device, str) and device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        raise InputError(f"device must be auto, cpu, cuda or cuda:N, not {device!r}") from None
    if chosen.type not in ("cpu", "cuda"):
        raise InputError(f"device must be auto, cpu, cuda or cuda:N, not {device!r}")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise InputError(
            f"device {chosen} is not there: torch sees {count or 'no'} CUDA device{'s'[: count != 1]}; use cpu"
        )
    return chosen


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """`auto` is float32 on a CPU and bfloat16 on a GPU. InputError for any other than the three supported ones."""
    if isinstance(dtype, str) and dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise InputError(f"dtype must be auto, {', '.join(DTYPES)}, not {dtype!r}")
    chosen: torch.dtype = getattr(torch, name)
    return chosen


ROOM_SHARE = 0.95  # of the free memory that weights or a pool may take; the rest is for what is computed with them


def free_bytes(device: torch.device) -> int:
    """Memory that can still be had on the device. On a CPU: what the system could free, and no more than a container's limit leaves."""
    if device.type == "cuda":
        # What torch holds without using it: the next tensors come from there.
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = min(free, int(lines["MemAvailable"].split()[0]) * 1024)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (most := limit.read_text().strip()) != "max":
        free = min(free, max(0, int(most) - int(used.read_text())))
    return free


def check_room(what: str, need: int, device: torch.device, advice: str = "") -> None:
    """Raise InputError, before anything is allocated, if `need` bytes do not fit on the device."""
    free = free_bytes(device)
    if need > ROOM_SHARE * free:
        words = f"{what} takes {need / 2**30:,.1f} GiB, and {device} has {free / 2**30:,.1f} GiB free"
        raise InputError(words + (f": {advice}" if advice else ""))
