"""An engine in a child process, and the two pipes to it: records come out of one, commands go into the other.

LiveSource reads them for a screen, the HTTP server's link for its clients. The child ends when its command pipe closes, however the parent
went.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

PIPE_BYTES = 1 << 20  # of records under way: the engine does not wait while the reader is busy


class EngineChild:
    """A child process that runs an engine.

    factory: a top-level function; called in the child with `arguments` and `progress`, a callable that takes (stage,
    done, total). It returns the engine. The child's output goes to `log_path`, never to the terminal.
    """

    def __init__(
        self,
        factory: Callable[..., Any],
        arguments: Mapping[str, Any] | None = None,
        *,
        log_path: str | os.PathLike[str] | None = None,
    ) -> None:
        if log_path is None:
            handle, name = tempfile.mkstemp(prefix="minipaged-engine-", suffix=".log")
            os.close(handle)
            self.log_path, self._own_log = Path(name), True
        else:
            self.log_path, self._own_log = Path(log_path), False
        started = {
            "sys_path": sys.path,
            "cwd": os.getcwd(),
            "call": pickle.dumps((factory, dict(arguments or {}))),
            "own_log": str(self.log_path) if self._own_log else None,
        }
        payload = pickle.dumps(started)
        command_out, command_in = os.pipe()
        record_out, record_in = os.pipe()
        _widen(record_in)
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, str(command_out), str(record_in)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(command_out, record_in),
            )
        os.close(command_out)
        os.close(record_in)
        self.commands: BinaryIO = os.fdopen(command_in, "wb")
        with contextlib.suppress(OSError):
            self.commands.write(len(payload).to_bytes(8, "little") + payload)
            self.commands.flush()
        self.records: BinaryIO = os.fdopen(record_out, "rb", PIPE_BYTES)

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the child runs."""
        return self._process.poll() is None

    def last_words(self) -> str:
        """The last line of the child's log: why it died, if it said so."""
        try:
            lines = self.log_path.read_text(errors="replace").strip().splitlines()
        except OSError:
            return ""
        return lines[-1] if lines else ""

    def see_out(self, grace_seconds: float = 2.0) -> None:
        """Wait for the child, to whom the caller has hung up; kill it if it does not go. Leaves no process, and no log unless the child
        failed with words."""
        try:
            code = self._process.wait(grace_seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            code = 0  # it was only busy
        with contextlib.suppress(OSError):
            if self._own_log and (code == 0 or not self.log_path.stat().st_size):
                self.log_path.unlink()


def _widen(pipe: int) -> None:
    """Let a pipe hold PIPE_BYTES, where the system can and allows it."""
    with contextlib.suppress(ImportError, AttributeError, OSError):
        import fcntl

        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)


# The child's first lines: nothing of ours is imported before the parent's import path is known.
_BOOT = """
import os, pickle, signal, sys
for asked in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # sent to all of a group at once: the parent's to answer
    signal.signal(asked, signal.SIG_IGN)
commands = os.fdopen(int(sys.argv[1]), "rb")
size = int.from_bytes(commands.read(8), "little")
call = pickle.loads(commands.read(size)) if size else sys.exit(0)
sys.path[:] = call["sys_path"]
os.chdir(call["cwd"])
from minipaged.serving.loop import main
main(call["call"], commands, os.fdopen(int(sys.argv[2]), "wb"), call["own_log"])
"""
