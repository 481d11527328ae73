"""Which of the two implementations runs: the Triton kernel or its torch twin.

CUDA tensors go to Triton, all others to torch. `MINIPAGED_KERNELS=torch|triton` overrides.
triton is imported only to ask whether it is there.
"""

from __future__ import annotations

import importlib.util
import os
import re
import warnings
from functools import cache

import torch

ENVIRONMENT_VARIABLE = "MINIPAGED_KERNELS"
GLUON_VERSIONS = ((3, 6), (3, 9))  # of Triton: measured with the first; compiled with both, and read as compiled


@cache
def triton_installed() -> bool:
    """Whether triton can be imported."""
    return importlib.util.find_spec("triton") is not None


@cache
def triton_interpreted() -> bool:
    """Whether our Triton kernels run in triton's interpreter, that is on the CPU.

    Triton decides when a function is decorated, and decorates its own library when it is imported.
    """
    import triton
    import triton.language

    return bool(triton.knobs.runtime.interpret) and not isinstance(triton.language.cdiv, triton.JITFunction)


@cache
def gluon_runs() -> bool:
    """Whether there is a Triton whose lower language, Gluon, is the one that prefill_hopper is written in, and not its interpreter.

    Gluon is experimental and changes from version to version; in the ones named here the kernel is known to compile.
    """
    if not triton_installed() or triton_interpreted():
        return False
    import triton

    return tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:2]) in GLUON_VERSIONS


@cache
def _warn_of_missing_triton() -> None:
    warnings.warn(
        "triton is not installed: CUDA tensors go to the slower torch twins; pip install triton", stacklevel=4
    )


def use_triton(tensor: torch.Tensor) -> bool:
    """Whether `tensor`'s operation goes to Triton.

    Raises ValueError if MINIPAGED_KERNELS is neither torch nor triton, or asks for a triton that cannot run here.
    """
    choice = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if choice == "torch":
        return False
    if tensor.is_meta:  # shapes alone: whoever asks wants to know what would be launched (variants.py)
        return triton_installed()
    if choice == "":
        if not tensor.is_cuda:
            return False
        if not triton_installed():
            _warn_of_missing_triton()
            return False
        return True
    if choice != "triton":
        raise ValueError(f"{ENVIRONMENT_VARIABLE}={choice!r}: it must be torch or triton, or unset to go by the device")
    if not triton_installed():
        raise ValueError(f"{ENVIRONMENT_VARIABLE}=triton, but triton is not installed: pip install triton")
    if not tensor.is_cuda and not triton_interpreted():
        raise ValueError(
            f"{ENVIRONMENT_VARIABLE}=triton with tensors on {tensor.device}: Triton needs a CUDA device, "
            "or TRITON_INTERPRET=1 set before triton is imported"
        )
    return True
