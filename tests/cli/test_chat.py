"""`minipaged chat`: its commands, errors, ctrl+c, a full context, and what is typed while an answer is written."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import signal
import sys
import termios
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from minipaged.api import LLM
from minipaged.cli import chat as module
from minipaged.cli.chat import Conversation
from minipaged.config import SamplingParams
from minipaged.errors import RequestError
from minipaged.memory.block_manager import BlockManager
from minipaged.model.loading.chat_template import ChatTemplate

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
PLAIN = SamplingParams(max_tokens=8, ignore_eos=True)


def talking_toy(**settings: Any) -> LLM:
    """The toy model with a chat template; a byte a token."""
    llm = LLM("toy", num_blocks=200, device="cpu", **settings)
    llm.tokenizer.chat_template = ChatTemplate(TEMPLATE)
    return llm


@pytest.fixture(scope="module")
def llm() -> LLM:
    return talking_toy()


@pytest.fixture
def talk(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[str, str]]:
    """Type lines into a conversation; returns standard output and standard error. Every question is remembered."""

    def run(typed: str, params: SamplingParams = PLAIN, system: str | None = None) -> tuple[str, str]:
        monkeypatch.setattr(module, "load", lambda model, settings: llm)
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        assert module.chat("any", params, {}, system) == 0
        captured = capsys.readouterr()
        return captured.out, captured.err

    return run


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What reaches the model."""
    questions: list[str] = []
    monkeypatch.setattr(Conversation, "ask", lambda self, question: questions.append(question))
    return questions


@pytest.mark.parametrize(
    "typed", ["", "\n", "/quit\n", " /exit \nmore\n", "/help\n/quit\n", "/stats\n/reset\n/system\n"]
)
def test_ends_and_commands_are_no_questions(typed: str, talk: Any, asked: list[str]) -> None:
    talk(typed)
    assert asked == []


def test_an_unknown_command_is_refused_with_the_list(talk: Any, asked: list[str]) -> None:
    _, err = talk("/rest\n/etc/passwd holds what?\n")
    told = next(line for line in err.splitlines() if line.startswith("minipaged: "))
    assert told == "minipaged: there is no command /rest; there are /reset, /system, /stats, /ours, /help, /quit"
    assert asked == ["/etc/passwd holds what?"], "a path is no command"


def test_help_lists_every_command(talk: Any) -> None:
    _, err = talk("/help\n")
    assert all(any(line.startswith(command) for line in err.splitlines()) for command in module.COMMANDS)


def test_system_stats_and_reset(talk: Any, llm: LLM) -> None:
    _, err = talk("/system\n/system Be [/brief].\n/system\nhello\n/stats\n/reset\n/stats\n", system=None)
    assert "There is no system prompt" in err
    assert "\nBe [/brief].\n" in err
    system, question = "system: Be [/brief].\n", "user: hello\n"
    held = len(system + question + "assistant: " + "x" * 8 + "\n")  # eight tokens of the toy are eight characters
    assert f"1 turn · {held} of 2,048 tokens of context" in err
    assert "8 tokens in" in err
    assert "0 turns · 0 of 2,048 tokens of context" in err


