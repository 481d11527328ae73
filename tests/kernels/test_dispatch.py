"""Which implementation runs, and what is said about arguments that do not fit."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from minipaged.kernels import dispatch, launch_table
from minipaged.kernels.attention import paged_decode, paged_prefill, prefill
from minipaged.kernels.cache import copy_blocks, write_kv
from minipaged.kernels.launch_table import HopperPrefillLaunch
from tests.kernels.paged_cases import PagedCase, assert_close, make_case

ROOT = Path(__file__).parents[2]
WRITE_ONE_TOKEN = """
import torch
from minipaged.kernels.cache import write_kv
cache = torch.zeros(2, 4, 1, 32)
write_kv(torch.ones(1, 1, 32), torch.ones(1, 1, 32), cache, cache.clone(), torch.tensor([5]))
print(float(cache[1, 1].sum()))
"""


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    hidden = {"TRITON_INTERPRET", "MINIPAGED_KERNELS"}
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=kept | environment, capture_output=True, text=True, timeout=120
    )


def test_kernels_work_without_triton() -> None:
    done = run_python("import sys; sys.modules['triton'] = None" + WRITE_ONE_TOKEN)
    assert done.stdout == "32.0\n", done.stderr
    done = run_python("import sys; sys.modules['triton'] = None" + WRITE_ONE_TOKEN, MINIPAGED_KERNELS="triton")
    assert "ValueError: MINIPAGED_KERNELS=triton, but triton is not installed" in done.stderr


def test_importing_kernels_does_not_import_triton() -> None:
    done = run_python("import sys, minipaged.kernels.attention; print('triton' in sys.modules)")
    assert done.stdout == "False\n", done.stderr


def test_triton_on_the_cpu_needs_its_interpreter() -> None:
    pytest.importorskip("triton")
    done = run_python(WRITE_ONE_TOKEN, MINIPAGED_KERNELS="triton")
    assert "ValueError: MINIPAGED_KERNELS=triton with tensors on cpu" in done.stderr
    done = run_python(WRITE_ONE_TOKEN, MINIPAGED_KERNELS="triton", TRITON_INTERPRET="1")
    assert done.stdout == "32.0\n", done.stderr


@pytest.mark.parametrize(
    ("version", "interprets", "runs"),
    [
        ("3.5.1", False, False),
        ("3.6.0", False, True),
        ("3.6.0", True, False),
        ("3.7.1", False, False),
        ("3.9.0+git1a2b", False, True),
        ("3.10.0", False, False),
        ("4.0.0", False, False),
    ],
)
def test_gluon_is_used_where_its_version_is_known(
    version: str, interprets: bool, runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(dispatch, "triton_interpreted", lambda: interprets)
    assert dispatch.gluon_runs.__wrapped__() is runs


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("gluon", [False, True])
@pytest.mark.parametrize("on_hopper", [False, True])
def test_prefill_goes_to_the_hopper_kernel_only_where_it_can(
    gluon: bool, on_hopper: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without Gluon or Hopper the Triton kernel (here its interpreter) does it, and prefill_hopper is not even imported."""
    launch = HopperPrefillLaunch(128, 2, persistent=False)
    arrived = []
    stand_in = ModuleType("minipaged.kernels.attention.prefill_hopper")
    stand_in.paged_prefill_hopper = lambda *given, out, launch: arrived.append(launch)  # type: ignore[attr-defined]
    monkeypatch.setitem(
        sys.modules, "minipaged.kernels.attention.prefill_hopper", stand_in if gluon and on_hopper else None
    )
    monkeypatch.setattr(prefill, "gluon_runs", lambda: gluon)
    monkeypatch.setattr(launch_table, "hopper_prefill_launch", lambda *given: launch if on_hopper else None)
    monkeypatch.setenv("MINIPAGED_KERNELS", "triton")
    case = make_case([9, 5], [4, 1], kv_heads=1, group=2, head_dim=32, block_size=4)
    out = paged_prefill(*case.prefill())
    if gluon and on_hopper:
        assert arrived == [launch]
    else:
        assert_close(out, prefill.paged_prefill_torch(*case.prefill()))
    monkeypatch.setenv("MINIPAGED_KERNELS", "torch")
    assert torch.equal(paged_prefill(*case.prefill()), prefill.paged_prefill_torch(*case.prefill()))


