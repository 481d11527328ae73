"""Standard streams that fail: a reader that has enough, a full disk, closed ones, encodings that lack a character, signals."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.live import Live

from minipaged.cli import terminal
from minipaged.cli.main import app
from minipaged.cli.progress import status_line
from minipaged.cli.terminal import complain, json_text, note, read_stdin, run_guarded
from minipaged.errors import InputError
from minipaged.lab.report.tables import table

TOY = ["--model", "toy", "--raw", "--num-blocks", "200", "--device", "cpu"]
FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A shell's exit code and output; `minipaged` in the command is ours."""
    ours = f"{sys.executable} -m minipaged"
    return subprocess.run(
        ["bash", "-c", command.replace("minipaged", ours)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


ONE_PROMPT = " ".join(["minipaged generate hello --max-tokens 4", *TOY])


def test_a_reader_that_has_enough_ends_it_without_a_word() -> None:
    done = shell(f"{ONE_PROMPT} again --max-tokens 1900 | head -1; echo ${{PIPESTATUS[0]}}")
    assert done.stdout.splitlines() == ["── hello", "1"]
    assert done.stderr == ""


@needs_full
@pytest.mark.parametrize("command", [ONE_PROMPT, f"{ONE_PROMPT} --json", "minipaged --help", "minipaged laws"])
def test_a_full_disk_is_one_sentence(command: str) -> None:
    done = shell(f"{command} > {FULL}")
    assert done.returncode == 1
    told = [line for line in done.stderr.splitlines() if line.startswith("minipaged: ")]
    assert told == ["minipaged: the output could not be written: No space left on device"]
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@needs_full
def test_no_room_for_the_sentence_either() -> None:
    assert shell(f"minipaged generate x --model nope 2> {FULL}").returncode == 1


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (f"{ONE_PROMPT} >&-", 0),
        (f"{ONE_PROMPT.replace('hello', '-')} <&-", 2),
        (f"{ONE_PROMPT} 2>&-", 0),
        ("minipaged tui --steps 2 --model toy --device cpu <&-", 0),
    ],
)
def test_closed_streams_are_empty_ones(command: str, code: int) -> None:
    done = shell(command)
    assert done.returncode == code
    assert "Traceback" not in done.stdout + done.stderr


