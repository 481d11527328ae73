"""What the command line calls: `run_screen` shows a trace, or an engine that it starts, in the terminal or headless."""

from __future__ import annotations

import asyncio
import shutil
import sys
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minipaged.config import SamplingParams
from minipaged.errors import InputError
from minipaged.serving.live import EngineProcess, LiveSource
from minipaged.text.safe import clean, printable
from minipaged.trace.player import SPEEDS
from minipaged.trace.sources import FileSource, Source
from minipaged.trace.words import counted, plural
from minipaged.tui.app import ScreenApp, binding_ids
from minipaged.tui.keys import load_keys
from minipaged.tui.playback import REPLAY_SPEED
from minipaged.tui.session import Session

Factory = Callable[..., Any]
Prompts = Sequence[str | tuple[str, SamplingParams]]
WATCH_SECONDS = 25.0  # that a short recording takes
START_SECONDS = 600.0  # headless: a model may have to be fetched first
QUIET_SECONDS = 120.0  # headless: the longest time without a step


def run_screen(
    source_or_engine_factory: Source | str | Path | Factory | tuple[Factory, Mapping[str, Any]],
    *,
    prompts: Prompts = (),
    ascii: bool = False,
    record: str | Path | None = None,
    headless: bool = False,
    steps: int | None = None,
    screenshot: str | Path | None = None,
    size: tuple[int, int] | None = None,
    light: bool = False,
    speed: float | None = None,
    guided: bool = False,
    compare: bool = False,
    at_end: bool = False,
) -> int:
    """Show a trace or a live engine; returns the exit code.

    source_or_engine_factory: a source or a trace's path, or a top-level function (with its arguments, as a pair) that a child process
    calls to build the engine. prompts: submitted at once. record: a file that gets the trace. headless: no terminal;
    goes `steps` steps (None: until nothing is left to do), saves `screenshot` (SVG) and returns. size: (columns, rows)
    of a headless screen, 80 by 24 by default. guided: a live run in a terminal goes slowly at first and says what it does.
    compare: begin with other systems in the place of the map. at_end: a trace stands still at its last step.
    Inside a running event loop (a notebook) only a headless screen can be had: InputError for another one.
    """
    if not headless and _loop_runs():
        raise InputError(
            "the screen needs a terminal and an event loop of its own, and one runs here already (a notebook?): "
            "run_screen(…, headless=True, screenshot='x.svg') draws a picture instead, or use a terminal"
        )
    if screenshot is not None and Path(screenshot).suffix.lower() != ".svg":
        raise InputError(f"{str(screenshot)!r}: a screenshot is an SVG picture: give a name that ends in .svg")
    display = DisplayOptions(ascii, light, load_keys(binding_ids()), size or (80, 24), compare)
    given = source_or_engine_factory
    if isinstance(given, str | Path):
        given = FileSource(given, progress=_say_progress)
    if isinstance(given, tuple):
        runner = EngineRunner(*given, record=record)
    elif callable(given):
        runner = EngineRunner(given, {}, record=record)
    else:
        recorded = Session(
            given,
            speed=speed if speed is not None else play_speed(len(given)),
            ends_fullest=not (headless or given.live or at_end),
        )
        if at_end:
            recorded.playback.seek(len(given))
        elif not (headless or given.live or recorded.playback.at_edge):
            recorded.playback.toggle()
        code = _show(recorded, display, None, headless, steps, screenshot)
        if headless and code == 0 and screenshot is None:
            print(f"minipaged: {plural(len(given), 'step')} in this trace; --screenshot FILE keeps a picture of one")
        return code
    try:
        session = Session(runner.start(), speed=speed, guided=guided and not headless, ends_fullest=not headless)
        for prompt in prompts:
            session.submit(*(prompt if isinstance(prompt, tuple) else (prompt, SamplingParams())))
        if not headless:
            session.playback.start()
        code = _show(session, display, runner, headless, steps, screenshot)
        if code == 0:
            session.playback.seek(len(session.source))  # the run is summed up, wherever in it somebody was looking
            code = _say_what_it_came_to(session, guided and not headless)
        if code == 1 and (words := runner.last_words()):
            print(f"minipaged: {printable(words)}", file=sys.stderr)
        return code
    finally:
        runner.close()


@dataclass(frozen=True, slots=True)
class DisplayOptions:
    """How the screen is shown, whatever it shows."""

    ascii: bool
    light: bool
    keymap: Mapping[str, str]
    size: tuple[int, int]  # of a headless screen
    compare: bool  # whether it begins with other systems in the place of the map


