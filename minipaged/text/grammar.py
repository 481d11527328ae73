"""Answers that follow a JSON schema: which tokens may come next, as a bit a token. The grammar itself is llguidance's (extra `structured`).

One matcher a sequence walks along its tokens. A fork begins with its parent's tokens and walks them anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from minipaged.errors import InputError, RequestError
from minipaged.text.detokenizer import TextCodec

ANY_OBJECT = '{"type":"object"}'  # what response_format json_object means
# Between two parts of a document: room to indent, and an end, so that a model which likes spaces comes to its point.
SPACES = {"whitespace_pattern": "[ \\n]{0,8}"}
MAX_SCHEMA = 200_000  # characters


class Line(Protocol):
    """What is read of a sequence."""

    grammar_state: Any  # the walker is kept here

    @property
    def output_token_ids(self) -> list[int]:
        """The tokens drawn so far."""
        ...


Grammar = Callable[[Line], bytes]  # the tokens that may come next in a sequence, a bit each


class Grammars:
    """The schemas of one engine's requests, over its vocabulary. InputError without the package that it needs."""

    def __init__(self, codec: TextCodec, eos_token_ids: Sequence[int]) -> None:
        try:
            import llguidance
        except ImportError:
            raise InputError(
                "answers that follow a schema need llguidance: pip install 'minipaged[structured]'"
            ) from None
        if not eos_token_ids:
            raise InputError("answers that follow a schema need a model with an end token")
        self._matcher = llguidance.LLMatcher
        self._tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Vocabulary(codec, eos_token_ids[0])), eos_token=list(eos_token_ids)
        )

    def masks(self, schema: str) -> Grammar:
        """What says, of a sequence that follows this schema, which tokens may come next. RequestError if the schema is none."""
        try:
            grammar = self._matcher.grammar_from_json_schema(_checked(schema), overrides=SPACES)
        except RequestError:
            raise
        except ValueError as error:  # its own reader takes less than Python's: of numbers, of levels
            raise RequestError(f"the JSON schema cannot be followed: {_one_line(str(error))}") from None
        first = self._matcher(self._tokenizer, grammar, log_level=0)
        if first.is_error():
            raise RequestError(f"the JSON schema cannot be followed: {_one_line(first.get_error())}")

        def mask(line: Line) -> bytes:
            walker: _Walker | None = line.grammar_state
            if walker is None:
                walker = line.grammar_state = _Walker(first.deep_copy())
            return walker.mask(line.output_token_ids)

        return mask


class _Walker:
    """A matcher, and how many tokens it has taken."""

    __slots__ = ("_count", "_matcher")

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher
        self._count = 0

    def mask(self, tokens: list[int]) -> bytes:
        if len(tokens) > self._count:
            self._matcher.consume_tokens(tokens[self._count :])
            self._count = len(tokens)
        mask: bytes = self._matcher.compute_bitmask()
        return mask


class _Vocabulary:
    """The tokens as llguidance reads them: special ones are no text."""

    def __init__(self, codec: TextCodec, eos_token_id: int) -> None:
        self.eos_token_id, self.bos_token_id = eos_token_id, None
        self._codec = codec
        tokens, special = [], []
        for token in range(codec.vocab_size):
            spelled = codec.token_bytes(token)
            if not spelled:
                special.append(token)
                spelled = b"\xff" + (codec.token_bytes(token, skip_special=False) or b"<%d>" % token)
            tokens.append(spelled)
        self.tokens, self.special_token_ids = tokens, special

    def __call__(self, text: str) -> list[int]:
        return self._codec.encode(text, add_special=False)


def _checked(schema: str) -> str:
    if len(schema) > MAX_SCHEMA:
        raise RequestError(f"the JSON schema is longer than {MAX_SCHEMA} characters")
    try:
        found = json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the JSON schema is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise RequestError("the JSON schema must be an object")
    return schema


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
