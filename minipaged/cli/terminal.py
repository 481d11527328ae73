"""The command line's three streams: made ready at the start, spoken to in one way, and given up where they fail."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import typer
from rich.console import Console

from minipaged.errors import BlockManagerError, InputError, RankError
from minipaged.text.safe import printable

MAX_STDIN = 64 * 2**20  # characters; no context is that long, and an endless input must end somewhere
_WRITE_FAILURES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)


def run_guarded(command: Callable[..., Any]) -> int:
    """Run a Typer app and turn what its user and this machine can cause into one sentence and an exit code."""
    prepare_streams()
    try:
        code = _run(command)
        sys.stdout.flush()  # a full disk may show itself only now
    except BrokenPipeError:  # who reads has enough: no word of it, and the exit code that click gives
        _discard_output(sys.stdout, sys.stderr)
        return 1
    except OSError as error:
        if error.filename is None and error.errno not in _WRITE_FAILURES:
            raise
        _discard_output(sys.stdout)
        what = str(error.filename) if error.filename is not None else "the output could not be written"
        try:
            complain(f"{what}: {error.strerror}")
        except OSError:
            _discard_output(sys.stderr)
        return 1
    return code


def _run(command: Callable[..., Any]) -> int:
    try:
        result = command(standalone_mode=False)
    except InputError as error:
        complain(str(error))
        return 2
    except (RankError, BlockManagerError) as error:
        complain(str(error))
        return 1
    except (typer.Abort, KeyboardInterrupt):
        if sys.stderr.isatty():
            print(file=sys.stderr)  # the shell's prompt begins a line
        return 130
    except Exception as error:
        show = getattr(error, "show", None)  # click's usage errors
        if show is None:
            raise
        if hasattr(error, "message"):  # it quotes what was typed or pasted
            error.message = printable(error.message)
        show()
        return int(getattr(error, "exit_code", 2))
    return result if isinstance(result, int) else 0


def prepare_streams() -> None:
    """From here on every character can be written (as ? where the encoding lacks it), and a closed stream is an empty one."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (it stays open as long as the process)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # standard error escapes them already


def _discard_output(*streams: Any) -> None:
    """What is still buffered goes nowhere, so that Python does not fail again when it flushes at the end."""
    for stream in streams:
        with contextlib.suppress(OSError, ValueError):  # a stream without a descriptor buffers nothing for one
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def note(text: str, style: str = "dim") -> None:
    """Print on standard error. The text may be a stranger's: nothing in it is markup, nothing steers the terminal."""
    console = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
    console.print(printable(text), style=style)


def complain(text: str, style: str = "") -> None:
    """Say in one line on standard error what is wrong."""
    note(f"minipaged: {' '.join(text.split())}", style)


def read_stdin() -> str:
    """Standard input as text. InputError where it is none, or has no end in sight."""
    try:
        text = sys.stdin.read(MAX_STDIN + 1)
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is no text: {error}") from None
    if len(text) > MAX_STDIN:
        raise InputError(f"standard input is longer than {MAX_STDIN:,} characters: give a shorter prompt")
    return text


def json_text(document: object) -> str:
    """The document as JSON that stdout can hold: what it cannot encode, and what would steer a terminal, as \\u escapes."""
    plain = (sys.stdout.encoding or "").lower().replace("-", "") != "utf8"
    text = json.dumps(document, ensure_ascii=plain, indent=2)
    if text.isascii() and text.replace("\n", "").isprintable():
        return text
    return "".join(char if printable(char) == char else json.dumps(char)[1:-1] for char in text)


@contextlib.contextmanager
def keys_unseen() -> Iterator[None]:
    """What is typed meanwhile is not echoed; it waits for whoever reads standard input next. Without a terminal, nothing."""
    try:
        import termios

        keyboard = sys.stdin.fileno()
        before = termios.tcgetattr(keyboard)
    except (ImportError, OSError, ValueError, termios.error):
        yield
        return
    silent = before.copy()
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(keyboard, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)
