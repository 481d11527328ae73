"""The screen in a browser: textual-serve (extra `web`) runs the command line's screen and shows it on this machine only."""

from __future__ import annotations

import importlib
import shlex
import sys
from collections.abc import Sequence

from minipaged.errors import InputError


def serve_screen(arguments: Sequence[str], *, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve `minipaged ARGUMENTS` until it is interrupted. InputError where textual-serve is missing."""
    try:
        server = importlib.import_module("textual_serve.server")
    except ImportError:
        raise InputError("a browser needs the extra 'web': pip install 'minipaged[web]'") from None
    command = " ".join([shlex.quote(sys.executable), "-m", "minipaged", *map(shlex.quote, arguments)])
    server.Server(command, host=host, port=port, title="minipaged").serve()
