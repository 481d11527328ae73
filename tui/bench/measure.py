"""`minipaged bench screen`: what the screen costs an engine that runs beside it, and pictures of that run.

The same requests are served with the screen on and off in turn, by one engine; the screen has a terminal of its own (a pty), so that what
it writes is encoded and sent as for a person. Times are the engine's own, from its first step to its last.
"""

from __future__ import annotations

import json
import os
import pty
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fcntl import ioctl
from pathlib import Path
from typing import Any, NamedTuple

from minipaged.errors import InputError
from minipaged.serving.live import EngineProcess, LiveSource
from minipaged.tui.app import ScreenApp
from minipaged.tui.bench.engine import requests, timed_engine
from minipaged.tui.bench.pictures import take_pictures
from minipaged.tui.session import Session

SIZE = (160, 50)  # columns, rows, while it is timed
LOAD_SECONDS, ROUND_SECONDS = 300.0, 240.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run. threads: torch's, on a CPU; the screen gets the other cores. pictures: a folder for SVGs, or ""."""

    model: str
    settings: dict[str, Any]
    num_requests: int = 64
    max_tokens: int = 256
    pairs: int = 3
    threads: int | None = None
    pictures: str = ""


class Round(NamedTuple):
    """One generation: with the screen or without, and the engine's figures."""

    screen: bool
    figures: dict[str, float]

    @property
    def tokens_per_second(self) -> float:
        """Of the engine."""
        return self.figures["tokens_per_second"]


class Outcome(NamedTuple):
    """All rounds, how many bytes the screen wrote to its terminal, and the pictures taken."""

    rounds: tuple[Round, ...]
    terminal_bytes: int
    pictures: tuple[str, ...]

    @property
    def ratios(self) -> list[float]:
        """Tokens a second with the screen over those without, pair by pair."""
        on = [r.tokens_per_second for r in self.rounds if r.screen]
        off = [r.tokens_per_second for r in self.rounds if not r.screen]
        return [with_screen / without for with_screen, without in zip(on, off, strict=True)]

    @property
    def processor_ratio(self) -> float:
        """The engine's processor time for a token without the screen over that with it: what other work on the machine disturbs less."""
        on, off = (
            [r.figures["cpu_seconds"] / r.figures["tokens"] for r in self.rounds if r.screen == s]
            for s in (True, False)
        )
        return statistics.median(without / with_screen for with_screen, without in zip(on, off, strict=True))

    @property
    def ratio(self) -> float:
        """The median pair's."""
        return statistics.median(self.ratios)


def measure(plan: Plan) -> Outcome:
    """Run the plan in a process on a new terminal. InputError with the last words of one that fails."""
    with tempfile.TemporaryDirectory(prefix="minipaged-bench-") as folder:
        outcome, log = Path(folder) / "outcome.json", Path(folder) / "log"
        words = json.dumps({name: getattr(plan, name) for name in Plan.__dataclass_fields__})
        code, written = _on_a_terminal(
            [sys.executable, "-m", "minipaged.tui.bench.measure", words, str(outcome), str(log)],
            SIZE,
            _cores(plan.threads)[1],
        )
        if code or not outcome.exists():
            lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
            raise InputError(f"the run ended with code {code}: {lines[-1] if lines else 'it said nothing'}")
        found = json.loads(outcome.read_text())
    rounds = tuple(Round(bool(screen), figures) for screen, figures in found["rounds"])
    return Outcome(rounds, written, tuple(found["pictures"]))


def _cores(threads: int | None) -> tuple[list[int], list[int]]:
    """The engine's cores, and those of all else: the first `threads`, and the others as far as there are; (): any."""
    if threads is None:
        return [], []
    cores = sorted(os.sched_getaffinity(0))
    return cores[:threads], cores[threads:] or cores


