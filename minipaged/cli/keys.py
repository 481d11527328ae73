"""Single keys from a terminal, without enter. Where there is none (a pipe, Windows) no key ever comes."""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

try:
    import termios
    import tty
except ImportError:  # Windows
    termios = None  # type: ignore[assignment]


class Keys:
    """Keys while it is entered; afterwards the terminal is as before. ctrl+c still raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self._before: list[Any] | None = None

    def __enter__(self) -> Keys:
        if termios is not None and sys.stdin.isatty():
            self._before = termios.tcgetattr(sys.stdin)
            tty.setcbreak(sys.stdin)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._before is not None:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self._before)

    def lend(self, work: Callable[[], object]) -> None:
        """Do some work that wants the terminal as it was before."""
        self.__exit__(None, None, None)
        try:
            work()
        finally:
            self.__enter__()

    @property
    def come(self) -> bool:
        """Whether keys can come at all."""
        return self._before is not None

    def wait(self) -> str:
        """The next key, however long it takes; "" where none can come."""
        while self.come:
            if key := self.get(60.0):
                return key
        return ""

    def get(self, seconds: float) -> str:
        """The next key; "" if none comes for so long."""
        if self._before is None:
            time.sleep(seconds)
            return ""
        ready, _, _ = select.select([sys.stdin], [], [], seconds)
        return os.read(sys.stdin.fileno(), 1).decode("ascii", "ignore").lower() if ready else ""
