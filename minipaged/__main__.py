"""The way in, for `minipaged` and `python -m minipaged`: ctrl+c is answered from the first import on."""

from __future__ import annotations

import signal
import sys
from types import FrameType

ASK_AGAIN_SECONDS = 0.05


def main() -> None:
    """Run the command line and end with its exit code."""
    try:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _interrupt)
        from minipaged.cli.main import app, run_guarded

        code = run_guarded(app)
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def _interrupt(signal_number: int, frame: FrameType | None) -> None:
    """KeyboardInterrupt, but not inside `import torch`: its C++ half cannot take one and would abort the process. It comes when torch is
    there.
    """
    spec = getattr(sys.modules.get("torch"), "__spec__", None)
    if getattr(spec, "_initializing", False) and hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, _interrupt)
        signal.setitimer(signal.ITIMER_REAL, ASK_AGAIN_SECONDS)
        return
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
