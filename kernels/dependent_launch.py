"""Programmatic dependent launch: a kernel is put onto the GPU while the one before it still drains, and waits there for its results.

This saves most of the microsecond or two between two small kernels: a small model's decode step consists of those. A kernel that is
launched so must call `wait_for_previous` before it touches anything that another kernel wrote or still reads; weights it may touch before.
Source: CUDA programming guide, "Programmatic Dependent Launch and Synchronization" (Hopper and later).
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803

import os
from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from minipaged.kernels.launch_table import HOPPER, gpu_of

ENVIRONMENT_VARIABLE = "MINIPAGED_DEPENDENT_LAUNCH"
PLAIN_LAUNCH: dict[str, bool] = {"DEPENDENT": False}  # after everything before it has ended


@triton.jit
def wait_for_previous(DEPENDENT: tl.constexpr):
    """Until the kernel before this one has ended and its writes are seen; and let the next one come onto the GPU already."""
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()


@cache
def dependent_launch(device: torch.device) -> dict[str, bool]:
    """The options of a launch on `device`: dependent from Hopper on, unless MINIPAGED_DEPENDENT_LAUNCH=0; plain in the interpreter."""
    if os.environ.get(ENVIRONMENT_VARIABLE) == "0" or gpu_of(device).capability < HOPPER:
        return PLAIN_LAUNCH
    return {"DEPENDENT": True, "launch_pdl": True}
