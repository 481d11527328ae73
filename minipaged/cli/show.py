"""`minipaged` and `minipaged tui`: the screen over a live engine or a recorded trace; plain lines where there is no terminal."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from minipaged.cli.demo import DEMO
from minipaged.config import SamplingParams, check_choice, check_int
from minipaged.engine import Engine
from minipaged.errors import InputError

# A pool that a screen can show whole and that the demo fills, so that somebody must make way; and prompts read in chunks, so that
# later ones find the beginnings of earlier ones in the cache.
DEMO_SETTINGS: dict[str, Any] = {"num_blocks": 50, "max_num_batched_tokens": 64}

Asked = tuple[tuple[str, SamplingParams], ...]


def show(
    model: str,
    *,
    prompts: Path | None = None,
    record: Path | None = None,
    replay: Path | None = None,
    headless: bool = False,
    steps: int | None = None,
    screenshot: Path | None = None,
    size: str | None = None,
    ascii_only: bool = False,
    light: bool = False,
    scenario: str | None = None,
    web: bool = False,
    settings: dict[str, Any] | None = None,
) -> int:
    """Show a run; every argument is checked before anything is started. Returns the exit code."""
    chosen = dict(settings or {})
    demo = prompts is None and chosen.get("num_blocks") is None
    if demo:
        chosen |= DEMO_SETTINGS
        if model == "toy" or model.startswith("random:"):  # a byte a token: the same prompts take more blocks
            chosen["num_blocks"] *= 2
    if steps is not None:
        check_int("steps", steps, 1)
    check_int("block_size", chosen.get("block_size", 16), 1, 256)
    check_choice("dtype", chosen.get("dtype", "auto"), ("auto", "float32", "float16", "bfloat16"))
    asked = read_prompts(prompts) if prompts is not None else DEMO
    cells = parse_size(size)
    for target in (record, screenshot):
        if target is not None and not target.resolve().parent.is_dir():
            raise InputError(f"{target}: the folder {target.resolve().parent} does not exist")
    if scenario is not None:
        if replay is not None:
            raise InputError("--scenario and --replay both name a recording: give one of them")
        from minipaged.tui.gallery import scenario_path

        replay = scenario_path(scenario)
    if web:
        from minipaged.tui.web import serve_screen

        serve_screen([word for word in sys.argv[1:] if word != "--web"])
        return 0
    in_browser = "TEXTUAL_DRIVER" in os.environ  # textual-serve's: it talks to the screen over pipes
    terminal = in_browser or (sys.stdin.isatty() and sys.stdout.isatty())
    if replay is None and not headless and not terminal:
        from minipaged.cli.plain import run_plain

        return run_plain(partial(build_engine, model, chosen), asked, steps=steps, record=record)
    from minipaged.tui.app import run_screen

    source: Any = replay if replay is not None else (build_engine, {"model": model, "settings": chosen})
    return run_screen(
        source,
        prompts=asked,
        ascii=ascii_only,
        record=record,
        headless=headless or not terminal,
        steps=steps,
        screenshot=screenshot,
        size=cells,
        light=light,
        guided=demo,
        compare=scenario == "orca",  # what it shows is how the others fare
    )


def build_engine(model: str, settings: dict[str, Any], num_blocks: int | None = None, progress: Any = None) -> Engine:
    """An engine over that model; a top-level function, so that a child process can be given it.

    num_blocks: in place of the settings', for a run with another pool.
    """
    from minipaged.api import LLM

    chosen = settings if num_blocks is None else {**settings, "num_blocks": num_blocks}
    return LLM(model, progress=progress, **chosen).engine


def read_prompts(path: Path) -> Asked:
    """A prompt a line; empty lines and lines that begin with # are passed over. InputError if none is left."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read: {error.strerror or error}; give a file with a prompt a line"
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})") from None
    texts = [line for line in lines if line.strip() and not line.startswith("#")]
    if not texts:
        raise InputError(f"{path}: holds no prompt; give a prompt a line")
    return tuple((text, SamplingParams(max_tokens=96)) for text in texts)


def parse_size(size: str | None) -> tuple[int, int] | None:
    """Columns and rows from text such as 120x40."""
    if size is None:
        return None
    columns, _, rows = size.lower().partition("x")
    if not (columns.isdigit() and rows.isdigit()):
        raise InputError(f"size must be columns x rows, such as 120x40, not {size!r}")
    return check_int("columns", int(columns), 40, 500), check_int("rows", int(rows), 12, 200)