def test_an_unknown_choice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIPAGED_KERNELS", "cuda")
    with pytest.raises(ValueError, match="MINIPAGED_KERNELS='cuda': it must be torch or triton"):
        copy_blocks([torch.zeros(2, 3)], torch.tensor([[0, 1]]))


def changed(case: PagedCase, **changes: object) -> dict[str, object]:
    names = ("query", "key_cache", "value_cache", "block_tables", "context_lens", "query_starts", "max_query_len")
    return {name: getattr(case, name) for name in names} | {"scale": case.scale} | changes


@pytest.mark.usefixtures("unset_choice")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {"query": c.query[0]}, r"query has shape \[4, 32\]"),
        (lambda c: {"query": c.query[:, :3]}, "heads a multiple of the cache's 2"),
        (lambda c: {"query": c.query.half()}, "query is torch.float16, but the cache is torch.float32"),
        (
            lambda c: {"query": c.query.transpose(0, 2).contiguous().transpose(0, 2)},
            "last dimension must be contiguous",
        ),
        (lambda c: {"key_cache": c.key_cache[:, :, :1]}, "both must be"),
        (lambda c: {"value_cache": c.value_cache.half()}, "value_cache torch.float16"),
        (lambda c: {"key_cache": c.key_cache.int(), "value_cache": c.value_cache.int()}, "one of float32"),
        (lambda c: {"block_tables": c.block_tables.long()}, "block_tables is torch.int64"),
        (lambda c: {"block_tables": c.block_tables[:1]}, r"block_tables has shape \[1, 2\]"),
        (lambda c: {"block_tables": c.block_tables[:, None]}, "a table per KV head"),
        (
            lambda c: {"block_tables": c.block_tables.T.contiguous().T},
            r"block_tables has strides \(1, 2\); its last dimension must be contiguous",
        ),
        (lambda c: {"context_lens": c.context_lens.long()}, "context_lens is torch.int64"),
        (
            lambda c: {"context_lens": c.context_lens.repeat_interleave(2)[::2]},
            "context_lens has stride 2; it must be contiguous",
        ),
        (lambda c: {"context_lens": c.context_lens[:1]}, r"context_lens has shape \[1\]"),
        (lambda c: {"query_starts": c.query_starts.long()}, "query_starts is torch.int64"),
        (lambda c: {"query_starts": c.query_starts[:0]}, "query_starts is empty"),
        (lambda c: {"max_query_len": -1}, "max_query_len is -1"),
        *(
            (lambda c, scale=scale: {"scale": scale}, f"scale is {scale}; it must be above 0 and finite")
            for scale in (0.0, -0.125, 1e-40, math.inf, math.nan)
        ),
        (lambda c: {"window": 0}, "window is 0"),
        (lambda c: {"out": c.query[:1]}, r"out has shape \[1, 4, 32\]"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change: Callable[[PagedCase], dict[str, object]], message: str) -> None:
    case = make_case([5, 7], [3, 1], kv_heads=2, group=2, head_dim=32, block_size=4)
    with pytest.raises(ValueError, match=message):
        paged_prefill(**changed(case, **change(case)))  # type: ignore[arg-type]


@pytest.mark.usefixtures("unset_choice")
@pytest.mark.parametrize("scale", [0.0, -0.125, math.nan])
def test_decode_takes_positive_scales_only(scale: float) -> None:
    case = replace(make_case([5, 7], [1, 1], kv_heads=2, group=2, head_dim=32, block_size=4), scale=scale)
    with pytest.raises(ValueError, match=r"scale is .*; it must be above 0 and finite"):
        paged_decode(*case.decode())


@pytest.mark.usefixtures("unset_choice")
def test_writes_and_copies_that_do_not_fit_are_named() -> None:
    cache, key = torch.zeros(3, 4, 2, 32), torch.zeros(5, 2, 32)
    slots = torch.zeros(5, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"slot_mapping has shape \[4\]; it must be \[5\]"):
        write_kv(key, key, cache, cache, slots[:4])
    with pytest.raises(ValueError, match=r"slot_mapping is torch.int16; it must be torch.int64 or torch.int32"):
        write_kv(key, key, cache, cache, slots.short())
    with pytest.raises(ValueError, match=r"key \[5, 1, 32\]"):
        write_kv(key[:, :1], key, cache, cache, slots)
    with pytest.raises(ValueError, match=r"pairs is torch.int32 \[1, 2\]"):
        copy_blocks([cache], torch.zeros(1, 2, dtype=torch.int32))
