"""`minipaged tui`: options that would do nothing are refused by name, and an instruct model is talked to as it expects."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import minipaged.api
from minipaged.cli.show import ChatCodec, build_engine, show
from minipaged.config import DEFAULT_MODEL, SamplingParams
from minipaged.errors import InputError
from minipaged.model.loading.chat_template import ChatTemplate

PARAMS = SamplingParams(max_tokens=4)


@pytest.mark.parametrize("recording", [{"scenario": "cow"}, {"replay": Path("run.mpt")}], ids=["scenario", "replay"])
@pytest.mark.parametrize(
    ("option", "given"),
    [
        ("--record", {"record": Path("x.mpt")}),
        ("--prompts", {"prompts": Path("x.txt")}),
        ("--model", {"model": "toy"}),
        ("--num-blocks", {"settings": {"num_blocks": 64}}),
        ("--block-size", {"settings": {"block_size": 8}}),
        ("--device", {"settings": {"device": "cuda"}}),
        ("--dtype", {"settings": {"dtype": "float16"}}),
    ],
)
def test_a_recording_takes_no_option_of_an_engine(
    recording: dict[str, Any], option: str, given: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match=f"^{next(f'--{name}' for name in recording)} shows a recording.* {option}$"):
        show(**{"model": DEFAULT_MODEL, **recording, **given})


def test_all_useless_options_are_named_at_once() -> None:
    with pytest.raises(InputError, match=r"takes no --record or --num-blocks$"):
        show(DEFAULT_MODEL, scenario="cow", record=Path("x.mpt"), settings={"num_blocks": 64, "device": "auto"})


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize(
    ("option", "given"), [("--screenshot", {"screenshot": Path("x.svg")}), ("--size", {"size": "80x24"})]
)
def test_a_picture_needs_headless(
    terminal: bool, option: str, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: terminal, raising=False)
    with pytest.raises(InputError, match=f"without --headless there is no use for {option}"):
        show("toy", **given)


def test_prompts_from_a_file_are_what_a_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `generate` does: the template goes around them, and special tokens are not added a second time."""
    made = minipaged.api.LLM("toy", block_size=4, num_blocks=64)
    made.tokenizer.chat_template = ChatTemplate(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<a>", {}
    )
    monkeypatch.setattr(minipaged.api, "LLM", lambda *_, **__: made)
    engine = build_engine("toy", {}, chat=True)
    assert isinstance(engine.codec, ChatCodec)
    output = engine.ask("hello", PARAMS)
    conversation = made.chat_prompt([{"role": "user", "content": "hello"}])
    assert output.error is None
    assert list(output.prompt_token_ids) == conversation["prompt_token_ids"]  # type: ignore[index]
    assert made.tokenizer.decode(output.prompt_token_ids) == "<user>hello<a>"
    assert output.prompt == "hello", "what was asked is what was typed"
    assert engine.ask("  ", PARAMS).error == "the prompt is empty: give some text"


@pytest.mark.parametrize("chat", [True, False])
def test_a_model_without_a_template_gets_the_text_itself(chat: bool) -> None:
    engine = build_engine("toy", {"block_size": 4, "num_blocks": 64}, chat=chat)
    assert not isinstance(engine.codec, ChatCodec)


def test_a_demo_is_text_to_be_continued_and_a_file_is_a_conversation(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[bool] = []
    monkeypatch.setattr("minipaged.tui.run.run_screen", lambda source, **_: seen.append(source[1]["chat"]) or 0)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("What is a page?\n")
    assert show("toy", headless=True) == show("toy", headless=True, prompts=prompts) == 0
    assert seen == [False, True]
