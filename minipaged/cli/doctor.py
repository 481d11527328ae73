"""`minipaged doctor`: what this machine has, and for each missing thing the one command that installs it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.text import Text

import minipaged
from minipaged.text.safe import printable

EXTRAS = {  # of pyproject.toml
    "learn": "lessons 3 and 6",
    "web": "the screen in a browser",
    "serve": "the server",
    "structured": "answers that follow a JSON schema",
    "clients": "the server's tests with further clients",
    "test": "the tests",
    "docs": "the site and the notebooks",
    "mutation": "the tests of the tests",
}


class Finding(NamedTuple):
    """One thing that was looked at. mend: the command that helps, "" if nothing is wrong; needed: whether runs fail without it."""

    name: str
    state: str
    mend: str = ""
    needed: bool = True


def report() -> int:
    """Print the findings; returns 1 if something needed is missing."""
    console = Console(highlight=False, soft_wrap=True)
    findings = examine()
    width = max(len(finding.name) for finding in findings)
    for name, state, mend, needed in findings:
        mark = ("✗", "red") if mend and needed else ("–", "yellow") if mend else ("✓", "green")
        console.print(Text.assemble(mark, f" {name:<{width}}  {printable(state)}"))
        if mend:
            console.print(Text(f"  {'':<{width}}  → {printable(mend)}", style="yellow"))
    return 1 if any(finding.mend and finding.needed for finding in findings) else 0


def examine() -> list[Finding]:
    """Look at everything that a run needs, and at what some commands need besides."""
    return [
        _ourselves(),
        _python(),
        *_torch(),
        _triton(),
        _kernels(),
        _kv_cache(),
        *map(_package, ("numpy", "tokenizers", "safetensors", "gguf", "jinja2", "textual")),
        _model(),
        *(_extra(name, use) for name, use in EXTRAS.items()),
    ]


def _ourselves() -> Finding:
    return Finding("minipaged", f"{minipaged.__version__}, {Path(minipaged.__file__).parent}")


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    wanted = sys.version_info >= (3, 11)
    return Finding("python", version, "" if wanted else "install Python 3.11 or newer")


def _torch() -> list[Finding]:
    if importlib.util.find_spec("torch") is None:
        return [Finding("torch", "not installed", _pip("torch"))]
    try:
        import torch
    except Exception as error:  # a library of CUDA that is missing, a build for another Python
        return [
            Finding("torch", f"cannot be imported: {' '.join(str(error).split())}", _pip("--force-reinstall torch"))
        ]
    found = [Finding("torch", f"{torch.__version__}, {torch.get_num_threads()} threads")]
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        found.append(Finding("gpu", f"{torch.cuda.get_device_name(0)}, {memory:.0f} GiB, CUDA {torch.version.cuda}"))
    else:
        built = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no GPU"
        found.append(Finding("gpu", f"none ({built}); the CPU is used"))
    return found


def _triton() -> Finding:
    if sys.platform != "linux" and importlib.util.find_spec("triton") is None:
        return Finding("triton", "not available on this system; the torch kernels are used")
    return _package("triton")


def _kernels() -> Finding:
    """Which kernels a run on this machine takes, and how they run."""
    try:
        import torch

        from minipaged.kernels import dispatch
    except Exception:  # whatever ails torch is said in its own line
        return Finding("kernels", "unknown without torch")
    asked = os.environ.get(dispatch.ENVIRONMENT_VARIABLE)
    if asked:
        try:
            dispatch.use_triton(torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu"))
        except ValueError as error:
            return Finding("kernels", str(error), f"unset {dispatch.ENVIRONMENT_VARIABLE}")
        return Finding("kernels", f"{asked} on every device ({dispatch.ENVIRONMENT_VARIABLE}={asked})")
    if not dispatch.triton_installed():
        return Finding("kernels", "torch on every device (triton is not installed)")
    how = "interpreted (TRITON_INTERPRET is set)" if dispatch.triton_interpreted() else "compiled"
    return Finding("kernels", f"torch on the CPU, triton on a GPU, {how}")


def _kv_cache() -> Finding:
    """What keys and values may be kept as, and what a token of the default model takes then."""
    from minipaged.config import DEFAULT_MODEL
    from minipaged.model.loading.shapes import shape

    sizes = {"float32": "float32", "bfloat16": "bfloat16", "int8": "int8", "fp8": "float8_e4m3fn"}
    taken = ", ".join(f"{name} {shape(DEFAULT_MODEL).kv_bytes_per_token(kept):,}" for name, kept in sizes.items())
    return Finding("kv cache", f"bytes a token of {DEFAULT_MODEL}: {taken} (--kv-cache-dtype)")


def _package(name: str) -> Finding:
    version = _version(name)
    return Finding(name, "not installed", _pip(name)) if version is None else Finding(name, version)


def _extra(name: str, use: str) -> Finding:
    """Whether all packages of an optional extra are there. Nothing else needs them."""
    label = f"[{name}]"
    try:
        required = importlib.metadata.requires("minipaged") or []
    except importlib.metadata.PackageNotFoundError:  # a folder on PYTHONPATH
        return Finding(label, f"for {use}: unknown, since minipaged itself is not installed by pip", needed=False)
    wanted = [line for line in required if re.search(rf"""extra\s*==\s*['"]{name}['"]""", line)]
    names = [found.group() for line in wanted if (found := re.match(r"[\w.-]+", line))]
    missing = [package for package in names if _version(package) is None]
    if missing:
        return Finding(label, f"for {use}: {', '.join(missing)} not installed", _pip(" ".join(missing)), needed=False)
    return Finding(label, f"for {use}: {', '.join(names)}", needed=False)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _pip(what: str) -> str:
    return f"{sys.executable} -m pip install {what}"


def _model() -> Finding:
    from minipaged.model.loading import zoo
    from minipaged.model.loading.pull import cached_path, is_cached

    path = cached_path(zoo.DEFAULT_MODEL)
    if not is_cached(zoo.DEFAULT_MODEL):
        return Finding("model", f"{zoo.DEFAULT_MODEL} is not in {path.parent}", "minipaged pull")
    return Finding("model", f"{zoo.DEFAULT_MODEL}, {os.path.getsize(path) / 1e6:.0f} MB in {path.parent}")
