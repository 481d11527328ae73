"""`minipaged serve`: an OpenAI-compatible server over one model."""

from __future__ import annotations

import contextlib
import importlib.util
import ipaddress
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minipaged.cli.progress import status_line
from minipaged.cli.terminal import complain, note
from minipaged.config import check_choice, check_int, check_real
from minipaged.errors import InputError
from minipaged.serving.attach import attach

PACKAGES = ("uvicorn", "httptools", "msgspec", "prometheus_client")
KEY_VARIABLE = "MINIPAGED_API_KEY"


def serve(
    model: str,
    settings: dict[str, Any],
    *,
    host: str,
    port: int,
    keys: Sequence[str],
    names: Sequence[str],
    max_waiting: int,
    drain: float,
    metrics_prefix: str,
    show_prompts: bool = False,
) -> int:
    """Check every argument, then serve until a signal. Returns the exit code."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"the server needs {', '.join(missing)}: pip install 'minipaged[serve]'")
    check_int("port", port, 1, 65535)
    check_int("max_waiting", max_waiting, 0)
    check_real("drain", drain, 0.0)
    check_choice("metrics_prefix", metrics_prefix, ("minipaged", "vllm"))
    check_int("block_size", settings.get("block_size", 16), 1, 256)
    check_choice("dtype", settings.get("dtype", "auto"), ("auto", "float32", "float16", "bfloat16"))
    given = [*keys, *filter(None, [os.environ.get(KEY_VARIABLE, "")])]
    if any(not key.strip() or not key.isascii() for key in given):
        raise InputError("an API key must be ASCII characters, and at least one")
    if not given and not is_loopback(host):
        complain(f"{host} can be reached by others, and no --api-key is set: anybody may use this server", "yellow")
    from minipaged.serving.http.app import Options, names_of
    from minipaged.serving.http.server import Address
    from minipaged.serving.http.server import serve as run

    options = Options(model, names_of(model, names), tuple(given), max_waiting, metrics_prefix, show_prompts)

    def say(text: str) -> None:
        note(f"minipaged: {text}", "")

    say(f"loading {model}")
    return run(build_engine, {"model": model, "settings": settings}, options, Address(host, port, drain), say)


def serve_with_screen(host: str, port: int, key: str) -> int:
    """The same command without --tui in a process of its own, whose words go to a file, and the screen in front of it.

    Whoever leaves the screen ends the server, as ctrl+c does.
    """
    handle, log = tempfile.mkstemp(prefix="minipaged-serve-", suffix=".log")
    words = [word for word in sys.argv[1:] if word != "--tui"]
    process = subprocess.Popen(
        [sys.executable, "-m", "minipaged", *words], stdin=subprocess.DEVNULL, stdout=handle, stderr=handle
    )
    os.close(handle)
    reached = "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    url = f"http://{reached}:{port}"
    try:
        with status_line() as progress:
            source = None
            while source is None:
                if process.poll() is not None:
                    complain(Path(log).read_text(errors="replace").strip().rpartition("minipaged: ")[2] or f"see {log}")
                    return process.returncode
                progress("loading; the server's words are in " + log, 0, 0)
                time.sleep(0.2)
                with contextlib.suppress(InputError):
                    source = attach(url, key)
        from minipaged.tui.run import run_screen

        return run_screen(source)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach that address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def build_engine(model: str, settings: dict[str, Any], progress: Any = None) -> Any:
    """The engine, in its own process."""
    from minipaged.api import LLM

    return LLM(model, progress=progress, **settings).engine