def test_an_encoding_without_the_character() -> None:
    done = shell(f"{ONE_PROMPT.replace('hello', 'é☃')} B", PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert [line for line in done.stdout.splitlines() if line.startswith("??")] == ["?? ??", "?? B"]
    document = shell(f"{ONE_PROMPT.replace('hello', 'é☃')} --json", PYTHONIOENCODING="ascii")
    assert json.loads(document.stdout)["answers"][0]["prompt"] == "é☃", "JSON loses nothing"


def test_json_holds_everything_and_steers_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    document = {"text": "é \x1b[2J \x9b2J \x7f \u202e \ud800 \U000f0000 \U0001f600\n\ttab"}
    text = json_text(document)
    assert json.loads(text) == document
    assert "é" in text
    assert not set("\x1b\x9b\x7f\u202e\ud800\U000f0000") & set(text)


@pytest.mark.parametrize("words", ["[/b]", "[red]x", ":smile:", "a\\", "[link=x]", "x" * 300])
def test_notes_are_what_was_said(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    note(words)
    complain(f"{words}\n  more")
    with status_line() as progress:
        progress(words, 1, 2)
    assert capsys.readouterr().err == f"{words}\nminipaged: {words} more\n{words}\n"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_shows_any_name(is_terminal: bool) -> None:
    from rich.console import Console

    written = io.StringIO()
    with status_line(Console(file=written, force_terminal=is_terminal, width=80)) as progress:
        progress("reading [/x] \x1b]0;title\x07", 1, 2)
    assert "reading [/x] \ufffd]0;title\ufffd" in written.getvalue()


def test_standard_input_that_is_no_text_or_has_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8"))
    with pytest.raises(InputError, match="standard input is no text"):
        read_stdin()
    monkeypatch.setattr(terminal, "MAX_STDIN", 10)
    monkeypatch.setattr("sys.stdin", io.StringIO("x" * 10))
    assert read_stdin() == "x" * 10
    monkeypatch.setattr("sys.stdin", io.StringIO("x" * 11))
    with pytest.raises(InputError, match="longer than 10 characters"):
        read_stdin()


def raising(error: BaseException) -> Callable[..., Any]:
    def command(standalone_mode: bool) -> None:
        raise error

    return command


def test_a_file_that_fails_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_guarded(raising(PermissionError(13, "Permission denied", "a[/b]\x1b.json"))) == 1
    assert capsys.readouterr().err == "minipaged: a[/b]\ufffd.json: Permission denied\n"
    with pytest.raises(OSError, match="refused"):  # nobody's output and nobody's file: a fault of ours
        run_guarded(raising(ConnectionRefusedError(111, "Connection refused")))


@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("after_seconds", [0.7, 6.0])
def test_a_signal_ends_it_promptly_and_leaves_the_terminal_whole(asked: signal.Signals, after_seconds: float) -> None:
    """While torch is imported or the weights are drawn, under the bar that hides the cursor; and while it generates.

    Nobody reads the terminal until then, so on a busy machine the bar fills its buffer, and the signal meets a bar that waits.
    """
    command = [
        "generate",
        "Count.",
        "--model",
        "random:smollm2-135m",
        "--raw",
        "--max-tokens",
        "1500",
        "--num-blocks",
        "100",
    ]
    pid, screen = pty.fork()
    if pid == 0:
        os.execve(sys.executable, [sys.executable, "-m", "minipaged", *command], {**os.environ, "TERM": "xterm"})
    time.sleep(after_seconds)
    os.kill(pid, asked)
    started, status, shown = time.monotonic(), 0, b""
    os.set_blocking(screen, False)
    while time.monotonic() - started < 20:
        with contextlib.suppress(OSError):
            shown += os.read(screen, 65536)
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            break
        time.sleep(0.02)
    else:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise AssertionError(f"it did not end: {shown.decode()}")
    with contextlib.suppress(OSError):  # until the terminal has no more of what was written before the end
        while rest := os.read(screen, 65536):
            shown += rest
    assert os.waitstatus_to_exitcode(status) in (128 + asked, -asked)  # the latter before Python itself has started
    assert shown.rfind(b"\x1b[?25h") >= shown.rfind(b"\x1b[?25l"), "the cursor is shown again"
    assert b"Traceback" not in shown


def test_a_signal_while_the_bar_is_being_ended_shows_the_cursor_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal that is not read blocks the bar's own thread, and the signal meets the end of the bar waiting for it."""
    written, stop, signals = io.StringIO(), Live.stop, iter([SystemExit(143)])

    def interrupted(live: Live) -> None:
        for error in signals:
            raise error
        stop(live)

    monkeypatch.setattr(Live, "stop", interrupted)
    with pytest.raises(SystemExit), status_line(Console(file=written, force_terminal=True)) as report:
        report("loading", 1, 2)
    assert 0 <= written.getvalue().rfind("\x1b[?25l") < written.getvalue().rfind("\x1b[?25h")


def test_a_table_shows_any_text_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """Titles are names of files, cells names from them, notes their errors."""
    table("a[/b]\x1b]0;title\x07", ("[red]", "b"), [("[/x]", ":smile:")], notes=("[link=y] \x9b2J",))
    out = capsys.readouterr().out
    assert all(words in out for words in ("a[/b]\ufffd]0;title\ufffd", "[red]", "[/x]", ":smile:", "[link=y] \ufffd2J"))


def test_laws_name_the_folder_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_guarded(partial(app, args=["laws", "--tests", "no[/such]"])) == 0
    assert "There is no tests folder at no[/such]: " in capsys.readouterr().err