def test_a_system_prompt_that_the_template_refuses_changes_nothing(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no [/system] role') }}{% endif %}" + TEMPLATE
    monkeypatch.setattr(llm.tokenizer, "chat_template", ChatTemplate(strict))
    conversation = Conversation(llm, PLAIN)
    with pytest.raises(RequestError, match=r"no .* role"):
        conversation.set_system("Be brief.")
    assert conversation.system is None


@pytest.mark.parametrize("words", ["[/b]", "[red]", "a [link=x] b", "\x1b]0;title\x07", "two\nlines"])
def test_any_error_text_is_one_line_and_the_conversation_goes_on(
    words: str, talk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Conversation, question: str) -> None:
        raise RequestError(words)

    monkeypatch.setattr(Conversation, "ask", refuse)
    _, err = talk("one\ntwo\n")
    told = [line for line in err.splitlines() if line.startswith("minipaged: ")]
    assert told == [f"minipaged: {' '.join(words.split())}".replace("\x1b", "\ufffd").replace("\x07", "\ufffd")] * 2


def test_a_full_context_drops_the_oldest_turns_and_says_so(talk: Any, llm: LLM) -> None:
    filler = "a" * 600
    _, err = talk(f"first {filler}\nsecond {filler}\nthird {filler}\nfourth {filler}\nhi\n/stats\n")
    assert err.count("The context of 2,048 tokens is full: the oldest turn is forgotten. /reset begins anew.") == 1
    assert "4 turns · " in err
    assert "minipaged: " not in err


def test_a_question_longer_than_the_context_is_refused_and_forgotten(talk: Any) -> None:
    out, err = talk("a" * 3000 + "\n/stats\nhi\n")
    assert "the question takes 3,007 tokens and the context has 2,048: ask a shorter one" in err
    assert "0 turns" in err
    assert len(out.split()) >= 1, "the next question is answered"


def test_an_answer_may_take_what_the_question_leaves(talk: Any) -> None:
    _, err = talk("a" * 2000 + "\n", SamplingParams(max_tokens=500, ignore_eos=True))
    assert f"{2048 - 2000 - len('user: ' + chr(10))} tokens in" in err


def test_a_small_pool_is_the_context(talk: Any) -> None:
    conversation = Conversation(LLM("toy", num_blocks=11, block_size=4, device="cpu"), PLAIN)
    assert conversation._context() == 40


def test_ctrl_c_stops_the_answer_only(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    conversation = Conversation(llm, SamplingParams(max_tokens=50, ignore_eos=True))
    stream = llm.stream

    def interrupted(*args: Any) -> Iterator[Any]:
        for number, output in enumerate(stream(*args)):
            if number == 5:
                raise KeyboardInterrupt
            yield output

    monkeypatch.setattr(llm, "stream", interrupted)
    conversation.ask("hello")
    assert capsys.readouterr().out.endswith(" …\n")
    assert [len(answer) for _, answer in conversation.turns] == [5]
    monkeypatch.undo()
    conversation.ask("and more")
    assert [len(answer) for _, answer in conversation.turns] == [5, 50]
    assert llm.engine.scheduler.manager.usage().referenced == 0


# A conversation at a terminal, with the toy.

SCRIPT = """
import sys
from minipaged.cli import chat
from tests.cli.test_chat import talking_toy
chat.load = lambda model, settings: talking_toy()
sys.argv = ["minipaged", "chat", "--max-tokens", "1500"]
from minipaged.__main__ import main
main()
"""


class Terminal:
    """`chat` with a terminal of its own."""

    def __init__(self) -> None:
        self.pid, self._keyboard = pty.fork()
        if self.pid == 0:
            os.execve(sys.executable, [sys.executable, "-c", SCRIPT], {**os.environ, "TERM": "dumb", "NO_COLOR": "1"})
        self._read = b""

    @property
    def shown(self) -> str:
        return self._read.decode(errors="replace")

    def type(self, keys: str) -> None:
        os.write(self._keyboard, keys.encode())

    def wait_for(self, done: Callable[[str], bool], seconds: float = 60.0) -> None:
        """Read until what was shown satisfies `done`."""
        end = time.monotonic() + seconds
        while not done(self.shown):
            assert time.monotonic() < end, self.shown
            if select.select([self._keyboard], [], [], 0.1)[0]:
                try:
                    self._read += os.read(self._keyboard, 65536)
                except OSError:  # the other end has closed
                    assert done(self.shown), self.shown

    def answers(self) -> str:
        """What was shown after the last question."""
        return self.shown.rpartition("hello\r\n")[2]

    def echoes(self) -> bool:
        return bool(termios.tcgetattr(self._keyboard)[3] & termios.ECHO)

    def exit_code(self) -> int:
        for _ in range(200):
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.05)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise AssertionError(f"it did not end: {self.shown}")


def test_at_a_terminal() -> None:
    terminal = Terminal()
    terminal.wait_for(lambda shown: shown.endswith("› "))
    terminal.type("half a quest")
    terminal.wait_for(lambda shown: shown.endswith("half a quest"))
    time.sleep(0.3)  # until it waits for keys again: in between, Python's input() hears a signal only with the next key
    terminal.type("\x03")
    terminal.wait_for(lambda shown: "ctrl+d or /quit ends the conversation." in shown and shown.endswith("› "))
    terminal.type("hello\r")
    terminal.wait_for(lambda shown: re.search(r"[a-z ]{6}", terminal.answers()) is not None)
    assert not terminal.echoes()
    terminal.type("TYPED AHEAD")
    seen = len(terminal.answers())
    terminal.wait_for(lambda shown: len(terminal.answers()) > seen + 5)
    assert "TYPED" not in terminal.answers(), "it is not part of the answer"
    os.kill(terminal.pid, signal.SIGINT)  # a signal alone: the key would also throw away what was typed
    terminal.wait_for(lambda shown: shown.endswith("TYPED AHEAD"))
    assert " …\r\n" in terminal.answers()
    terminal.type("\x15hello\r")
    terminal.wait_for(lambda shown: re.search(r"[a-z ]{6}", terminal.answers()) is not None)
    os.kill(terminal.pid, signal.SIGTERM)
    assert terminal.exit_code() == 128 + signal.SIGTERM
    assert terminal.echoes(), "the terminal is as it was"


def test_ours_answers_the_last_question_beside_the_users_manager(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Same text and hits, for both have seen the whole conversation; each cost on a line of its own."""
    own = {"block_manager": type("Mine", (BlockManager,), {})}
    monkeypatch.setattr(module, "load", lambda model, settings: talking_toy(**settings))
    monkeypatch.setattr(module, "load_beside", lambda model, settings, llm: talking_toy())
    monkeypatch.setattr("sys.stdin", io.StringIO("/ours\nfirst question\nsecond question\n/ours\n/ours\n"))
    assert module.chat("any", PLAIN, own, None) == 0
    first, *_, mine, ours, _, again = capsys.readouterr().err.splitlines()[1:]
    assert first.endswith("ask something first")
    assert ours.startswith("minipaged's manager, the same text: 8 tokens")
    hits = [re.findall(r"(\d+) tokens from the prefix cache", line) for line in (mine, ours)]
    assert hits[0] == hits[1] != ["0"]
    assert again.startswith("minipaged's manager, the same text")


def test_ours_needs_another_manager(talk: Callable[..., tuple[str, str]]) -> None:
    assert "start with --block-manager FILE.py:CLASS" in talk("/ours\n")[1]
