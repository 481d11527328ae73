"""The Triton kernels pass a GPU's compiler, on any machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_kernel_compiles_for_hopper(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    kept = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "MINIPAGED_KERNELS")}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_for_hopper"],
        cwd=Path(__file__).parents[2],
        env=kept | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-2000:]
    assert "_prefill_kernel" in done.stdout
    assert "_hopper_prefill_kernel" in done.stdout
    assert "reduce_kernel" in done.stdout
    for kernel in ("_decode_kernel", "reduce_kernel", "_prefill_kernel", "_rope_write_kernel"):
        assert f"{kernel} waits after" in done.stdout, "what reads pages must wait for what writes them"
