"""`minipaged` and `minipaged tui`: the screen over a live engine or a recorded trace; plain lines where there is no terminal."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minipaged.cli.demo import DEMO
from minipaged.cli.options import ENGINE_OPTIONS
from minipaged.config import DEFAULT_MODEL, KV_CACHE_DTYPES, WEIGHTS, SamplingParams, check_choice, check_int
from minipaged.engine import Engine
from minipaged.errors import InputError, RequestError

if TYPE_CHECKING:
    from minipaged.model.loading.tokenizer import Tokenizer

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
    at_end: bool = False,
    headless: bool = False,
    steps: int | None = None,
    screenshot: Path | None = None,
    size: str | None = None,
    ascii_only: bool = False,
    light: bool = False,
    scenario: str | None = None,
    attach: str | None = None,
    api_key: str = "",
    web: bool = False,
    max_tokens: int | None = None,
    temperature: float | None = None,
    tour: bool = True,
    settings: dict[str, Any] | None = None,
) -> int:
    """Show a run; every argument is checked before anything is started. Returns the exit code.

    at_end: a recording stands still at its last step, instead of being played from its first.
    """
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
    check_choice("weights", chosen.get("weights", "auto"), WEIGHTS)
    check_choice("kv_cache_dtype", chosen.get("kv_cache_dtype", "auto"), KV_CACHE_DTYPES)
    cells = parse_size(size)
    in_browser = "TEXTUAL_DRIVER" in os.environ  # textual-serve's: it talks to the screen over pipes
    terminal = in_browser or (sys.stdin.isatty() and sys.stdout.isatty())
    asked_for = settings or {}
    of_a_run = {
        "--record": record is not None,
        "--model": model != DEFAULT_MODEL,
    }  # what only a run of one's own can have
    of_a_run |= {
        "--max-tokens": max_tokens is not None,
        "--temperature": temperature is not None,
        "--no-tour": not tour,
    }
    of_a_run |= {
        f"--{name.replace('_', '-')}": asked_for.get(name, usual) != usual
        for name, (_, usual) in ENGINE_OPTIONS.items()
    }
    if attach is not None:
        given = {"--scenario": scenario is not None, "--replay": replay is not None, "--prompts": prompts is not None}
        refuse(given | of_a_run, "--attach looks on at a server: it takes no")
    if scenario is not None or replay is not None:
        recording = "--scenario" if scenario is not None else "--replay"
        if scenario is not None and replay is not None:
            raise InputError("--scenario and --replay both name a recording: give one of them")
        refuse(
            {"--prompts": prompts is not None} | of_a_run, f"{recording} shows a recording, which is over: it takes no"
        )
    on_screen = (web or terminal) and not headless
    if on_screen or (not headless and replay is None and scenario is None):  # the second prints lines instead
        given = {"--screenshot": screenshot is not None, "--size": size is not None}
        given["--steps"] = on_screen and steps is not None
        refuse(given, "without --headless there is no use for")
    if not tour:
        refuse(
            {"--no-tour": not (demo and on_screen)}, "only the first run on a screen has a tour: there is no use for"
        )
    asked = read_prompts(prompts) if prompts is not None else DEMO
    asked = with_params(asked, max_tokens, temperature)
    for target in (record, screenshot):
        if target is not None and not target.resolve().parent.is_dir():
            raise InputError(f"{target}: the folder {target.resolve().parent} does not exist")
    if scenario is not None:
        from minipaged.tui.gallery import scenario_path

        replay = scenario_path(scenario)
    if web:
        from minipaged.tui.web import serve_screen

        serve_screen([word for word in sys.argv[1:] if word != "--web"])
        return 0
    engine: dict[str, Any] = {"model": model, "settings": chosen, "chat": prompts is not None}
    if replay is None and attach is None and not headless and not terminal:
        from minipaged.cli.plain import run_plain

        return run_plain(partial(build_engine, **engine), asked, steps=steps, record=record)
    from minipaged.tui.run import run_screen

    source: Any = replay if replay is not None else (build_engine, engine)
    if attach is not None:
        from minipaged.serving.attach import attach as look_on

        source, asked, demo = look_on(attach, api_key), (), False
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
        at_end=at_end,
        guided=demo and tour,
        compare=scenario == "orca",  # what it shows is how the others fare
    )


def refuse(given: dict[str, bool], reason: str) -> None:
    """InputError naming the options that were given and would do nothing."""
    useless = [name for name, is_given in given.items() if is_given]
    if useless:
        raise InputError(f"{reason} {' or '.join(useless)}")


def build_engine(
    model: str, settings: dict[str, Any], num_blocks: int | None = None, progress: Any = None, *, chat: bool = False
) -> Engine:
    """An engine over that model; a top-level function, so that a child process can be given it.

    num_blocks: in place of the settings', for a run with another pool. chat: prompts are what a user says; the chat template of an
    instruct model is put around them, as `generate` does.
    """
    from minipaged.api import LLM

    chosen = settings if num_blocks is None else {**settings, "num_blocks": num_blocks}
    llm = LLM(model, progress=progress, **chosen)
    if chat and llm.tokenizer.chat_template is not None:
        llm.engine.codec = ChatCodec(llm.tokenizer)
    return llm.engine


class ChatCodec:
    """A tokenizer that encodes a prompt as a conversation in which the user has said it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.vocab_size = tokenizer.vocab_size
        self.token_bytes = tokenizer.token_bytes
        self.fewest_tokens = tokenizer.fewest_tokens
        self._tokenizer = tokenizer

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """The tokens of the conversation, up to where the answer begins; of the text alone without `add_special`."""
        if not add_special:
            return self._tokenizer.encode(text, add_special=False)
        if not text.strip():
            raise RequestError("the prompt is empty: give some text")
        conversation = self._tokenizer.chat([{"role": "user", "content": text}])
        return self._tokenizer.encode(conversation, add_special=False)


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


def with_params(asked: Asked, max_tokens: int | None, temperature: float | None) -> Asked:
    """The prompts with these in the place of their own. InputError for what they cannot be."""
    changes: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature}
    changes = {name: value for name, value in changes.items() if value is not None}
    try:
        return tuple((text, replace(params, **changes)) for text, params in asked)
    except RequestError as error:
        raise InputError(str(error)) from None


def parse_size(size: str | None) -> tuple[int, int] | None:
    """Columns and rows from text such as 120x40."""
    if size is None:
        return None
    columns, _, rows = size.lower().partition("x")
    if not (columns.isdigit() and rows.isdigit()):
        raise InputError(f"size must be columns x rows, such as 120x40, not {size!r}")
    return check_int("columns", int(columns), 40, 500), check_int("rows", int(rows), 12, 200)
