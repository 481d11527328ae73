"""The way in, for `minipaged` and `python -m minipaged`. ctrl+c, SIGTERM and SIGHUP are answered from the first import on."""

from __future__ import annotations

import signal
import sys
from functools import partial
from types import FrameType

ASK_AGAIN_SECONDS = 0.05


def main() -> None:
    """Run the command line and end with its exit code."""
    try:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, partial(_end, signal.SIGINT))
        for asked in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(asked) is signal.SIG_DFL:  # nohup ignores the second, and it stays ignored
                signal.signal(asked, partial(_end, asked))
        from minipaged.cli.main import app
        from minipaged.cli.terminal import run_guarded

        code = run_guarded(app)
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def _end(asked: signal.Signals, number: int, frame: FrameType | None) -> None:
    """Leave by an exception, so that whoever changed the terminal changes it back: KeyboardInterrupt for ctrl+c, else SystemExit.

    Not inside `import torch`: its C++ half cannot take one and would abort the process. It comes when torch is there.
    """
    spec = getattr(sys.modules.get("torch"), "__spec__", None)
    if getattr(spec, "_initializing", False) and hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, partial(_end, asked))
        signal.setitimer(signal.ITIMER_REAL, ASK_AGAIN_SECONDS)
        return
    if asked is signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + asked)


if __name__ == "__main__":
    main()
