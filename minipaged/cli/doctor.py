"""`minipaged doctor`: what this machine has, and for each missing thing the one command that mends it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape


class Finding(NamedTuple):
    """One thing that was looked at. mend: the command that helps, "" if nothing is wrong."""

    name: str
    state: str
    mend: str = ""


def report() -> int:
    """Print the findings; returns 1 if something needed is missing."""
    console = Console(highlight=False)
    findings = examine()
    width = max(len(finding.name) for finding in findings)
    for name, state, mend in findings:
        mark = "[red]✗[/]" if mend else "[green]✓[/]"
        console.print(f"{mark} {name:<{width}}  {escape(state)}")
        if mend:
            console.print(f"  {'':<{width}}  → {escape(mend)}", style="yellow")
    return 1 if any(finding.mend for finding in findings) else 0


def examine() -> list[Finding]:
    """Look at everything that a run needs."""
    return [
        _python(),
        *_torch(),
        _triton(),
        Finding("kernels", _kernel_choice()),
        *map(_package, ("textual", "tokenizers", "gguf", "safetensors")),
        _model(),
    ]


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    wanted = sys.version_info >= (3, 11)
    return Finding("python", version, "" if wanted else "install Python 3.11 or newer")


def _torch() -> list[Finding]:
    if importlib.util.find_spec("torch") is None:
        return [Finding("torch", "not installed", f"{sys.executable} -m pip install torch")]
    import torch

    found = [Finding("torch", f"{torch.__version__}, {torch.get_num_threads()} threads")]
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        found.append(Finding("gpu", f"{torch.cuda.get_device_name(0)}, {memory:.0f} GiB, CUDA {torch.version.cuda}"))
    else:
        built = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no GPU"
        found.append(Finding("gpu", f"none ({built}); the CPU is used"))
    return found


def _triton() -> Finding:
    if importlib.util.find_spec("triton") is None:
        if sys.platform != "linux":
            return Finding("triton", "not available on this system; the torch kernels are used")
        return Finding("triton", "not installed", f"{sys.executable} -m pip install triton")
    return Finding("triton", importlib.metadata.version("triton"))


def _kernel_choice() -> str:
    """Which kernels a run on this machine takes, and how they run."""
    if importlib.util.find_spec("torch") is None:
        return "ours; they need torch"
    from minipaged.kernels import dispatch

    asked = os.environ.get("MINIPAGED_KERNELS")
    if asked:
        return f"{asked} on every device (MINIPAGED_KERNELS={asked})"
    if not dispatch.triton_installed():
        return "torch on every device (triton is not installed)"
    how = "interpreted (TRITON_INTERPRET is set)" if dispatch.triton_interpreted() else "compiled"
    return f"torch on the CPU, triton on a GPU, {how}"


def _package(name: str) -> Finding:
    if importlib.util.find_spec(name) is None:
        return Finding(name, "not installed", f"{sys.executable} -m pip install {name}")
    return Finding(name, importlib.metadata.version(name))


def _model() -> Finding:
    from minipaged.model.loading import zoo
    from minipaged.model.loading.pull import cached_path, is_cached

    path = cached_path(zoo.DEFAULT_MODEL)
    if not is_cached(zoo.DEFAULT_MODEL):
        return Finding("model", f"{zoo.DEFAULT_MODEL} is not in {path.parent}", "minipaged pull")
    return Finding("model", f"{zoo.DEFAULT_MODEL}, {os.path.getsize(path) / 1e6:.0f} MB in {path.parent}")
