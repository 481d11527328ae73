"""`minipaged chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console

from minipaged.api import LLM
from minipaged.cli.generate import Meter, load
from minipaged.config import SamplingParams
from minipaged.errors import RequestError
from minipaged.text.safe import printable

ENDS = ("", "/quit", "/exit", "/bye")
HOW_IT_ENDS = "An empty line, /quit or ctrl+d ends the conversation; ctrl+c ends an answer."


def chat(model: str, params: SamplingParams, settings: dict[str, Any], system: str | None) -> int:
    """Read questions until the end of input; ctrl+c ends an answer, and at the prompt the conversation."""
    llm = load(model, settings)
    messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    llm.chat_prompt([*messages, {"role": "user", "content": "hello"}])  # a model without a template is refused here
    notes = Console(stderr=True, highlight=False)
    notes.print(HOW_IT_ENDS, style="dim")
    while True:
        try:
            question = input("› " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        if question.strip() in ENDS:
            return 0
        if question.strip() == "/help":
            notes.print(HOW_IT_ENDS, style="dim")
            continue
        asked = [*messages, {"role": "user", "content": question}]
        meter = Meter(llm)
        try:
            meter.run(lambda asked=asked: [_answer(llm, asked, params)])
        except RequestError as error:
            notes.print(f"minipaged: {error}", style="red")
            continue
        messages = asked
        notes.print(meter.line(), style="dim")


def _answer(llm: LLM, messages: list[dict[str, str]], params: SamplingParams) -> Any:
    prompt = llm.chat_prompt(messages)
    written, text, output = 0, "", None
    try:
        for output in llm.stream(prompt, params):
            if output.error:
                raise RequestError(output.error)
            sequence = output.request.sequences[0]
            text = sequence.text if output.finished else sequence.text[: sequence.stable_text]
            sys.stdout.write(printable(text[written:]))
            sys.stdout.flush()
            written = len(text)
    except KeyboardInterrupt:
        sys.stdout.write(" …")
    print()
    messages.append({"role": "assistant", "content": text})
    return output
