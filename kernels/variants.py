"""Which variants of the Triton kernels a program needs, found without a GPU and without computing anything; and compiling them.

Triton compiles a kernel anew for every combination of its constants, the dtypes of its pointers, and for each integer whether it is 1, a
multiple of 16 or neither (unless the kernel says do_not_specialize). Each combination is a variant, and takes a second or two to compile,
once. On the device "meta" tensors have shapes, dtypes and strides but no contents. So the program's own functions, called on such tensors
inside `recording`, say which variants they launch: no list has to be kept beside the code, and every kernel that is added later is in it.
"""
# mypy: allow-untyped-calls

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from triton.runtime.jit import JITFunction

from minipaged.kernels import launch_table
from minipaged.kernels.dependent_launch import dependent_launch
from minipaged.kernels.launch_table import Gpu

_run = JITFunction.run


@dataclass(frozen=True, slots=True, eq=False)
class Variant:
    """One kernel to compile: a launch of it on tensors without contents."""

    function: Any  # the kernel, a JITFunction
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel's."""
        return str(self.function.fn.__name__)

    def compile(self) -> Any:
        """Compile it into Triton's cache on disk, for the target of Triton's active driver. Returns Triton's CompiledKernel."""
        return _run(self.function, *self.arguments, grid=(1,), warmup=True, **self.options)


def key_of(function: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
    """What tells variants apart, as Triton does. All tensors count as aligned to 16 bytes, as the engine's are."""
    plain = [kind_of(value, parameter.do_not_specialize) for parameter, value in zip(function.params, arguments)]  # noqa: B905
    return (function.fn.__qualname__, *plain, *sorted(options.items(), key=lambda item: item[0]))


def kind_of(value: Any, unspecialised: bool) -> object:
    """What Triton compiles for an argument: a pointer's dtype, an integer's width and what is known of it."""
    if isinstance(value, torch.Tensor):
        return value.dtype
    if isinstance(value, int) and not isinstance(value, bool):
        wide = not -(2**31) <= value < 2**31
        return ("int", wide) if unspecialised else ("int", wide, value == 1, value % 16 == 0)
    return type(value)


@contextmanager
def recording(gpu: Gpu) -> Iterator[list[Variant]]:
    """Note the kernels that are launched on tensors of the device "meta", as on this GPU, each variant once and in order."""
    found: dict[tuple[Any, ...], Variant] = {}

    def note(function: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        found.setdefault(key_of(function, arguments, options), Variant(function, arguments, options))
        variants[:] = found.values()

    variants: list[Variant] = []
    _assume(gpu)
    JITFunction.run = note
    try:
        yield variants
    finally:
        JITFunction.run = _run
        _assume(launch_table.INTERPRETED)


def _assume(gpu: Gpu) -> None:
    launch_table.assume_for_shapes(gpu)
    for remembered in (launch_table.decode_launch, launch_table._fitted, dependent_launch):
        remembered.cache_clear()  # they answer by device, and "meta" is another one now
