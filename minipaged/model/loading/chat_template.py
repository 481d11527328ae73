"""Chat messages -> the text that a model was trained to continue.

A template comes with a model from somewhere else, so it runs in Jinja2's sandbox, with the few extras that published templates use
(those of transformers), and every failure is one line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minipaged.errors import ModelError, RequestError

Message = Mapping[str, Any]


class ChatTemplate:
    """A compiled template. `special_tokens` are the names it may use: bos_token, eos_token and the like."""

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens or {})
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ModelError(f"the model's chat template does not compile: {_one_line(error)}") from None

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        values: Mapping[str, Any] | None = None,
    ) -> str:
        """The text for `messages`, each with a role and a content; with the opening of the answer unless that is switched off.

        values: further variables that the template may read, such as enable_thinking.
        """
        check_messages(messages)
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                **{"tools": None, "documents": None, **self._special_tokens, **_allowed(values)},
            )
        except Exception as error:  # a template is a program: it can fail in any way
            raise RequestError(f"the model's chat template refused the messages: {_one_line(error)}") from None


def _allowed(values: Mapping[str, Any] | None) -> dict[str, Any]:
    """The variables that a caller may set: not those that are said in another way."""
    return {name: value for name, value in (values or {}).items() if name not in ("messages", "add_generation_prompt")}


def check_messages(messages: Sequence[Message]) -> None:
    """Raise RequestError unless `messages` is a non-empty list of objects with text under role and content."""
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence) or not messages:
        raise RequestError(f"messages must be a non-empty list, not {messages!r:.80}")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise RequestError(f"messages[{index}] must be an object with role and content, not {message!r:.80}")
        for name in ("role", "content"):
            if not isinstance(message.get(name), str):
                raise RequestError(f"messages[{index}].{name} must be text, not {message.get(name)!r:.80}")


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}` marks what the assistant said, for training; here it is just its body."""

    tags = {"generation"}  # noqa: RUF012 (so does jinja2)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    extensions = [_Generation, "jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(value: object, **options: Any) -> str:
    """Plain JSON: Jinja2's own filter escapes HTML."""
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
