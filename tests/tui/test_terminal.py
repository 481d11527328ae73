"""A real terminal: tmux, send-keys, capture-pane. Start, keys, resize, kill -9 of the engine, a closed terminal, quit."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from processes import children, wait_for

pytestmark = pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux")

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
sys.path[:0] = [{root!r}, {trace!r}]
from minipaged.config import SamplingParams
from scripted import scripted_engine
from minipaged.tui.run import run_screen
prompts = [("a prompt that goes on for a while \\x1b[31m\\u202e", SamplingParams(max_tokens=40)), "Once upon a time"]
sys.exit(run_screen((scripted_engine, {{"num_blocks": 64}}), prompts=prompts, speed={speed}))
"""


class Terminal:
    """One tmux session with a shell in it."""

    def __init__(self, socket: str) -> None:
        self.socket = socket
        self.tmux("new-session", "-d", "-s", "t", "-x", "100", "-y", "30", "sh")
        self.keys("PS1='ready> '; export TERM=xterm-256color; unset COLUMNS LINES", "Enter")

    def tmux(self, *words: str) -> str:
        return subprocess.run(["tmux", "-L", self.socket, *words], capture_output=True, text=True, check=False).stdout

    def keys(self, *keys: str) -> None:
        self.tmux("send-keys", "-t", "t", *keys)

    def screen(self) -> str:
        return self.tmux("capture-pane", "-t", "t", "-p")

    def until(self, condition: Callable[[str], bool], seconds: float = 25.0) -> str:
        deadline = time.monotonic() + seconds
        while True:
            shown = self.screen()
            if condition(shown):
                return shown
            assert time.monotonic() < deadline, shown
            time.sleep(0.05)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    made = Terminal(f"minipaged-{os.getpid()}-{time.monotonic_ns()}")
    made.until(lambda shown: "ready>" in shown)
    yield made
    made.tmux("kill-server")


def start(terminal: Terminal, tmp_path: Path, *, speed: str = "float('inf')") -> Path:
    """Run the screen in it; its process id goes to a file."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(root=str(ROOT), trace=str(ROOT / "tests" / "trace"), speed=speed))
    terminal.keys(f"clear; {sys.executable} {program}; echo code=$?", "Enter")
    return program


def test_a_session_from_start_to_quit(terminal: Terminal, tmp_path: Path) -> None:
    program = start(terminal, tmp_path)
    terminal.until(lambda shown: "IDLE" in shown)
    shown = terminal.screen()
    assert "a prompt that goes on" in shown
    assert "�[31m�" in shown, "escape sequences and bidi marks show as marks"
    terminal.keys("[", "[")
    terminal.until(lambda shown: "2 behind live" in shown)
    terminal.tmux("resize-window", "-t", "t", "-x", "140", "-y", "45")
    terminal.until(lambda shown: "5 Inspector" in shown and "2 behind live" in shown)
    terminal.tmux("resize-window", "-t", "t", "-x", "80", "-y", "24")
    terminal.until(lambda shown: "5 Inspector" not in shown and "4 Timeline" in shown)
    terminal.keys("?")
    terminal.until(lambda shown: "copy-on-write" in shown)
    terminal.keys("Escape")
    terminal.until(lambda shown: "4 Timeline" in shown)
    terminal.keys("q")
    shown = terminal.until(lambda shown: "code=0" in shown)
    assert "ready>" in shown, "the shell is back"
    terminal.keys("echo al''ive", "Enter")
    terminal.until(lambda shown: "alive" in shown)
    wait_for(lambda: not children(program))


def test_ctrl_c_and_a_killed_engine(terminal: Terminal, tmp_path: Path) -> None:
    program = start(terminal, tmp_path, speed="5.0")
    terminal.until(lambda shown: "LIVE · step" in shown)
    terminal.tmux("resize-window", "-t", "t", "-x", "130", "-y", "40")  # while it generates
    terminal.until(lambda shown: "5 Inspector" in shown)
    pids = children(program)
    assert len(pids) == 2
    os.kill(max(pids), signal.SIGKILL)  # the engine is the younger one
    terminal.until(lambda shown: "ENDED" in shown and "has ended" in shown)
    terminal.keys("C-c")
    terminal.until(lambda shown: "code=0" in shown and "ready>" in shown)


def test_a_closed_terminal_leaves_no_process(terminal: Terminal, tmp_path: Path) -> None:
    program = start(terminal, tmp_path, speed="5.0")
    terminal.until(lambda shown: "LIVE · step" in shown)
    assert len(children(program)) == 2
    terminal.tmux("kill-server")
    wait_for(lambda: not children(program))


def pane_modes(terminal: Terminal) -> str:
    """Whether the terminal shows the alternate screen, and whether a program gets its mouse."""
    return terminal.tmux("display-message", "-t", "t", "-p", "#{alternate_on}#{mouse_any_flag}").strip()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_gives_the_terminal_back(
    terminal: Terminal, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    program = start(terminal, tmp_path, speed="5.0")
    terminal.until(lambda shown: "LIVE · step" in shown)
    assert pane_modes(terminal) == "11"
    os.kill(min(children(program)), number)  # the screen is the older one
    terminal.until(lambda shown: f"code={code}" in shown and "ready>" in shown and "Timeline" not in shown)
    assert pane_modes(terminal) == "00"
    wait_for(lambda: not children(program))
    terminal.keys("echo al''ive", "Enter")
    terminal.until(lambda shown: "alive" in shown)


def test_ctrl_z_suspends_and_fg_goes_on(terminal: Terminal, tmp_path: Path) -> None:
    program = start(terminal, tmp_path, speed="5.0")
    terminal.until(lambda shown: "LIVE · step" in shown)
    terminal.keys("C-z")
    terminal.until(lambda shown: "Stopped" in shown and "ready>" in shown and "Timeline" not in shown)
    assert pane_modes(terminal) == "00"
    terminal.keys("echo al''ive", "Enter")
    terminal.until(lambda shown: "alive" in shown)
    terminal.keys("fg", "Enter")
    terminal.until(lambda shown: "Timeline" in shown and " · step" in shown)
    assert pane_modes(terminal) == "11"
    terminal.keys("q")
    terminal.until(lambda shown: "ready>" in shown and "Timeline" not in shown)
    wait_for(lambda: not children(program))
