"""Compile lesson 12's kernel for an H100 without one, in the shapes that its tests and its measurement launch.

Run by test_lessons.py in a process of its own, for Triton here must not interpret. Prints a line per compiled kernel, and what a
learner on a GPU would read where a task is not solved yet.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from minipaged.learn.catalog import lesson
from minipaged.learn.runner import load, stub_in
from tests.kernels.compile_for_hopper import HopperDriver, compile_only


def loaded(path: Path) -> ModuleType:
    """The lesson as it is on a GPU machine, with its tensors on the CPU: compiling needs no more."""
    with patch.dict(os.environ, LESSON_ON_GPU="1"), patch.object(torch.cuda, "is_available", lambda: True):
        module = load(path)
    assert module.ON_GPU
    module.DEVICE = "cpu"
    return module


def read_one_tile(module: ModuleType) -> None:
    batch, out = module.Batch([8], page=4), torch.empty(4, 16)
    module._one_page[(1,)](out, batch.keys, 1, 0, 4, *batch.keys.stride()[:3], 4, 16)


def main(scratch: Path) -> None:
    driver.set_active(HopperDriver())
    JITFunction.run = compile_only
    solved = scratch / "solved.py"
    solved.write_text(lesson(12).solved(), encoding="utf-8")
    module = loaded(solved)
    read_one_tile(module)
    for page in (1, 4, 16, 64):
        module.paged_decode(module.Batch([1, page, 11], page=page))
    for dtype in (torch.float16, torch.bfloat16):
        module.paged_decode(module.Batch([7, 12], dtype=dtype))
    for _, _, heads, kv_heads in module.SHAPES:
        module.paged_decode(module.large_batch(2, 20, heads, kv_heads))

    # a body that is missing must be named, although the GPU's compiler wraps the error in its own
    unsolved = scratch / "unsolved.py"
    unsolved.write_text(lesson(12).solved(tasks=1), encoding="utf-8")
    try:
        read_one_tile(loaded(unsolved))
    except Exception as error:
        print("unsolved:", stub_in(error))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