class EngineRunner:
    """Starts the engine's process, and another in its place for a branch: two would not fit one device's memory."""

    def __init__(self, factory: Factory, arguments: Mapping[str, Any], *, record: str | Path | None) -> None:
        self._factory, self._arguments, self._record = factory, arguments, record
        self._engine: EngineProcess | None = None

    def start(self, changes: Mapping[str, object] | None = None) -> LiveSource:
        """A fresh engine, some of its arguments changed. The first one's steps are recorded."""
        self.close()
        arguments = {**self._arguments, **(changes or {})}
        self._engine = EngineProcess(self._factory, arguments, recording=self._record)
        self._record = None
        return self._engine.source

    def last_words(self) -> str:
        """The last line of the engine's log, and where it is."""
        words = self._engine.last_words() if self._engine is not None else ""
        return f"{words} (log: {self._engine.log_path})" if words and self._engine is not None else ""

    def close(self) -> None:
        """End the engine's process."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None


def _say_what_it_came_to(session: Session, first_run: bool) -> int:
    """A line on a run that is over, and one on each prompt that was refused; to whoever has seen the first one, what next. The code."""
    for reason in session.refused:
        print(f"minipaged: refused: {clean(reason)}", file=sys.stderr)
    if session.refused and not session.asked:
        return 2
    stats = session.snapshot.stats
    answers = sum(params.n for _, params in session.asked.values())
    if session.asked:
        print(
            f"minipaged: {plural(len(session.asked), 'prompt')}, {plural(answers, 'answer')}, "
            f"{plural(stats.generated_tokens, 'token')} in {plural(session.position, 'step')} "
            f"over {max(0, stats.total_blocks - 1)} blocks of {stats.block_size}"
        )
        if counts := counted(stats):
            print(f"           {' · '.join(counts)}")
    if first_run:
        me = "minipaged" if shutil.which("minipaged") else sys.argv[0]  # an environment that is not activated
        print(f"next: {me} tui --scenario cow · {me} learn · {me} chat")
    return 0


def play_speed(length: int) -> float:
    """Steps a second at which a recording starts to play: a short one slowly enough to be followed, a long one no faster than usual."""
    return next((speed for speed in SPEEDS if speed >= REPLAY_SPEED or length <= speed * WATCH_SECONDS), REPLAY_SPEED)


def _say_progress(done: int, size: int) -> None:
    """Rebuilding the index of a large trace takes a while: say how far it is."""
    if size > 1 << 22 and sys.stderr.isatty():
        end = "\n" if done >= size else ""
        print(f"\rminipaged: rebuilding the trace's index {100 * done // size} %", end=end, file=sys.stderr, flush=True)


def _show(
    session: Session,
    display: DisplayOptions,
    runner: EngineRunner | None,
    headless: bool,
    steps: int | None,
    screenshot: str | Path | None,
) -> int:
    restart = runner.start if runner is not None else None
    app = ScreenApp(
        session,
        ascii=display.ascii,
        light=display.light,
        keymap=display.keymap,
        restart=restart,
        compare=display.compare,
    )
    if headless:
        code = _run(lambda: _headless(app, steps, screenshot, display.size))
        if code:
            print(f"minipaged: {printable(session.failed or session.message)}", file=sys.stderr)
        return code
    found = app.run()
    if session.failed and not session.playback.ready:
        print(f"minipaged: {printable(session.failed)}", file=sys.stderr)
    return found if found is not None else 0


def _loop_runs() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _run(make: Callable[[], Coroutine[Any, Any, int]]) -> int:
    """The coroutine's result; where this thread has a running event loop, from a thread of its own."""
    if not _loop_runs():
        return asyncio.run(make())
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: asyncio.run(make())).result()


async def _headless(app: ScreenApp, steps: int | None, screenshot: str | Path | None, size: tuple[int, int]) -> int:
    """Run without a terminal, go the steps, take the picture."""
    session = app.session
    if session.live is not None:
        session.playback.pause()
    async with app.run_test(size=size) as pilot:
        code = await _go(session, steps)
        if code:
            return code
        session.go(len(session.source) if steps is None else min(steps, len(session.source)))
        app.frame()
        await pilot.pause()
        if screenshot is not None:
            target = Path(screenshot)
            try:
                target.write_text(app.export_screenshot(title="minipaged"), encoding="utf-8")
            except OSError as error:
                raise InputError(f"cannot write the screenshot to {str(target)!r}: {error.strerror}") from None
    return 0


async def _go(session: Session, steps: int | None) -> int:
    """Let a live engine take exactly `steps` steps, or all it has; a recording has taken its own."""
    live = session.live
    if live is None:
        return 0
    if steps is None:
        live.run()
    else:
        live.permit(steps)
    last, deadline = -1, time.monotonic() + START_SECONDS
    while True:
        session.tick(time.monotonic())
        count = len(live)
        if session.failed:
            return 2 if session.input_error else 1
        if count != last:
            last, deadline = count, time.monotonic() + (QUIET_SECONDS if count else START_SECONDS)
        if (steps is not None and count >= steps) or (live.ready and live.idle):
            return 0
        if live.ended or time.monotonic() > deadline:
            session.message = live.ended or "the engine took no step for too long"
            return 1
        await asyncio.sleep(0.005)
