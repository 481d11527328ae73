"""Triton's interpreter for the kernels' tests on machines without a GPU, and the report of the GPU ones."""

from __future__ import annotations

import os

import pytest
import torch

# Triton decides when it is imported whether it interprets, so this stands before any test module.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def interpreted() -> None:
    """Triton kernels run in the interpreter. On a machine with a GPU that takes TRITON_INTERPRET=1 from outside."""
    pytest.importorskip("triton")
    from minipaged.kernels.dispatch import triton_interpreted

    if triton_interpreted():
        return
    if torch.cuda.is_available():
        pytest.skip("compiled kernels on this machine; TRITON_INTERPRET=1 interprets them")
    pytest.fail("triton was imported before TRITON_INTERPRET=1 was set, so nothing can be interpreted")


@pytest.fixture
def unset_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dispatch goes by the device, whatever the environment said."""
    monkeypatch.delenv("MINIPAGED_KERNELS", raising=False)
