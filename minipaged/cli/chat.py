"""`minipaged chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Generator
from dataclasses import replace
from functools import partial
from typing import Any, cast

from minipaged.api import LLM, Prompt
from minipaged.cli.generate import Meter, compared, load, load_beside, warn_of_idle_flags
from minipaged.cli.terminal import complain, keys_unseen, note
from minipaged.config import SamplingParams
from minipaged.errors import InputError, RequestError
from minipaged.scheduling.request import RequestOutput
from minipaged.text.safe import printable

ENDS = ("", "/quit", "/exit", "/bye")
HOW_IT_ENDS = "An empty line, /quit or ctrl+d ends the conversation; ctrl+c stops an answer; /help lists the commands."
HELP = """\
/reset          Forget the conversation; the system prompt stays.
/system [TEXT]  Show the system prompt, or replace it.
/stats          Show how full the context is, and what the last answer cost.
/ours           Ask the last question again of minipaged's block manager, beside your own.
/help           Show this list.
/quit           End the conversation, as /exit, /bye, ctrl+d and an empty line do."""
COMMANDS = ("/reset", "/system", "/stats", "/ours", "/help", "/quit")
ANSWER_SHARE = 4  # a quarter of the context, or max_tokens if that is less, is kept for an answer


def chat(model: str, params: SamplingParams, settings: dict[str, Any], system: str | None) -> int:
    """Read questions and commands until the end of input; ctrl+c stops an answer, and at the prompt it gives up the line."""
    warn_of_idle_flags(params)
    own = settings.get("block_manager") is not None
    beside = partial(load_beside, model, settings) if own else None
    conversation = Conversation(load(model, settings), params, beside)
    conversation.set_system(system)  # a model without a template is refused here
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (input() then edits its line, and shows what was typed during an answer)
    note(HOW_IT_ENDS)
    at_terminal = sys.stdin.isatty()
    while True:
        try:
            typed = input("› " if at_terminal else "")
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            if not at_terminal:
                raise
            print()
            note("ctrl+d or /quit ends the conversation.")
            continue
        except UnicodeDecodeError as error:
            raise InputError(f"standard input is no text: {error}") from None
        if typed.strip() in ENDS:
            return 0
        try:
            _obey(typed.strip(), conversation) if _is_command(typed) else conversation.ask(typed)
        except InputError as error:
            complain(str(error), "red")
        except KeyboardInterrupt:  # before the answer's first step
            print()


def _is_command(typed: str) -> bool:
    """Whether the first word is a slash and letters: a path, which has more slashes, may begin a question."""
    return re.match(r"\s*/\w*(\s|$)", typed) is not None


def _obey(typed: str, conversation: Conversation) -> None:
    command, _, rest = typed.partition(" ")
    if command == "/help":
        note(HELP)
    elif command == "/reset":
        conversation.turns.clear()
        note("The conversation begins anew.")
    elif command == "/stats":
        note(conversation.stats())
    elif command == "/ours":
        conversation.ask_ours()
    elif command != "/system":
        raise InputError(f"there is no command {command}; there are {', '.join(COMMANDS)}")
    elif rest.strip():
        conversation.set_system(rest.strip())
        note("The model is told this first from now on.")
    else:
        note(conversation.system or "There is no system prompt; /system TEXT sets one.")


class Conversation:
    """The turns so far, and the model that they are held with."""

    def __init__(self, llm: LLM, params: SamplingParams, beside: Callable[[LLM], LLM] | None = None) -> None:
        """beside: makes the same as `llm`, with minipaged's block manager, where `llm` has the user's own."""
        self._llm = llm
        self._params = params
        self._make_beside = beside
        self._beside: LLM | None = None
        self._asked: list[
            tuple[Prompt, SamplingParams]
        ] = []  # what the one beside was not asked yet, and the last question
        self._answer = ""  # the last one
        self._last_cost = ""
        self.system: str | None = None
        self.turns: list[tuple[str, str]] = []  # question and answer

    def set_system(self, text: str | None) -> None:
        """Tell the model this first. RequestError, and nothing is changed, if the model's template takes none."""
        before, self.system = self.system, text
        try:
            self._prompt("hello")
        except InputError:
            self.system = before
            raise

    def ask(self, question: str) -> None:
        """Print the answer as it grows, and what it cost; a question that was not answered at all is forgotten."""
        meter = Meter(self._llm)
        answer = ""

        def run() -> list[RequestOutput]:
            nonlocal answer
            asked = self._fit(question)
            answer = self._print_answer(*asked)
            self._asked.append(asked)
            return []

        with keys_unseen():
            meter.run(run)
        if answer:
            self.turns.append((question, answer))
        self._answer, self._last_cost = answer, meter.line()
        note(self._last_cost)

    def ask_ours(self) -> None:
        """What the last answer costs under minipaged's block manager, which is first asked all that came before. InputError without one of
        the user's."""
        if self._make_beside is None:
            raise InputError(
                "this is minipaged's block manager: start with --block-manager FILE.py:CLASS to compare yours"
            )
        if not self._asked:
            raise InputError("ask something first")
        if self._beside is None:
            self._beside = self._make_beside(self._llm)
        *before, last = self._asked
        for prompt, params in before:
            self._beside.generate([prompt], params)
        meter = Meter(self._beside)
        (output,) = meter.run(lambda: meter.llm.generate([last[0]], last[1]))
        note(self._last_cost)
        note(compared(meter, output.outputs[0].text.startswith(self._answer)))  # the answer may have been stopped
        self._asked = [last]

    def stats(self) -> str:
        """How full the context is, and the line of the last answer."""
        held = self._length(self._prompt(None)) if self.turns else 0
        turns = f"{len(self.turns)} turn{'s'[: len(self.turns) != 1]}"
        lines = [f"{turns} · {held:,} of {self._context():,} tokens of context", self._last_cost]
        return "\n".join(line for line in lines if line)

    def _fit(self, question: str) -> tuple[Prompt, SamplingParams]:
        """The prompt, without the oldest turns if they leave no room for an answer; and the params, with what room there is."""
        context, dropped = self._context(), 0
        wanted = min(self._params.max_tokens, context // ANSWER_SHARE)
        prompt = self._prompt(question)
        while self._length(prompt) + wanted > context and self.turns:
            del self.turns[0]
            dropped += 1
            prompt = self._prompt(question)
        if dropped:
            turns = "oldest turn is" if dropped == 1 else f"{dropped} oldest turns are"
            note(f"The context of {context:,} tokens is full: the {turns} forgotten. /reset begins anew.")
        room = context - self._length(prompt)
        if room < 1:
            raise RequestError(
                f"the question takes {self._length(prompt):,} tokens and the context has {context:,}: ask a shorter one"
            )
        return prompt, replace(self._params, max_tokens=min(self._params.max_tokens, room))

    def _context(self) -> int:
        """Tokens that a conversation may have: the model's limit, or what the whole pool holds if that is less and all of it is kept."""
        scheduler = self._llm.engine.scheduler
        if scheduler.running_set.retention.window is not None:
            return scheduler.config.max_model_len
        return min(scheduler.config.max_model_len, (scheduler.manager.usage().total - 1) * scheduler.block_size)

    def _prompt(self, question: str | None) -> Any:
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for asked, answer in self.turns:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        if question is not None:
            messages.append({"role": "user", "content": question})
        return self._llm.chat_prompt(messages)

    @staticmethod
    def _length(prompt: Any) -> int:
        return len(prompt["prompt_token_ids"])

    def _print_answer(self, prompt: Prompt, params: SamplingParams) -> str:
        """The answer's text, as far as it came: ctrl+c stops it. RequestError if the request is refused."""
        text, written = "", 0
        stream = cast("Generator[RequestOutput]", self._llm.stream(prompt, params))
        with contextlib.closing(stream) as outputs:
            try:
                for output in outputs:
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
        return text