def _on_a_terminal(command: Sequence[str], size: tuple[int, int], cores: Sequence[int]) -> tuple[int, int]:
    """Run a command on a pty of that size, reading what it writes on these cores. Returns its exit code and how many bytes it wrote."""
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", size[1], size[0], 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor"}
    environment.pop("NO_COLOR", None)
    # It is that terminal's own session, so that it is hung up on when this process goes, however it goes.
    process = subprocess.Popen(command, env=environment, preexec_fn=lambda: os.login_tty(theirs))
    os.close(theirs)
    if cores:
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, cores)
    written = 0
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:  # the other side is closed
            break
        if not part:
            break
        written += len(part)
    os.close(ours)
    if cores:
        os.sched_setaffinity(0, before)
    return process.wait(), written


# In that process.


class TimedScreen(ScreenApp):
    """A screen that goes when everything was answered."""

    def frame(self) -> None:
        """As ever, then look whether there is anything left."""
        super().frame()
        session = self.session
        live = session.live
        if live is not None and (
            live.ended or (live.idle and session.playback.at_edge and not session.playback.at_full_speed)
        ):
            self.exit(0)


def run_rounds(plan: Plan) -> tuple[list[Round], list[str]]:
    """A warm round whose trace the pictures are of, then the pairs."""
    asked = requests(plan.num_requests, plan.max_tokens)
    engine_cores, cores = _cores(plan.threads)
    arguments = {"model": plan.model, "settings": plan.settings, "cores": engine_cores}
    rounds: list[Round] = []
    if cores:
        os.sched_setaffinity(0, cores)  # the engine's process goes to its own, by name
    with EngineProcess(timed_engine, arguments) as engine:
        source = engine.source
        _wait(source, lambda: source.ready, LOAD_SECONDS, engine)
        pictures: list[str] = []
        for number in range(2 * plan.pairs + 1):
            screen = number % 2 == 0
            source.pause()
            for prompt, params in asked:
                source.submit(prompt, params)
            figures = _with_screen(source) if screen else _without(source, engine)
            if number:
                rounds.append(Round(screen, figures))
            elif plan.pictures:
                pictures = take_pictures(
                    source, {n: params.max_tokens for n, (_, params) in enumerate(asked)}, plan.pictures
                )
    return rounds, pictures


def _with_screen(source: LiveSource) -> dict[str, float]:
    session = Session(source)
    session.playback.seek(len(source))
    session.playback.start()
    TimedScreen(session).run()
    source.pause()
    return _ask(source, "report")


def _without(source: LiveSource, engine: EngineProcess) -> dict[str, float]:
    return _ask(source, "quiet")


def _ask(source: LiveSource, name: str) -> dict[str, float]:
    source.notes.clear()
    source.knob(name, True)
    words: list[str] = []

    def answered() -> bool:
        while source.notes:
            note = source.notes.popleft()
            if note.get("kind") == "failed":
                raise RuntimeError(str(note.get("text")))
            if note.get("kind") == "turned" and note.get("name") == name:
                words.append(str(note.get("text")))
        return bool(words)

    if not source.wait(answered, ROUND_SECONDS):
        raise RuntimeError(source.ended or f"no answer within {ROUND_SECONDS:.0f} seconds")
    figures: dict[str, float] = json.loads(words[0][words[0].index("{") :])
    return figures


def _wait(source: LiveSource, condition: Callable[[], bool], seconds: float, engine: EngineProcess) -> None:
    if not source.wait(condition, seconds):
        failed = [str(note.get("text")) for note in source.notes if note.get("kind") == "failed"]
        raise RuntimeError(failed[-1] if failed else source.ended or engine.last_words() or "the engine did not start")


def main(words: str, outcome: str, log: str) -> int:
    """Run a plan given as JSON, and write the outcome to a file. Errors go to a log: the terminal is the screen's."""
    try:
        rounds, pictures = run_rounds(Plan(**json.loads(words)))
    except Exception as error:
        Path(log).write_text(f"{type(error).__name__}: {error}\n")
        return 1
    Path(outcome).write_text(json.dumps({"rounds": rounds, "pictures": pictures}))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
