"""`minipaged chat`: what is typed that is no question."""

from __future__ import annotations

import io

import pytest

from minipaged.cli import chat as module
from minipaged.config import SamplingParams


class Silent:
    """A model that would notice a question."""

    def chat_prompt(self, messages: list[dict[str, str]]) -> list[int]:
        assert messages[-1]["content"] == "hello", "only the template is tried"
        return [1]


@pytest.mark.parametrize("typed", ["", "\n", "/quit\n", " /exit \nmore\n", "/help\n/quit\n"])
def test_ends_and_help_are_no_questions(
    typed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "load", lambda model, settings: Silent())
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    assert module.chat("any", SamplingParams(), {}, None) == 0
    assert capsys.readouterr().err.count("ends the conversation") == 1 + ("/help" in typed)
