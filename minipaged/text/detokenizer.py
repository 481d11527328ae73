"""The text of every sequence beside its tokens, made when somebody reads it, and whether a stop string has ended it."""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

from minipaged.errors import RequestError
from minipaged.text.growing import TextStream


class TextCodec(Protocol):
    """Text to tokens and back."""

    @property
    def vocab_size(self) -> int:
        """Tokens that exist."""
        ...

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """The tokens of a prompt, or of a bare text without what the model wants around it."""
        ...

    def token_bytes(self, token: int, *, skip_special: bool = True) -> bytes:
        """The exact bytes of one token; b"" for a special token, unless those are wanted."""
        ...


class TextSource(Protocol):
    """What is read of a sequence to make its text."""

    request: Any  # with `params`
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
            token_bytes = self._codec.token_bytes
            stream = sequence.text_state = TextStream(
                token_bytes if params.skip_special_tokens else partial(token_bytes, skip_special=False),
                params.stop,
                min_tokens=params.min_tokens,
                keep_stop=params.include_stop_str_in_output,
            )
        tokens = sequence.text_token_ids(stream.consumed)
        if tokens:
            stream.feed(tokens)
        if sequence.finished:
            stream.finish()
        return stream

    def token_text(self, token: int) -> str:
        """What one token reads by itself, special ones too; bytes that make no character become U+FFFD."""
        return self._codec.token_bytes(token, skip_special=False).decode("utf-8", errors="replace")

    def special_tokens(self, texts: tuple[str, ...]) -> dict[int, str]:
        """Those of the texts that are a special token of the model, by its id: no text of an answer ever has them."""
        found: dict[int, str] = {}
        for text in texts:
            for token in self._encode(text):
                if self._codec.token_bytes(token, skip_special=False) == text.encode() and not self._codec.token_bytes(
                    token
                ):
                    found[token] = text
        return found

    def word_tokens(self, words: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        """Each word as tokens, and as those that it has behind a space where they are as many, and others (vLLM's rule for bad words)."""
        found: list[tuple[int, ...]] = []
        for word in words:
            bare, spaced = (tuple(self._encode(space + word.lstrip())) for space in ("", " "))
            found.append(bare)
            if len(spaced) == len(bare) and spaced[:1] != bare[:1]:
                found.append(spaced)
        return tuple(word for word in found if word)

    def _encode(self, text: str) -> list[int]:
        """The tokens of a bare text; none where there is no tokenizer but for ids."""
        try:
            return self._codec.encode(text, add_special=False)
        except RequestError:
            return []

    def stopped(self, sequence: TextSource) -> bool:
        """Whether a stop string stands in the text."""
        return self.read(sequence).stopped
