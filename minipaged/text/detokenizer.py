"""The text of every sequence beside its tokens, made when somebody reads it, and whether a stop string has ended it."""

from __future__ import annotations

from typing import Any, Protocol

from minipaged.text.growing import TextStream


class TextCodec(Protocol):
    """Text to tokens and back."""

    @property
    def vocab_size(self) -> int:
        """Tokens that exist."""
        ...

    def encode(self, text: str) -> list[int]:
        """The tokens of a prompt."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """The exact bytes of one token; b"" for a special token."""
        ...


class TextSource(Protocol):
    """What is read of a sequence to make its text."""

    request: Any  # with `params.stop` and `params.min_tokens`
    text_state: Any  # the stream is kept here

    @property
    def finished(self) -> bool:
        """Whether no more tokens come."""
        ...

    def text_token_ids(self, start: int) -> list[int]:
        """The drawn tokens that are text, from number `start` on."""
        ...


class Detokenizer:
    """One text stream a sequence, fed when somebody reads the text; where a stop string may end it, after every token."""

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec

    def read(self, sequence: TextSource) -> TextStream:
        """The sequence's text, up to its newest token."""
        stream = sequence.text_state
        if not isinstance(stream, TextStream):
            params = sequence.request.params
            stream = sequence.text_state = TextStream(
                self._codec.token_bytes, params.stop, min_tokens=params.min_tokens
            )
        tokens = sequence.text_token_ids(stream.consumed)
        if tokens:
            stream.feed(tokens)
        if sequence.finished:
            stream.finish()
        return stream

    def stopped(self, sequence: TextSource) -> bool:
        """Whether a stop string stands in the text."""
        return self.read(sequence).stopped
